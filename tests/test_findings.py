"""What is said of many runs is their mean by measure, not a list of runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import prune_row, vectors
from synthetic_runs import record

from analysis import MissingQuantityError, comparison_findings, findings, pruning_findings
from analysis.conditions import by_setting, mean_by_measure
from analysis.typeset import percent
from dynamics import Recorder, open_run
from figures import catalogue
from figures.report import _done


def units(run: xr.DataTree, alive: list[int]) -> xr.DataTree:
    nodes = run.to_dict()
    layers = ["a"] * 2 + ["b"] * 2
    nodes["/units"] = xr.Dataset({"alive": (("event", "unit"), [alive])}, coords={"layer": ("unit", layers)})
    return xr.DataTree.from_dict(nodes)


@pytest.fixture
def runs() -> dict[str, xr.DataTree]:
    return {
        "m0": units(record("magnitude", 0, accuracy=0.8, removed_grad=0.4), [1, 1, 1, 0]),
        "m1": units(record("magnitude", 1, accuracy=0.6, removed_grad=0.8), [1, 0, 1, 0]),
        "l0": units(record("loss_preservation", 0, accuracy=0.5, removed_grad=2.0), [0, 0, 1, 1]),
        "of another condition": units(record("loss_preservation", 0, rounds=2, accuracy=0.7), [1, 1, 1, 1]),
        "broken": units(record("loss_preservation", 2, ended=False), [1, 1, 0, 0]),
    }


def test_a_mean_is_over_conditions_that_measures_have_in_common(runs: dict[str, xr.DataTree]) -> None:
    values = dict(zip(runs, [1.0, 3.0, 5.0, 100.0, 9.0], strict=True))
    assert mean_by_measure(runs, values).to_dict() == {"magnitude": 2, "loss_preservation": 7}


def test_accuracies_are_means_by_measure(runs: dict[str, xr.DataTree]) -> None:
    assert findings.final_accuracy(runs) == (
        "Final test accuracy of the pruned networks, means over conditions and seeds: 50.0% (loss preservation) to "
        "70.0% (magnitude)."
    )
    single = {name: runs[name] for name in ("m0", "l0")}
    assert findings.final_accuracy(single) == (
        "Final test accuracy of the pruned networks: 50.0% (loss preservation) to 80.0% (magnitude). One seed each, so "
        "no verdict on which is better."
    )
    with pytest.raises(MissingQuantityError, match="no run has ended"):
        findings.final_accuracy({"broken": runs["broken"]})


def test_accuracies_are_said_where_not_all_conditions_have_one() -> None:
    """Accuracies are known of one condition alone, and of more measures under the other."""
    unknown = {"accuracy": float("nan")}
    runs = {
        "m": record("magnitude", 0, accuracy=0.8),
        "l": record("loss_preservation", 0, rounds=2, **unknown),
        "i": record("gradient_norm_increase", 0, rounds=2, **unknown),
    }
    assert findings.final_accuracy(runs).startswith("Final test accuracy of the pruned networks")
    assert "80.0% (magnitude)" in findings.final_accuracy(runs)


def steps(learning_rate: list[float], flow: float) -> xr.DataTree:
    """A descent in half a square, θ = 1, whose flow time is so many times its learning rate."""
    count = len(learning_rate)
    rate = np.array(learning_rate)[:, None]
    layered = {
        name: (("step", "layer"), np.broadcast_to(values, (count, 1)))
        for name, values in {"param_update": -rate, "update_sqnorm": rate**2, "param_grad": 1.0, "decay_sqnorm": 0.0,
                             "grad_sqnorm": 1.0, "learning_rate": rate, "flow_step": flow * rate,
                             "grad_update": -rate, "update_hess_update": rate**2, "grad_hess_grad": 1.0}.items()
    }  # fmt: skip
    coordinates = {"step": np.arange(count), "layer": ["a"]}
    whole = {"loss_before": ("step", np.ones(count)), "loss_after": ("step", 1 - rate[:, 0])}
    run = {"/": xr.Dataset(attrs={"model": "m", "measure": "none"}), "/steps": xr.Dataset(layered, coordinates)}
    return xr.DataTree.from_dict(run | {"/curvature": xr.Dataset(layered | whole, coordinates)})


def test_momentum_and_smaller_steps_are_said_where_there_are_any() -> None:
    plain, heavy = steps([0.1] * 12, 1), steps([0.1] * 6 + [0.01] * 6, 10)
    assert "momentum" not in findings.norm_prediction({"plain": plain})
    assert findings.norm_prediction({"plain": plain, "heavy": heavy}).endswith("The prediction leaves out momentum.")
    assert "in the second half: " in findings.loss_over_time({"plain": plain})
    assert "in the second half: " in findings.loss_over_time({"plain": plain, "heavy": heavy})
    assert "in the second half, with smaller steps: " in findings.loss_over_time({"heavy": heavy})


def test_layers_are_compared_under_one_condition(runs: dict[str, xr.DataTree]) -> None:
    del runs["broken"]
    assert findings.layer_choice(runs) == (
        "VGG-13, digits, 50% pruned in 1 round: the measures differ most in layer a, where loss preservation leaves "
        "0% of the filters and magnitude 75%."
    )
    assert findings.layer_choice({"m1": runs["m1"]}) == (
        "VGG-13, digits, 50% pruned in 1 round: layer a keeps the smallest share of its filters, 50%."
    )


def test_what_prunings_move_is_in_the_median_over_all_of_them() -> None:
    runs = {
        str(number): record("magnitude", number, loss=(2.0, 2.0 * factor)) for number, factor in enumerate([2, 3, 100])
    }
    runs["other"] = record("loss_preservation", 0, loss=(2.0, 1.0))
    found = comparison_findings.moved_at_pruning(runs)
    assert found.startswith(
        "Median ratio of after to before a pruning. Loss: magnitude 3.00, loss preservation 0.50. ‖g‖²"
    )


def test_runs_that_have_no_condition_in_common_are_told_by_their_labels_or_not_at_all() -> None:
    runs = {"m": record("magnitude", 0), "l": record("loss_preservation", 0, rounds=2)}
    with pytest.raises(MissingQuantityError, match="no two pruned runs have a condition in common"):
        comparison_findings.fastest(runs)
    for run, last in zip(runs.values(), (1.0, 0.001), strict=True):
        norm = np.linspace([2.0], [2 * last], run["steps"].sizes["step"])
        run["steps"] = (
            run["steps"].to_dataset().assign_coords(layer=["a"]).assign(param_sqnorm=(("step", "layer"), norm))
        )
    found = comparison_findings.norm_growth(runs)
    assert found == "‖θ‖² at the last step divided by that at the first: m 1.00, l 0.001."


def test_networks_that_grew_in_one_seed_alone_are_not_said_to_grow() -> None:
    runs = {f"m{seed}": record("magnitude", seed) for seed in range(3)}
    for run, last in zip(runs.values(), (0.5, 0.5, 40.0), strict=True):
        norm = np.linspace([2.0], [2 * last], run["steps"].sizes["step"])
        run["steps"] = (
            run["steps"].to_dataset().assign_coords(layer=["a"]).assign(param_sqnorm=(("step", "layer"), norm))
        )
    assert comparison_findings.norm_growth(runs) == (
        "‖θ‖² at the last step divided by that at the first, medians over seeds, means over conditions: magnitude 0.50."
    )


def test_measures_that_leave_the_same_are_not_said_to_differ(runs: dict[str, xr.DataTree]) -> None:
    same = {"m": runs["m0"], "l": units(record("loss_preservation", 0), [1, 1, 1, 0])}
    assert findings.layer_choice(same) == (
        "VGG-13, digits, 50% pruned in 1 round: the measures leave the same share of the filters in every layer."
    )


def test_small_errors_are_not_said_to_be_none() -> None:
    said = [percent(share) for share in (0.0, 1e-7, 0.00042, 0.002, 0.0094, 0.0096, 0.37, 12.0, float("nan"))]
    assert said == ["0%", "under 0.001%", "0.04%", "0.2%", "0.9%", "1%", "37%", "1200%", "–"]


def test_what_are_no_measures_are_not_called_so(runs: dict[str, xr.DataTree]) -> None:
    one, other = runs["m0"], runs["l0"]
    for name, run in (("slow", one), ("fast", other)):
        settings = json.loads(run.attrs["experiment"])
        run.attrs = {"experiment": json.dumps(settings | {"measure": name})}
    assert "the networks differ most in layer a, where fast" in findings.layer_choice({"a": one, "b": other})


def test_nothing_is_said_of_predictions_where_nothing_moves() -> None:
    still = steps([0.0] * 12, 1)
    with pytest.raises(MissingQuantityError, match="everything measured is zero"):
        findings.loss_prediction({"still": still})


def test_shares_removed_are_means_by_measure(runs: dict[str, xr.DataTree]) -> None:
    some = {name: runs[name] for name in ("m0", "m1", "l0")}
    assert pruning_findings.decrease_removed(some) == (
        "Mean share of ‖g‖² (and of the parameters) removed by a pruning: magnitude 15.0% (25.0%), "
        "loss preservation 50.0% (25.0%)."
    )


def test_shares_removed_are_of_prunings_whose_gradient_is_known() -> None:
    """Of a condition in which it is not, no measure is there, whatever it removed."""
    dead = {"removed_grad": 0.0, "grad": (0.0, 0.0)}
    some = {
        "l": record("loss_preservation", 0, **dead), "m": record("magnitude", 0, **dead), "t": record("taylor", 0),
        "l2": record("loss_preservation", 0, rounds=2), "r2": record("random", 0, rounds=2),
    }  # fmt: skip
    assert pruning_findings.decrease_removed(some) == (
        "Mean share of ‖g‖² (and of the parameters) removed by a pruning: loss preservation 12.5% (25.0%), "
        "random 12.5% (25.0%)."
    )


def test_what_is_said_of_settings_is_a_mean_of_each_setting() -> None:
    def run(rate: float, seed: int, accuracy: float) -> xr.DataTree:
        said = {"model": "m", "data": "d", "measure": "none", "learning_rate": rate, "seed": seed}
        epochs = xr.Dataset({"test_accuracy": ("epoch", [accuracy])}, coords={"epoch": [0]})
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=said), "/epochs": epochs})

    runs = {f"{rate} {seed}": run(rate, seed, 0.5 + rate + 0.02 * seed) for rate in (0.1, 0.4) for seed in (0, 1)}
    found = findings.final_accuracy(by_setting(runs))
    assert found == (
        "Final test accuracy, means over conditions and seeds: 61.0% (learning rate 0.1) to 91.0% (learning rate 0.4)."
    )
    assert findings.final_accuracy({"alone": runs["0.1 0"]}) == "Final test accuracy: 60.0%."
    assert "Learning rate: 0.1, 0.4" in _done(runs)


def test_a_setting_in_place_of_the_measure_leaves_out_runs_that_did_not_end() -> None:
    """And of those selected on the test set it has the best epoch, not the last."""
    runs = {f"{rate} {seed}": record("magnitude", seed, accuracy=0.5 + rate, ended=(rate, seed) != (0.4, 1))
            for rate in (0.1, 0.4) for seed in (0, 1)}  # fmt: skip
    for label, run in runs.items():
        settings = json.loads(run.attrs["experiment"]) | {"learning_rate": float(label.split()[0])}
        run.attrs["experiment"] = json.dumps(settings)
    expected = (
        "Final test accuracy of the pruned networks, means over conditions and seeds: 60.0% (learning rate 0.1) to "
        "90.0% (learning rate 0.4)."
    )
    assert findings.final_accuracy(by_setting(runs)) == expected
    for label, run in runs.items():
        accuracies = {"test_accuracy": ("epoch", [0.1, 0.5 + float(label.split()[0]), 0.3])}
        run["epochs"] = xr.DataTree(xr.Dataset(accuracies, {"epoch": [1, 2, 3]}))
        run["pruning"] = run["pruning"].to_dataset().assign(epoch=("event", [0]))
        run.attrs["protocol"] = json.dumps({"select_on_test": True})
    assert findings.final_accuracy(by_setting(runs)) == expected


def test_measures_are_fast_or_slow_by_runs_that_ended() -> None:
    runs = {"half": record("magnitude", 0, ended=False)}
    with pytest.raises(MissingQuantityError, match="no pruned run has ended"):
        comparison_findings.fastest(runs)
    runs |= {"whole": record("magnitude", 1, area=2.0), "none": record("none", 1, area=1.0)}
    assert comparison_findings.fastest(runs) == "Mean training loss after the last pruning, lowest first: magnitude 2."


def test_what_is_not_finite_is_not_averaged() -> None:
    whole = steps([0.1] * 16, 1.0)
    lost = whole.map_over_datasets(lambda node: node.where(node.step < 8) if "step" in node.dims else node)
    assert findings.norm_prediction({"lost": lost}).startswith("Median relative error over 9 points:")
    assert findings.loss_over_time({"lost": lost}).endswith("in the second half: not finite and not finite.")
    assert "in 0% of the measured steps" in findings.time_unstable({"lost": lost})
    nothing = whole.map_over_datasets(lambda node: node.where(node.step < 0) if "step" in node.dims else node)
    for finding in (findings.loss_prediction, findings.loss_over_time, findings.layer_spread):
        with pytest.raises(MissingQuantityError, match="finite"):
            finding({"nothing": nothing})


def test_layers_whose_optimizers_take_turns_are_compared_by_the_gradients_that_they_have() -> None:
    values = np.zeros((6, 3))
    values[::2, 0], values[1::2, 1], values[1, 2] = [3.0, 4.0, 5.0], [0.01, 0.02, 0.03], 0.6
    steps = xr.Dataset({"grad_sqnorm": (("step", "layer"), values)}, {"step": np.arange(6), "layer": list("abc")})
    said = findings.layer_spread({"gan": xr.DataTree.from_dict({"/steps": steps})})
    assert said == "The layers' median ‖g‖² differ by up to a factor of 200."  # 4 over 0.02


def test_what_is_not_known_of_a_pruning_is_said_to_be_missing(tmp_path: Path) -> None:
    """One layer has no rank among layers, and a loss that is not finite no relative error."""
    model = torch.nn.Linear(4, 3)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=vectors(1)):
            prune_row(model, "weight", 0)
    run = open_run(tmp_path / "run")
    assert re.search(r"‖g‖² – \(\d+%\), d‖θ‖²/dt – \(\d+%\)", pruning_findings.layers_moved({"run": run}))
    run["pruning"]["loss"] = run["pruning"].loss * np.inf
    assert findings.effect_prediction({"run": run}).startswith("Loss: median relative error – in first and – in second")
    run["pruning"] = run["pruning"].to_dataset().map(lambda values: values * np.nan if values.ndim > 1 else values)
    with pytest.raises(MissingQuantityError, match="finite"):
        findings.effect_prediction({"run": run})


def test_an_error_that_is_small_is_not_zero() -> None:
    assert findings.error_in_percent(2.7e-5) == "0.003%"
    assert findings.error_in_percent(0.0) == "0.0%"
    assert findings.error_in_percent(4e-16) == "under 0.001%"
    assert findings.error_in_percent(0.0234) == "2.3%"
    assert findings.error_in_percent(6450.4392) == "650 000%"
    assert findings.error_in_percent(float("nan")) == "not finite"


@pytest.mark.parametrize("steps", [2, 5])
def test_of_a_single_measured_step_no_halves_are_told(tmp_path: Path, steps: int) -> None:
    """So is a short loop with the default ``curvature_every``: nothing failed to be finite in its first half."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=4) as recorder:
        for x, y in recorder.watch([(torch.randn(3, 4), torch.tensor([0, 1, 0]))] * steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    assert run["curvature"].sizes["step"] == (1 if steps == 2 else 2)
    said = catalogue.finding("loss_decrease_over_time", {"mine": run})
    assert ("in the first half" in said) == (steps == 5)
    assert "not finite" not in said
