"""The machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe(device: str = "cpu") -> str:
    """Processor or GPU, threads and versions, in one line."""
    import torch  # here, so that a benchmark without it measures no memory of it

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{name}, {threads}; Python {platform.python_version()}, torch {version('torch')}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
