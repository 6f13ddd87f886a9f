"""Coupling: which slices of a network's parameters are removed together, by torch-pruning's dependency graph.

A channel can be removed if everything that writes to it is silenced. Whatever reads it then reads only zeros, so the
slices of weights that read it are removed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import named
from ...network.identities import is_layer
from ...network.masks import parameter_masks
from ...probing.batch import mapped
from ..call import call
from ..candidates.channels import NORMALISATIONS, is_depthwise

_POOLINGS = [f"{kind}Pool{dims}D" for kind in ("Avg", "AdaptiveAvg", "MkldnnAdaptiveAvg") for dims in (1, 2, 3)]
_ACTIVATIONS = ["Relu", "LeakyRelu", "RreluWithNoise", "Hardtanh", "Elu", "Celu", "Gelu", "Silu", "Mish", "Hardswish"]
_ACTIVATIONS += ["Tanh", "Abs", "Softshrink", "Hardshrink"]
_OTHERS = [
    "Add", "Sub", "Mul", "Div", "Neg", "Mean", "Sum", "Squeeze", "Unsqueeze", "Clone", "NativeDropout", "ConstantPadNd",
]  # fmt: skip
_OTHERS += [f"{kind}Pool{dims}DWithIndices" for kind in ("Max", "AdaptiveMax") for dims in (2, 3)]
_OTHERS += ["AdaptiveMaxPool2D", "AdaptiveMaxPool3D", *(f"UpsampleNearest{dims}D" for dims in (1, 2, 3))]
_OTHERS += ["UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleTrilinear3D"]
# Operations that treat every channel alike and map 0 to 0: autograd's names without the number at the end.
CHANNELWISE = frozenset(f"{name}Backward" for name in (*_POOLINGS, *_ACTIVATIONS, *_OTHERS))
_SUMS = ("AddBackward", "SubBackward")
_VIEWS = frozenset(f"{name}Backward" for name in ("View", "UnsafeView", "Expand", "Permute", "Transpose", "T"))
# These treat every channel alike, but do not map 0 to 0: what reads their results does not read zeros.
_LIFTING = frozenset(f"{name}Backward" for name in ("Sigmoid", "Hardsigmoid", "Softplus", "Exp"))


def dependency_graph(model: nn.Module, inputs: Any) -> Any:
    """torch-pruning's dependency graph, for which it runs the model, a copy, on the inputs, in eval mode.

    Its parameters become contiguous: in channels-last format a global average ends in a view that is not known.

    Raises:
        ModuleNotFoundError: torch-pruning is not installed.
        ValueError: torch-pruning fails on the model.
    """
    tools, inputs = _torch_pruning(), mapped(inputs, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    try:
        return tools.DependencyGraph().build_dependency(model, inputs, forward_fn=call, verbose=False)
    except Exception as error:
        raise ValueError(f"torch-pruning cannot follow the channels of {type(model).__name__}: {error}") from error


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        text = "shrink() needs torch-pruning, which is not installed: pip install torch-pruning"
        raise ModuleNotFoundError(text, name="torch_pruning") from error
    return torch_pruning


def silent_units(model: nn.Module) -> dict[str, Tensor]:
    """Outputs of each layer and normalisation whose parameters are all pruned, boolean (output,), by module name."""
    masks = parameter_masks(model)
    silent = {}
    for name, module in model.named_modules():
        if is_layer(module) or isinstance(module, NORMALISATIONS):
            prefix = f"{name}." if name else ""
            leaves = [f"{prefix}{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            pruned = [~masks[leaf].reshape(len(masks[leaf]), -1).any(1) if leaf in masks else None for leaf in leaves]
            if pruned and all(one is not None for one in pruned):
                silent[name] = torch.stack(pruned).all(0).cpu()
    return silent


def plan(graph: Any, silent: Mapping[str, Tensor]) -> list[tuple[Callable, list[int]]]:
    """torch-pruning's cuts, each a dependency with all the indices that it removes, counted before any cut."""
    cuts: dict[tuple[nn.Module, Callable], tuple[Callable, set[int]]] = {}
    layers = [(name, graph.model.get_submodule(name)) for name in silent]
    for name, module in layers:
        if is_layer(module) and module in graph.module2node and silent[name].any():
            for dependency, indices in _removable(graph, name, module, silent):
                key = (dependency.target.module, dependency.handler)
                cuts.setdefault(key, (dependency, set()))[1].update(indices)
    return [(cut, sorted(indices)) for cut, indices in cuts.values()]


def _removable(graph: Any, name: str, module: nn.Module, silent: Mapping[str, Tensor]) -> Any:
    """The group of cuts that removes as many of a layer's silenced units as possible; empty if none can be removed."""
    units = silent[name].nonzero().flatten().tolist()
    units = units[len(units) == len(silent[name]) :]  # a layer keeps one unit, even if all are silenced
    while units:
        group = _group(graph, name, module, units)
        _check_known(graph, group, name, CHANNELWISE | _LIFTING)
        staying = {root for item in group.items for root in _staying(graph, item, silent)}
        if not staying:
            _check_known(graph, group, name, CHANNELWISE)
            return group.items
        units = [unit for unit in units if unit not in staying]
    return []


def _group(graph: Any, name: str, module: nn.Module, units: list[int]) -> Any:
    try:
        return graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, units)
    except Exception as error:  # it cannot follow channels that are split twice, for example
        raise ValueError(
            f"torch-pruning cannot follow the channels of layer {name!r}: {named(error)}. The model is left as it was"
        ) from error


def _staying(graph: Any, item: Any, silent: Mapping[str, Tensor]) -> Iterator[int]:
    """Units that must stay because this member of their group is the network's output, or writes to them unsilenced."""
    node, puts_out = item.dep.target, graph.is_out_channel_pruning_fn(item.dep.handler)
    if puts_out and not node.outputs:
        yield from item.root_idxs
    elif puts_out and node.module in graph._module2name and not isinstance(node.module, nn.PReLU):
        gone = silent.get(graph._module2name[node.module], torch.empty(0))
        yield from (
            root for index, root in zip(item.idxs, item.root_idxs, strict=True) if index >= len(gone) or not gone[index]
        )


def _check_known(graph: Any, group: Any, name: str, operations: Set[str]) -> None:
    """Raise ValueError if a layer's channels meet something that may mix, move or shift them."""
    for dependency, _ in group.items:
        met, known = _met(graph, dependency.target, operations)
        if not known:
            raise ValueError(
                f"the silenced filters of layer {name!r} feed into {met}, where shrink() cannot tell what becomes "
                f"of a channel: to shrink the others, prune with protected=({name!r},). The model is left as it was"
            )


def _met(graph: Any, node: Any, operations: Set[str]) -> tuple[str, bool]:
    """The parameter, module or operation at a node of the graph, and whether it is known to keep channels separate."""
    module = node.module
    if isinstance(module, nn.Parameter):
        return f"the parameter {graph._param_to_name[module]!r}", False
    if module in graph._module2name:
        plain = is_layer(module) and (getattr(module, "groups", 1) == 1 or is_depthwise(module))
        known = plain or isinstance(module, (*NORMALISATIONS, nn.PReLU))
        return f"{graph._module2name[module]!r} ({module})", known
    operation = getattr(module, "_grad_fn", type(module).__name__.strip("_"))
    sums = () if operations >= _LIFTING else _SUMS  # a shift lifts, too
    shifts = [_shift(operand) for operand in _operands(node.grad_fn)] if _kind(operation) in sums else []
    if (shift := next((one for one in shifts if one is not None), None)) is not None:
        name = next((name for name, parameter in graph.model.named_parameters() if parameter is shift), "of the model")
        return f"a sum with the parameter {name!r}", False
    known = operation in ("ConcatOp", "ReshapeOp", "OutputOp") or _kind(operation) in operations
    return operation, known or _is_within_a_module(graph, node, _kind(operation))


def _kind(operation: str) -> str:
    """Autograd's name of an operation without the number at its end."""
    return operation.rstrip("0123456789")


def _operands(function: Any) -> list[Any]:
    """The functions whose results autograd's function takes; what needs no gradient has none."""
    return [operand for operand, _ in function.next_functions if operand is not None]


def _shift(function: Any) -> Tensor | None:
    """A parameter of which this is made, and of nothing else that was trained; None if there is other."""
    if hasattr(function, "variable"):
        return function.variable
    operands = _operands(function) if _kind(function.name()) in CHANNELWISE | _VIEWS else []
    parameters = [_shift(operand) for operand in operands]
    return None if any(one is None for one in parameters) else next(iter(parameters), None)


def _is_within_a_module(graph: Any, node: Any, kind: str) -> bool:
    """Whether an operation is part of a linear layer or BatchNorm in the graph, but not its last one.

    A linear layer transposes its weight, and may view its result; a BatchNorm of its own code may end in an activation.
    """
    if kind in ("AddmmBackward", "MmBackward"):
        readers = [one for one in node.outputs if node.grad_fn in _operands(one.grad_fn)]
        return any(isinstance(one.module, nn.Linear) and "View" in one.grad_fn.name() for one in readers)
    if kind in ("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward"):
        own = {id(module.weight) for module in graph.module2node if isinstance(module, NORMALISATIONS)}
        return any(id(getattr(operand, "variable", None)) in own for operand in _operands(node.grad_fn))
    return kind == "TBackward" and not node.inputs
