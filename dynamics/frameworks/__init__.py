"""Recorders for other people's training loops: callbacks of Lightning and of Hugging Face's Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lightning_callback import LightningRecorder
    from .trainer_callback import TrainerRecorder

__all__ = ["LightningRecorder", "TrainerRecorder"]

_HOMES = {  # the module, what it imports, and what to install
    "LightningRecorder": ("lightning_callback", ("lightning", "pytorch_lightning"), "lightning"),
    "TrainerRecorder": ("trainer_callback", ("transformers", "accelerate"), "transformers accelerate"),
}


def __getattr__(name: str) -> object:
    """Import a recorder, and with it its framework, when it is first asked for.

    Raises:
        ModuleNotFoundError: the framework is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, frameworks, packages = _HOMES[name]
    try:
        return getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in frameworks:
            raise
        text = f"{name} needs {missing}, which is not installed: pip install {packages}"
        raise ModuleNotFoundError(text, name=missing) from error


def __dir__() -> list[str]:
    """The module's names, with the recorders that are yet to be imported."""
    return sorted({*globals(), *__all__})
