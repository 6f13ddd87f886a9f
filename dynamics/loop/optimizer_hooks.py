"""Hooks that an optimizer has put on the model, to collect statistics as K-FAC does: a probe is not theirs to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class OptimizerHooks:
    """Those hooks of a model's modules that are methods of one of ``optimizers``."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        self._model, self._theirs = model, {id(one) for one in optimizers}

    def _tables(self) -> list[dict[int, Any]]:
        tables = [vars(module).get(name) for module in self._model.modules() for name in _TABLES]
        return [table for table in tables if table and any(_of(hook) in self._theirs for hook in table.values())]

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Inside, they are not there."""
        tables = self._tables()
        before = [dict(table) for table in tables]
        for table in tables:
            for key in [key for key, hook in table.items() if _of(hook) in self._theirs]:
                del table[key]
        try:
            yield
        finally:
            for table, hooks in zip(tables, before, strict=True):
                table.clear()
                table.update(hooks)


def _of(hook: Any) -> int:
    """Whose method a hook is."""
    while isinstance(hook, partial):
        hook = hook.func
    return id(getattr(hook, "__self__", None))
