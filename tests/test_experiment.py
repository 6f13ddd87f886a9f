"""An experiment follows the protocol, is reproducible bit for bit, and compares measures on the same training."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from experiments import assert_agree, few_digits, recorded

from analysis import (
    filters_left,
    outcome,
    removal_curve,
    scale_invariance,
    score_noise,
    training_curve,
)
from dynamics.data import Data
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.running import run
from dynamics.models import MODELS, build
from dynamics.pruning import MEASURES, PROTOCOLS, Pruner, share_left

TINY = Experiment(
    width=0.05, rounds=2, epochs=(2, 1), learning_rates=(0.1, 0.01), sparsity=0.5, batch_size=32,
    importance_samples=64, probe_samples=32, curvature_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return few_digits(64, 64)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, data: Data) -> xr.DataTree:
    """The record of TINY in float64, as in the tests: a module's fixture is made before they set it."""
    torch.set_default_dtype(torch.float64)
    return recorded(tmp_path_factory.mktemp("experiment") / "run.zarr", TINY, data)


def test_the_record_of_a_run(record: xr.DataTree) -> None:
    assert record["steps"].sizes["step"] == 6
    assert record["curvature"].step.values.tolist() == [0, 2, 4]
    assert record["steps"].epoch.values.tolist() == [0, 0, 1, 1, 2, 2]
    rates = record["steps"].learning_rate
    np.testing.assert_allclose(rates.T, [[0.1] * 4 + [0.01] * 2] * rates.sizes["layer"])
    assert all(np.isfinite(record["steps"][name]).all() for name in ("loss", "param_sqnorm", "grad_sqnorm"))
    assert training_curve(record).epoch.values.tolist() == [1, 2, 3]
    assert record["pruning"]["step"].values.tolist() == [2, 4]
    assert record["pruning"].measure.values.tolist() == ["magnitude"] * 2
    left = filters_left(record).left.sum("layer").values
    assert left.tolist() == record["units"].alive.sum("unit").values.tolist()


@pytest.mark.parametrize("set_before", [True, False])
def test_a_gpu_adds_up_in_the_same_order_each_time(tmp_path: Path, data: Data, set_before: bool) -> None:
    torch.backends.cudnn.deterministic = set_before
    seen = []
    try:
        run(
            replace(TINY, epochs=(1,), learning_rates=(0.1,), rounds=1), tmp_path / "run.zarr", data=data,
            progress=False, report=lambda steps: seen.append(torch.backends.cudnn.deterministic),
        )  # fmt: skip
        assert seen == [True] * 3
        assert torch.backends.cudnn.deterministic is set_before
    finally:
        torch.backends.cudnn.deterministic = False


def test_the_record_says_its_configuration(record: xr.DataTree) -> None:
    assert Experiment(**json.loads(record.attrs["experiment"])) == TINY
    assert record.attrs["seed"] == 0


def test_achieved_sparsity_is_the_one_asked_for(record: xr.DataTree) -> None:
    alive = record["units"].alive
    targets = record["pruning"].target.values
    np.testing.assert_allclose(targets, [1 - share_left(0.5, 2, 1), 0.5], rtol=1e-12)
    total = alive.sizes["unit"]
    assert alive.sum("unit").values.tolist() == [round(total * (1 - target)) for target in targets]
    assert not (alive.isel(event=1) & ~alive.isel(event=0).astype(bool)).any()


def test_the_record_says_how_it_was_pruned(record: xr.DataTree) -> None:
    events = record["pruning"].to_dataset()
    alive = record["units"].alive
    np.testing.assert_allclose(events.sparsity, 1 - alive.sum("unit") / alive.sizes["unit"])
    model = build("vgg13", num_classes=10, in_channels=1, width=TINY.width)
    assert events.dense_parameters.values.tolist() == [sum(p.numel() for p in model.parameters())] * 2
    assert (events.parameters_left < events.remaining.sum("layer")[:, 1]).all()  # and what would have read them
    assert (events.multiply_adds_left < events.dense_multiply_adds).all()
    for name, value in {"granularity": "filter", "protocol": "default", "measure": "magnitude"}.items():
        assert events[name].values.tolist() == [value] * 2


def test_how_a_measure_was_evaluated_is_recorded(tmp_path: Path, data: Data) -> None:
    grasp = replace(TINY, measure="grasp", epochs=(1, 0), rounds=1, curvature_every=0, importance_samples=20)
    events = recorded(tmp_path / "run.zarr", grasp, data)["pruning"]
    assert (events.score_mode.item(), events.score_temperature.item()) == ("eval", 200.0)
    assert events.score_samples.item() == 20  # 2 of each class


@pytest.mark.long
def test_where_a_pruning_is_measured_changes_the_measurement_alone(
    tmp_path: Path, data: Data, record: xr.DataTree
) -> None:
    other = recorded(tmp_path / "run.zarr", replace(TINY, probe_mode="train"), data)
    assert set(record["pruning"]["mode"].values) == {"eval"}
    assert set(other["pruning"]["mode"].values) == {"train"}
    assert_agree(other, record, ["steps", "units"])
    assert not np.isclose(other["pruning"].loss, record["pruning"].loss).any()


@pytest.mark.long
def test_single_weights_are_pruned_too(tmp_path: Path, data: Data) -> None:
    weights = replace(TINY, granularity="weight", measure="snip", sparsity=0.8, curvature_every=0)
    record = recorded(tmp_path / "run.zarr", weights, data)
    events = record["pruning"].to_dataset()
    assert events.granularity.values.tolist() == ["weight"] * 2
    np.testing.assert_allclose(events.sparsity, events.target, atol=1e-4)
    assert float(outcome(record).sparsity) == pytest.approx(0.8, abs=1e-4)
    assert not record["units"].data_vars
    assert weights.name == "vgg13-digits-snip-0.8-2r-weight-seed0"
    for changes in ({"protocol": "reference"}, {"measure": "bn_scale"}):
        with pytest.raises(ValueError, match=r"prunes filters, not single weights: choose granularity filter"):
            replace(weights, **changes)


@pytest.mark.long
def test_the_reference_protocol_is_an_experiments_too(tmp_path: Path, data: Data) -> None:
    quirky = replace(TINY, model="resnet56", protocol="reference", epochs=(2, 0), curvature_every=0, sparsity=0.3)
    record = recorded(tmp_path / "run.zarr", quirky, data)
    events = record["pruning"].to_dataset()
    np.testing.assert_allclose(events.target, [1 - share_left(0.3, 2, 1), 0.3])
    assert (events.sparsity > events.target).all()  # percentages are cut down
    assert json.loads(record.attrs["protocol"]) == asdict(PROTOCOLS["reference"])
    assert quirky.name.endswith("-0.3-2r-reference-seed0")
    with pytest.raises(ValueError, match="unknown protocol 'paper': choose one of default, whole_percent"):
        replace(quirky, protocol="paper")


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase"])
@pytest.mark.parametrize(
    ("protocol", "augment", "shifted"),
    [("default", True, False), ("score_augmented", True, True), ("reference", True, True), ("reference", False, False)],
)
def test_importance_is_scored_where_the_protocol_does(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, measure: str, protocol: str, augment: bool,
    shifted: bool,
) -> None:  # fmt: skip
    """On images as they are, or, as the paper's code does, as its training's loader has them: one of 81 crops each."""
    seen, plan = [], Pruner.plan
    monkeypatch.setattr(Pruner, "plan", lambda self, share, batches: seen.extend(batches) or plan(self, share, batches))
    scored = replace(
        TINY, measure=measure, protocol=protocol, augment=augment, rounds=1, epochs=(1, 0), curvature_every=0
    )  # fmt: skip
    run(scored, tmp_path / "run.zarr", data=data, progress=False)
    padded = F.pad(data.train.images, (4, 4, 4, 4)) / 127.5 - 1
    crops = torch.stack([padded[:, :, r : r + 32, c : c + 32] for r in range(9) for c in range(9)])
    middle = []
    for inputs, labels in seen:
        for image, label in zip(inputs, labels, strict=True):
            same = (crops == image).all((2, 3, 4)) & (data.train.labels == label)
            assert same.any()
            middle.append(bool(same[40].any()))  # 4 rows and 4 columns: the image itself
    assert len(middle) >= 40
    assert np.mean(middle) < 0.2 if shifted else all(middle)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_studies_are_made_before_the_first_and_the_last_pruning(tmp_path: Path, data: Data, mode: str) -> None:
    plain = replace(
        TINY, measure="grasp", rounds=3, epochs=(3, 0), sparsity=0.3, curvature_every=0, batch_size=64,
        importance_samples=20, probe_samples=8, probe_mode=mode,
    )  # fmt: skip
    with_studies, without = (
        recorded(tmp_path / f"{studies}.zarr", replace(plain, studies=studies), data) for studies in (True, False)
    )
    for node in ("steps", "pruning", "units"):  # nothing else is another for it
        xr.testing.assert_identical(with_studies[node].to_dataset(), without[node].to_dataset())
    for study, found in (("scores", score_noise), ("invariance", scale_invariance), ("curve", removal_curve)):
        assert with_studies[study].event.values.tolist() == [0, 2]
        assert not without[study].data_vars
        assert np.isfinite(found(with_studies).to_array()).any()
    curve, events = (with_studies[node].to_dataset().load() for node in ("curve", "pruning"))
    assert np.isfinite(curve.to_array()).all()
    # 30% in 3 rounds: the first pruning, by the highest scores, takes an eighth, and is a point of the curve
    np.testing.assert_array_equal(curve.removed.sel(event=0, fraction=1 / 8), events.removed.sel(event=0))
    for stage, fraction in (("before", 1 / 32), ("after", 1 / 8)):
        found, expected = (one.sel(event=0, stage=stage) for one in (curve.sel(fraction=fraction), events))
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
        np.testing.assert_allclose(found.grad_sqnorm, expected.grad_sqnorm, rtol=1e-9)


def test_a_run_is_reproducible_bit_for_bit(tmp_path: Path, data: Data, record: xr.DataTree) -> None:
    again = recorded(tmp_path / "again.zarr", TINY, data)
    for node in ("steps", "curvature", "pruning", "units"):
        xr.testing.assert_identical(again[node].to_dataset(), record[node].to_dataset())
    clock = "seconds"
    xr.testing.assert_identical(
        again["epochs"].to_dataset().drop_vars(clock), record["epochs"].to_dataset().drop_vars(clock)
    )
    changed = recorded(tmp_path / "changed.zarr", replace(TINY, seed=1, epochs=(1, 0), rounds=1), data)
    assert not np.isclose(record["steps"].loss[:2], changed["steps"].loss).any()


@pytest.mark.long
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "magnitude"] + ["none"])
def test_every_measure_sees_the_same_training_until_it_prunes(
    tmp_path: Path, data: Data, record: xr.DataTree, measure: str
) -> None:
    short = replace(TINY, measure=measure, epochs=(1, 0), rounds=1, curvature_every=0)
    run_of_it = recorded(tmp_path / "run.zarr", short, data)
    np.testing.assert_array_equal(run_of_it["steps"].loss, record["steps"].loss[:2])
    assert ("alive" in run_of_it["units"].data_vars) == (measure != "none")


@pytest.mark.long
def test_every_measure_sees_the_same_batches_after_it_pruned(tmp_path: Path, data: Data) -> None:
    """With nothing to prune, all that could differ is the data: also after a round that drew its own samples."""
    same = replace(TINY, sparsity=0.0, curvature_every=0, keep_momentum=True)
    runs = [
        recorded(tmp_path / f"{measure}.zarr", replace(same, measure=measure), data)["steps"].loss.values
        for measure in ("none", "loss_preservation", "random")
    ]
    for losses in runs[1:]:
        np.testing.assert_array_equal(losses, runs[0])


@pytest.mark.long
def test_momentum_is_dropped_unless_kept(tmp_path: Path, data: Data) -> None:
    for kept in (False, True):
        short = replace(TINY, keep_momentum=kept, epochs=(2, 0), sparsity=0.0, weight_decay=0.0, curvature_every=0)
        steps = recorded(tmp_path / f"{kept}.zarr", short, data)["steps"]
        update, gradient = (steps[name].isel(step=2).sum("layer") for name in ("update_sqnorm", "grad_sqnorm"))
        plain = 0.1**2 * float(gradient)  # Δθ = −ηg, the first step of a fresh SGD
        assert (float(update) == pytest.approx(plain, rel=1e-9)) != kept


@pytest.mark.long
def test_a_share_of_the_training_set_is_the_same_for_every_measure(tmp_path: Path, data: Data) -> None:
    few = replace(TINY, train_samples=30)
    runs = [recorded(tmp_path / f"{name}.zarr", replace(few, measure=name), data) for name in ("none", "magnitude")]
    assert [run["steps"].sizes["step"] for run in runs] == [3, 3]  # three epochs of one batch of at most 30 images
    losses = [run["steps"].loss.values[0] for run in runs]
    assert losses[0] == losses[1]
    other = recorded(tmp_path / "other.zarr", replace(few, seed=1), data)
    assert other["steps"].loss.values[0] != losses[0]


@pytest.mark.parametrize("model", ["mobilenet_v1", pytest.param("resnet56", marks=pytest.mark.long)])
def test_the_other_networks_run_too(tmp_path: Path, data: Data, model: str) -> None:
    small = replace(TINY, model=model, epochs=(1, 0), rounds=1, curvature_every=0, measure="loss_preservation")
    record = recorded(tmp_path / "run.zarr", small, data)
    assert 1 - float(filters_left(record).left.sum() / filters_left(record).total.sum()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vgg"}, f"unknown model 'vgg': choose one of {', '.join(MODELS)}"),
        ({"data": "mnist"}, "unknown data 'mnist': choose one of digits"),
        ({"measure": "magic"}, "unknown measure 'magic': choose one of none, magnitude"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\), got 1.5"),
        ({"rounds": 3}, "rounds=3 needs at least as many epochs in the first stage, got 2"),
        ({"epochs": (1, 2, 3)}, "epochs and learning_rates need one entry per stage"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"momentum": -1.0}, "momentum must not be negative, got -1.0"),
        ({"epochs": (-1, 2)}, r"need one entry per stage, and epochs of 0 or more, got \(-1, 2\)"),
        ({"epochs": (), "learning_rates": ()}, "epochs and learning_rates need one entry per stage"),
        ({"learning_rates": (0.1, 0.0)}, r"learning_rates must be positive, got \(0.1, 0.0\)"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seed": 2**63}, "seed must be less than"),
        ({"rounds": "many"}, "rounds must be a whole number, got 'many'"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"sparsity": "half"}, "sparsity must be a number, got 'half'"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"width": True}, "width must be a number, got True"),
        ({"epochs": 3}, "epochs must be a list of whole numbers, got 3"),
        ({"learning_rates": ("a", "b")}, "learning_rates must be a list of numbers, got"),
        ({"augment": 1}, "augment must be true or false, got 1"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"precision": "float16"}, "unknown precision 'float16': choose one of float32, bfloat16"),
        ({"root": 3}, "root must be a string, got 3"),
        ({"studies": True, "granularity": "weight"}, "studies need filters and at least 8 probe samples, got gran"),
        ({"studies": True, "probe_samples": 7}, "got granularity 'filter' and 7 probe samples"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.long
def test_it_says_first_what_is_trained(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(TINY, device="cpu")
    run(settings, tmp_path / "run.zarr", data=data)
    first, *_ = capsys.readouterr().err.splitlines()
    trained, pruned = "training vgg13 of width 0.05 on digits for 3 epochs on cpu", "to a sparsity of 50% in 2 rounds"
    assert first == f"{trained}, pruned by magnitude {pruned}"
    run(settings, tmp_path / "run.zarr", data=data)  # it is finished
    run(replace(TINY, measure="none"), tmp_path / "quiet.zarr", data=data, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_the_bar_says_while_it_prunes(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    run(TINY, tmp_path / "run.zarr", data=data)
    bars = capsys.readouterr().err.split("\r")
    prunes = [bar.endswith(", pruning]") for bar in bars]
    assert (sum(prunes), prunes[-1]) == (2, False)


def test_an_existing_record_is_not_touched(tmp_path: Path, data: Data) -> None:
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "run.zarr" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run.zarr exists already, and is not a .* or remove it first"):
        run(TINY, tmp_path / "run.zarr", data=data)
    assert [path.read_text() for path in (tmp_path / "run.zarr").iterdir()] == ["mine"]


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_an_impossible_device_is_said_before_anything_is_written(tmp_path: Path, data: Data, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .*; choose auto, cpu, or cuda"):
        run(replace(TINY, device=device), tmp_path / "run.zarr", data=data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", ["default", "reference"])
def test_more_than_can_be_pruned_is_refused_before_anything_is_trained(
    tmp_path: Path, data: Data, protocol: str
) -> None:
    settings = replace(TINY, protocol=protocol, sparsity=0.999)
    with pytest.raises(ValueError, match=r"asks for \d+ more units to be pruned, but only \d+ can be"):
        run(settings, tmp_path / "run.zarr", data=data)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.filterwarnings("ignore:‖g‖² of .* is not finite at step")
@pytest.mark.parametrize("measure", ["none", "magnitude"])
def test_a_training_that_diverges_fails_and_says_when(tmp_path: Path, data: Data, measure: str) -> None:
    settings = replace(TINY, measure=measure, rounds=1, learning_rates=(0.1, 1e300))
    with pytest.raises(ValueError, match="the training diverged in epoch 3: parameters are no longer finite"):
        run(settings, tmp_path / "run.zarr", data=data)
    record = xr.open_datatree(tmp_path / "run.zarr")
    assert record["epochs"].sizes["epoch"] == 3
    assert "finished" not in record.attrs
