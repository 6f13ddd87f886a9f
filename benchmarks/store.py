"""What a record costs, each figure beside its floor, measured in the same run: ``python benchmarks/store.py``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import xarray as xr
from machine import describe

from dynamics import open_run, schema
from dynamics.record.store import Store

LAYERS, BLOCK = 60, 256
NAMES = [f"quantity_{number:02}" for number in range(40)]
TABLE = {name: schema.Quantity(name, name, (0, 0), 0, ("steps",), ("layer",), "one of the benchmark") for name in NAMES}


def block(start: int, rows: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows as a training gives them: positive, of slowly changing size, 24 random bits each."""
    size = np.exp(random.normal(size=(rows, LAYERS)).astype(np.float32)).astype(np.float64)
    return {"step": np.arange(start, start + rows)} | {name: size * (1 + number) for number, name in enumerate(NAMES)}


def write(path: Path, steps: int, rows: int) -> list[float]:
    """Seconds that each block of a record took."""
    random, seconds = np.random.default_rng(0), []
    store = Store(path, {"schema_version": schema.SCHEMA_VERSION})
    store.write_coordinate("steps", "layer", "layer", np.array([f"layer{number}" for number in range(LAYERS)]))
    for start in range(0, steps, rows):
        values = block(start, min(rows, steps - start), random)
        begin = time.perf_counter()
        store.append("steps", values)
        store.commit()
        seconds.append(time.perf_counter() - begin)
    store.close()
    return seconds


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several times in seconds: of what stands in the page cache, without others' interruptions."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second at which a file of the size is written (as the record is: not waiting for the disk itself)."""
    data = os.urandom(size)
    return size / timed(lambda: (folder / "floor").write_bytes(data))


def files_read(path: Path, name: str) -> int:
    """Read the bytes of a quantity's files, and nothing else: the floor of reading it."""
    return sum(len(file.read_bytes()) for file in (path / "steps" / name).iterdir())


def memory(steps: int) -> float:
    """Peak MiB of a process that writes so many steps in blocks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--memory", str(steps), "--folder", folder]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def row(what: str, value: float, floor: float, of: str) -> None:
    """A line of the table."""
    print(f"{what:<46}{value:>10.4f}{floor:>10.4f}{value / floor:>8.1f} ×  {of}", flush=True)


def measure(folder: Path, steps: int) -> None:
    """The lines of the table for a record of so many steps."""
    path, name, raw = folder / "run.zarr", NAMES[7], BLOCK * len(NAMES) * LAYERS * 8
    each = write(path, 20 * BLOCK, BLOCK)
    floor = raw / disk_rate(folder, raw)
    row(
        "write a step in blocks of 256, ms", 1e3 * np.mean(each) / BLOCK, 1e3 * floor / BLOCK, "its bytes into one file"
    )
    shutil.rmtree(path)
    write(path, steps, 8 * 2048)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    floor = steps * len(NAMES) * LAYERS * 4
    row(f"size of {steps:.0e} steps, GB", size / 1e9, floor / 1e9, "their 24 random bits, in 4 bytes")
    floor = timed(lambda: ((path / ".zmetadata").read_bytes(), files_read(path, "step")))
    opened = timed(lambda: xr.open_datatree(path, engine="zarr"))
    row(f"open {steps:.0e} steps by xarray, s", opened, floor, "reading the bytes of .zmetadata and step")
    row(f"open {steps:.0e} steps by open_run, s", timed(lambda: open_run(path)), opened, "xarray's, without checks")
    read, floor = timed(lambda: open_run(path)["steps"][name].values), timed(lambda: files_read(path, name))
    row(f"open, and read one of {steps:.0e} × {LAYERS}, s", read, floor, "reading its files' bytes")
    row("go on with it: Store.reopen, s", timed(lambda: Store.reopen(path).close()), opened, "opening it by xarray")
    shutil.rmtree(path)


def report(folder: Path, long: bool) -> None:
    """Measure and print."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("zarr", "numcodecs", "xarray", "numpy"))
    print(f"{describe()}, {packages}")
    print(f"{len(NAMES)} quantities × {LAYERS} layers in float64; a figure, its floor and what that is\n")
    for steps in (100_000, 1_000_000) if long else (100_000,):
        measure(folder, steps)
    few, many = memory(20_000), memory(200_000)
    row("peak memory of writing 2e+05 steps, MiB", many, few, "of writing 2e+04")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="also 1e6 steps: about 10 GB of disk")
    parser.add_argument("--folder", help="where records are written; default: the system's folder for temporary files")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with mock.patch.dict(schema.QUANTITIES, TABLE):
        if arguments.memory:
            write(Path(arguments.folder) / "memory.zarr", arguments.memory, BLOCK)
            status = Path("/proc/self/status").read_text()  # getrusage's figure is the parent's where that is larger
            print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        else:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                report(Path(folder), arguments.long)


if __name__ == "__main__":
    main()
