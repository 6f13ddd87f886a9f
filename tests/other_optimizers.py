"""Optimizers as other libraries have them: that step through another, and that keep their state in other ways."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lookahead(torch.optim.Optimizer):
    """As published: goes half way back to a slow copy at every second step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.look_at(optimizer)

    def look_at(self, optimizer: torch.optim.Optimizer) -> None:
        self.fast, self.param_groups, self.taken = optimizer, optimizer.param_groups, 0
        self.state, self.zero_grad = defaultdict(dict), optimizer.zero_grad

    def step(self, closure: Callable | None = None) -> None:
        self.go()

    @torch.no_grad()
    def go(self) -> None:
        self.fast.step()
        self.taken += 1
        for parameter in (one for group in self.param_groups for one in group["params"]):
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            if self.taken % 2 == 0:
                parameter.copy_(slow.add_(parameter - slow, alpha=0.5))


class WithoutHooks(Lookahead):
    """Never calls the ``__init__`` of torch's optimizers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.look_at(optimizer)

    def step(self, closure: Callable | None = None) -> None:
        self.go()


class Keeping(torch.optim.Optimizer):
    """Steps by momentum, which ``keep`` puts into the state and ``take`` takes out of it."""

    def __init__(self, parameters: Any, keep: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        super().__init__(parameters, {})
        self.keep, self.take = keep, take

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            before = self.take(state["kept"]) if "kept" in state else torch.zeros_like(parameter)
            now = parameter.grad + 0.9 * before
            state["kept"] = self.keep(now)
            parameter.sub_(now, alpha=0.1)


class Shampoo(torch.optim.Optimizer):
    """Multiplies by the inverse of a matrix that has, by chance, the shape of a square parameter."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            matrix = parameter.grad.reshape(len(parameter), -1)
            kept = self.state[parameter].setdefault("preconditioner", torch.eye(len(parameter)))
            kept.add_(matrix @ matrix.T)
            parameter.sub_(torch.linalg.solve(kept, matrix).view_as(parameter), alpha=0.01)
