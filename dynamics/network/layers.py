"""A network as layers: its parameters by name, θ and g as vectors over all of them, and sums over each layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..quantities import Vectors, sums
from ..warning import warn
from .blocks import Layout, Vector
from .masks import parameter_masks
from .parameter_names import plain_name, plain_names
from .structure import has_any


def _held(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that count in this process; if some are sharded, unsharded ones count in the first process only.

    A parameter may be sharded over several groups of processes, each of which holds all of it, as FSDP2 does with one
    that tensor parallelism leaves out: it counts in the group of the first process.
    """
    sharded: dict[str, Any] = {name: parameter for name, parameter in named.items() if hasattr(parameter, "to_local")}
    if not sharded:
        return named
    meshes = {parameter.device_mesh for parameter in sharded.values()}
    first = max(meshes, key=lambda mesh: mesh.size()).mesh.min()
    counting = {mesh for mesh in meshes if (mesh.mesh == first).any()}
    others = any(any(mesh.get_coordinate()) for mesh in meshes)
    counted = sharded if others else named
    return {name: one for name, one in counted.items() if name not in sharded or sharded[name].device_mesh in counting}


_kind = attrgetter("shape", "dtype", "device")


class Layers:
    """The layers of a model: the modules that own its parameters, by qualified name.

    Parameters are identified by name, so a pruning may replace Parameter objects; :meth:`refresh` looks them up again.
    A parameter that several modules share counts once, in the first of them. One that is added later is not recorded,
    and one that is removed counts as zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = list(plain_names(name for name, _ in model.named_parameters()).values())
        owners = [name.rpartition(".")[0] or "(root)" for name in self._known]
        self.names = list(dict.fromkeys(owners))
        self.layer_of_parameter = [self.names.index(owner) for owner in owners]
        self.version = 0
        self._look_up()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._layout.device

    @property
    def on_one_gpu(self) -> bool:
        """Whether all parameters are on one GPU."""
        return self._layout.on_one_gpu

    def refresh(self) -> None:
        """Look the parameters up again if one, or a module, was replaced, added, removed or converted."""
        tables, keys, values = self._slots
        if (
            list(map(len, self._tables)) != self._sizes
            or not all(map(is_, map(dict.get, tables, keys), values))
            or list(map(_kind, self.parameters)) != self._kinds
        ):
            self._look_up()
            self.version += 1

    def _look_up(self) -> None:
        tables = (table for module in self._model.modules() for table in (module._modules, module._parameters))
        self._tables = [table for table in tables if isinstance(table, dict)]  # a ScriptModule's stay as they are
        self._sizes = list(map(len, self._tables))
        slots = [(table, key, value) for table in self._tables for key, value in table.items()]
        self._slots: list[list[Any]] = [[slot[part] for slot in slots] for part in range(3)]  # tables, keys, values
        named = dict(self._model.named_parameters())
        self._plain = plain_names(named)
        found = {self._plain[name]: (name, parameter) for name, parameter in _held(named).items()}
        if added := [name for name in found if name not in self._known]:
            warn(f"parameters that were added after recording began are not recorded: {added}")
        absent = (None, torch.empty(0, device=next(iter(named.values()), torch.empty(0)).device))
        self._found = [found.get(name, absent) for name in self._known]
        self.parameters = [parameter for _, parameter in self._found]
        self._kinds = list(map(_kind, self.parameters))
        self._layout = Layout(self.parameters)
        self.layer_of_block = self._in_blocks(self.layer_of_parameter, torch.int64)
        # torch.nn.utils.prune leaves the parameter as it is and multiplies it by the mask in the forward pass
        self._elsewhere = [
            (index, name) for index, (name, _) in enumerate(self._found) if (name or "").endswith("_orig")
        ]

    def has_any(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of these is a parameter of the model, recorded or not."""
        return has_any(self._model, parameters)

    def _plain_name(self, name: str) -> str:
        """The plain name of a parameter, from a name that the model has, or had before it was pruned, say."""
        return self._plain.get(name, plain_name(name))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter by its plain name."""
        return dict(zip(self._known, self._layout.shapes, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the vectors."""
        return self._layout.dtype

    def zeros(self) -> Vector:
        """A vector over all parameters, zero everywhere."""
        return self._layout.zeros()

    def per_block(self, values: Sequence[float]) -> Tensor:
        """One number per parameter → one per block, (block,)."""
        return self._in_blocks(values, self._layout.dtype)

    def _in_blocks(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        per_parameter = torch.tensor(values, dtype=dtype, device="cpu")
        counts = torch.tensor(self._layout.counts, device="cpu")
        return per_parameter.repeat_interleave(counts).to(self.device)

    @torch.no_grad()
    def theta(self, into: Vector, among: Sequence[int] | None = None) -> Vector:
        """Copy θ into a vector, zero where it is pruned; ``among``: indices of the parameters, by default all."""
        into.take(self.parameters if among is None else [self.parameters[index] for index in among], among)
        masks = parameter_masks(self._model) if self._elsewhere else {}
        for index, name in self._elsewhere:
            if name in masks:
                into.views[index].mul_(masks[name])
        return into

    def vector(self, tensors: Mapping[str, Tensor], *, without: Collection[int] = ()) -> Tensor:
        """Tensors by parameter name → blocks of a vector, zero for parameters without one or at indices ``without``."""
        plainly = {self._plain_name(name): tensor for name, tensor in tensors.items()}
        known = enumerate(self._known)
        return self.zeros().take([None if index in without else plainly.get(name) for index, name in known]).blocks

    def tensors(self, blocks: Tensor, names: Iterable[str]) -> list[Tensor]:
        """The vector's part of each named parameter, in the parameter's shape."""
        vector = self.zeros()
        vector.blocks.copy_(blocks)
        views = dict(zip(self._known, vector.views, strict=True))
        return [views[self._plain_name(name)] for name in names]

    def named(self, vector: Vector) -> dict[str, Tensor]:
        """The vector's part of each parameter, in its shape, by the name that the model has for it now."""
        parts = zip(self._found, vector.views, strict=True)
        return {name: view for (name, _), view in parts if name is not None}

    @property
    def frozen(self) -> set[str]:
        """The parameters with ``requires_grad=False``, by the name that the model has for each."""
        return {name for name, parameter in self._found if name is not None and not parameter.requires_grad}

    @property
    def layer_of(self) -> dict[str, int]:
        """Index of the layer of each parameter, by the name that the model has for it."""
        parts = zip(self._found, self.layer_of_parameter, strict=True)
        return {name: layer for (name, _), layer in parts if name is not None}

    def kept(self) -> Tensor:
        """1 where a parameter is not pruned, 0 where it is, as blocks of a vector."""
        masks, vector = parameter_masks(self._model), self.zeros()
        for (name, _), view in zip(self._found, vector.views, strict=True):
            view.copy_(masks[name]) if name in masks else view.fill_(1)
            if view.is_complex():
                view.mul_(1 + 1j)
        return vector.blocks

    def remaining(self) -> np.ndarray:
        """How many parameters of each layer are not pruned, (layer,); a complex one counts as two."""
        masks, counts = parameter_masks(self._model), np.zeros(len(self))
        for (name, parameter), layer in zip(self._found, self.layer_of_parameter, strict=True):
            kept = int(masks[name].sum()) if name in masks else parameter.numel()
            counts[layer] += 2 * kept if parameter.is_complex() else kept
        return counts

    def evaluate(self, names: Iterable[str], vectors: Vectors) -> dict[str, Tensor]:
        """The named quantities, each a tensor (layer,)."""
        names = list(names)
        return dict(zip(names, self.sums(names, vectors).unbind(), strict=True)) if names else {}

    def sums(self, names: Sequence[str], vectors: Vectors) -> Tensor:
        """The named quantities, (name, layer)."""
        return sums(names, vectors, self.layer_of_block, len(self))
