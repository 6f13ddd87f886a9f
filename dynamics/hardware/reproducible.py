"""Makes a training repeatable bit for bit: a GPU otherwise sums gradients in whatever order its threads arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cudnn


@contextmanager
def reproducible() -> Iterator[None]:
    """Inside, cuDNN convolves by algorithms that give the same result each time, on the same machine.

    Otherwise rounding differences grow into different networks within an epoch, and runs of one seed, whose measures
    are compared, would not be pruned from the same network.
    """
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before
