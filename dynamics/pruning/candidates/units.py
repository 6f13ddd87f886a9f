"""Units: the filters that pruning may remove, and the parameters that are pruned with each of them.

A filter's channel stays separate through normalisations, activations, pooling and depthwise convolutions until another
convolution, a linear layer or a sum mixes it with others. All parameters on that path are pruned with the filter: its
bias, its normalisation's γ and β, and the depthwise layer's filter with its own normalisation. Neurons of a linear
layer count as filters, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ...network.identities import Layer, layer_named
from ...network.masks import filters_left
from ...network.structure import check_initialised, check_whole
from .channels import CONVOLUTIONS, LAYERS, NORMALISATIONS, TRANSPOSED, is_about, is_depthwise, normalised_by
from .paths import ChannelPath, follow, own_tensors, reaches_output, reads_each, traced
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


def unit_layers(model: nn.Module, protected: Iterable[str] = ()) -> list[UnitLayer]:
    """The ranked layers of a model in the order of its modules, found by tracing it symbolically in eval mode.

    These are its convolutions, and those linear layers that are not its output. Depthwise convolutions are not ranked:
    their filters go with those of the layer that feeds them. Layers in ``protected`` are left out.

    Raises:
        ValueError: the model cannot be traced, has nothing to prune, ``protected`` names no layer of it, or a layer
            cannot be pruned safely: one with groups, a transposed one, one whose weight is shared, computed from others
            or used by the model's own code, or one whose channels run into what would not be silent for a silenced
            filter (a sigmoid, a division by it, a normalisation other than BatchNorm, a BatchNorm without γ and β or
            one shared with other channels), or that is inside a module which tracing does not open (torch's
            TransformerEncoder).
    """
    check_initialised(model)
    check_whole(model, "prune")
    protected = within(model, protected)
    graph = traced(model)
    calls = _calls(graph, model)
    weights = own_tensors(graph)
    used = {node.target: node for node in weights if node.op == "get_attr" and _is_used(node)}
    layers, refusals = [], []
    for name, module in model.named_modules():
        by_itself = used.get(weight_of(name)) if name else None
        if not isinstance(module, LAYERS) or name in protected or not (name in calls or by_itself):
            continue
        head = any(reaches_output(model, node, module, weights) for node in calls.get(name, [by_itself]))
        if head and (isinstance(module, nn.Linear) or name not in calls):
            continue
        if by_itself:
            refusals.append(
                f"layer {name!r} has a weight that the model's own code uses: what goes with it is not known"
            )
            continue
        if is_depthwise(module):
            continue
        path = _path(model, module, calls, name)
        if refusal := _refusal(model, name, module) or (None if head else path.refusal):
            refusals.append(f"layer {name!r} {refusal}")
            continue
        modules = tuple(dict.fromkeys([name, *path.modules]))
        copies = sum(is_depthwise(model.get_submodule(one)) for one in modules)
        readers = _readers(model, module, calls, path)
        layers.append(UnitLayer(name, len(module.weight), modules, copies, path.summed, head, readers))
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
    masks: dict[str, Tensor] = {}
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
    found: dict[str, Tensor] = {}
    for layer in layers:
        left = filters_left(model, layer.name)
        for reader in layer.readers if not left.all() else ():
            module = layer_named(model, reader)
            weights = weights_reading(module, left.repeat_interleave(module.weight.shape[1] // len(left)))
            found[reader] = found[reader] & weights if reader in found else weights
    return found


def _calls(graph: fx.Graph, model: nn.Module) -> dict[str, list[fx.Node]]:
    """Module → the nodes that call it or, of a BatchNorm whose forward method was traced, normalise by it."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if name := node.target if node.op == "call_module" else normalised_by(node, model):
            calls.setdefault(name, []).append(node)
    return calls


def _is_used(tensor: fx.Node) -> bool:
    """Whether the model's own code uses the numbers of one of its tensors."""
    return not all(is_about(user, tensor) for user in tensor.users)


def _path(model: nn.Module, module: Layer, calls: Mapping[str, list[fx.Node]], name: str) -> ChannelPath:
    """The path of a layer's channels from all of its calls; refused where other channels meet them."""
    path = ChannelPath()
    for node in calls[name]:
        follow(model, node, module, path)
    for shared in (one for one in path.modules if not path.nodes.issuperset(calls[one])):
        path.refusal = f"feeds into {shared!r}, and so do other channels"
    return path


def _readers(model: nn.Module, module: Layer, calls: Mapping[str, list[fx.Node]], path: ChannelPath) -> tuple[str, ...]:
    """The layers that read each of a layer's channels, and nothing else."""
    return tuple(
        reader
        for reader, flattened in path.readers.items()
        if len(calls[reader]) == 1 and reads_each(module, layer_named(model, reader), flattened=flattened)
    )


def _refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a layer's own filters cannot be pruned; None if they can."""
    if isinstance(module, TRANSPOSED):
        return "is a transposed convolution: only plain and depthwise convolutions are pruned"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return f"has {module.groups} groups: only plain and depthwise convolutions are pruned"
    return not_plain(model, name)


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
