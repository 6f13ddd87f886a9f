"""Puts a network into training or eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..network.exchanged import exchanged
from .kept import kept


@contextmanager
def mode_of(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Inside, all modules are in ``mode`` ("train" or "eval"; None leaves them); afterwards each is as it was.

    A module's own ``train`` may do more, such as merge an adapter into its weights: it does so with copies of these.
    """
    if mode not in ("train", "eval", None):
        raise ValueError(f"mode must be 'train' or 'eval', got {mode!r}")
    modules = list(model.modules())
    with ExitStack() as afterwards:
        for module in modules:
            afterwards.callback(setattr, module, "training", module.training)
        if mode is not None:
            if any(type(module).train is not nn.Module.train for module in modules):
                afterwards.callback(kept(modules, afterwards=True).put_back)
                copies = {name: one.clone() for name, one in model.named_parameters()}
                afterwards.enter_context(exchanged(model, copies))
            model.train(mode == "train")
        yield
