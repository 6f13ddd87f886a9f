"""An experiment follows the protocol, is reproducible bit for bit, and compares measures on the same training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from analysis import filters_left, training_curve
from dynamics import open_run
from dynamics.data import Data, load
from dynamics.experiment import Experiment, run
from dynamics.pruning import MEASURES, share_left
from dynamics.sweep import grid, sweep

TINY = Experiment(
    width=0.05, rounds=2, epochs=(2, 1), learning_rates=(0.1, 0.01), sparsity=0.5, batch_size=32,
    importance_samples=64, probe_samples=32, curvature_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    return replace(digits, train=digits.train.sample(64), test=digits.test.sample(64))


def recorded(path: Path, experiment: Experiment, data: Data) -> xr.DataTree:
    return open_run(run(experiment, path, data=data, progress=False))


def test_the_record_of_a_run(tmp_path: Path, data: Data) -> None:
    record = recorded(tmp_path / "run.zarr", TINY, data)
    assert record["steps"].sizes["step"] == 6
    assert record["curvature"].step.values.tolist() == [0, 2, 4]
    assert record["steps"].epoch.values.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(record["steps"].learning_rate, [0.1] * 4 + [0.01] * 2)
    assert np.isfinite(record["steps"].loss).all()
    assert training_curve(record).epoch.values.tolist() == [1, 2, 3]
    assert record["pruning"]["step"].values.tolist() == [2, 4]
    assert record["pruning"].measure.values.tolist() == ["magnitude"] * 2
    total = record["units"].sizes["unit"]
    left = filters_left(record).left.sum("layer").values
    assert left.tolist() == [round(total * share_left(0.5, 2, number)) for number in (1, 2)]
    assert json.loads(record.attrs["experiment"])["width"] == 0.05
    assert record.attrs["seed"] == 0


def test_a_run_is_reproducible_bit_for_bit(tmp_path: Path, data: Data) -> None:
    one, other = (recorded(tmp_path / f"{name}.zarr", TINY, data) for name in ("one", "other"))
    for node in ("steps", "curvature", "pruning", "units"):
        xr.testing.assert_identical(one[node].to_dataset(), other[node].to_dataset())
    changed = recorded(tmp_path / "changed.zarr", replace(TINY, seed=1), data)
    assert not np.allclose(one["steps"].loss, changed["steps"].loss)


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "magnitude"] + ["none"])
def test_every_measure_sees_the_same_training_until_it_prunes(tmp_path: Path, data: Data, measure: str) -> None:
    reference = recorded(tmp_path / "reference.zarr", TINY, data)
    record = recorded(tmp_path / "run.zarr", replace(TINY, measure=measure), data)
    np.testing.assert_array_equal(record["steps"].loss[:2], reference["steps"].loss[:2])
    assert ("alive" in record["units"].data_vars) == (measure != "none")


@pytest.mark.parametrize("model", ["mobilenet_v1", "resnet56"])
def test_the_other_networks_run_too(tmp_path: Path, data: Data, model: str) -> None:
    small = replace(TINY, model=model, epochs=(1, 0), rounds=1, curvature_every=0, measure="loss_preservation")
    record = recorded(tmp_path / "run.zarr", small, data)
    assert 1 - float(filters_left(record).left.sum() / filters_left(record).total.sum()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vgg"}, "unknown model 'vgg': choose one of vgg13, mobilenet_v1, resnet56"),
        ({"data": "mnist"}, "unknown data 'mnist': choose one of digits"),
        ({"measure": "magic"}, "unknown measure 'magic': choose one of none, magnitude"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\), got 1.5"),
        ({"rounds": 3}, "3 rounds need as many epochs in the first stage, which has 2"),
        ({"epochs": (1, 2, 3)}, "epochs and learning_rates need one entry a stage"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"momentum": -1.0}, "momentum must not be negative"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    experiments = grid({"measure": ["none", "magnitude"], "seed": [0, 1], "epochs": [2, 1], "learning_rates": [1, 0.1],
                        "rounds": 1})  # fmt: skip
    assert [(e.measure, e.seed) for e in experiments] == [("none", 0), ("none", 1), ("magnitude", 0), ("magnitude", 1)]
    assert all(e.epochs == (2, 1) for e in experiments)
    with pytest.raises(ValueError, match="unknown settings colour: an experiment has model, data"):
        grid({"colour": "red"})
    with pytest.raises(ValueError, match="would write the same record"):
        sweep([TINY, TINY], tmp_path)
    (tmp_path / f"{TINY.name}.zarr").mkdir()
    with pytest.raises(FileExistsError, match="exists already: choose another folder"):
        sweep([TINY], tmp_path)
