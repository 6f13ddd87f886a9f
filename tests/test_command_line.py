"""The command lines as a newcomer tries them; each mistake is one clear line, exit status 2, and costs nothing."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import xarray as xr
from networks import recorded, smooth_network, vectors

import analysis.__main__
import dynamics.__main__
import figures.__main__
from dynamics.data import DATASETS, load
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.protocols import Comparison
from dynamics.models import MODELS
from dynamics.pruning import MEASURES, PROTOCOLS
from dynamics.record.store import Store

MAINS = {
    "dynamics": dynamics.__main__.main,
    "analysis": analysis.__main__.main,
    "figures": figures.__main__.main,
}
TINY = ["--width", "0.05", "--epochs", "[1]", "--learning_rates", "[0.1]", "--rounds", "1", "--curvature_every", "4"]
TINY += ["--batch_size", "256", "--probe_samples", "64", "--importance_samples", "64"]
TINY_FILE = "width: 0.05\nepochs: [1]\nlearning_rates: [0.1]\nrounds: 1\nbatch_size: 256\nprobe_samples: 64\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_default_dtype(torch.float64)  # a module's fixture is made before conftest sets it
    path, model = tmp_path_factory.mktemp("original") / "run.zarr", smooth_network()
    recorded(path, model, torch.optim.SGD(model.parameters(), 0.1), vectors(3), curvature_every=1)
    return path


@pytest.fixture
def record(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run.zarr"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("package", "words"), [("analysis", "rank correlation"), ("figures", "report.html")])
def test_help_teaches(package: str, words: str) -> None:
    command = [sys.executable, "-m", package, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert words in " ".join(shown.split())


def shown_help(arguments: list[str], capsys: pytest.CaptureFixture[str], package: str = "dynamics") -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        MAINS[package]([*arguments, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_command_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(f" {command} " in shown_help([], capsys) for command in ("run", "sweep", "show"))
    shown = shown_help(["run"], capsys)
    assert "Importance measure to prune by" in shown
    for field in fields(Experiment):
        assert f"--{field.name} " in shown
        assert f"default: {'null' if field.default is None else field.default})" in shown
    said = set(re.split(r"[\s,:.\"]+", shown.replace("- ", "-")))  # fashion-mnist may be broken
    unsaid = {*MODELS, *DATASETS, *MEASURES, *PROTOCOLS} - said
    assert not unsaid, "the docstring of Experiment is to name them"
    assert "a list stands for each of its values in turn" in shown_help(["sweep"], capsys)
    assert "out/run.zarr" in shown_help(["show"], capsys)


def test_help_of_a_command_shows_its_usage_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "sweep", "protocols", "show"):
        assert shown_help([command], capsys).startswith(f"usage: python -m dynamics {command} ")


def test_help_of_protocol_diff_says_what_it_does_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    shown, comparison = shown_help(["protocol-diff"], capsys, "analysis"), Comparison()
    assert "(required)" not in shown
    for setting in ("model", "measure", "sparsity", "rounds", "width"):
        assert f"{setting} for the fresh network (default: {getattr(comparison, setting)})" in shown


@pytest.mark.long
def test_from_nothing_to_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load("digits")
    few = replace(digits, train=digits.train.sample(512), test=digits.test.sample(64))
    monkeypatch.setattr("dynamics.experiments.running.load", lambda name, **settings: few)
    run, again, drawn = (str(tmp_path / name) for name in ("run.zarr", "again.zarr", "drawn"))
    settings = tmp_path / "settings.yaml"
    settings.write_text(TINY_FILE + "measure: taylor\n")
    assert MAINS["dynamics"](["run", "-o", run, *TINY]) == 0
    assert MAINS["dynamics"](["run", "-o", again, "--config", str(settings), "--curvature_every", "4"]) == 0
    assert MAINS["dynamics"](["show", again]) == 0
    assert "measure taylor" in capsys.readouterr().out
    assert MAINS["analysis"]([run, again]) == 0
    assert "loss decrease" in capsys.readouterr().out
    assert MAINS["figures"]([run, again, "-o", drawn]) == 0
    assert {path.suffix for path in Path(drawn).iterdir()} == {".png", ".pdf", ".html"}


def test_a_sweep_writes_a_record_each(tmp_path: Path) -> None:
    configuration = tmp_path / "grid.yaml"
    configuration.write_text(TINY_FILE + "measure: [none, random]\ncurvature_every: 0\n")
    assert MAINS["dynamics"](["sweep", str(configuration), "-o", str(tmp_path / "out"), "--workers", "0"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["vgg13-digits-none-seed0.zarr", "vgg13-digits-random-0.75-1r-seed0.zarr"]


def experiments_run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[Experiment]:
    """What the command line would run: nothing is trained."""
    seen: list[Experiment] = []
    monkeypatch.setattr("dynamics.__main__.run", lambda experiment, path: seen.append(experiment))
    monkeypatch.setattr(
        "dynamics.experiments.workers.run", lambda experiment, path, **settings: seen.append(experiment)
    )
    for user in ("workers", "sweep"):
        monkeypatch.setattr(f"dynamics.experiments.{user}.data_of", lambda *names: None)
    monkeypatch.setattr("dynamics.experiments.sweep.steps_of", lambda experiment, data: 1)
    in_this_process = ["--workers", "0"] if arguments[0] == "sweep" else []
    assert MAINS["dynamics"]([*arguments, *in_this_process]) == 0
    return seen


SETTINGS = {
    "weight_decay": ("1e-4", 1e-4),
    "learning_rates": ("[1e-1, .01, 1.0E-3]", (0.1, 0.01, 0.001)),
    "epochs": ("[3, 2, 1]", (3, 2, 1)),
    "rounds": ("2", 2),
    "augment": ("false", False),
    "measure": ("none", "none"),
    "root": ("null", None),
    "download": ("true", True),
    "seed": ("7", 7),
}


def test_flags_and_files_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Experiment(**{name: value for name, (_, value) in SETTINGS.items()})
    flags = [part for name, (text, _) in SETTINGS.items() for part in (f"--{name}", text)]
    settings, out = tmp_path / "settings.yaml", str(tmp_path / "out")
    settings.write_text("".join(f"{name}: {text}\n" for name, (text, _) in SETTINGS.items()))
    assert experiments_run(monkeypatch, ["run", "-o", out, *flags]) == [expected]
    assert experiments_run(monkeypatch, ["run", "-o", out, "--config", str(settings)]) == [expected]
    assert experiments_run(monkeypatch, ["sweep", str(settings), "-o", out]) == [expected]
    won = experiments_run(monkeypatch, ["run", "-o", out, "--config", str(settings), "--seed", "8"])
    assert won == [replace(expected, seed=8)]
    assert experiments_run(monkeypatch, ["run", "-o", out]) == [Experiment()]
    fetched = experiments_run(monkeypatch, ["run", "-o", out, "--data", "cifar10", "--download", "--seed", "1"])
    assert fetched == [Experiment(data="cifar10", download=True, seed=1)]


@pytest.mark.parametrize("configuration", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=str)
def test_the_configurations_that_ship_are_valid(
    configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert experiments_run(monkeypatch, ["sweep", str(configuration), "-o", str(tmp_path)])


@pytest.mark.long
def test_a_mistake_reaches_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynamics", "run", "-o", str(tmp_path / "new.zarr"), "--measure", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown measure 'magic': choose one of none, magnitude, ")
    assert done.stderr.count("\n") == 1


MISTAKES = {
    "unknown measure": ("dynamics", ["run", "-o", "{new}", "--measure", "magic"], "unknown measure 'magic'"),
    "unknown model": ("dynamics", ["run", "-o", "{new}", "--model", "vgg"], "unknown model 'vgg'"),
    "unknown flag": ("dynamics", ["run", "-o", "{new}", "--colour", "red"], "--colour"),
    "unknown data": (
        "dynamics",
        ["run", "-o", "{new}", "--data", "mnist"],
        "unknown data 'mnist': choose one of digits",
    ),
    "wrong type": (
        "dynamics",
        ["run", "-o", "{new}", "--rounds", "x"],
        'setting "rounds": Expected a int. Got value: x',
    ),
    "not a number": ("dynamics", ["run", "-o", "{new}", "--temperature", "nan"], "temperature"),
    "not a list": ("dynamics", ["run", "-o", "{new}", "--epochs", "3"], "epochs"),
    "no output": ("dynamics", ["run"], "required: -o/--output; see --help"),
    "no path after -o": ("dynamics", ["run", "-o"], "-o/--output: expected one argument"),
    "an empty path": ("dynamics", ["sweep", "configs/demo.yaml", "-o", ""], "-o/--output is empty: give a folder"),
    "no command": ("dynamics", [], "{run,sweep,protocols,show}"),
    "unknown command": ("dynamics", ["fly"], "invalid choice: 'fly' (choose from 'run', 'sweep', 'protocols', 'show')"),
    "word too many": ("dynamics", ["show", "{record}", "more"], "unrecognized arguments: more"),
    "rounds": ("dynamics", ["run", "-o", "{new}", "--rounds", "99"], "rounds=99 needs at least as many epochs"),
    "seed": ("dynamics", ["run", "-o", "{new}", "--seed", "-1"], "seed must not be negative, got -1"),
    "sparsity": ("dynamics", ["run", "-o", "{new}", "--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
    "device": ("dynamics", ["run", "-o", "{new}", "--device", "abacus"], "device 'abacus' cannot be used"),
    "no GPU to compute on": ("dynamics", ["run", "-o", "{new}", "--device", "meta"], "device 'meta' cannot be used"),
    "damaged data": (
        "dynamics",
        ["run", "-o", "{new}", "--data", "cifar100", "--root", "{folder}"],
        "is damaged or incomplete",
    ),
    "settings not YAML": ("dynamics", ["run", "-o", "{new}", "--config", "{broken}"], "broken.yaml is not YAML: "),
    "settings that say it twice": (
        "dynamics",
        ["run", "-o", "{new}", "--config", "{doubled}"],
        "doubled.yaml is not YAML: seed is set twice",
    ),
    "settings without end": (
        "dynamics",
        ["run", "-o", "{new}", "--config", "{endless}"],
        "endless.yaml is not YAML: found unconstructable recursive node",
    ),
    "settings too deep": ("dynamics", ["run", "-o", "{new}", "--config", "{deep}"], "deep.yaml is not YAML: "),
    "no settings": ("dynamics", ["run", "-o", "{new}", "--config", "{blank}"], "blank.yaml must hold settings like"),
    "settings unknown": ("dynamics", ["run", "-o", "{new}", "--config", "{unknown}"], "'colour'"),
    "settings of wrong type": ("dynamics", ["run", "-o", "{new}", "--config", "{wrong}"], "rounds"),
    "grid unknown": ("dynamics", ["sweep", "{unknown}", "-o", "{new}"], "unknown.yaml: unknown settings colour: an"),
    "grid nearly known": (
        "dynamics",
        ["sweep", "{near}", "-o", "{new}"],
        "settings measur (did you mean measure?): an",
    ),
    "grid on a file": (
        "dynamics",
        ["sweep", "{seed}", "-o", "{broken}"],
        "broken.yaml is a file: the records of a sweep",
    ),
    "grid in a file": (
        "dynamics",
        ["sweep", "{seed}", "-o", "{broken}/new"],
        "broken.yaml is a file: the records of a",
    ),
    "grid of wrong type": (
        "dynamics",
        ["sweep", "{wrong}", "-o", "{new}"],
        "wrong.yaml: rounds must be a whole number, got 'many'",
    ),
    "grid without output": ("dynamics", ["sweep", "{broken}"], "required: -o/--output"),
    "grid of lists": ("dynamics", ["sweep", "{list}", "-o", "{new}"], "must hold settings like `measure: magnitude`"),
    "grid of nothing": ("dynamics", ["sweep", "{nothing}", "-o", "{new}"], "measure is an empty list"),
    "grid in Latin-1": ("dynamics", ["sweep", "{latin}", "-o", "{new}"], "is not YAML: 'utf-8' codec"),
    "grid on no device": ("dynamics", ["sweep", "{abacus}", "-o", "{new}"], "device 'abacus' cannot be used"),
    "grid exists": ("dynamics", ["sweep", "{seed}", "-o", "{folder}"], "none-seed3.zarr exists already"),
    "grid twice": (
        "dynamics",
        ["sweep", "{twice}", "-o", "{new}"],
        "width 1.0 and 2.0 would write the same record vgg13-digits-magnitude-0.75-5r-seed0.zarr: sweep each value",
    ),
    "grid that says it twice": (
        "dynamics",
        ["sweep", "{doubled}", "-o", "{new}"],
        "doubled.yaml is not YAML: seed is set twice",
    ),
    "grid without end": ("dynamics", ["sweep", "{endless}", "-o", "{new}"], "endless.yaml is not YAML: found"),
    "grid too deep": ("dynamics", ["sweep", "{deep}", "-o", "{new}"], "deep.yaml is not YAML: maximum recursion depth"),
    "grid of no time": ("dynamics", ["sweep", "{month}", "-o", "{new}"], "month.yaml is not YAML: month must be in"),
    "grid on too few": (
        "dynamics",
        ["sweep", "{seed}", "-o", "{new}", "--workers", "-1"],
        "workers must be a whole number",
    ),
    "existing": ("dynamics", ["run", "-o", "{record}", *TINY], "exists already"),
    "no data": ("dynamics", ["run", "-o", "{new}", "--data", "cifar10", "--root", "{folder}"], "--download"),
    "no configuration": ("dynamics", ["run", "-o", "{new}", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "a folder": ("dynamics", ["sweep", "{folder}", "-o", "{new}"], "is not a plain file: give a YAML file"),
    "no grid": ("dynamics", ["sweep", "nowhere.yaml", "-o", "{new}"], "no configuration file nowhere.yaml"),
    "broken grid": ("dynamics", ["sweep", "{broken}", "-o", "{new}"], "is not YAML"),
    "show a text": ("dynamics", ["show", "{broken}"], "is not a thetadot record"),
    "show a folder": ("dynamics", ["show", "{data}"], "is not a thetadot record"),
    "show a folder of records": ("dynamics", ["show", "{folder}"], "is a folder of records, not a record: give"),
    "show without a record": ("dynamics", ["show"], "required: record"),
    "show nothing": ("dynamics", ["show", "{new}"], "no record at"),
    "other version": ("dynamics", ["show", "{future}"], "has schema version 99"),
    "grid on no number": (
        "dynamics",
        ["sweep", "{seed}", "-o", "{new}", "--workers", "x"],
        "Expected a int. Got value: x",
    ),
    "run in a file": (
        "dynamics",
        ["run", "-o", "{broken}/run.zarr", *TINY],
        "broken.yaml is a file: records need a folder",
    ),
    "compare in a file": ("dynamics", ["protocols", "-o", "{broken}"], "broken.yaml is a file: records need a folder"),
    "show condensed": ("dynamics", ["show", "{zip}"], "`python -m analysis` read condensed records, named *.zarr.zip"),
    "analyse a zip": ("analysis", ["{zip}"], "read condensed records, named *.zarr.zip"),
    "analyse half a zip": ("analysis", ["{half}"], "or is damaged (File is not a zip file); copy it again"),
    "analyse with what": ("analysis", ["{record}", "--colour"], "unrecognized arguments: --colour; see --help"),
    "draw with what": ("figures", ["{record}", "--colour"], "; see --help"),
    "condense into a folder": (
        "analysis",
        ["condense", "{record}", "-o", "{folderzip}"],
        "is a folder: condensed records",
    ),
    "condense into a file": (
        "analysis",
        ["condense", "{record}", "-o", "{broken}/x.zarr.zip"],
        "broken.yaml is a file: condensed records need a folder",
    ),
    "analyse nothing": ("analysis", ["{new}"], "no record at"),
    "analyse no runs": ("analysis", [], "required: runs"),
    "analyse a text": ("analysis", ["{broken}"], "is not a thetadot record"),
    "analyse the future": ("analysis", ["{future}"], "has schema version 99"),
    "analyse emptiness": ("analysis", ["{empty}"], "the record holds nothing yet"),
    "draw nothing": ("figures", ["{new}", "-o", "{folder}"], "no record at"),
    "draw nowhere": ("figures", ["{record}"], "output"),
    "draw on a file": (
        "figures",
        ["{record}", "-o", "{broken}"],
        "broken.yaml is a file: figures and report need a folder",
    ),
    "draw in a file": ("figures", ["{record}", "-o", "{broken}/new"], "broken.yaml is a file: figures and report need"),
    "draw emptiness": ("figures", ["{empty}", "-o", "{folder}"], "the record holds nothing yet"),
}


FILES = {
    "broken": b"a: [1\nb: {",
    "unknown": b"colour: red\n",
    "wrong": b"rounds: many\n",
    "near": b"measur: none\n",
    "list": b"- measure\n",
    "nothing": b"measure: []\n",
    "latin": "model: größe\n".encode("latin-1"),
    "abacus": b"device: abacus\n",
    "seed": b"measure: none\nseed: [3, 4]\n",
    "doubled": b"measure: none\nseed: [3, 4]\nepochs: [1]\nlearning_rates: [1]\nseed: 5\n",
    "endless": b"grids: &all\n- *all\n",
    "deep": b"seed: " + b"[" * 2000 + b"]" * 2000,
    "month": b"seed: 2020-13-01\n",
    "blank": b"",
    "twice": b"width: [1, 2]\nmeasure: magnitude\n",
}


def prepared(folder: Path) -> dict[str, Path]:
    """What the mistakes are made with: files, records that cannot be read, damaged data, an existing record."""
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_bytes(text)
    Store(folder / "future.zarr", {"schema_version": 99})
    Store(folder / "empty.zarr", {"schema_version": 1})
    (folder / "sweep.zip").write_bytes(b"PK")
    (folder / "half.zarr.zip").write_bytes(b"PK")
    (folder / "folder.zarr.zip").mkdir()
    for taken in ("vgg13-digits-none-seed3.zarr", "cifar-100-python"):
        (folder / taken).mkdir()
        (folder / taken / "train").write_text("precious")
    records = {
        "new": "new.zarr",
        "record": "run.zarr",
        "folder": "",
        "data": "cifar-100-python",
        "future": "future.zarr",
        "empty": "empty.zarr",
        "zip": "sweep.zip",
        "half": "half.zarr.zip",
        "folderzip": "folder.zarr.zip",
    }
    return {name: folder / place for name, place in (records | {name: f"{name}.yaml" for name in FILES}).items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(
    mistake: str, tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, arguments, words = MISTAKES[mistake]
    places = {name: str(path) for name, path in prepared(tmp_path).items()}
    before = contents(tmp_path)
    assert MAINS[package]([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    line = shown.err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in shown.err
    assert len([part for part in shown.err.splitlines() if part.strip()]) == 1
    assert contents(tmp_path) == before
    assert xr.open_datatree(record)["steps"].sizes["step"] == 3


def refusal(package: str, arguments: list[str], places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command says which cannot do what it is asked to."""
    assert MAINS[package]([argument.format(**places) for argument in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


OUTPUTS = {
    "sweep": ("dynamics", ["sweep", "{seed}", "-o", "{new}"], "the records of a sweep"),
    "run": ("dynamics", ["run", "-o", "{new}", *TINY], "records"),
    "protocols": ("dynamics", ["protocols", "-o", "{new}"], "records"),
    "condense": ("analysis", ["condense", "{record}", "-o", "{folder}/x.zarr.zip"], "condensed records"),
    "figures": ("figures", ["{record}", "-o", "{new}"], "figures and report"),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_folder_that_may_not_be_written_is_said_before_anything_is_computed(
    command: str, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, arguments, what = OUTPUTS[command]
    places, before = {name: str(path) for name, path in prepared(tmp_path).items()}, contents(tmp_path)
    monkeypatch.setattr("dynamics.places.os.access", lambda place, how: False)
    said = refusal(package, arguments, places, capsys)
    assert f"error: you may not write into {tmp_path}: {what} need a folder of your own, such as out/" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_folder_that_is_a_link_to_what_is_not_there_is_said_at_once(
    command: str, tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one on a disk that is not mounted."""
    package, arguments, what = OUTPUTS[command]
    places = {name: str(path) for name, path in prepared(tmp_path).items()}
    (tmp_path / "scratch").symlink_to(tmp_path / "unmounted")
    places |= {"new": f"{tmp_path}/scratch/new", "folder": f"{tmp_path}/scratch"}
    before = contents(tmp_path)
    said = refusal(package, arguments, places, capsys)
    assert f"{tmp_path}/scratch is a link to {tmp_path}/unmounted, which is not there: {what} need" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("column", ["steps/grad_sqnorm", "steps/skipped", "steps/step", "curvature/loss_after"])
def test_a_chunk_that_cannot_be_decoded_is_named_by_every_command_that_reads_it(
    column: str, tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shutil.copytree(record, tmp_path / "whole.zarr")
    (chunk,) = (file for file in (record / column).iterdir() if file.name.startswith("0"))
    content = bytearray(chunk.read_bytes())
    content[8:12] = b"\xff\xff\xff\x7f"  # the size of a block, where Blosc looks for it
    chunk.write_bytes(content)
    said = []
    for package, arguments in (
        ("dynamics", ["show", str(record)]),
        ("analysis", [str(whole), str(record)]),
        ("analysis", ["condense", str(whole), str(record), "-o", str(tmp_path / "all.zarr.zip")]),
        ("figures", [str(record), "-o", str(tmp_path / "figures")]),
    ):
        if MAINS[package](arguments):
            said.append(capsys.readouterr().err.rstrip("\n").splitlines()[-1])
    assert len(said) == (4 if column == "steps/step" else 3)  # `show` looks at few columns
    assert all(line.startswith(f"error: {chunk} is damaged (error during blosc") for line in said), said
    assert not (tmp_path / "all.zarr.zip").exists()


@pytest.mark.parametrize(
    ("package", "arguments", "where"),
    [
        ("analysis", ["{record}"], "analysis.__main__.overview"),
        ("analysis", ["condense", "{record}", "-o", "{new}.zip"], "analysis.__main__.condense"),
        ("figures", ["{record}", "-o", "{new}"], "figures.__main__.write_report"),
    ],
)
def test_an_interruption_is_one_line(
    package: str,
    arguments: list[str],
    where: str,
    tmp_path: Path,
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*given: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    places = {"record": str(record), "new": str(tmp_path / "new.zarr")}
    assert MAINS[package]([argument.format(**places) for argument in arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1:] == ["interrupted"]
