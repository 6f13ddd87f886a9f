"""Warnings that show the user's own line: the one that called this package, however deep inside it they are given."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

_PACKAGE, _TORCH = (f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
_INSIDE = (_PACKAGE, _TORCH, contextlib.__file__)  # torch and context managers call what this package gives them
_CALLERS = (f"{_PACKAGE}experiments{os.sep}", f"{_PACKAGE}__main__.py")  # use the rest as anyone does


def warn(text: str) -> None:
    """Give a UserWarning at the line that called this package or, through hooks, torch."""
    frame, level = sys._getframe(1), 2  # Python 3.12 has skip_file_prefixes for this
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_inside(file: str) -> bool:
    return file.startswith(_INSIDE) and not file.startswith(_CALLERS)
