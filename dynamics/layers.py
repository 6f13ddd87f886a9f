"""A network seen as layers: the modules that own its parameters, and θ, g, λ and masks as one tensor a parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .masks import parameter_masks
from .quantities import Vectors, evaluate


class Layers:
    """The layers of a model. Parameters are looked up anew at each call: pruning may replace Parameter objects.

    A parameter that several modules share counts once, in the first of them. A parameter without a gradient (frozen or
    unused) has the gradient zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        owners = [name.rpartition(".")[0] or "(root)" for name, _ in model.named_parameters()]
        self.names = list(dict.fromkeys(owners))
        self._layer_of = torch.tensor([self.names.index(owner) for owner in owners], device=self.device)
        self._decays: list[float] = []
        self._decay = torch.empty(0)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self._model.parameters()).device

    def theta(self) -> list[Tensor]:
        """θ, the live tensors without their graph."""
        return [parameter.detach() for parameter in self._model.parameters()]

    def theta_copy(self) -> list[Tensor]:
        """θ as it is now."""
        return [tensor.clone() for tensor in self.theta()]

    def grad_copy(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """g as the optimizer is about to apply it, without a gradient scaler's factor."""
        grads = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().to_dense().clone()
            for parameter in self._model.parameters()
        ]
        scale = getattr(optimizer, "grad_scale", None)  # set during a fused step only
        return grads if scale is None else torch._foreach_div(grads, scale)

    def kept(self) -> list[Tensor]:
        """True where a parameter is not pruned."""
        masks = parameter_masks(self._model)
        named = self._model.named_parameters()
        return [masks.get(name, torch.ones_like(parameter, dtype=torch.bool)) for name, parameter in named]

    def decay(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Weight decay λ of each parameter, (parameter,); 0 for what the optimizer does not hold."""
        decays = {
            id(parameter): float(group.get("weight_decay", 0.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        values = [decays.get(id(parameter), 0.0) for parameter in self._model.parameters()]
        if values != self._decays:  # sent to the device only when it changes
            self._decays, self._decay = values, torch.tensor(values, dtype=self.theta()[0].dtype, device=self.device)
        return self._decay

    def evaluate(self, names: Iterable[str], vectors: Vectors) -> dict[str, Tensor]:
        """The named quantities, each a tensor (layer,)."""
        return evaluate(names, vectors, self._layer_of, len(self))
