"""Full precision for what is measured: a GPU otherwise rounds the factors of float32 products to ten bits (TF32)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.backends import cuda, cudnn


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 convolutions, recurrent layers and matrix products on a GPU are computed in float32.

    PyTorch convolves in TF32 unless told otherwise, with rounding errors of 2⁻¹¹ a factor: more than many a step's
    decrease of the loss. On a processor nothing changes.
    """
    with ExitStack() as stack:
        _set_for_now(stack, cudnn, [cudnn.conv, cudnn.rnn])
        _set_for_now(stack, cuda.matmul, [cuda.matmul])
        yield


def _set_for_now(stack: ExitStack, library: Any, kinds: Sequence[Any]) -> None:
    """PyTorch keeps the setting twice, by an older and by newer names, and some of its code asks whether they agree."""
    precisions = [kind.fp32_precision for kind in kinds]
    if "tf32" not in precisions:
        return
    for kind, precision in zip(kinds, precisions, strict=True):
        stack.callback(setattr, kind, "fp32_precision", precision)
    try:
        stack.callback(setattr, library, "allow_tf32", library.allow_tf32)
        library.allow_tf32 = False
    except RuntimeError:  # they did not agree before
        pass
    for kind in kinds:
        kind.fp32_precision = "ieee"
