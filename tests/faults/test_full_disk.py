"""A disk that is really full, a small tmpfs, and freed again. Needs the right to mount one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import writers
import xarray as xr

from dynamics.record import writer
from dynamics.record.buffer import Buffer
from dynamics.record.store import Store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                pass
    return ballast


def add(buffer: Buffer, start: int, stop: int) -> None:
    for step in range(start, stop):
        row = writers.rows(step, step + 1)
        buffer.add("steps", {"step": step, "loss": row["loss"].item(), "grad_sqnorm": row["grad_sqnorm"][0]})


def test_a_full_disk_costs_nothing_once_it_is_freed(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.01)
    path = small_disk / "run.zarr"
    buffer = Buffer(Store(path, writers.ATTRIBUTES))
    add(buffer, 0, 100)
    buffer.flush(wait=True)
    ballast = fill(small_disk)
    for start in range(100, 3000, 100):
        add(buffer, start, start + 100)
        buffer.flush(wait=True)
    assert "No space left on device" in str(buffer.failure)
    np.testing.assert_array_equal(xr.open_datatree(path)["steps"].loss, writers.rows(0, 100)["loss"])
    ballast.unlink()
    while buffer.failure is not None:  # tried again, also without new rows
        time.sleep(1e-3)
    np.testing.assert_array_equal(xr.open_datatree(path)["steps"].loss, writers.rows(0, 3000)["loss"])
    buffer.close()


def test_a_record_on_a_disk_that_stays_full_is_gone_on_with_later(small_disk: Path) -> None:
    path = small_disk / "run.zarr"
    buffer = Buffer(Store(path, writers.ATTRIBUTES))
    add(buffer, 0, 100)
    buffer.flush(wait=True)
    ballast = fill(small_disk)
    add(buffer, 100, 2500)
    with pytest.warns(UserWarning, match=r"run\.zarr is incomplete: \d+ rows since .* No space left on device"):
        buffer.close()
    ballast.unlink()
    again = Store.reopen(path)
    start = again.lengths["steps"]
    buffer = Buffer(again)
    add(buffer, start, 2500)
    buffer.close()
    found = xr.open_datatree(path)["steps"]
    for name, values in writers.rows(0, 2500).items():
        np.testing.assert_array_equal(found[name], values)
