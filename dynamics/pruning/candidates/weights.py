"""The layers whose single weights can be pruned, in any model, without tracing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ...network.identities import Layer
from ...network.structure import check_initialised, check_whole
from .channels import LAYERS, TRANSPOSED

LEAVE = "to leave it as it is, name it in protected=(...)"


def weight_layers(model: nn.Module, protected: Iterable[str] = ()) -> list[str]:
    """Names of all convolutions and linear layers except ``protected`` ones, in the order of the model's modules.

    Biases, normalisations and embeddings are not pruned weight by weight.

    Raises:
        ValueError: there is no such layer, ``protected`` names no module, or a layer's weight is shared or computed
            from others.
    """
    check_initialised(model)
    check_whole(model, "prune")
    protected = within(model, protected)
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS) and name not in protected]
    if refusals := [f"layer {name!r} {refusal}" for name in layers if (refusal := not_plain(model, name))]:
        raise ValueError(f"{'; '.join(refusals)}; {LEAVE}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer whose weights could be pruned")
    return layers


def weight_of(layer: str) -> str:
    """Name of a layer's weight: "weight" alone where the model itself is the layer, whose name is empty."""
    return f"{layer}.weight".removeprefix(".")


def weights_reading(module: Layer, alive: Tensor) -> Tensor:
    """True where a layer's weight reads a channel that is ``alive``, (channel,); in the weight's shape."""
    weight = module.weight
    if isinstance(module, TRANSPOSED):
        return alive.view(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
    groups = getattr(module, "groups", 1)
    by_group = alive.view(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    return by_group.reshape(len(weight), -1, *[1] * (weight.ndim - 2)).expand_as(weight)


def within(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Names of the named modules (one name or several) and of all modules inside them.

    Raises:
        ValueError: a name is not that of a module of the model.
    """
    names, known = (names,) if isinstance(names, str) else tuple(names), dict(model.named_modules())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"protected contains names that are no modules of {type(model).__name__}: {unknown}; give qualified names"
        )
    return tuple(inner for name in names for inner, _ in known[name].named_modules(prefix=name))


def not_plain(model: nn.Module, name: str) -> str | None:
    """Why a layer's weight cannot be masked by its name; None if it can."""
    module = model.get_submodule(name)
    if module._parameters.get("weight") is None:
        return (
            "has a weight that is computed from others (by a parametrization or torch.nn.utils.prune): "
            "remove that first"
        )
    owners = [other for other, one in model.named_modules() if one._parameters.get("weight") is module.weight]
    if len(owners) > 1:
        return f"shares its weight with {next(other for other in owners if other != name)!r}"
    return None
