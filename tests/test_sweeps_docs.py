"""The examples of docs/sweeps.md, as far as the scripts of their jobs go: no queue is here."""

import re
from pathlib import Path

import pytest
import yaml
from snippets import run_snippets

from dynamics.experiments.grid import grid

# Clusters end in the background, and another one on this machine may have the port of the dashboard.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:(?s)Port .* already in use")
jobqueue = pytest.importorskip("dask_jobqueue")
TEXT = Path(__file__).parents[1].joinpath("docs", "sweeps.md").read_text(encoding="utf-8")


def test_the_number_of_runs_is_the_one_it_says() -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert f"This makes {len(grid(yaml.safe_load(settings)))} runs" in TEXT


def test_examples_run_as_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}
    monkeypatch.setattr(jobqueue.SLURMCluster, "adapt", lambda cluster, **jobs: asked.update(jobs))
    monkeypatch.setattr(
        "dynamics.experiments.sweep.sweep", lambda runs, folder, scheduler: asked.update({scheduler: len(runs)})
    )
    run_snippets(TEXT)
    shown = capsys.readouterr().out
    for line in ("#SBATCH -p gpu", "#SBATCH -t 08:00:00", "#SBATCH --gres=gpu:1", "export THETADOT_DATA=$HOME/data"):
        assert line in shown
    assert "--nthreads 1" in shown
    assert "--no-nanny" in shown
    assert "all are recorded" in shown
    (scheduler,) = {*asked} - {"minimum_jobs", "maximum_jobs"}
    assert scheduler.startswith("tcp://")
    assert asked == {"minimum_jobs": 1, "maximum_jobs": 20, scheduler: 2}


def test_a_job_of_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (written,) = re.findall(r"`(PBSCluster\(.*?\))`", TEXT)
    cluster = eval(written.replace("...", 'walltime="01:00:00"'), {"PBSCluster": jobqueue.PBSCluster})
    script = cluster.job_script()
    cluster.close()
    for line in ("#PBS -q gpu", "#PBS -l select=1:ncpus=4:ngpus=1:mem=16gb", "#PBS -l walltime=01:00:00"):
        assert line in script
