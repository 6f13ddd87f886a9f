"""The record on disk: rows appended to a plain Zarr directory that plain xarray opens, also while it is written.

Readers take every shape from the consolidated metadata, one file that is replaced by one atomic rename. So an append
first writes the chunks, then the arrays' own shapes, and :meth:`Store.commit` at last lets readers see them; what a
killed writer left half done lies beyond the committed shapes and stays invisible.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .schema import NODES, QUANTITIES

_CHUNK_ROWS = {"steps": 2048, "curvature": 2048, "pruning": 16, "units": 1, "epochs": 256}


class Store:
    """A new record at ``path``. One writer.

    Raises:
        FileExistsError: something is at ``path`` already. Nothing of it is touched.
        OSError: the folder cannot be created.
    """

    def __init__(self, path: str | os.PathLike, attributes: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already: choose another path, or remove it first")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sibling = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}")
        root = zarr.create_group(str(sibling), zarr_format=2, attributes=dict(attributes))
        for node in NODES:
            root.create_group(node)
        zarr.consolidate_metadata(str(sibling), zarr_format=2)
        try:
            sibling.rename(self.path)
        except OSError as error:
            shutil.rmtree(sibling, ignore_errors=True)
            raise FileExistsError(f"{self.path} exists already: choose another path, or remove it first") from error
        self._root = zarr.open_group(str(self.path), mode="r+", zarr_format=2, use_consolidated=False)
        self._coordinates: dict[tuple[str, str], np.ndarray] = {}
        self._length = dict.fromkeys(NODES, 0)
        self._open: dict[str, dict[str, np.ndarray]] = {node: {} for node in NODES}

    def write_coordinate(self, node: str, name: str, dim: str, values: np.ndarray) -> None:
        """Write a coordinate that does not grow, e.g. the layers' names. One that is there already stays.

        Raises:
            ValueError: it is there with other values.
        """
        if (node, name) in self._coordinates:
            if not np.array_equal(self._coordinates[node, name], values):
                raise ValueError(
                    f"coordinate {name!r} of /{node} changed; a record's {dim}s are fixed at their first use"
                )
            return
        array = self._root[node].create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(max(len(values), 1),), fill_value=None, overwrite=True
        )
        array.attrs["_ARRAY_DIMENSIONS"] = [dim]
        array[...] = values
        self._declare_coordinates(node)
        self._coordinates[node, name] = values

    def append(self, node: str, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows to a node: name → values whose first dimension is the node's index. Invisible until commit.

        A variable that is new or absent this time is missing (NaN) in the rows that do not have it.
        """
        start, chunk = self._length[node], _CHUNK_ROWS[node]
        length = start + len(next(iter(rows.values())))
        open_start = start - start % chunk
        still_open = {}
        for name in self._open[node].keys() | rows.keys():
            block = np.asarray(rows[name]) if name in rows else None
            values = self._extended(node, name, block, start - open_start, length - open_start)
            self._write(node, name, values, open_start, length, chunk)
            still_open[name] = values[(length - length % chunk) - open_start :]
        # Only now: after a failure half way, the same append can be tried again.
        self._open[node], self._length[node] = still_open, length

    def commit(self) -> None:
        """Let readers see all that was appended, at once."""
        zarr.consolidate_metadata(str(self.path), zarr_format=2)

    def _extended(self, node: str, name: str, block: np.ndarray | None, opened: int, length: int) -> np.ndarray:
        """The open chunk's rows of a variable with the new block behind them; missing where there are none."""
        kept = self._open[node].get(name)
        sample = block if block is not None else kept
        values = np.full((length, *sample.shape[1:]), _missing(sample.dtype), dtype=sample.dtype)
        if kept is not None:
            values[:opened] = kept
        if block is not None:
            values[opened:] = block
        return values

    def _write(self, node: str, name: str, values: np.ndarray, start: int, length: int, chunk: int) -> None:
        """Write whole chunks: the array is widened to a multiple of the chunk, so that no chunk is read back."""
        group = self._root[node]
        if name not in self._open[node]:  # new, or left half made by an append that failed
            array = group.create_array(
                name, shape=(0, *values.shape[1:]), dtype=values.dtype, chunks=(chunk, *values.shape[1:]),
                fill_value=_missing(values.dtype) if values.dtype.kind == "f" else None, overwrite=True,
            )  # fmt: skip
            row = QUANTITIES.get(name)
            array.attrs.update(row.attributes if row else {})
            array.attrs["_ARRAY_DIMENSIONS"] = list(_dims(node, name))
            self._declare_coordinates(node)
        array = group[name]
        whole = -(-length // chunk) * chunk
        padded = np.full((whole - start, *values.shape[1:]), _missing(values.dtype), dtype=values.dtype)
        padded[: length - start] = values
        array.resize((whole, *values.shape[1:]))
        array[start:] = padded
        array.resize((length, *values.shape[1:]))

    def _declare_coordinates(self, node: str) -> None:
        """Tell xarray which variables of the node are coordinates without being dimensions (CF's way)."""
        group = self._root[node]
        names = sorted(name for name in _LABELS.get(node, ()) if name in group)
        if names:
            group.attrs["coordinates"] = " ".join(names)


_LABELS = {"units": ("layer", "index")}


def _dims(node: str, name: str) -> tuple[str, ...]:
    if name in QUANTITIES and node in QUANTITIES[name].nodes:
        return QUANTITIES[name].dims(node)
    return (NODES[node][0],)


def _missing(dtype: np.dtype) -> Any:
    return np.nan if dtype.kind == "f" else np.zeros((), dtype).item()
