"""The examples of docs/sweeps.md: on a queue that starts each job at once, the grid is recorded."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from snippets import run_snippets

from dynamics import open_run
from dynamics.grid import grid

jobqueue = pytest.importorskip("dask_jobqueue")
TEXT = Path(__file__).parents[1].joinpath("docs", "sweeps.md").read_text(encoding="utf-8")

SBATCH = """#!/bin/sh
setsid sh "$1" > "$1.log" 2>&1 &
echo $! > {folder}/job
echo Submitted batch job $!
"""
SCANCEL = "#!/bin/sh\nkill -- -$1\n"


def test_the_number_of_runs_is_the_one_it_says() -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert f"This is {len(grid(yaml.safe_load(settings)))} runs" in TEXT


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands of SLURM that start a job here, at once."""
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    yield
    if (tmp_path / "job").exists():
        with suppress(ProcessLookupError):
            os.killpg(int((tmp_path / "job").read_text()), signal.SIGKILL)


@pytest.mark.usefixtures("queue")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_examples_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    run_snippets(TEXT.replace("maximum_jobs=20", "maximum_jobs=1"))
    shown = capsys.readouterr().out
    for line in ("#SBATCH -p gpu", "#SBATCH -t 08:00:00", "#SBATCH --gres=gpu:1", "export THETADOT_DATA=$HOME/data"):
        assert line in shown
    assert "--nthreads 1" in shown
    assert "all are recorded" in shown
    assert len([open_run(path) for path in tmp_path.glob("out/sweep/*.zarr")]) == 2


def test_a_job_of_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (written,) = re.findall(r"`(PBSCluster\(.*?\))`", TEXT)
    cluster = eval(written.replace("...", 'walltime="01:00:00"'), {"PBSCluster": jobqueue.PBSCluster})
    script = cluster.job_script()
    cluster.close()
    for line in ("#PBS -q gpu", "#PBS -l select=1:ncpus=4:ngpus=1:mem=16gb", "#PBS -l walltime=01:00:00"):
        assert line in script
