"""Runs of someone's own loop are compared as experiments are: by what was said of them and what their events say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import analysis
from analysis import STATISTICS
from analysis.conditions import by_setting
from analysis.findings import diverged
from analysis.overview import overview
from dynamics import Recorder, open_run
from dynamics.pruning import Pruner
from dynamics.record.summary import summary
from figures import draw
from figures.report import _done

MEASURES = ("magnitude", "loss_preservation")


def train(path, measure, seed, *, said=None, rounds=2) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))) for _ in range(3)]
    said = {"model": "my net", "data": "my images", "seed": seed} if said is None else said
    with Recorder(path, model, optimizer, curvature_every=0, attributes=said) as recorder:
        pruner = None if measure is None else Pruner(model, optimizer, measure)
        for epoch in range(rounds + 1):
            for x, y in recorder.watch(batches):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)
            recorder.log_epoch(test_accuracy=0.5 + 0.01 * seed)
            if pruner and epoch < rounds:
                pruning = pruner.plan(0.25 * (epoch + 1), batches)
                with recorder.event("prune", probe=batches[:1], **pruning.attributes):
                    pruner.apply(pruning)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for seed in (1, 2, 3):
        for measure in (None, *MEASURES):
            train(folder / f"{measure}-{seed}.zarr", measure, seed)
    return analysis.open_runs(sorted(folder.glob("*.zarr")))


def test_runs_of_one_measure_are_laid_side_by_side_by_what_they_differ_in(runs, tmp_path: Path) -> None:
    for number, (rate, size) in enumerate(((0.2, 8), (0.05, 8), (0.1, 8), (0.1, 16))):
        said = {"model": "m", "data": "d", "seed": 3, "learning_rate": rate, "batch_size": size}
        train(tmp_path / f"{number}.zarr", "magnitude", 3, said=said)
    found = by_setting(analysis.open_runs(sorted(tmp_path.glob("*.zarr"))))
    table = analysis.comparisons(found)
    rates = ["learning rate 0.05", "learning rate 0.1", "learning rate 0.2"]
    assert table[table.batch_size == 8].measure.tolist() == rates
    assert table[table.batch_size == 16].measure.tolist() == rates[1:2]
    assert table.columns.tolist() == ["run", "model", "data", "measure", "rounds", "sparsity", "seed", "batch_size"]
    assert table[["rounds", "sparsity", "seed"]].drop_duplicates().values.tolist() == [[2, 0.5, 3]]
    assert by_setting(runs) == runs
    alone = {label: run for label, run in runs.items() if label.startswith("magnitude")}
    assert by_setting(alone) == alone  # their seeds are all that differs


def test_events_say_how_a_run_was_pruned(runs) -> None:
    table = analysis.conditions(runs)
    assert table.columns.tolist() == ["model", "data", "measure", "rounds", "sparsity", "seed"]
    assert table.loc["None-2"].tolist() == ["my net", "my images", "none", 0, 0.0, 2]
    assert table.loc["magnitude-3"].tolist() == ["my net", "my images", "magnitude", 2, 0.5, 3]


def test_they_have_tables_and_claims_over_their_seeds(runs, tmp_path) -> None:
    accuracy = analysis.accuracy_table(runs)
    assert accuracy.index.to_frame().astype(str).agg(" ".join, axis=1).str.contains("my net").all()
    verdicts = analysis.claims(runs)
    assert (verdicts.seeds == 3).sum() > 2  # of claims about these measures alone
    condensed = analysis.open_runs(analysis.condense(runs, tmp_path / "own.zarr.zip"))
    assert analysis.claims(condensed)[["claim", "verdict"]].equals(verdicts[["claim", "verdict"]])
    done = _done(runs)
    assert "my net on my images. 3 seeds. Measures: not pruned, loss preservation, magnitude." in done


def test_what_was_said_comes_before_what_events_say(tmp_path) -> None:
    said = {"model": "m", "measure": "mine", "rounds": 7, "sparsity": 0.9, "lr": 0.1, "name": "first", "seed": None}
    train(tmp_path / "one.zarr", "magnitude", 1, said=said)
    train(tmp_path / "two.zarr", "magnitude", 1, said=said | {"lr": 0.2})
    runs = analysis.open_runs(sorted(tmp_path.glob("*.zarr")))
    table = analysis.conditions(runs)
    assert table.loc["one"].tolist() == ["m", "", "mine", 7, 0.9, 0, 0.1]
    assert table.lr.tolist() == [0.1, 0.2]
    again = analysis.open_runs(analysis.condense(runs, tmp_path / "both.zarr.zip"))
    assert [run.attrs["name"] for run in again.values()] == ["first", "first"]


@pytest.mark.parametrize(
    "table", [analysis.conditions, analysis.comparisons, analysis.statistics, analysis.claims, analysis.accuracy_table,
              analysis.convergence_table],
)  # fmt: skip
def test_no_runs_are_said_to_be_none(table) -> None:
    with pytest.raises(ValueError, match=r"^no runs: give at least one record"):
        table({})
    with pytest.raises(ValueError, match=r"give runs by label, .* got a DataTree"):
        table(of())


@pytest.mark.parametrize(
    "analyse",
    [analysis.outcome_table, analysis.agreement_table, lambda run: analysis.each(run, analysis.loss_decrease),
     lambda run: analysis.condense(run, "never.zarr.zip"), lambda run: draw("norm_rate", run)],
)  # fmt: skip
@pytest.mark.parametrize("given", ["a record", "a list"])
def test_a_record_without_a_label_is_not_taken_for_its_groups(analyse, given, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"give runs by label, .* got a (DataTree|list)"):
        analyse(of() if given == "a record" else [of()])
    assert not list(tmp_path.iterdir())


def test_what_was_pruned_is_not_what_runs_are_laid_side_by_side_by() -> None:
    runs = {unit: of(granularity=unit) for unit in ("filter", "weight")}
    assert by_setting(runs) == runs
    of_rates = {f"{unit} {rate}": of(granularity=unit, rate=rate) for unit in ("filter", "weight") for rate in (1, 2)}
    found = analysis.comparisons(by_setting(of_rates))
    assert found.groupby("granularity").measure.apply(list).tolist() == [["rate 1", "rate 2"]] * 2


@pytest.mark.parametrize(
    "attributes",
    [{"experiment": "learning rates"}, {"experiment": "[1, 2]", "protocol": "mine"}, {"experiment": '{"lr": 0.1}'}],
)
def test_an_attribute_of_ones_own_is_no_experiments_configuration(attributes) -> None:
    epochs = xr.Dataset({"test_accuracy": ("epoch", [0.5, 0.75])}, coords={"epoch": [0, 1]})
    run = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), "/epochs": epochs})
    assert analysis.conditions({"mine": run}).measure.tolist() == ["mine"]
    assert float(analysis.outcome(run).test_accuracy) == 0.75
    assert _done({"mine": xr.DataTree.from_dict({"/": run.to_dataset(), "/steps": xr.Dataset()})})


def test_settings_of_several_kinds_can_be_compared() -> None:
    def of(**settings: object) -> xr.DataTree:
        return xr.DataTree(xr.Dataset(attrs={"model": "m", "data": "d", "measure": "x"} | settings))

    runs = {
        "a": of(epochs=3, layers=[[1], [2]]), "b": of(epochs=[2, 1], layers={"n": 1}), "c": of(epochs="all"),
        "d": of(layers=2),
    }  # fmt: skip
    table = analysis.comparisons(runs)
    assert sorted(table.epochs.dropna()) == ["(2, 1)", "3", "all"]
    assert json.loads(table.layers[table.run == "a"].item()) == [[1], [2]]
    assert np.isnan(table.sparsity).all()


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"resumed": 1}, "attributes cannot contain 'resumed', which the recorder writes itself"),
        ({"schema_version": 2}, "attributes cannot contain 'schema_version'"),
        ([("lr", 1)], "attributes must be a dictionary whose keys are strings"),
        ({3: 1}, "attributes must be a dictionary"),
        ({"path": object()}, "an attribute of a record must be a number, a string or a list of these, got object"),
    ],
)
def test_what_no_table_could_read_is_refused_and_nothing_written(tmp_path, attributes, error) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises((TypeError, ValueError), match=error.replace("(", r"\(").replace("[", r"\[")):
        Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), lr=0.1), attributes=attributes)
    assert not list(tmp_path.iterdir())


def test_show_says_what_a_run_was_said_to_be(runs) -> None:
    assert summary(runs["magnitude-2"]).startswith("experiment  model my net, data my images, seed 2\n")


def test_show_says_what_a_run_came_to_and_which_groups_are_empty(runs, tmp_path) -> None:
    _, came_to, *groups = summary(runs["magnitude-2"]).splitlines()
    reached = float(runs["magnitude-2"]["pruning"].sparsity[-1])
    assert came_to == f"came to     test accuracy 52.0%, sparsity {reached:.1%}, 9 steps, 2 events"
    assert "/curvature  empty" in groups
    model = nn.Linear(2, 2)
    Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), lr=0.1)).close()
    *groups, _ = summary(open_run(tmp_path / "run.zarr")).splitlines()
    assert all(re.fullmatch(r"/\w+ +empty", group) for group in groups)


def test_show_counts_the_steps_that_were_taken_not_those_up_to_the_last_that_was_recorded(tmp_path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0, every=5) as recorder:
        for _ in range(19):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        recorder.log_epoch(test_loss=1.0)
    assert "came to     19 steps, 4 of them recorded\n" in summary(open_run(tmp_path / "run.zarr"))


def of(test_accuracy: float = 0.5, **said: object) -> xr.DataTree:
    """A run of someone's loop that said so of itself, and has an accuracy."""
    epochs = xr.Dataset({"test_accuracy": ("epoch", [test_accuracy])}, coords={"epoch": [0]})
    attributes = {"model": "m", "data": "d", "measure": "x", "rounds": 1, "sparsity": 0.5} | said
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), "/epochs": epochs})


@pytest.mark.parametrize("name", ["run", "record", "rank", "counts", "value", "claim", "verdict", "p", *STATISTICS])
def test_a_setting_may_have_any_name(name: str) -> None:
    runs = {
        f"{value}-{seed}": of(value / 8, seed=seed, **{name: value}) for value in (1, 4) for seed in (0, 1)
    }  # fmt: skip
    table = analysis.accuracy_table(runs)
    assert table["seeds"].tolist() == ["2", "2"]
    assert table["test accuracy, %"].tolist() == ["12.5 ± 0.0", "50.0 ± 0.0"]
    assert len(analysis.claims_table(analysis.claims(runs))) > 0
    assert analysis.statistics(runs)[f"{name} (setting)"].tolist() == [1, 1, 4, 4]


def test_runs_that_said_the_same_are_told_apart_by_their_labels() -> None:
    runs = {"a": of(0.25), "b": of(0.5), "other": of(0.75, seed=1)}
    table = analysis.conditions(runs)
    assert table.record.tolist()[:2] == ["a", "b"]
    assert table.record.isna().tolist() == [False, False, True]
    assert analysis.accuracy_table(runs)["seeds"].tolist() == ["1", "1", "1"]
    for brief in (False, True):
        (said,) = overview(runs, brief=brief)["Runs with the same settings and seed"]
        assert said.startswith("2 runs have the seed and all settings of another")
        assert "not averaged: a, b. If they are repetitions, give each its seed: " in said
    runs["b"].attrs["seed"] = 2
    assert "Runs with the same settings and seed" not in overview(runs)
    assert analysis.accuracy_table(runs)["seeds"].tolist() == ["3"]


def test_what_a_stranger_said_in_another_kind_is_not_compared_by() -> None:
    table = analysis.conditions({"odd": of(sparsity="70%", rounds=[1], model=3)})
    assert table.model.tolist() == [""]
    assert table.rounds.tolist() == [0]
    assert table.sparsity.isna().all()


@pytest.mark.parametrize(("name", "value", "said"), [("rounds", "3", "a number"), ("data", ["a", "b"], "a string")])
def test_what_runs_cannot_be_compared_by_is_said_and_kept(tmp_path, name: str, value: object, said: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=rf"attribute '{name}' is .*, so runs are not compared by it: give {said}$"):
        Recorder(tmp_path / "run.zarr", model, optimizer, attributes={name: value, "model": "m"}).close()
    run = open_run(tmp_path / "run.zarr")
    assert run.attrs[name] == value
    assert analysis.conditions({"run": run}).loc["run", name] in (0, "")


def test_a_configuration_may_hold_paths_and_numbers_of_arrays(tmp_path) -> None:
    model = nn.Linear(2, 2)
    said = {
        "measure": "x",
        "data": Path("some/where"),
        "seed": torch.tensor(3),
        "sparsity": np.float32(0.5),
        "rounds": 2.0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recorder(tmp_path / "run.zarr", model, optimizer, attributes=said).close()
    table = analysis.conditions({"run": open_run(tmp_path / "run.zarr")})
    assert table.loc["run", ["data", "seed", "sparsity", "rounds"]].tolist() == ["some/where", 3, 0.5, 2]


def test_a_run_that_lacks_a_setting_is_no_seed_of_those_that_have_it() -> None:
    runs = {"plain 0": of(0.25, seed=0), "plain 1": of(0.5, seed=1), "flipped": of(0.75, seed=2, augmentation="flip")}
    assert analysis.conditions(runs).augmentation.fillna("no").tolist() == ["no", "no", "flip"]
    table = analysis.accuracy_table(runs)
    assert sorted(zip(table["test accuracy, %"], table.seeds, strict=True)) == [("37.5 ± 158.8", "2"), ("75.0", "1")]
    whole = of(0.9, measure="none", seed=3)
    assert "augmentation" not in analysis.conditions({"flipped": runs["flipped"], "whole": whole})
    assert len(analysis.claims(runs | {"the same seed": of(0.75, seed=0, augmentation="flip")}))


def test_runs_that_were_not_pruned_belong_to_every_value_of_what_only_pruning_has() -> None:
    pruned = {f"{epoch} {seed}": of(seed=seed, prune_epoch=epoch) for epoch in (1, 2) for seed in (0, 1)}
    whole = {f"whole {seed}": of(seed=seed, measure="none") for seed in (0, 1)}
    table = analysis.comparisons(pruned | whole)
    assert table.groupby("prune_epoch").run.apply(list).tolist() == [
        ["whole 0", "whole 1", "1 0", "1 1"], ["whole 0", "whole 1", "2 0", "2 1"],
    ]  # fmt: skip
    never = {"absent": of(seed=0)}
    table = analysis.comparisons(pruned | whole | never)
    assert table[table.prune_epoch.isna()].run.tolist() == ["whole 0", "whole 1", "absent"]
    assert table[table.prune_epoch.notna()].run.tolist() == list(pruned)


def test_where_only_some_events_say_what_was_pruned_it_does_not_differ() -> None:
    def pruned(**said: str) -> xr.DataTree:
        events = xr.Dataset({name: ("event", [value]) for name, value in ({"kind": "prune"} | said).items()})
        attributes = {"model": "m", "measure": said.get("measure", "mine"), "sparsity": 0.5}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), "/pruning": events})

    runs = {"ours": pruned(measure="magnitude", granularity="filter"), "mine": pruned()}
    assert "granularity" not in analysis.conditions(runs)


def test_runs_that_said_nothing_stand_beside_those_that_did() -> None:
    nothing = {f"mine {seed}": of(0.25 * (1 + seed)) for seed in (0, 1)}
    for run in nothing.values():
        run.attrs = {}
    table = analysis.accuracy_table({"a": of(0.5, seed=0), "b": of(0.75, seed=1)} | nothing)
    assert table["test accuracy, %"].tolist()[:2] == ["25.0", "50.0"]
    assert sorted(table.seeds) == ["1", "1", "2"]


def test_filters_and_weights_are_not_one_condition() -> None:
    def pruned(granularity: str, seed: int) -> xr.DataTree:
        events = xr.Dataset({"kind": ("event", ["prune"]), "granularity": ("event", [granularity]),
                             "measure": ("event", ["magnitude"]), "target": ("event", [0.5])})  # fmt: skip
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs={"model": "m", "seed": seed}), "/pruning": events})

    runs = {f"{of} {seed}": pruned(of, seed) for of in ("filter", "weight") for seed in (0, 1)}
    table = analysis.comparisons(runs)
    assert table.granularity.tolist() == ["filter", "filter", "weight", "weight"]
    assert table.groupby("granularity").seed.apply(list).tolist() == [[0, 1], [0, 1]]


def test_a_training_that_diverged_is_named() -> None:
    def steps(values: list[float]) -> xr.DataTree:
        norm = xr.Dataset({"param_sqnorm": (("step", "layer"), [[1.0, one] for one in values])},
                          coords={"step": [5, 6, 7], "layer": ["a", "b"]})  # fmt: skip
        return xr.DataTree.from_dict({"/": xr.Dataset(), "/steps": norm})

    found = diverged({"good": steps([1, 2, 3]), "bad": steps([1, np.inf, np.nan]), "none": xr.DataTree()})
    assert found == ["bad: ‖θ‖² is not finite from step 6 on"]


def test_the_training_loss_of_an_epoch_is_that_of_its_steps() -> None:
    steps = xr.Dataset({"loss": ("step", [4.0, 2.0, 1.0, 3.0]), "epoch": ("step", [0, 0, 1, 1])}, {"step": range(4)})
    epochs = xr.Dataset({"test_accuracy": ("epoch", [0.5, 0.75])}, coords={"epoch": [0, 1]})
    run = xr.DataTree.from_dict({"/steps": steps, "/epochs": epochs})
    assert analysis.training_curve(run).train_loss.values.tolist() == [3.0, 2.0]
    logged = xr.DataTree.from_dict({"/steps": steps, "/epochs": epochs.assign(train_loss=("epoch", [9.0, 8.0]))})
    assert analysis.training_curve(logged).train_loss.values.tolist() == [9.0, 8.0]


def test_a_run_that_was_never_tested_is_told_how_to_be() -> None:
    steps = xr.Dataset({"param_sqnorm": (("step", "layer"), np.ones((2, 1)))}, {"step": [0, 1], "layer": ["a"]})
    run = xr.DataTree.from_dict({"/steps": steps})
    (said,) = overview({"untested": run})["Outcome of the runs"]
    assert "recorder.log_epoch(test_accuracy=..., test_loss=...)" in said
