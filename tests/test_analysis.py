"""The summary figures are the textbook's, and an analysis that lacks something says what."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import plain_step, prune_row, recorded, smooth_network, vectors

import analysis
from analysis import MissingQuantityError
from analysis.overview import overview
from analysis.tables import brief_table
from dynamics import Recorder, open_run
from dynamics.models import VGG, build
from dynamics.pruning import Pruner


def prediction(measured: list[float], first: list[float], second: list[float]) -> xr.Dataset:
    return xr.Dataset({"measured": ("n", measured), "first_order": ("n", first), "second_order": ("n", second)})


def test_agree_on_numbers_done_by_hand() -> None:
    measured = [1.0, 2.0, 4.0, 5.0]
    figures = analysis.agree(prediction(measured, [2.0, 4.0, 8.0, 10.0], measured))
    first, second = figures.sel(order="first_order"), figures.sel(order="second_order")
    assert float(first.median_relative_error) == 1.0  # twice what was measured
    assert float(first.slope) == pytest.approx(0.5)
    assert float(first.rank_correlation) == pytest.approx(1.0)
    assert float(first.r_squared) == pytest.approx(1 - 46 / 10)  # residuals 1, 2, 4, 5; deviations 2, 1, 1, 2
    assert (float(second.median_relative_error), float(second.slope), float(second.r_squared)) == (0, 1, 1)


def test_agree_leaves_out_what_is_missing_and_claims_nothing_from_too_little() -> None:
    figures = analysis.agree(prediction([1.0, np.nan, 3.0], [1.0, 2.0, np.nan], [-1.0, 0.0, -3.0]))
    assert figures["count"].values.tolist() == [1, 2]
    assert figures.median_relative_error.values.tolist() == [0, 2]
    assert np.isnan(figures.slope).all()
    assert np.isnan(figures.rank_correlation).all()


def test_residuals_are_measured_less_predicted() -> None:
    found = analysis.residuals(prediction([1.0, 2.0], [0.5, 3.0], [1.0, 2.5]))
    assert found.first_order.values.tolist() == [0.5, -1.0]
    assert found.second_order.values.tolist() == [0.0, -0.5]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = VGG([4, "M", 6, "M", 6, "M", 6, "M", 6, "M"], num_classes=3, in_channels=1)
    batches = [(torch.randn(8, 1, 32, 32), torch.randint(3, (8,))) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    pruner = Pruner(model, optimizer, "loss_preservation")
    path = tmp_path_factory.mktemp("record") / "run.zarr"
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(batches):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        for sparsity in (0.2, 0.4):
            with recorder.event("prune", probe=batches, measure="loss_preservation") as event:
                pruned = pruner.prune(sparsity, batches)
                event.units(alive=pruned.alive, scores=pruned.scores)
    return open_run(path)


def test_filters_left_count_what_is_alive(record: xr.DataTree) -> None:
    left = analysis.filters_left(record)
    assert left.layer.values.tolist() == ["features.0", "features.4", "features.8", "features.12", "features.16"]
    assert left.total.values.tolist() == [4, 6, 6, 6, 6]
    units = record["units"].to_dataset()
    for event in (0, 1):
        for layer in left.layer.values:
            alive = units.alive[event].values[units.layer.values == layer]
            assert int(left.left.sel(event=event, layer=layer)) == alive.sum()
    assert left.left.sum("layer").values.tolist() == [22, 17]
    assert float(analysis.outcome(record).sparsity) == pytest.approx(1 - 17 / 28)


def test_the_effect_of_a_pruning_names_its_event(record: xr.DataTree) -> None:
    effect = analysis.pruning_effect(record)
    assert effect.measured.dims == ("quantity", "event")
    loss = record["pruning"].loss
    np.testing.assert_allclose(effect.measured.sel(quantity="loss"), loss[:, 1] - loss[:, 0])
    assert effect.measure.values.tolist() == ["loss_preservation"] * 2
    assert (effect.removed_share > 0).all()


def test_agreement_holds_every_relation(record: xr.DataTree) -> None:
    found = analysis.agreement(record)
    assert found.relation.values.tolist() == [
        "loss decrease",
        "norm rate",
        "effect of pruning on the loss",
        "effect of pruning on ‖g‖²",
        "effect of pruning on d‖θ‖²/dt",
        "effect of pruning on θᵀHg",
    ]
    errors = found.median_relative_error.sel(relation="loss decrease")
    assert float(errors.sel(order="second_order")) < float(errors.sel(order="first_order"))


def test_inputs_are_not_changed(record: xr.DataTree) -> None:
    before = record.copy(deep=True)
    for analyse in (analysis.loss_decrease, analysis.norm_rate, analysis.norm_balance, analysis.pruning_effect):
        analyse(record)
    assert record.identical(before)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = recorded(tmp_path / "run", model, optimizer, vectors(2), curvature_every=0)
    for analyse, message in (
        (analysis.loss_decrease, r"nothing was recorded in /curvature. Record with curvature_every > 0"),
        (analysis.stability, "nothing was recorded in /curvature"),
        (analysis.pruning_effect, "nothing was recorded in /pruning. Prune inside"),
        (analysis.filters_left, "nothing was recorded in /units. Call event.units"),
        (analysis.training_curve, "nothing was recorded in /epochs. Call recorder.log_epoch"),
    ):
        with pytest.raises(analysis.MissingQuantityError, match=message):
            analyse(run)


def test_tables_of_agreement_say_on_how_much_they_stand_and_how_to_read_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runs = {}
    for seed in range(2):
        model = smooth_network()
        attributes = {"model": "m", "data": "d", "measure": "none", "seed": seed}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        runs[str(seed)] = recorded(
            tmp_path / str(seed), model, optimizer, vectors(6), curvature_every=2 + seed, attributes=attributes
        )
    parts = overview({"0": runs["0"]})
    table = parts["Theory against measurement"]
    assert table["count"].loc["loss decrease"].tolist() == [3, 3]
    assert "Read the medians" in parts["How to read theory against measurement"][0]
    (brief,) = overview({"0": runs["0"]}, brief=True).values()
    assert brief["error of loss decrease", "count"].tolist() == ["3"]
    assert brief["error of norm rate", "second"].tolist() == ["under 0.001%"]  # exact but for rounding
    parts = overview(runs)
    table = parts["Theory against measurement: medians over runs"]
    assert table["count"].loc["loss decrease"].tolist() == ["2.5", "2.5"]
    assert "Read the medians" in parts["How to read theory against measurement"][0]


def test_runs_are_told_apart(tmp_path: Path) -> None:
    paths = [str(tmp_path / folder / "run.zarr") for folder in ("one", "two")]
    for path in paths:
        model = smooth_network()
        recorded(Path(path), model, torch.optim.SGD(model.parameters(), 0.1), vectors(1))
    assert list(analysis.open_runs(paths[:1])) == ["run"]
    assert list(analysis.open_runs(paths)) == paths


def test_a_pattern_stands_for_all_that_it_matches_in_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "[c]"):
        model = smooth_network()
        recorded(tmp_path / f"{name}.zarr", model, torch.optim.SGD(model.parameters(), 0.1), vectors(1))
    assert list(analysis.open_runs(f"{tmp_path}/*.zarr")) == ["[c]", "a", "b"]
    assert list(analysis.open_runs([tmp_path / "b.zarr", tmp_path / "?.zarr"])) == ["b", "a"]
    assert list(analysis.open_runs(tmp_path / "[c].zarr")) == ["[c]"]
    with pytest.raises(ValueError, match=r"nothing matches .*/\*\.zip: give the paths of records, e\.g\."):
        analysis.open_runs(f"{tmp_path}/*.zip")


def test_a_diverged_step_is_not_taken_for_zero(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(3)
    batches[1] = (batches[1][0] * torch.nan, batches[1][1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="‖g‖² of layer 0 is not finite at step 1"):
        run = recorded(tmp_path / "run", model, optimizer, batches, curvature_every=1)
    decrease = analysis.loss_decrease(run)
    for name in ("measured", "first_order", "second_order"):
        assert np.isnan(decrease[name].values).tolist() == [False, True, True]


def test_where_no_step_is_finite_the_brief_table_has_no_error(tmp_path: Path) -> None:
    model, batches = smooth_network(), [(inputs * torch.nan, labels) for inputs, labels in vectors(2)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="is not finite at step 0"):
        run = recorded(tmp_path / "run", model, optimizer, batches, curvature_every=1)
    table = brief_table({"run": run})
    assert table["error of loss decrease"].loc["run"].tolist() == ["–", "–", "0"]


def test_an_event_that_prunes_nothing_leaves_the_outcome_as_it_was(tmp_path: Path) -> None:
    model = build("vgg13", num_classes=3, in_channels=1, width=0.05)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.randn(8, 1, 32, 32), torch.arange(8) % 3)]
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        pruner = Pruner(model, optimizer, "magnitude")
        pruning = pruner.plan(0.5, batches)
        with recorder.event("prune", probe=batches, **pruning.attributes):
            pruner.apply(pruning)
        with recorder.event("look", probe=batches):
            pass
    found = analysis.outcome(open_run(tmp_path / "run.zarr"))
    assert float(found.sparsity) == pytest.approx(pruning.sparsity)
    assert 0 < float(found.removed_multiply_adds) < 1


def test_a_run_that_has_just_begun_stands_beside_the_others(tmp_path: Path, record: xr.DataTree) -> None:
    model = torch.nn.Linear(4, 3)
    Recorder(tmp_path / "begun.zarr", model, torch.optim.SGD(model.parameters(), 0.1)).close()
    runs = {"whole": record, "begun": open_run(tmp_path / "begun.zarr")}
    assert set(analysis.agreement_table(runs).index.get_level_values("run")) == {"whole"}
    table = analysis.outcome_table(runs)
    assert list(table.index) == ["whole", "begun"]
    assert "epochs completed" not in table


def test_what_was_rewound_to_its_beginning_is_not_there(tmp_path: Path, record: xr.DataTree) -> None:
    """Its groups have no row any more: analyses say so, and tables hold it beside others."""
    model, batches = smooth_network(), vectors(4)
    pair, begun = (model, torch.optim.SGD(model.parameters(), 0.1)), copy.deepcopy(model.state_dict())
    with Recorder(tmp_path / "run.zarr", *pair) as recorder:
        for batch in recorder.watch(batches):
            plain_step(*pair, batch)
        with recorder.event("prune", probe=batches) as event:
            prune_row(model, "0.weight", 0)
            event.units(alive={"0": torch.arange(5) > 0})
        recorder.log_epoch(test_accuracy=0.5)
    model = smooth_network()
    model.load_state_dict(begun)
    Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1), resume="rewind").close()
    run = open_run(tmp_path / "run.zarr")
    assert np.isnan(analysis.outcome(run).test_accuracy)
    for analyse in (analysis.training_curve, analysis.filters_left, analysis.norm_balance, analysis.loss_decrease):
        with pytest.raises(MissingQuantityError, match="holds nothing yet"):
            analyse(run)
    assert list(analysis.outcome_table({"whole": record, "rewound": run}).index) == ["whole", "rewound"]


def test_values_that_differ_by_rounding_alone_have_one_rank() -> None:
    exact = np.array([1e-14, 2e-14, 3.0, 3.0, 3.0, 5.0])
    noisy = exact * (1 + 1e-15 * np.array([0, 0, 3, -2, 1, 0]))
    values = {"measured": ("step", exact), "first_order": ("step", noisy), "second_order": ("step", exact)}
    assert analysis.agree(xr.Dataset(values)).rank_correlation.values == pytest.approx([1, 1], abs=1e-15)


@pytest.mark.parametrize("analyse", [analysis.loss_decrease, analysis.norm_rate, analysis.agreement])
def test_a_group_of_a_record_is_not_said_to_be_an_empty_record(analyse) -> None:
    run = xr.DataTree.from_dict({"/steps": xr.Dataset({"loss": ("step", [1.0])})})
    with pytest.raises(ValueError, match=r"^an analysis needs a whole record, open_run\(path\), got its group /steps$"):
        analyse(run["steps"])


def test_curvature_that_lacks_quantities_says_how_to_have_them(tmp_path: Path) -> None:
    model, names = smooth_network(), ["grad_update", "update_hess_update"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = recorded(tmp_path / "run", model, optimizer, vectors(3), curvature_every=1, quantities=names)
    needs = r"/curvature needs \['loss_before', .*\. Record with quantities=None, or name them in Recorder\(quantities="
    with pytest.raises(analysis.MissingQuantityError, match=needs):
        analysis.loss_decrease(run)
    run = recorded(tmp_path / "none", model, optimizer, vectors(3), curvature_every=0)
    with pytest.raises(analysis.MissingQuantityError, match=r"in /curvature\. Record with curvature_every > 0"):
        analysis.loss_decrease(run)


@pytest.mark.parametrize("analyse", [analysis.network_norm_rate, analysis.layer_norm_rate])
@pytest.mark.parametrize("given", ["run.zarr", ["run.zarr"], xr.Dataset()], ids=["path", "list", "dataset"])
def test_velocities_of_what_is_no_record_are_refused(analyse: Callable, given: object) -> None:
    with pytest.raises(ValueError, match=r"^an analysis needs a record, open_run\(path\), got "):
        analyse(given)
