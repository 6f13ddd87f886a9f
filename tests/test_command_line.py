"""The command lines as a newcomer tries them; each mistake is one clear line, exit status 2, and costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr
from networks import recorded, smooth_network, vectors

import analysis.__main__
import dynamics.__main__
import figures.__main__
from dynamics.store import Store

MAINS = {
    "dynamics": dynamics.__main__.main,
    "analysis": analysis.__main__.main,
    "figures": figures.__main__.main,
}
TINY = ["--width", "0.05", "--epochs", "[1]", "--learning_rates", "[0.1]", "--rounds", "1", "--curvature_every", "4"]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    model = smooth_network()
    recorded(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1), vectors(3), curvature_every=1)
    return tmp_path / "run.zarr"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("package", MAINS)
def test_help_teaches(package: str) -> None:
    command = [sys.executable, "-m", package, *(["run"] if package == "dynamics" else []), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = {"dynamics": "Importance measure to prune by", "analysis": "rank correlation", "figures": "report.html"}
    assert words[package] in " ".join(shown.split())


def test_from_nothing_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, again, drawn = (str(tmp_path / name) for name in ("run.zarr", "again.zarr", "drawn"))
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "width: 0.05\nepochs: [1]\nlearning_rates: [0.1]\nrounds: 1\nmeasure: taylor\nprobe_samples: 64\n"
    )
    assert MAINS["dynamics"](["run", "-o", run, *TINY, "--probe_samples", "64"]) == 0
    assert MAINS["dynamics"](["run", "-o", again, "--config", str(settings), "--curvature_every", "4"]) == 0
    assert MAINS["dynamics"](["show", again]) == 0
    assert "measure taylor" in capsys.readouterr().out
    assert MAINS["analysis"]([run, again]) == 0
    assert "loss decrease" in capsys.readouterr().out
    assert MAINS["figures"]([run, again, "-o", drawn]) == 0
    assert {path.suffix for path in Path(drawn).iterdir()} == {".png", ".pdf", ".html"}


def test_a_sweep_writes_a_record_each(tmp_path: Path) -> None:
    configuration = tmp_path / "grid.yaml"
    configuration.write_text(
        "width: 0.05\nepochs: [1]\nlearning_rates: [0.1]\nrounds: 1\nmeasure: [none, random]\ncurvature_every: 0\n"
    )
    assert MAINS["dynamics"](["sweep", str(configuration), "-o", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["vgg13-digits-none-seed0.zarr", "vgg13-digits-random-0.75-1r-seed0.zarr"]


MISTAKES = {
    "unknown measure": ("dynamics", ["run", "-o", "{new}", "--measure", "magic"], "unknown measure 'magic'"),
    "unknown model": ("dynamics", ["run", "-o", "{new}", "--model", "vgg"], "unknown model 'vgg'"),
    "unknown flag": ("dynamics", ["run", "-o", "{new}", "--colour", "red"], "--colour"),
    "wrong type": ("dynamics", ["run", "-o", "{new}", "--rounds", "many"], "rounds"),
    "no output": ("dynamics", ["run"], "output"),
    "no command": ("dynamics", [], "run"),
    "sparsity": ("dynamics", ["run", "-o", "{new}", "--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
    "device": ("dynamics", ["run", "-o", "{new}", "--device", "abacus"], "device 'abacus' cannot be used"),
    "existing": ("dynamics", ["run", "-o", "{record}", *TINY], "exists already"),
    "no data": ("dynamics", ["run", "-o", "{new}", "--data", "cifar10", "--root", "{folder}"], "--download"),
    "no configuration": ("dynamics", ["run", "-o", "{new}", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "no grid": ("dynamics", ["sweep", "nowhere.yaml", "-o", "{new}"], "no configuration file nowhere.yaml"),
    "broken grid": ("dynamics", ["sweep", "{broken}", "-o", "{new}"], "is not YAML"),
    "show nothing": ("dynamics", ["show", "{new}"], "no record at"),
    "other version": ("dynamics", ["show", "{future}"], "has schema version 99"),
    "analyse nothing": ("analysis", ["{new}"], "no record at"),
    "analyse no runs": ("analysis", [], "required: runs"),
    "analyse a text": ("analysis", ["{broken}"], "is not a thetadot record"),
    "analyse the future": ("analysis", ["{future}"], "has schema version 99"),
    "analyse emptiness": ("analysis", ["{empty}"], "/"),
    "draw nothing": ("figures", ["{new}", "-o", "{folder}"], "no record at"),
    "draw nowhere": ("figures", ["{record}"], "output"),
    "draw on a file": ("figures", ["{record}", "-o", "{broken}"], "broken.yaml"),
    "draw emptiness": ("figures", ["{empty}", "-o", "{folder}"], "/"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(
    mistake: str, tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, arguments, words = MISTAKES[mistake]
    (tmp_path / "broken.yaml").write_text("a: [1\nb: {")
    Store(tmp_path / "future.zarr", {"schema_version": 99})
    Store(tmp_path / "empty.zarr", {"schema_version": 1})
    places = {"new": "new.zarr", "record": "run.zarr", "folder": "", "broken": "broken.yaml", "future": "future.zarr",
              "empty": "empty.zarr"}  # fmt: skip
    places = {name: str(tmp_path / place) for name, place in places.items()}
    before = contents(tmp_path)
    assert MAINS[package]([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    line = shown.err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in shown.err
    assert len([part for part in shown.err.splitlines() if part.strip() and "figure/s" not in part]) == 1
    assert contents(tmp_path) == before
    assert xr.open_datatree(record)["steps"].sizes["step"] == 3
