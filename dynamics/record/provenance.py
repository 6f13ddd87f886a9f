"""Where a record comes from: versions, commit, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path

import torch

from ..schema import SCHEMA_VERSION


def _commit() -> str:
    """Commit of the running code, with "+" if it was changed since; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip()


def attributes() -> dict[str, str | int]:
    """Attributes that every record carries."""
    return {
        "schema_version": SCHEMA_VERSION,
        "thetadot": importlib.metadata.version("thetadot"),
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
