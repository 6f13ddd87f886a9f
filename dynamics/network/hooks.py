"""Hooks on a model's modules that collect statistics of the training must not see the recorder's evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def hooks_removed(model: nn.Module, theirs: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, those hooks are removed that are methods of objects for which ``theirs`` is true.

    They do not run in backward passes through what was evaluated inside either, even if these come later.
    """
    tables = [vars(module).get(name) or {} for module in model.modules() for name in _TABLES]
    tables = [table for table in tables if any(theirs(_owner(hook)) for hook in table.values())]
    before = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if theirs(_owner(hook))]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _owner(hook: Any) -> Any:
    """The object whose method a hook is, behind any ``partial``; None for a function."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", None)
