"""The same training again, bit for bit: a GPU otherwise adds up gradients in whatever order its threads arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cudnn


@contextmanager
def reproducible() -> Iterator[None]:
    """Inside, cuDNN convolves by algorithms that give the same result each time, on the same machine.

    Rounding errors grow to other networks within an epoch. So without it runs of one seed, which are compared by their
    measures, would not be pruned from the same network.
    """
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before
