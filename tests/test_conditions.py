"""Runs are compared under the same conditions: what a record says of itself is what it is compared by."""

import json

import numpy as np
import pytest
import xarray as xr
from synthetic_runs import record as synthetic

import analysis
from analysis.condition_names import by_condition, names_of_conditions, probe_mode
from analysis.conditions import first_comparison, several_seeds
from figures.layout import models

SETTINGS = {
    "model": "vgg13", "data": "digits", "measure": "magnitude", "sparsity": 0.5, "rounds": 3, "granularity": "filter",
    "width": 0.5, "epochs": [2, 1], "seed": 1, "device": "cpu",
}  # fmt: skip


def record(**settings: object) -> xr.DataTree:
    return xr.DataTree(xr.Dataset(attrs={"experiment": json.dumps(SETTINGS | settings), "seed": 1}))


def test_a_condition_is_what_the_record_was_configured_with() -> None:
    table = analysis.conditions({"one": record(), "two": record(measure="none", device="cuda")})
    assert table.columns.tolist() == ["model", "data", "measure", "rounds", "sparsity", "seed"]
    assert table.loc["one"].tolist() == ["vgg13", "digits", "magnitude", 3, 0.5, 1]
    assert table.loc["two"].tolist() == ["vgg13", "digits", "none", 0, 0.0, 1]


def test_another_setting_is_a_column_where_it_differs_in_one_model_and_data_set() -> None:
    runs = {"small": record(), "of another": record(model="resnet56", width=0.25)}
    assert "width" not in analysis.conditions(runs)
    table = analysis.conditions(runs | {"large": record(width=1.0), "long": record(epochs=[4, 1])})
    assert table.columns.tolist()[6:] == ["width", "epochs"]
    assert table.loc["large", "width"] == 1.0
    assert table.loc["long", "epochs"] == (4, 1)
    weights = analysis.conditions({"filters": record(), "weights": record(granularity="weight"),
                                   "none": record(measure="none")})  # fmt: skip
    assert weights.granularity.isna().tolist() == [False, False, True]


def test_an_instrumented_loop_is_told_by_its_label() -> None:
    table = analysis.conditions({"mine": xr.DataTree(xr.Dataset(attrs={"seed": 7}))})
    assert table.loc["mine", ["model", "data", "measure", "rounds", "seed"]].tolist() == ["", "", "mine", 0, 7]
    assert np.isnan(table.sparsity["mine"])


def test_runs_that_were_not_pruned_belong_to_every_comparison_of_their_model() -> None:
    runs = {
        "more": record(rounds=5), "taylor": record(measure="taylor"), "none": record(measure="none"),
        "magnitude": record(), "other model": record(measure="none", model="resnet56"),
    }  # fmt: skip
    table = analysis.comparisons(runs)
    assert table[["model", "rounds", "run"]].values.tolist() == [
        ["resnet56", 0, "other model"], ["vgg13", 3, "none"], ["vgg13", 3, "magnitude"], ["vgg13", 3, "taylor"],
        ["vgg13", 5, "none"], ["vgg13", 5, "more"],
    ]  # fmt: skip
    assert first_comparison(runs).run.tolist() == ["none", "magnitude", "taylor"]
    assert first_comparison({"one": record(measure="none")}).run.tolist() == ["one"]
    assert not several_seeds(runs)
    assert several_seeds(runs | {"again": record(seed=2)})


def test_runs_without_pruning_that_lack_a_setting_differ_from_those_that_have_it() -> None:
    def own(**said: object) -> xr.DataTree:
        return xr.DataTree(xr.Dataset(attrs={"model": "m", "data": "d", "measure": "none"} | said))

    whole = {"a": own(seed=0), "b": own(seed=1), "c": own(seed=0, augment="cutout"), "d": own(seed=1, augment="cutout")}
    table = analysis.comparisons(whole)
    assert table.groupby("augment", dropna=False).run.apply(list).tolist() == [["c", "d"], ["a", "b"]]
    pruned = {"p": own(seed=0, measure="taylor", temperature=5.0), "q": own(seed=0)}
    assert "temperature" not in analysis.conditions(pruned)  # a network that is not pruned does not depend on it


def test_rounds_and_seeds_are_whole_numbers_of_whatever_type() -> None:
    said = [{"rounds": 2, "seed": 0}, {"rounds": 2.0, "seed": 1.0}]
    runs = {f"{number}": xr.DataTree(xr.Dataset(attrs={"model": "m", "measure": "taylor"} | one))
            for number, one in enumerate(said)}  # fmt: skip
    assert set(names_of_conditions(analysis.conditions(runs))) == {"m, pruned in 2 rounds"}
    assert analysis.conditions(runs).seed.map(str).tolist() == ["0", "1"]


def test_settings_that_are_lists_may_be_lacking() -> None:
    said = [{"betas": [0.9, 0.99]}, {"betas": [0.8]}, {}]
    runs = {
        f"{number} {seed}": xr.DataTree(xr.Dataset(attrs={"model": "m", "measure": "taylor", "seed": seed} | one))
        for number, one in enumerate(said)
        for seed in (0, 1)
    }
    assert first_comparison(runs).betas.nunique(dropna=False) == 1
    assert analysis.claims(runs).betas.unique().tolist() == ["(0.8,)", "(0.9, 0.99)", np.nan]


def test_instrumented_loops_are_one_comparison() -> None:
    loops = {name: xr.DataTree() for name in ("one", "other", "none")}
    assert first_comparison(loops).run.tolist() == ["none", "one", "other"]


def test_a_sparsity_that_nobody_asked_for_is_not_in_a_conditions_name() -> None:
    kinds = xr.Dataset({"kind": ("event", ["prune", "prune"])})
    own = {"/": xr.Dataset(attrs={"model": "net", "data": "images"}), "/pruning": kinds}
    runs = {"masked": xr.DataTree.from_dict(own), "asked": record()}
    names = names_of_conditions(analysis.comparisons(runs))
    assert sorted(names) == ["VGG-13, digits, 50% pruned in 3 rounds", "net, images, pruned in 2 rounds"]


def test_conditions_that_would_be_printed_alike_are_not_taken_for_one() -> None:
    runs = {f"{model} {seed}": record(model=model, seed=seed) for model in ("net_a", "net a") for seed in (0, 1)}
    names = {f"{model}, digits, 50% pruned in 3 rounds": 2 for model in ("net a", "net_a")}
    assert {name: len(rows) for name, rows in by_condition(analysis.comparisons(runs)).items()} == names
    assert list(models(runs, runs)) == ["net_a, digits", "net a, digits"]
    twice = {"one": record(model="a, b", data="c"), "other": record(model="a", data="b, c")}
    both = ["a, b, c, 50% pruned in 3 rounds", "a, b, c, 50% pruned in 3 rounds (2)"]
    assert sorted(by_condition(analysis.comparisons(twice))) == both


def test_sparsities_reached_in_an_unknown_number_of_rounds_are_told_apart() -> None:
    own = {"model": "net", "data": "", "measure": "mine"}
    runs = {f"{share}": xr.DataTree(xr.Dataset(attrs=own | {"sparsity": share})) for share in (0.5, 0.9, 0.0)}
    assert sorted(names_of_conditions(analysis.comparisons(runs))) == ["net", "net, 50% pruned", "net, 90% pruned"]


def test_a_sparsity_that_was_rounded_in_another_way_is_the_same() -> None:
    shares = {"given": 0.9, "computed": 1 - (1 - 0.1) * (0.1 / 0.9), "in single precision": float(np.float32(0.9))}
    runs = {name: record(sparsity=share, seed=seed) for seed, (name, share) in enumerate(shares.items())}
    assert analysis.conditions(runs).sparsity.unique().tolist() == [0.9]


@pytest.mark.parametrize("name", ["final loss", "test loss", "steps to 50%", "test accuracy, %", "filters pruned, %"])
def test_a_setting_that_is_called_like_a_column_of_a_table_gets_another_name(name: str) -> None:
    runs = {f"{value} {seed}": synthetic("magnitude", seed) for value in (1.0, 2.0) for seed in (0, 1)}
    for label, run in runs.items():
        run.attrs["experiment"] = json.dumps(json.loads(run.attrs["experiment"]) | {name: float(label.split()[0])})
    for table in (analysis.accuracy_table(runs), analysis.convergence_table(runs)):
        assert table.index.get_level_values(f"{name} (setting)").unique().tolist() == [1.0, 2.0]
        assert len(table) == 2


def test_the_mode_of_the_prunings_is_said() -> None:
    def pruned(mode: str) -> xr.DataTree:
        return xr.DataTree.from_dict({"/pruning": xr.Dataset({"mode": ("event", [mode, mode])})})

    assert probe_mode({"whole": record(measure="none")}) == ""
    in_training = probe_mode({"one": pruned("train"), "whole": record(measure="none")})
    assert in_training == "Prunings were measured in training mode, where BatchNorm normalises by the batch."
    both = probe_mode({"one": pruned("train"), "other": pruned("eval")})
    assert both.startswith("Prunings were measured in training mode, where")
    assert " or in eval mode, where" in both
