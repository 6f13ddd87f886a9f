"""Condensed records say what the records say, to single precision; and opening them runs nobody's code."""

import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import convolutional_network, images, plain_step
from recorded_runs import recorded
from synthetic_runs import runs as synthetic

import analysis
from analysis.__main__ import main
from dynamics import Recorder, RecordError, open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, xr.DataTree]:
    return recorded(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, xr.DataTree]) -> Path:
    return analysis.condense(runs, tmp_path_factory.mktemp("written") / "records" / "small.zarr.zip")


@pytest.fixture
def file(tmp_path: Path, written: Path) -> Path:
    """The file, for each test to change."""
    (tmp_path / "records").mkdir()
    return Path(shutil.copy(written, tmp_path / "records"))


ANALYSES = (
    analysis.loss_decrease,
    analysis.stability,
    analysis.network_norm_rate,
    analysis.training_curve,
    analysis.outcome,
    analysis.agreement,
    analysis.pruning_effect,
    analysis.pruning_effect_per_layer,
    analysis.removed_decrease,
    analysis.filters_left,
    analysis.removal_curve,
    analysis.score_noise,
    analysis.scale_invariance,
)


@pytest.mark.parametrize("analyse", ANALYSES, ids=lambda analyse: analyse.__name__)
def test_analyses_are_those_of_the_records(analyse: Callable, runs: dict[str, xr.DataTree], file: Path) -> None:
    condensed = analysis.expand(file)
    assert list(condensed) == list(runs)
    (_, whole), (_, ours) = (analysis.each(those, analyse).popitem() for those in (runs, condensed))
    assert list(ours) == list(whole)
    for name, values in whole.items():
        assert ours[name].dims == values.dims
        size = float(np.abs(values).max())
        np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=2e-6 * size)


def test_the_layers_of_the_network_add_up(runs: dict[str, xr.DataTree], file: Path) -> None:
    whole, ours = runs["none"]["steps"], analysis.expand(file)["none"]["steps"]
    assert ours.layer.values.tolist() == ["network"]
    assert whole.sizes["layer"] > 1
    np.testing.assert_allclose(ours.grad_sqnorm[:, 0], whole.grad_sqnorm.sum("layer"), rtol=1e-6)
    np.testing.assert_array_equal(ours.param_sqnorm[:, 0], whole.param_sqnorm.sum("layer"))  # in double precision
    assert set(ours.learning_rate.values.ravel().tolist()) == {0.5}


def test_the_balance_of_the_norm_survives(runs: dict[str, xr.DataTree], file: Path) -> None:
    whole, ours = (analysis.norm_balance(those["none"]) for those in (runs, analysis.expand(file)))
    measured = whole.measured.sum("layer", skipna=False)
    np.testing.assert_allclose(ours.measured[:, 0], measured, rtol=1e-9)
    np.testing.assert_allclose(ours.residual[:-1, 0], 0, atol=1e-6 * float(np.abs(measured).max()))


def test_what_single_precision_does_not_hold_stays_as_it_is(tmp_path: Path) -> None:
    """Of a training that diverged in double precision, say, or of the first of many layers."""
    values = {"grad_sqnorm": [1.0, 1e60, np.inf], "update_sqnorm": [1e-50, 1.0, 0.0], "loss": [1.0, np.inf, np.nan]}
    steps = xr.Dataset({name: ("step", of) for name, of in values.items()}, {"step": np.arange(3)})
    run = xr.DataTree.from_dict({"/steps": steps})
    ours = analysis.expand(analysis.condense({"run": run}, tmp_path / "one.zarr.zip"))["run"]["steps"].to_dataset()
    xr.testing.assert_equal(ours, steps)
    assert [ours[name].dtype for name in values] == [np.float64, np.float64, np.float32]


def test_layers_stay_where_their_sums_would_say_less(tmp_path: Path) -> None:
    model, batches = convolutional_network(), images(4)
    rates = [{"params": child.parameters(), "lr": 0.1 * (number + 1)} for number, child in enumerate(model)
             if list(child.parameters())]  # fmt: skip
    optimizer = torch.optim.SGD(rates)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=2) as recorder:
        for batch in recorder.watch(batches):
            recorder.log(loss=plain_step(model, optimizer, batch))
    run = open_run(tmp_path / "run.zarr")
    two = {"first": run, "second": run}
    ours = analysis.expand(analysis.condense(two, tmp_path / "two.zarr.zip"))["second"]
    assert ours["steps"].layer.values.tolist() == run["steps"].layer.values.tolist()
    np.testing.assert_allclose(analysis.norm_rate(ours).first_order, analysis.norm_rate(run).first_order, rtol=1e-5)


def test_a_layer_that_moves_at_a_rate_of_zero_stays_beside_the_others(tmp_path: Path) -> None:
    """With a dampening of 1 the flow does not go on, but what momentum holds from before still moves the layer."""
    model, batches = convolutional_network(), images(4)
    groups = [{"params": child.parameters()} for child in model if list(child.parameters())]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0) as recorder:
        for batch in recorder.watch(batches):
            plain_step(model, optimizer, batch)
            optimizer.param_groups[0]["dampening"] = 1.0
    run = open_run(tmp_path / "run.zarr")
    assert (run["steps"].update_sqnorm > 0).all()
    assert (run["steps"].flow_step[1:] == 0).any("layer").all()
    two = {"first": run, "second": run}
    ours = analysis.expand(analysis.condense(two, tmp_path / "two.zarr.zip"))["second"]
    assert ours["steps"].layer.values.tolist() == run["steps"].layer.values.tolist()


def test_claims_and_tables_are_those_of_the_records(tmp_path: Path) -> None:
    whole = synthetic(2)
    ours = analysis.expand(analysis.condense(whole, tmp_path / "many.zarr.zip"))
    claims, expected = analysis.claims(ours), analysis.claims(whole)
    assert (claims.verdict == expected.verdict).all()
    np.testing.assert_allclose(claims.value, expected.value, rtol=1e-5, atol=1e-7)
    assert analysis.accuracy_table(ours).equals(analysis.accuracy_table(whole))


def test_attributes_tell_where_each_record_comes_from(runs: dict[str, xr.DataTree], file: Path) -> None:
    for label, run in analysis.expand(file).items():
        assert run.attrs == runs[label].attrs
        assert run["steps"].grad_sqnorm.attrs == runs[label]["steps"].grad_sqnorm.attrs


def test_open_runs_takes_the_file_for_its_runs(file: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert list(analysis.open_runs([str(file)])) == ["none", "magnitude"]
    again = file.with_name("again.zarr.zip")
    assert main(["condense", *map(str, [folder / "none.zarr", folder / "magnitude.zarr"]), "-o", str(again)]) == 0
    assert "wrote 2 runs" in capsys.readouterr().out
    assert again.read_bytes() == file.read_bytes()  # the content alone decides
    assert main(["condense", str(folder / "none.zarr"), "-o", str(file.with_name("x.zip"))]) == 2
    assert "file named *.zarr.zip" in capsys.readouterr().err


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def altered(file: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return file


def metadata(content: dict[str, bytes], change: Callable[[dict], object]) -> None:
    found = json.loads(content[".zmetadata"])
    change(found["metadata"])
    content[".zmetadata"] = json.dumps(found).encode()


def test_a_stranger_s_code_does_not_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)

    def poison(content: dict[str, bytes]) -> None:
        codecs = {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "compressor": None,
                  "shape": [1], "chunks": [1], "fill_value": None}  # fmt: skip
        metadata(content, lambda found: found["epochs.0/seconds/.zarray"].update(codecs))
        content["epochs.0/seconds/0"] = pickle.dumps(Payload(file.parent / "ran"))

    with pytest.raises(RecordError, match=r"stored with codecs .*'pickle'"):
        analysis.expand(altered(file, poison))
    assert not (file.parent / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("epochs.0/seconds/0"), "damaged: epochs.0/seconds/0 is missing"),
        (lambda content: content.pop(".zmetadata"), "not a file of condensed records"),
        (lambda content: content.update({".zmetadata": b"{"}), "cannot be read"),
        (lambda content: metadata(content, lambda found: found[".zattrs"].pop("runs")), "does not name its runs"),
        (lambda content: metadata(content, lambda found: found[".zattrs"].update(runs="[3]")), "name its runs"),
        (lambda content: metadata(content, lambda found: found[".zattrs"].update(schema_version=0)), "version 0"),
        (lambda content: metadata(content, lambda found: found.update({"pie.0/.zgroup": {}})), "never writes"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_said(file: Path, change: Callable[[dict[str, bytes]], object], message: str) -> None:
    with pytest.raises(RecordError, match=message) as said:
        analysis.expand(altered(file, change))
    assert "\n" not in str(said.value)


def test_a_file_that_was_cut_or_changed_is_said(file: Path) -> None:
    whole = file.read_bytes()
    inside = whole.index(b".zmetadata") + 200  # of what is stored: a zip has no checksum of its own fields
    for content in (b"", whole[: len(whole) // 2], whole[:inside] + bytes([whole[inside] ^ 255]) + whole[inside + 1 :]):
        file.write_bytes(content)
        with pytest.raises(RecordError, match=r"small\.zarr\.zip"):
            analysis.expand(file)
    file.unlink()
    with pytest.raises(RecordError, match="no records at"):
        analysis.open_runs([str(file)])


@pytest.mark.skipif(sys.platform == "win32", reason="files are limited as POSIX has it")
def test_a_disk_that_is_full_leaves_the_file_that_was_there_and_no_part_of_another(
    runs: dict[str, xr.DataTree], file: Path
) -> None:
    import resource

    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            analysis.condense(runs, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
