"""Who reads the first lines only of what a command prints has no complaint."""

import subprocess
import sys
from pathlib import Path

import pytest

RECORDS = Path(__file__).parents[1] / "docs/records/full_width/rounds_5_seeds_3_4.zarr.zip"


@pytest.mark.long
def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "analysis", str(RECORDS), "--format", "latex"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    _, said = running.communicate()
    assert (running.returncode, said) == (0, "")
