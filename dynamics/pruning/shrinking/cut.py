"""A cut: what can be removed from a network without changing what it computes, tried and checked on a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import one_line
from ...float64 import has_float64
from ...hardware.precision import precise
from ...hardware.random_numbers import random_numbers_untouched
from ...network.identities import is_layer
from ...probing.batch import mapped
from ..call import call
from .coupling import dependency_graph, plan, silent_units

_OUTPUT = "the output"


@dataclass(frozen=True)
class Cut:
    """How a network gets smaller.

    ``kept`` holds, for each parameter and buffer that changes, the entries that stay: an array in the new shape of flat
    indices into the old one. ``sizes`` holds the modules' attributes that change, such as ``out_channels``.
    """

    kept: dict[str, Tensor]
    sizes: dict[str, dict[str, int]]


def find_cut(model: nn.Module, inputs: Any) -> Cut:
    """Find what can be cut from the model, which is left as it is. At least one unit of every layer stays.

    The cut is tried on a copy in float32 at least: with fewer digits the check could not tell a wrong network apart.

    Raises:
        ModuleNotFoundError: torch-pruning is not installed.
        ValueError: the model does not run on the inputs, or contains something that cannot be cut safely.
    """
    small, inputs = _bare_copy(model), mapped(inputs, lambda one: precise(one) if one.is_floating_point() else one)
    before = _run(small, inputs, "the model does not run on the inputs: pass shrink() inputs that it takes")
    graph = dependency_graph(small, inputs)
    sizes = {name: _sizes(module) for name, module in small.named_modules()}
    device = next(model.parameters()).device
    on_host = not has_float64(device)  # which holds every index; a model over several devices has it on all
    kept = _carry_out(plan(graph, silent_units(model)), small.cpu() if on_host else small)
    _check_shared(model, kept)
    values = dict(_floating(model))
    for name, tensor in _floating(small):
        value = precise(values[name].detach()).to(tensor.device)
        tensor.data = take(value, kept[name]) if name in kept else value.clone()
    if on_host:
        small.to(device)
    after = _run(
        small, inputs, "the smaller network does not run: its code may contain a fixed number of channels",
        "the smaller network does not run in training mode: shrink() does not follow what runs only there; remove it "
        "first if it is an auxiliary head",
    )  # fmt: skip
    rows = {
        name.removesuffix(".weight"): rows_left(index, values[name]) for name, index in kept.items() if index.ndim > 1
    }
    _check_alike(before, after, rows)
    return Cut(kept, {name: _changed(sizes[name], _sizes(module)) for name, module in small.named_modules()})


def take(tensor: Tensor, kept: Tensor) -> Tensor:
    """Entries of a tensor at flat indices, in the indices' shape and the tensor's memory format."""
    taken = tensor.detach().flatten()[kept.to(tensor.device)]
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    return taken.contiguous(memory_format=torch.channels_last) if channels_last else taken


def rows_left(kept: Tensor, old: Tensor) -> Tensor:
    """Indices of the rows that are left of ``old``, a matrix or filter bank, (row,), from the flat indices ``kept``."""
    return kept.flatten(1)[:, 0] // old[0].numel()


def _bare_copy(model: nn.Module) -> nn.Module:
    """A copy without hooks, in which all parameters require gradients: torch-pruning finds the graph by autograd."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in twin.modules():
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            module.weight.requires_grad_(False)  # one slope for all channels, which the graph would take for a branch
    for _, tensor in _floating(twin):
        tensor.data = precise(tensor.data)
    return twin


def _carry_out(cuts: list[tuple[Callable, list[int]]], small: nn.Module) -> dict[str, Tensor]:
    """Cut the copy, with its entries first set to their own flat indices; returns those left in each changed tensor."""
    shapes = {name: tensor.shape for name, tensor in _floating(small)}
    with torch.no_grad():
        for _, tensor in _floating(small):
            index = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
            tensor.data = index.view(tensor.shape)
        for cut, indices in cuts:
            cut(indices)
    return {name: tensor.detach().long() for name, tensor in _floating(small) if tensor.shape != shapes[name]}


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers, by name; one that has several names, under each."""
    for listed in (model.named_parameters, model.named_buffers):
        yield from ((name, one) for name, one in listed(remove_duplicate=False) if one.is_floating_point())


def _check_shared(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(name in kept for name in shared):
            raise ValueError(
                f"{' and '.join(shared)} are one parameter, which cannot shrink in one place only: give each its "
                "own first"
            )


def _sizes(module: nn.Module) -> dict[str, int]:
    return {key: value for key, value in vars(module).items() if type(value) is int}


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in after.items() if before[key] != value}


def _run(model: nn.Module, inputs: Any, otherwise: str, in_training: str = "") -> dict[str, list[Tensor]]:
    """Outputs in eval mode of each layer, by name and in the order of its calls, and of the model.

    The model has to run in training mode, too, where it may call more of its modules.
    """
    outputs: dict[str, list[Tensor]] = {}
    try:
        with torch.no_grad(), random_numbers_untouched(next(model.parameters()).device):
            with _noted(model, outputs):
                outputs[_OUTPUT] = list(_tensors(call(model.eval(), inputs)))
            # last: it changes running statistics, with dropout by numbers that depend on sizes
            call(model.train(), inputs)
            model.eval()
    except Exception as error:
        reason = one_line(error)[:200]
        otherwise = in_training if in_training and model.training else otherwise
        raise ValueError(f"{otherwise} ({type(error).__name__}: {reason})") from error
    return outputs


@contextmanager
def _noted(model: nn.Module, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Inside, each layer's outputs are appended to ``outputs``, by the layer's name."""

    def note(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if is_layer(module):
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        yield


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for one in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(one)


def _check_alike(
    before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]], rows: Mapping[str, Tensor]
) -> None:
    """Raise ValueError if the model, or a layer in the units left (``rows``), has other outputs than before."""
    for name, outputs in before.items():
        for one, other in zip(outputs, after[name], strict=True):
            if one.shape != other.shape and name in rows:
                dim = next(dim for dim, size in enumerate(one.shape) if size != other.shape[dim])
                one = one.index_select(dim, rows[name])
            if not _alike(one, other):
                where = name if name == _OUTPUT else f"layer {name!r}"
                raise ValueError(
                    f"the smaller network computes something else than the masked one, first in {where}: before it, "
                    "channels are shifted or rearranged in a way that cannot be followed. The model is left as it was"
                )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs agree in half their digits: rounding changes far fewer, a wrong channel far more."""
    if one.shape != other.shape:
        return False
    rtol = torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() else 0.0
    largest = one.abs().nan_to_num(0, 0).max().item()  # finite values only: a network may have diverged
    return torch.allclose(one, other, rtol=rtol, atol=rtol * largest, equal_nan=True)
