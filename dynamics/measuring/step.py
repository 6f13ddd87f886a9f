"""One training step: θ and g before it, Δθ, and its first-order quantities."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..hardware.captured import Repeated
from ..loop.groups import Group, Groups
from ..loop.processes import Processes
from ..network.blocks import Vector
from ..network.layers import Layers
from ..quantities import FORMULAS, Vectors
from ..record.store import Store
from ..warning import warn
from .present import Present


class Measurement:
    """Measures steps. Its vectors are allocated once and reused at every step, so memory does not grow.

    Attributes:
        theta: θ before the step.
        grad: g as the optimizers applied it.
        update: Δθ, of the optimizers that have stepped.
        rest: indices of the parameters held by none of the optimizers that have stepped.
    """

    def __init__(self, layers: Layers, groups: Groups, processes: Processes, names: Sequence[str]) -> None:
        self._layers, self._groups, self._processes = layers, groups, processes
        self._names = tuple(name for name in names if name in FORMULAS)
        self._make_vectors()
        self._start: Vector | None = None
        self._first_start: Vector | None = None  # θ₀ in its original shapes
        self.rest: list[int] = []

    def present(self) -> Present:
        """The model as it is now."""
        theta = self._layers.theta(self._layers.zeros()).blocks
        values = self._processes.sum(self._layers.evaluate(["param_sqnorm"], Vectors(theta=theta)))
        sqnorm, rounding = values["param_sqnorm"].cpu().numpy(), torch.finfo(self._layers.dtype).eps
        first, flow_step = self._groups.first()
        return Present(self._layers.names, sqnorm, rounding, first, flow_step, self._layers.remaining())

    def start_from(self, store: Store | None, step: int, *, begins: bool) -> None:
        """Set θ₀, for distances: the present θ if the record begins here, else the θ₀ kept beside it, else NaN."""
        if "distance_sqnorm" not in self._names:
            return
        self._start = self._first_start = self._layers.theta(self._layers.zeros())
        alone = store is not None and not self._processes.sharded
        if begins and alone:
            store.keep(self._name_of_start(), self._start.blocks.cpu().numpy())
        elif not begins:
            kept = store.kept(self._name_of_start()) if alone else None
            known = kept is not None and kept.shape == tuple(self._start.blocks.shape)
            self._start.blocks.copy_(torch.from_numpy(kept) if known else torch.tensor(torch.nan, device="cpu"))
            if store is not None and not known:
                warn(f"‖θ−θ₀‖² (distance_sqnorm) is NaN from step {step} on: {store.path} holds no θ₀ of these layers")

    def _name_of_start(self) -> str:
        """The name under which θ₀ is kept, which depends on the parameters' shapes."""
        return f"start-{zlib.crc32(repr(self._layers.shapes).encode()):08x}"

    def _make_vectors(self) -> None:
        self.theta, self.grad, self.update = (self._layers.zeros() for _ in range(3))
        self._version = self._layers.version
        self._repeated = Repeated()

    def _adapt(self) -> None:
        """Make vectors of the new shapes after the model changed; θ₀ becomes NaN where a shape is new."""
        self._make_vectors()
        if self._first_start is not None:
            self._start = self._layers.zeros()
            for old, new in zip(self._first_start.views, self._start.views, strict=True):
                new.copy_(old) if old.shape == new.shape else new.fill_(torch.nan)

    @property
    def takes_part(self) -> bool:
        """Whether this process measures first-order quantities: of replicas, only the one that writes does."""
        return self._processes.writes or not self._processes.replicated

    @property
    def together(self) -> bool:
        """Whether several processes train the model together, so that they have to agree on what a step is."""
        return self._processes.together

    @property
    def sharded(self) -> bool:
        """Whether every process holds a shard of the parameters, so that only all together can measure a step."""
        return self._processes.sharded

    def begin(self) -> None:
        """Keep θ as it is before the step."""
        self._layers.refresh()
        self._groups.refresh()
        if self._version != self._layers.version:
            self._adapt()
        self._layers.theta(self.theta)

    def take_gradient(self, optimizer: int) -> None:
        """Keep g as the optimizer is about to apply it, because the step may overwrite it."""
        self._groups.gradient(optimizer, self.grad)

    def take_update(self, optimizer: int) -> None:
        """Take Δθ of an optimizer's parameters right after its step."""
        held = self._groups.held(optimizer)
        self._layers.theta(self.update, among=held)
        if held is None:
            self.update.blocks.sub_(self.theta.blocks)
        elif held:
            torch._foreach_sub_(*([vector.views[index] for index in held] for vector in (self.update, self.theta)))

    def end(self, stepped: Sequence[int]) -> None:
        """Set Δθ and g to zero for parameters that no optimizer which has stepped holds."""
        self.rest = self._groups.rest(stepped)
        for vector in (self.update, self.grad) if self.rest else ():
            vector.take([None] * len(self.rest), among=self.rest)

    def step_values(self, trained: Mapping[int, Group]) -> dict[tuple[str, ...], Tensor]:
        """The layers' quantities of ``/steps`` in one tensor (name, layer), over all processes."""
        if not self._names:
            return {}
        vectors = Vectors(
            theta=self.theta.blocks,
            grad=self.grad.blocks,
            update=self.update.blocks,
            start=None if self._start is None else self._start.blocks,
            decay=self._groups.decay(trained) if "decay_sqnorm" in self._names else None,
        )
        places = [vectors.decay.data_ptr()] if vectors.decay is not None else []  # the other addresses are fixed
        sums = self._repeated(partial(self._layers.sums, self._names, vectors), places, self._layers.device)
        return self._processes.sum({self._names: sums.clone()})
