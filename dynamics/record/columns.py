"""Rows to columns: tensors on the device are stacked there and copied to the host once per variable, asynchronously."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..float64 import widened

LONGEST_TEXT = 64
_COUNTS = ("step", "epoch", "event")

Value: TypeAlias = Tensor | np.ndarray | float | int | bool | str
Row = Mapping[Any, Value]  # by name or, where several names share a tensor, stacked first, by the tuple of them
Columns = dict[str, Tensor | np.ndarray]


def stack(rows: Iterable[Row]) -> tuple[Columns, list[torch.cuda.Event]]:
    """Name → values over the rows, NaN where a row lacks the name; they are in host memory once the events have passed.

    A variable keeps the type of its first block, so only step, epoch and event are integers: a 1 may be followed by ½.
    """
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    devices: set[torch.device] = set()
    stacked = {name: _to_host(_column(name, [row.get(name) for row in rows]), devices) for name in names}
    columns = dict(column for name, values in stacked.items() for column in _named(name, values))
    return columns, [torch.cuda.current_stream(device).record_event() for device in devices]


def arrays(columns: Columns) -> dict[str, np.ndarray]:
    """The columns as numpy arrays."""
    return {name: values if isinstance(values, np.ndarray) else values.numpy() for name, values in columns.items()}


def _named(name: str | tuple[str, ...], values: Tensor | np.ndarray) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    yield from [(name, values)] if isinstance(name, str) else zip(name, values.swapaxes(0, 1), strict=True)


def _column(name: str | tuple[str, ...], values: list[Value | None]) -> Tensor | np.ndarray:
    given = [value for value in values if value is not None]
    sample = next((value for value in given if isinstance(value, Tensor)), given[0])
    if isinstance(sample, str):
        return np.array([value or "" for value in values], dtype=f"<U{LONGEST_TEXT}")
    if isinstance(sample, np.ndarray):
        return np.stack([np.full_like(sample, np.nan) if value is None else value for value in values])
    if not isinstance(sample, Tensor):
        whole = np.int64 if name in _COUNTS else np.float64
        return np.array([np.nan if value is None else value for value in values], whole)
    if sample.dtype in (torch.float16, torch.bfloat16):  # numpy has no bfloat16
        sample = sample.float()
    elif not sample.ndim and not sample.is_floating_point():
        sample = widened(sample)
    return torch.stack([_like(sample, float("nan") if value is None else value) for value in values])


def _like(sample: Tensor, value: Value) -> Tensor:
    """The value as a tensor like the sample; a number is filled in on the device, because copying it would wait."""
    return value.to(sample) if isinstance(value, Tensor) else torch.full_like(sample, float(value))


def _to_host(column: Tensor | np.ndarray, devices: set[torch.device]) -> Tensor | np.ndarray:
    if isinstance(column, np.ndarray) or not column.is_cuda:
        return column if isinstance(column, np.ndarray) else column.cpu()
    devices.add(column.device)
    return torch.empty_like(column, device="cpu", pin_memory=True).copy_(column, non_blocking=True)
