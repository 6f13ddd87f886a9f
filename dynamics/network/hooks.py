"""What collects statistics of the training, hooks and logs, must not see evaluations besides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIGHTNING, _LOGS = {"lightning", "pytorch_lightning"}, ("log", "log_dict")


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


@contextmanager
def unlogged(model: nn.Module) -> Iterator[None]:
    """Inside, what Lightning's modules in a model log is dropped: it would count among the metrics of the training.

    It is their classes that do not log, because the attributes of a module may be put back inside to what they were.
    """
    kinds = {type(module) for module in model.modules()}
    with ExitStack() as stack:
        for kind in filter(_is_lightnings, kinds):
            for name in _LOGS:
                if name in vars(kind):
                    stack.callback(setattr, kind, name, vars(kind)[name])
                else:
                    stack.callback(delattr, kind, name)
                setattr(kind, name, _nothing)
        yield


def _is_lightnings(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] in _LIGHTNING for base in kind.__mro__)


def _nothing(*given: object, **settings: object) -> None:
    """What an objective logs that is evaluated besides the training."""
