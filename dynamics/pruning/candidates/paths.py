"""The path of a layer's channels through a traced network, until something mixes them with others."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ...errors import first_line
from ...network.identities import Layer
from ...network.structure import is_scripted
from ...probing.activations import activations_stay
from ...probing.mode import mode_of
from .channels import (
    LAYERS,
    NORMALISATIONS,
    divides_by,
    does,
    flattens,
    is_depthwise,
    is_layer_of,
    is_sum,
    normalised_by,
    pads,
    pools,
    scales,
    shifts,
)


@dataclass
class ChannelPath:
    """The path of a layer's channels: modules and nodes they run through separately, and why they cannot be pruned."""

    modules: list[str] = field(default_factory=list)
    readers: dict[str, bool] = field(default_factory=dict)  # layer → whether the channels were flattened before it
    nodes: set[fx.Node] = field(default_factory=set)
    summed: bool = False
    refusal: str | None = None


class _Tracer(fx.Tracer):
    """Does not look into a layer that only inherits torch's forward pass, as it does not into torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        forward = [getattr(type(m), name, None) for name in ("forward", "_conv_forward", "_check_input_dim")]
        inherited = all(one is None or one.__module__.startswith("torch.nn.") for one in forward)
        known = isinstance(m, (*LAYERS, *NORMALISATIONS)) and inherited
        return known or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.Graph:
    """The model's graph in eval mode; arguments of ``forward`` with a number or string as default are fixed to that."""
    try:
        arguments = inspect.signature(model.forward).parameters.values()
        settings = {one.name: one.default for one in arguments if isinstance(one.default, bool | int | float | str)}
        with mode_of(model, "eval"), activations_stay():
            return _Tracer().trace(model, concrete_args=settings or None)
    except Exception as error:
        scripted = is_scripted(model)
        instead = "prune the module that was scripted" if scripted else "granularity='weight' needs no tracing"
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, which shows what belongs to a filter: "
            f"{first_line(error)}; {instead}"
        ) from error


def follow(model: nn.Module, node: fx.Node, layer: Layer, path: ChannelPath, *, flattened: bool = False) -> None:
    """Follow a layer's channels from a node on until something mixes them, and note the path."""
    filters = len(layer.weight)
    for user in node.users:
        normalisation = normalised_by(user, model)
        target: Any = normalisation or user.target  # the name of a module that is called, or a function
        module = model.get_submodule(target) if user.op == "call_module" or normalisation else None
        if is_depthwise(module) or isinstance(module, NORMALISATIONS):
            if (module.out_channels if is_depthwise(module) else module.num_features) != filters:
                continue  # channels were reshaped on the path, so they are not the layer's filters any more
            if isinstance(module, NORMALISATIONS) and module.weight is None:
                path.refusal = f"feeds into {target!r}, which has no γ and β: a silenced filter would not be silent"
            path.modules.append(target)
            path.nodes.add(user)
            follow(model, user, layer, path, flattened=flattened)
        elif is_sum(user):
            path.summed = True
        elif user.op != "output" and (effect := _effect(user, node, module, layer, flattened=flattened)) != "ends":
            if effect in ("lifts", "moves"):
                path.refusal = _lifted(model, user, node, layer) or path.refusal
            else:
                follow(model, user, layer, path, flattened=flattened or flattens(user, module))
        elif isinstance(module, LAYERS):
            path.readers[target] = flattened


def _lifted(model: nn.Module, user: fx.Node, node: fx.Node, layer: Layer) -> str | None:
    """Why a layer's channels cannot be pruned if their node has this user, by which they are moved or lifted, or none.

    Of channels that were moved it is not known which they are, so nothing is pruned with them.
    """
    waiting, seen = [(user, node)], set()
    while waiting:
        user, node = waiting.pop()
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        mixed = is_sum(user) or isinstance(module, LAYERS)
        stays = user.op == "output" or mixed or isinstance(module, NORMALISATIONS) or normalised_by(user, model)
        effect = "ends" if user in seen or stays else _effect(user, node, module, layer, flattened=True)
        seen.add(user)
        if effect == "lifts":
            what = user.target if isinstance(user.target, str) else user.target.__name__
            kind = f" ({type(module).__name__})" if module is not None else ""
            return f"feeds into {what!r}{kind}, through which a silenced filter may still have an effect"
        waiting += [(after, user) for after in user.users if effect != "ends"]
    return None


def _effect(user: fx.Node, node: fx.Node, module: nn.Module | None, layer: Layer, *, flattened: bool) -> str:
    """What the user of a node does to each of a layer's channels that come from there: see :func:`does`."""
    if pools(user, layer) or scales(user, node) or (not flattened and pads(user, layer)):
        return "alone"
    if (flattened or isinstance(layer, nn.Linear)) and shifts(module):
        return "ends"
    effect = "lifts" if divides_by(user, node) else does(user, module)
    of_others = user.all_input_nodes[0] is not node  # x.to(y) has x's channels
    return "ends" if of_others and effect in ("alone", "moves") else effect


def reads_each(layer: Layer, reader: Layer, *, flattened: bool) -> bool:
    """Whether each input channel of a reader, or group of flattened features, comes from one filter of the layer."""
    filters, inputs = len(layer.weight), reader.weight.shape[1]
    if flattened and not isinstance(layer, nn.Linear):
        return isinstance(reader, nn.Linear) and inputs % filters == 0
    kind = next(kind for kind in LAYERS if isinstance(layer, kind))
    return isinstance(reader, kind) and inputs == filters


def reaches_output(model: nn.Module, node: fx.Node, layer: nn.Module, weights: Collection[fx.Node]) -> bool:
    """Whether the result of a layer's node reaches the network's output without passing another layer."""
    waiting, seen = [(node, user, isinstance(layer, nn.Linear)) for user in node.users], set()
    while waiting:
        source, user, flattened = waiting.pop()
        if user in seen or is_layer_of(user, source, weights, flattened=flattened):
            continue
        seen.add(user)
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if user.op == "output":
            return True
        if not isinstance(module, LAYERS) or is_depthwise(module):
            waiting.extend((user, after, flattened or flattens(user, module)) for after in user.users)
    return False


def own_tensors(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that are made of the network's own tensors alone, in their order."""
    weights: dict[fx.Node, None] = {}
    for node in graph.nodes:
        made = bool(node.all_input_nodes) and all(one in weights for one in node.all_input_nodes)
        if node.op == "get_attr" or (made and node.op != "output"):
            weights[node] = None
    return weights
