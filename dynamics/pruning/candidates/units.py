"""Units: the filters that pruning may remove, and the parameters that are pruned with each of them.

A filter's channel stays separate through normalisations, activations, pooling and depthwise convolutions until another
convolution, a linear layer or a sum mixes it with others. All parameters on that way are pruned with the filter: its
bias, its normalisation's γ and β, and the depthwise layer's filter with its own normalisation. Neurons of a linear
layer count as filters, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from ...errors import first_line
from ...network.masks import filters_left
from ...network.structure import check_initialised, check_whole
from ...probing.activations import activations_stay
from ...probing.mode import mode_of
from .channels import (
    CONVOLUTIONS,
    LAYERS,
    NORMALISATIONS,
    TRANSPOSED,
    does,
    is_about,
    is_depthwise,
    is_layer_of,
    is_sum,
    lays_out,
    pads,
    pools,
    scales,
    shifts,
)
from .weights import LEAVE, not_plain, weight_layers, weight_of, weights_reading, within


@dataclass(frozen=True)
class UnitLayer:
    """A layer whose filters are ranked; ``modules``: itself first, then those that only its channels run through.

    ``copies`` counts the depthwise ones among them. ``summed`` says whether the channels end in a sum with others, and
    ``head`` whether they may be the network's output, from which nothing is pruned. ``readers`` are the layers that
    read these channels and no others.
    """

    name: str
    filters: int
    modules: tuple[str, ...]
    copies: int = 0
    summed: bool = False
    head: bool = False
    readers: tuple[str, ...] = ()

    def parameter_names(self, model: nn.Module) -> list[str]:
        """Names of all parameters of its modules; their first dimension is the filter."""
        named = ((module, model.get_submodule(module)) for module in self.modules)
        return [f"{module}.{leaf}" for module, owner in named for leaf, _ in owner.named_parameters(recurse=False)]

    def normalisation(self, model: nn.Module) -> str | None:
        """Name of the first normalisation after the layer, if there is one."""
        return next((name for name in self.modules if isinstance(model.get_submodule(name), NORMALISATIONS)), None)


@dataclass
class _Way:
    """The way of a layer's channels: modules and nodes they run through separately, and why they cannot be pruned."""

    modules: list[str] = field(default_factory=list)
    readers: dict[str, bool] = field(default_factory=dict)  # layer → whether the channels were flattened before it
    nodes: set[fx.Node] = field(default_factory=set)
    summed: bool = False
    refusal: str | None = None


def unit_layers(model: nn.Module, protected: Iterable[str] = ()) -> list[UnitLayer]:
    """The ranked layers of a model in the order of its modules, found by tracing it symbolically in eval mode.

    These are its convolutions, and those linear layers that are not its output. Depthwise convolutions are not ranked:
    their filters go with those of the layer that feeds them. Layers in ``protected`` are left out.

    Raises:
        ValueError: the model cannot be traced, has nothing to prune, ``protected`` names no layer of it, or a layer
            cannot be pruned safely: one with groups, a transposed one, one whose weight is shared, computed from others
            or used by the model's own code, or one whose channels run into what would not be silent for a silenced
            filter (a sigmoid, a normalisation other than BatchNorm, a BatchNorm without γ and β or one shared with
            other channels), or that is inside a module which tracing does not open (torch's TransformerEncoder).
    """
    check_initialised(model)
    check_whole(model, "prune")
    protected = within(model, protected)
    graph = _traced(model)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    weights = _weights(graph)
    taken = {
        node.target: node
        for node in weights
        if node.op == "get_attr" and not all(is_about(user, node) for user in node.users)
    }
    layers, refusals = [], []
    for name, module in model.named_modules():
        by_itself = taken.get(weight_of(name)) if name else None
        if not isinstance(module, LAYERS) or name in protected or not (name in calls or by_itself):
            continue
        head = any(_reaches_output(model, node, module, weights) for node in calls.get(name, [by_itself]))
        if head and (isinstance(module, nn.Linear) or name not in calls):
            continue
        if by_itself:
            refusals.append(
                f"layer {name!r} has a weight that the model's own code uses: what goes with it is not known"
            )
            continue
        if is_depthwise(module):
            continue
        way = _Way()
        for node in calls[name]:
            _follow(model, node, module, way)
        for shared in (one for one in way.modules if not way.nodes.issuperset(calls[one])):
            way.refusal = f"feeds into {shared!r}, and so do other channels"
        if refusal := _refusal(model, name, module) or (None if head else way.refusal):
            refusals.append(f"layer {name!r} {refusal}")
            continue
        modules = tuple(dict.fromkeys([name, *way.modules]))
        copies = sum(is_depthwise(model.get_submodule(one)) for one in modules)
        readers = tuple(
            reader
            for reader, laid_out in way.readers.items()
            if len(calls[reader]) == 1 and _reads_each(module, model.get_submodule(reader), laid_out=laid_out)
        )
        layers.append(UnitLayer(name, len(module.weight), modules, copies, way.summed, head, readers))
    refusals += _unseen(model, calls, protected)
    if refusals:
        raise ValueError(f"{'; '.join(refusals)}; {LEAVE}")
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no convolution or hidden linear layer whose filters could be pruned"
        )
    return layers


def units_of(model: nn.Module, granularity: str, protected: Iterable[str] = ()) -> dict[str, UnitLayer | None]:
    """Layer → its :class:`UnitLayer`; if single weights are pruned, None for each of :func:`weight_layers`."""
    if granularity == "weight":
        return dict.fromkeys(weight_layers(model, protected))
    return {layer.name: layer for layer in unit_layers(model, protected)}


def filter_coordinates(layers: Iterable[UnitLayer]) -> dict[str, tuple[str, list]]:
    """Layer and index of each filter, along the dimension ``unit`` of a study of all of them."""
    filters = [(layer.name, index) for layer in layers for index in range(layer.filters)]
    return {"layer": ("unit", [name for name, _ in filters]), "index": ("unit", [index for _, index in filters])}


def masks_of(
    model: nn.Module, layers: Mapping[str, UnitLayer | None], alive: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameter name → which of its entries are kept, given which units of each layer are ``alive``.

    ``layers`` says what is pruned with a layer's filters; if None, its units are single weights, in the weight's shape.
    """
    masks = {}
    for name, kept in alive.items():
        layer = layers[name]
        for owned in [weight_of(name)] if layer is None else layer.parameter_names(model):
            parameter = model.get_parameter(owned)
            per_unit = kept.to(parameter.device).view(*kept.shape, *[1] * (parameter.ndim - kept.ndim))
            mask = per_unit.expand_as(parameter)
            masks[owned] = masks[owned] & mask if owned in masks else mask  # a product has its filters of two layers
    return masks


def weights_left(model: nn.Module, layers: Iterable[UnitLayer]) -> dict[str, Tensor]:
    """Layer → which of its weights read a channel that is left, in the weight's shape.

    A channel is gone if its filter is pruned. Only layers that read a single, pruned layer's channels are listed: one
    that reads several layers' channels, summed or concatenated, keeps all its weights.
    """
    found = {}
    for layer in layers:
        left = filters_left(model, layer.name)
        for reader in layer.readers if not left.all() else ():
            module = model.get_submodule(reader)
            weights = weights_reading(module, left.repeat_interleave(module.weight.shape[1] // len(left)))
            found[reader] = found[reader] & weights if reader in found else weights
    return found


class _Tracer(fx.Tracer):
    """Does not look into a layer that only inherits torch's forward pass, as it does not into torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        forward = [getattr(type(m), name, None) for name in ("forward", "_conv_forward", "_check_input_dim")]
        inherited = all(one is None or one.__module__.startswith("torch.nn.") for one in forward)
        known = isinstance(m, (*LAYERS, *NORMALISATIONS)) and inherited
        return known or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.Graph:
    """The model's graph in eval mode; arguments of ``forward`` with a number or string as default are fixed to that."""
    try:
        arguments = inspect.signature(model.forward).parameters.values()
        settings = {one.name: one.default for one in arguments if isinstance(one.default, bool | int | float | str)}
        with mode_of(model, "eval"), activations_stay():
            return _Tracer().trace(model, concrete_args=settings or None)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, which shows what belongs to a filter: "
            f"{first_line(error)}; granularity='weight' needs no tracing"
        ) from error


def _refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a layer's own filters cannot be pruned; None if they can."""
    if isinstance(module, TRANSPOSED):
        return "is a transposed convolution: only plain and depthwise convolutions are pruned"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return f"has {module.groups} groups: only plain and depthwise convolutions are pruned"
    return not_plain(model, name)


def _follow(model: nn.Module, node: fx.Node, layer: nn.Module, way: _Way, *, laid_out: bool = False) -> None:
    """Follow a layer's channels from a node on until something mixes them, and note the way."""
    filters = len(layer.weight)
    for user in node.users:
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        if is_depthwise(module) or isinstance(module, NORMALISATIONS):
            if (module.out_channels if is_depthwise(module) else module.num_features) != filters:
                continue  # channels were reshaped on the way, so they are not the layer's filters any more
            if isinstance(module, NORMALISATIONS) and module.weight is None:
                way.refusal = f"feeds into {user.target!r}, which has no γ and β: a silenced filter would not be silent"
            way.modules.append(user.target)
            way.nodes.add(user)
            _follow(model, user, layer, way, laid_out=laid_out)
        elif is_sum(user):
            way.summed = True
        elif user.op != "output" and (effect := _effect(user, node, module, layer, laid_out=laid_out)) != "ends":
            if effect == "lifts":
                what = user.target if isinstance(user.target, str) else user.target.__name__
                kind = f" ({type(module).__name__})" if module is not None else ""
                way.refusal = f"feeds into {what!r}{kind}, through which a silenced filter may still have an effect"
            else:
                _follow(model, user, layer, way, laid_out=laid_out or lays_out(user, module))
        elif isinstance(module, LAYERS):
            way.readers[user.target] = laid_out


def _effect(user: fx.Node, node: fx.Node, module: nn.Module | None, layer: nn.Module, *, laid_out: bool) -> str:
    """What the user of a node does to each of a layer's channels that come from there: see :func:`does`."""
    if pools(user, layer) or scales(user, node) or (not laid_out and pads(user, layer)):
        return "alone"
    if (laid_out or isinstance(layer, nn.Linear)) and shifts(module):
        return "ends"
    effect = does(user, module)
    return "ends" if effect == "alone" and user.all_input_nodes[0] is not node else effect  # x.to(y) has x's channels


def _reads_each(layer: nn.Module, reader: nn.Module, *, laid_out: bool) -> bool:
    """Whether each input channel of a reader, or group of flattened features, comes from one filter of the layer."""
    filters, inputs = len(layer.weight), reader.weight.shape[1]
    if laid_out and not isinstance(layer, nn.Linear):
        return isinstance(reader, nn.Linear) and inputs % filters == 0
    kind = next(kind for kind in LAYERS if isinstance(layer, kind))
    return isinstance(reader, kind) and inputs == filters


def _reaches_output(model: nn.Module, node: fx.Node, layer: nn.Module, weights: Collection[fx.Node]) -> bool:
    """Whether the result of a layer's node reaches the network's output without passing another layer."""
    waiting, seen = [(node, user, isinstance(layer, nn.Linear)) for user in node.users], set()
    while waiting:
        source, user, laid_out = waiting.pop()
        if user in seen or is_layer_of(user, source, weights, laid_out=laid_out):
            continue
        seen.add(user)
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        if user.op == "output":
            return True
        if not isinstance(module, LAYERS) or is_depthwise(module):
            waiting.extend((user, after, laid_out or lays_out(user, module)) for after in user.users)
    return False


def _weights(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that are made of the network's own tensors alone, in their order."""
    weights: dict[fx.Node, None] = {}
    for node in graph.nodes:
        made = bool(node.all_input_nodes) and all(one in weights for one in node.all_input_nodes)
        if node.op == "get_attr" or (made and node.op != "output"):
            weights[node] = None
    return weights


def _unseen(model: nn.Module, calls: Iterable[str], protected: Iterable[str]) -> list[str]:
    """Refusals of modules that tracing does not open and that contain layers."""
    refusals, called = [], {model.get_submodule(name) for name in calls}
    for name in (name for name in calls if name not in protected):
        module = model.get_submodule(name)
        inner = module.named_modules(prefix=name)
        layers = [leaf for leaf, part in inner if isinstance(part, LAYERS) and part not in called]
        if layers:
            kind = type(module).__name__
            refusals.append(
                f"torch.fx does not look into {name!r} ({kind}), which contains layers such as {layers[0]!r}"
            )
    return refusals
