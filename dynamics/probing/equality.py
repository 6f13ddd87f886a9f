"""Equality of objects that hold numbers: tensors, arrays and states of random generators, in which NaN equals NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 2**20  # bytes compared at a time


def are_equal(one: Any, other: Any) -> bool:
    """Whether two numbers, tensors, arrays or generator states are equal; NaN equals NaN."""
    try:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
            return same and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            return one.dtype == other.dtype and one.shape == other.shape and _are_same_bytes(one, other)
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(are_equal(value, other[key]) for key, value in one.items())
        if isinstance(one, tuple) and isinstance(other, tuple):
            return len(one) == len(other) and all(map(are_equal, one, other))
        return type(one) is type(other) and bool(one == other or (one != one and other != other))
    except Exception:  # a type whose comparison fails
        return False


def _are_same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare arrays of one shape and type, a megabyte at a time because they may be large."""
    if not one.ndim or not one.size:
        return one.tobytes() == other.tobytes()
    rows = max(_AT_ONCE * len(one) // one.nbytes, 1)
    starts = range(0, len(one), rows)
    return all(one[start : start + rows].tobytes() == other[start : start + rows].tobytes() for start in starts)
