"""Units: the filters that pruning may remove, and the parameters that go with each of them.

A filter's channel runs alone through normalisations, activations, pooling and depthwise convolutions until another
convolution, a linear layer or a sum mixes it with others. All parameters it meets on that way go with the filter: its
bias, its normalisation's γ and β, and the depthwise layer's filter with its own normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class UnitLayer:
    """A convolution whose filters are ranked; ``modules`` are those its channels run through alone, itself first."""

    name: str
    filters: int
    modules: tuple[str, ...]

    def parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters whose first dimension is the filter."""
        named = ((module, model.get_submodule(module)) for module in self.modules)
        return [f"{module}.{leaf}" for module, owner in named for leaf, _ in owner.named_parameters(recurse=False)]

    def normalisation(self, model: nn.Module) -> str | None:
        """Name of the first normalisation after the convolution, if there is one."""
        return next((name for name in self.modules if isinstance(model.get_submodule(name), _NORMALISATIONS)), None)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def unit_layers(model: nn.Module) -> list[UnitLayer]:
    """The ranked convolutions of a model in the order of its modules, found by tracing it symbolically.

    Depthwise convolutions are not ranked: their filters go with those of the layer that feeds them.

    Raises:
        ValueError: the model cannot be traced, or has a grouped convolution that is not depthwise.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, which shows pruning what goes with a filter: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or _is_depthwise(module) or name not in calls:
            continue
        if module.groups > 1:
            raise ValueError(
                f"layer {name!r} has {module.groups} groups: only plain and depthwise convolutions are pruned"
            )
        modules = tuple(dict.fromkeys([name, *_followed(model, calls[name], module.out_channels)]))
        layers.append(UnitLayer(name, module.out_channels, modules))
    return layers


def _followed(model: nn.Module, node: fx.Node, filters: int) -> list[str]:
    """Modules that the node's channels run through one by one, as far as nothing mixes them."""
    met = []
    for user in node.users:
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        if _is_depthwise(module) or isinstance(module, _NORMALISATIONS):
            channels = module.out_channels if isinstance(module, nn.Conv2d) else module.num_features
            if channels != filters:
                continue  # something reshaped on the way: its channels are not the filters'
            met.append(user.target)
        if len(user.all_input_nodes) == 1 and not isinstance(module, nn.Linear) and not _mixes(module):
            met += _followed(model, user, filters)
    return met


def _mixes(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d) and not _is_depthwise(module)
