"""An event in a training, such as a pruning: its effect on loss, gradient and curvature, measured before and after."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .. import schema
from ..curvature.expansion import Expansion
from ..loop.processes import Processes
from ..network.identities import as_original, identities
from ..network.layers import Layers
from ..quantities import Vectors
from ..warning import warn
from .arguments import check_name
from .past_events import PastEvents, coordinates

_FLOATS = (np.float16, np.float32, np.float64)  # which a record can hold


class Event:
    """What the body of ``with recorder.event(...) as event`` may add to the record."""

    def __init__(self, model: nn.Module, past: PastEvents | None = None) -> None:
        self._model, self._past = model, past or PastEvents()
        self.alive: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.studies: dict[str, xr.Dataset] = {}

    def __repr__(self) -> str:
        added = [*(["units"] if self.alive else []), *(["scores of units"] if self.scores else []), *self.studies]
        return f"<Event: {', '.join(added) or 'nothing'} added>"

    def units(self, *, alive: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> None:
        """Record which units (filters) of each layer are left, as booleans (unit,), and their scores if there are any.

        If the network was shrunk before, they may be given for the units it has now: they are recorded as the units of
        the original network that they were, with False and NaN for those removed.

        Raises:
            ValueError: masks of single weights (``/pruning`` counts those by layer), another number of units than the
                layer has, other units than in an earlier event, or scores of another shape.
        """
        alive = {layer: torch.as_tensor(kept, device="cpu").bool() for layer, kept in alive.items()}
        scores = {layer: torch.as_tensor(score, device="cpu") for layer, score in (scores or {}).items()}
        for layer, kept in alive.items():
            if kept.ndim != 1:
                raise ValueError(
                    f"event.units() takes one boolean per filter, (unit,), got shape {tuple(kept.shape)} for "
                    f"{layer!r}: single weights are counted by layer in /pruning, as removed and remaining"
                )
            if layer in scores and scores[layer].shape != kept.shape:
                shapes = tuple(kept.shape), tuple(scores[layer].shape)
                raise ValueError(
                    f"event.units() takes one score per filter, but the masks and scores of layer {layer!r} have "
                    f"shapes {shapes}"
                )
        known = identities(self._model)
        for layer, identity in known.items():
            if layer in alive and len(alive[layer]) not in (len(identity.index), identity.total):
                raise ValueError(
                    f"event.units() takes one boolean per filter: layer {layer!r} has {len(identity.index)} filters, "
                    f"got {len(alive[layer])} booleans"
                )
        found = {layer: kept.detach().cpu().clone() for layer, kept in as_original(alive, known).items()}
        before = self._past.units
        if before and (other := sorted(set(_units(found)) ^ set(before))):
            layer, index = other[0]
            raise ValueError(
                f"event.units() takes the same units in all events of a record, but unit {index} of layer {layer!r} is "
                "not in all"
            )
        self.alive = {layer: found[layer] for layer in dict.fromkeys(layer for layer, _ in before)} or found
        self.scores = {layer: score.detach().cpu() for layer, score in as_original(scores, known).items()}

    def add(self, node: str, study: xr.Dataset) -> None:
        """Record a study of the network: "curve", "scores" or "invariance", as dynamics.pruning computes them.

        Its variables are recorded as double precision numbers, and are NaN in a study that lacks them.

        Raises:
            ValueError: another name; a dataset with other variables or dimensions than the node's; variables that are
                no real numbers; a coordinate that does not lie along one dimension, is neither numbers nor strings, or
                has a name that no variable can have; other measures, draws, fractions or units than in an earlier
                event.
        """
        if node not in schema.STUDIES:
            raise ValueError(f"event.add() takes one of the studies {', '.join(schema.STUDIES)}, got {node!r:.60}")
        dims = {row.name: row.dims(node)[1:] for row in schema.quantities(node)}
        for name, values in study.data_vars.items():
            if name not in dims:
                raise ValueError(f"event.add({node!r}) takes the variables {', '.join(dims)}, got {name!r:.60}")
            if set(values.dims) != set(dims[name]):
                raise ValueError(
                    f"event.add({node!r}) takes {name!r} over the dimensions {dims[name]}, got it over {values.dims}"
                )
            if values.dtype.kind not in "biuf":
                raise ValueError(f"event.add({node!r}) takes real numbers, got {name!r} of the type {values.dtype}")
        labels = {name: (values.dims, _labels(values)) for name, values in study.coords.items()}
        for name, values in study.coords.items():
            check_name("event.add", str(name))
            if len(values.dims) != 1:
                raise ValueError(
                    f"a coordinate of {node!r} lies along one dimension, but {name!r:.60} has {values.dims}: "
                    f"drop it by study.drop_vars({name!r:.60})"
                )
            if (found := labels[name][1].dtype).kind not in "biuU" and found not in _FLOATS:
                raise ValueError(
                    f"the labels of a coordinate of {node!r} are numbers or strings, but those of {name!r:.60} have "
                    f"the type {values.dtype}"
                )
        study = study.assign_coords(labels)
        before, now = self._past.studied.get(node, {}), coordinates(study)
        for name in (name for name in before if name in now):
            if not np.array_equal(before[name], now[name]):
                was, has = (f"{values[name].tolist()!r:.60}" for values in (before, now))
                raise ValueError(
                    f"event.add({node!r}) takes the same {name!r} in all events of a record: it was {was} before, and "
                    f"is {has} now"
                )
        self.studies[node] = study.map(lambda values: values.transpose(*dims[values.name]).astype(np.float64))

    def unit_labels(self) -> list[tuple[str, int]]:
        """Layer and index of each unit, in the order of :meth:`unit_row`."""
        return _units(self.alive)

    def unit_row(self) -> dict[str, Tensor]:
        """Scores and survival of all units, each (unit,)."""
        missing = {layer: torch.full(kept.shape, torch.nan, device="cpu") for layer, kept in self.alive.items()}
        scores = [self.scores.get(layer, missing[layer]).double() for layer in self.alive]
        return {"score": torch.cat(scores), "alive": torch.cat(list(self.alive.values()))}


def _units(alive: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    return [(layer, index) for layer, kept in alive.items() for index in range(len(kept))]


class Stage:
    """The network before or after an event: its expansion at the probe, θ, g, Hg, and which parameters are kept."""

    def __init__(self, layers: Layers, processes: Processes, expansion: Expansion) -> None:
        self._layers, self._processes, self._expansion = layers, processes, expansion
        self.shapes = layers.shapes
        (self.loss,) = processes.mean([expansion.loss])
        self._names, self._frozen = list(expansion.theta), layers.frozen
        unit = max(torch.finfo(one.dtype).eps for one in expansion.theta.values())
        self._rounding, self._noise = unit**0.5, min(100 * unit, unit**0.5)
        self.theta = layers.theta(layers.zeros()).blocks
        self.kept = layers.kept()
        self.grad = self._vector(expansion.grad)
        self._hess_grad = self.hessian_product(self.grad)

    def has_parameters_of(self, other: Stage) -> bool:
        """Whether the parameters, and which of their entries are not pruned, are the same."""
        return torch.equal(self.theta, other.theta) and torch.equal(self.kept, other.kept)

    def _vector(self, tensors: list[Tensor]) -> Tensor:
        return self._layers.vector(dict(zip(self._names, self._processes.mean(tensors), strict=True)))

    def hessian_product(self, blocks: Tensor) -> Tensor:
        """Hv at this stage, from blocks of v to blocks of Hv."""
        return self._vector(self._expansion.hessian_product(self._layers.tensors(blocks, self._names)))

    def third_products(self, removal: Tensor, *others: Tensor) -> list[Tensor]:
        """T[δ,v] at this stage for each v, where T is the derivative of H; all are blocks of vectors.

        They are NaN if T is not symmetric, because then an operation's derivative is wrong.
        """
        direction, *vectors = (self._layers.tensors(blocks, self._names) for blocks in (removal, *others))
        products = [self._vector(product) for product in self._expansion.third_products(direction, vectors)]
        pairs = list(zip(others, products, strict=True))
        usual = self._hess_grad.norm() * removal.norm() ** 2 / self.theta.norm()
        if all(self._is_symmetric("third", pairs[0], pair, usual) for pair in pairs[1:]):
            return products
        return [torch.full_like(product, torch.nan) for product in products]

    def frozen_in(self, removal: Tensor) -> list[str]:
        """Names of the frozen parameters that a removal moves."""
        parts = zip(self._names, self._layers.tensors(removal, self._names), strict=True) if self._frozen else ()
        return [name for name, part in parts if name in self._frozen and part.any()]

    def removal_product(self, removal: Tensor) -> Tensor:
        """Hδ at this stage; warns if H is exact but not symmetric."""
        product = self.hessian_product(removal)
        if self._expansion.exact:
            usual = self._hess_grad.norm() * removal.norm()
            self._is_symmetric("second", (self.grad, self._hess_grad), (removal, product), usual)
        return product

    def _is_symmetric(
        self, which: str, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], usual: Tensor
    ) -> bool:
        """Whether uᵀ(Av) = vᵀ(Au), up to rounding, for (u, Au) and (v, Av); warns if not: some derivative is wrong.

        Where the loss does not depend on what is removed, both are rounding noise, small beside their ``usual`` size.
        """
        forth, back = (one[0] * other[1]).sum(), (other[0] * one[1]).sum()
        size = torch.minimum(one[0].norm() * other[1].norm(), other[0].norm() * one[1].norm())
        rounding = self._rounding * size + self._noise * usual
        if (forth - back).abs() > 0.01 * torch.maximum(forth.abs(), back.abs()) + rounding:
            warn(
                f"the {which} derivatives of the loss are not symmetric ({forth:.4g} one way, {back:.4g} the other): "
                "an operation of the network has a wrong derivative, so the predictions that use it are "
                f"{'wrong' if which == 'second' else 'recorded as NaN'}"
            )
            return False
        return True

    def vectors(self, **others: Tensor) -> Vectors:
        """θ, g, Hg and the mask of kept parameters, with further vectors."""
        return Vectors(theta=self.theta, grad=self.grad, hess_grad=self._hess_grad, kept=self.kept, **others)


_COUNTED = ("removed", "removed_grad_sqnorm")  # quantities of a removal that are no predictions


@torch.no_grad()
def effect(layers: Layers, before: Stage, after: Stage) -> dict[str, Tensor]:
    """The row of ``/pruning``: all quantities at both stages, (stage, layer), and those of the removal δ, (layer,).

    δ = θ_after − θ_before, R = the parameters pruned in between. H is that of the network before.

    Raises:
        ValueError: a parameter changed its shape.
    """
    if changed := [name for name, shape in before.shapes.items() if after.shapes[name] != shape]:
        name = changed[0]
        raise ValueError(
            f"inside event() {name!r} changed its shape from {tuple(before.shapes[name])} to "
            f"{tuple(after.shapes[name])}, so before and after cannot be compared: mask what is pruned inside "
            "event(), and shrink the network after it"
        )
    return measured(layers, before, after) | predicted(layers, before, after, after.theta - before.theta)


@torch.no_grad()
def measured(layers: Layers, before: Stage, after: Stage) -> dict[str, Tensor]:
    """The quantities of ``/pruning`` at both stages, (stage, layer); the loss, (stage,)."""
    names = [row.name for row in schema.quantities("pruning") if {"stage", "layer"} <= set(row.over)]
    stages = [layers.evaluate(names, stage.vectors()) for stage in (before, after)]
    values = {name: torch.stack([stage[name] for stage in stages]) for name in names}
    return values | {"loss": torch.stack([before.loss, after.loss])}


@torch.no_grad()
def predicted(layers: Layers, before: Stage, after: Stage, removal: Tensor, node: str = "pruning") -> dict[str, Tensor]:
    """The quantities of a node that belong to a removal δ, (layer,), computed from the network before it and from R.

    Predictions are NaN if δ moves frozen parameters, whose gradient is unknown.
    """
    names = [row.name for row in schema.quantities(node) if "layer" in row.over and "stage" not in row.over]
    removed = before.kept * (1 - after.kept)
    if frozen := before.frozen_in(removal):
        warn(
            f"frozen parameters are removed or changed, first {frozen[0]!r}: they have no gradient, so all predictions "
            "of what that does are NaN. If you need these, call requires_grad_() on the parameters first"
        )
        counted = layers.evaluate(_COUNTED, before.vectors(removed=removed))
        unknown = torch.full_like(counted["removed"], torch.nan)
        return {name: counted.get(name, unknown) for name in names}
    hess_removal = before.removal_product(removal)
    vectors = {"removal": removal, "hess_removal": hess_removal, "removed": removed}
    if "param_hess_grad_first_order" in names:  # the change of Hg is H((Hδ)_K − g_R) + T[δ]g_K
        third, third_grad = before.third_products(removal, removal, before.grad * (1 - removed))
        moved = before.hessian_product(hess_removal * (1 - removed) - before.grad * removed)
        vectors |= {"third_removal": third, "hess_grad_change": moved + third_grad}
    else:
        (vectors["third_removal"],) = before.third_products(removal, removal)
    return layers.evaluate(names, before.vectors(**vectors))


def _labels(coordinate: xr.DataArray) -> np.ndarray:
    """The labels of a coordinate; strings that pandas keeps as objects are numpy's own."""
    found = coordinate.values
    strings = found.dtype.kind in "OT" and all(isinstance(one, str) for one in found.ravel())
    return np.array(found.tolist(), dtype=str) if strings else found
