"""Full precision for what is measured: a GPU otherwise rounds the factors of float32 products to ten bits (TF32)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mkldnn

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # types of those that autocast
_lock, _undo, _inside = threading.Lock(), ExitStack(), 0


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 convolutions, recurrent layers and matrix products are computed in float32, whatever autocasts.

    PyTorch convolves in TF32 on a GPU unless told otherwise, with a rounding error of 2⁻¹¹ per factor, more than many a
    step's decrease of the loss. The setting is global to the program; it is restored when no thread is inside any more.
    """
    global _inside
    with _lock:
        if not _inside:
            _set()
        _inside += 1
    try:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, _DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _undo.close()


def _set() -> None:
    """Change the older and the newer settings: PyTorch keeps both, and some of its code checks that they agree."""
    convolving = [kind for kind in (cudnn.conv, cudnn.rnn) if kind.fp32_precision == "tf32"]
    multiplying = [cuda.matmul] if cuda.matmul.fp32_precision == "tf32" else []
    for kind in (cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.matmul):
        _undo.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
    with suppress(RuntimeError):  # they did not agree before
        if convolving:
            _undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
    with suppress(RuntimeError):
        if multiplying:
            _undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
    for kind in convolving + multiplying:
        kind.fp32_precision = "ieee"


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: with fewer digits, different sums become equal, or stop growing."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_precise(model: nn.Module, device: torch.device) -> bool:
    """Whether a forward pass that begins now is in float32 at least, as far as can be seen."""
    wrapped = any("_original_forward" in vars(module) for module in model.modules())  # Accelerate's autocasts
    on_gpu, on_cpu = (cudnn.conv, cudnn.rnn, cuda.matmul), (mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
    kinds = on_cpu if device.type == "cpu" else on_gpu
    rounds = any(kind.fp32_precision in ("tf32", "bf16") for kind in kinds)
    types = (one.dtype for one in model.parameters() if one.is_floating_point())
    single = all(torch.promote_types(one, torch.float32) == one for one in types)
    return single and not (wrapped or rounds or torch.is_autocast_enabled(device.type))
