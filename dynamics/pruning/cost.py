"""The cost of a pruned network: its parameters and multiply-adds, as if silent channels had been removed.

Multiply-adds are those of one sample, as torch's own counter sees them (half its FLOPs: convolutions, linear layers,
matrix products; no normalisations, activations or sums). The count of a convolution or linear layer is scaled by the
share of its weights that are kept and read a channel that is not silent: neither a silenced filter counts, nor the
weights that would have read it. A channel is silent if only silenced filters feed it: a channel of a residual stream
counts if any filter that adds to it is left. Parameters are those weights, and all kept parameters of other kinds.

Filters that are masked but still in memory save no time: this is the cost of what is left, not how fast it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..float64 import widened, widest
from ..hardware.random_numbers import random_numbers_untouched
from ..network.exchanged import exchanged
from ..network.identities import layer_named
from ..network.masks import parameter_masks
from ..network.parameter_names import plain_names
from ..network.wrappers import unwrap
from ..probing.mode import mode_of
from .candidates.channels import LAYERS, NORMALISATIONS
from .candidates.weights import weight_of, weights_reading

_OF_INSTANCES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_OF_SAMPLES = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, *_OF_INSTANCES)


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of one sample."""

    parameters: int
    multiply_adds: int


@torch.no_grad()
def network_cost(model: nn.Module, shape: Sequence[int], keep: Mapping[str, Tensor] | None = None) -> Cost:
    """The cost of a model for inputs of ``shape`` (without the batch dimension), given its pruning masks.

    ``keep`` maps parameter names to masks that replace the model's. Silent channels are found by running a sample of
    ones through a copy in which kept weights are positive and pruned ones zero, so that hardly anything but pruning
    makes a channel zero; one that is zero even without masks does not count as silent.
    """
    model = unwrap(model)
    keep = dict(parameter_masks(model) if keep is None else keep)
    with _reading(model) as read, random_numbers_untouched(next(model.parameters()).device), mode_of(model, "eval"):
        counts = _count(model, shape, _silence(model, {}))
        whole = dict(read)
        if keep:
            read.clear()
            _count(model, shape, _silence(model, keep))
    total: float = counts[""]
    parameters, layers = 0, {weight_of(layer): layer for layer in read}
    named = dict(model.named_parameters())
    for (name, parameter), plain in zip(named.items(), plain_names(named).values(), strict=True):
        kept = keep.get(name, torch.ones((), dtype=torch.bool, device=parameter.device)).expand_as(parameter)
        layer = layers.get(plain)
        if layer is not None and parameter.shape == layer_named(model, layer).weight.shape:
            kept = kept & weights_reading(layer_named(model, layer), read[layer] | ~whole[layer])
            total -= counts[layer] * (1 - kept.sum().item() / kept.numel())
        parameters += int(kept.sum())
    return Cost(parameters, round(total / 2))


def _silence(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that show silent channels: weights average what is kept, and BatchNorm changes nothing."""
    values = {name: widened(tensor) for name, tensor in model.named_buffers() if tensor.is_floating_point()}
    for name, parameter in model.named_parameters():
        kept = widened(keep[name] if name in keep else torch.ones_like(parameter))
        values[name] = kept * (len(kept) / max(kept.numel(), 1)) if kept.ndim > 1 else kept
        if name.endswith("_orig"):  # torch.nn.utils.prune keeps its mask as a buffer
            values[f"{name.removesuffix('_orig')}_mask"] = torch.ones_like(kept)
    for name, module in model.named_modules():
        if isinstance(module, NORMALISATIONS) and module.running_mean is not None:
            values[f"{name}.running_mean"] = widened(torch.zeros_like(module.running_mean))
            values[f"{name}.running_var"] = widened(torch.ones_like(module.running_var))
    return values


@contextmanager
def _reading(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields layer → which of its input channels are not silent, (channel,); a forward pass inside fills it in.

    In that pass each layer gets ones in place of all nonzero inputs, so that its outputs are positive.
    """
    read: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        channels_at = inputs[0].ndim - 1 if isinstance(module, nn.Linear) else 1
        given = inputs[0] != 0
        alive = given.movedim(channels_at, 0).flatten(1).any(1)
        read[name] = read[name] | alive if name in read else alive
        return given.to(inputs[0]), *inputs[1:]

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
            elif isinstance(module, _OF_SAMPLES):
                hooks.enter_context(module.register_forward_hook(_normalised))
        yield read


def _normalised(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Replaces the output of a normalisation over single samples, which would turn equal inputs into zeros.

    After it a silent channel is shifted by the mean of others, or by the bias, and so is not silent any more, unless
    the normalisation only scales.
    """
    alone = isinstance(module, nn.RMSNorm) or (isinstance(module, _OF_INSTANCES) and not module.affine)
    return inputs[0] if alone else torch.ones_like(inputs[0])


def _count(model: nn.Module, shape: Sequence[int], values: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs of a sample by the first name of each module, which may occur in several places; under "" the total."""
    device = next(model.parameters()).device
    ones = torch.ones(1, *shape, dtype=widest(device), device=device)
    names = {module: name for name, module in model.named_modules()}
    with _plain_attention(), FlopCounterMode(display=False) as counter, exchanged(model, values):
        model(ones)
    root, counts = f"{type(model).__name__}.", dict.fromkeys(names.values(), 0)
    by_place = {name.removeprefix(root): sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    for place, module in model.named_modules(remove_duplicate=False):
        counts[names[module]] += by_place.get(place or "Global", 0)
    return counts


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Inside, attention consists of matrix products, which the counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
