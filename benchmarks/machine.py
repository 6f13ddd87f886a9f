"""The machine that a benchmark ran on, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def describe(device: str = "cpu") -> str:
    """Processor or GPU, threads and versions, in one line."""
    import torch  # here, so that a benchmark without it measures no memory of it

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{name}, {threads}; Python {platform.python_version()}, torch {version('torch')}"


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Stopwatch:
    """Times what a device does, by the wall's clock or by the processor's: what all threads of this process compute."""

    device: torch.device
    clock: str = "wall"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of a piece of work, with the device idle before and after."""
        self._synchronise()
        begin = CLOCKS[self.clock]()
        work()
        self._synchronise()
        return CLOCKS[self.clock]() - begin

    def _synchronise(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def multiplication_rate(watch: Stopwatch, dtype: torch.dtype, repetitions: int = 7) -> float:
    """Floating-point operations a second in the best of several large products; on a GPU with TF32, as convolutions."""
    import torch

    size = 8192 if watch.device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=watch.device, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if watch.device.type == "cuda" else "highest")
    try:
        return 2 * size**3 / min(watch.seconds(lambda: left @ right) for _ in range(repetitions))
    finally:
        torch.set_float32_matmul_precision(before)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
