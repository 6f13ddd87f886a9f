"""Whatever a public function is given that it cannot take, one sentence says what it needs and what it got."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_runs import record

import analysis
import figures
from figures.catalogue import finding

WRONG = {
    "NoneType": None,
    "int": 3,
    "list": [record("magnitude", 0)],
    "dict": {"mine": record("magnitude", 0)},
    "DataTree": record("magnitude", 0),
    "Dataset": xr.Dataset({"loss": ("step", [1.0])}),
    "DataArray": xr.DataArray([1.0], dims="step", name="loss"),
    "DataFrame": pd.DataFrame({"accuracy": [0.5]}),
    "ndarray": np.zeros((2, 2)),
}

PREDICTION = xr.Dataset({name: ("step", [1.0]) for name in ("measured", "first_order", "second_order")}, {"step": [0]})
OF_LAYERS = xr.DataArray([[1.0, 2.0]], dims=["step", "layer"], coords={"step": [0], "layer": ["a", "b"]}, name="loss")

TAKES = {
    "a prediction beside its measurement": [
        analysis.agree,
        analysis.residuals,
        figures.draw_over_time,
        lambda given: figures.draw_predicted_measured(given, "first_order"),
    ],
    "the table of claims": [analysis.claims_table, analysis.verdict_table],
    "a DataArray over seed": [analysis.mean_and_interval, analysis.median_and_quartiles],
    "a DataArray over layer and step alone": [figures.draw_layers],
    "a DataArray over layer alone": [figures.draw_over_layers],
    "the path of a record": [analysis.expand, lambda given: analysis.condense(WRONG["dict"], given)],
    "steps as numbers": [figures.draw_events],
    "a function of a record": [
        lambda given: analysis.each({"mine": record("magnitude", 0)}, given),
        lambda given: analysis.compare({"mine": record("magnitude", 0)}, given),
    ],
    "an Axes as ax": [
        figures.draw_identity,
        lambda given: figures.draw_over_time(PREDICTION, ax=given),
        lambda given: figures.draw_predicted_measured(PREDICTION, "first_order", ax=given),
        lambda given: figures.draw_layers(OF_LAYERS, ax=given),
        lambda given: figures.draw_over_layers(OF_LAYERS[0], ax=given),
        lambda given: figures.draw_events([3], ax=given),
    ],
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("needed", "function"), [(needed, one) for needed, all_ in TAKES.items() for one in all_])
def test_what_a_function_cannot_take_is_said_in_one_sentence(needed: str, function: Callable, kind: str) -> None:
    if needed == "an Axes as ax" and WRONG[kind] is None:
        return  # the current ones
    with pytest.raises(ValueError, match=rf"^give {needed}.*, got a {kind}( over step)?$"):
        function(WRONG[kind])
    assert not plt.get_fignums()


OF_RUNS = [
    analysis.accuracy_table,
    analysis.agreement_table,
    analysis.claims,
    analysis.conditions,
    analysis.convergence_table,
    analysis.outcome_table,
    analysis.protocol_table,
    analysis.side_by_side,
    analysis.statistics,
    lambda given: analysis.each(given, analysis.loss_decrease),
    lambda given: analysis.condense(given, "never.zarr.zip"),
    *(entry.draw for entry in figures.FIGURES.values()),
    *(lambda given, name=name: finding(name, given) for name in figures.FIGURES),
]


@pytest.mark.parametrize("function", OF_RUNS)
@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "dict"])
def test_what_is_no_mapping_of_runs_is_said(function: Callable, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^give runs by label, such as .*, got a {kind}$"):
        function(WRONG[kind])


@pytest.mark.parametrize("function", OF_RUNS)
def test_labels_of_what_is_no_record_are_said(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"^a run must be a record, open_run\(path\), got 'out/run.zarr' for 'mine'$"):
        function({"mine": "out/run.zarr"})
    with pytest.raises(ValueError, match=r"^no runs: give at least one record"):
        function({})


@pytest.mark.parametrize("given", [None, 3, [None], [record("magnitude", 0)], b"out"])
def test_what_is_no_path_cannot_be_opened(given: object) -> None:
    with pytest.raises(ValueError, match=r"^give the path of a record as text or Path, got a \w+$"):
        analysis.open_runs(given)


@pytest.mark.parametrize("given", [0, -1, 2.5, "2", None, [2]])
def test_what_is_no_number_of_steps_is_no_window(given: object) -> None:
    with pytest.raises(ValueError, match=r"^window must be a number of steps >= 1, got "):
        analysis.norm_rate(WRONG["DataTree"], window=given)


@pytest.mark.parametrize("given", [-1, 2.5, "2", [2]])
def test_what_is_no_step_is_no_beginning(given: object) -> None:
    with pytest.raises(ValueError, match=r"^since must be a step >= 0, got "):
        analysis.convergence(WRONG["DataTree"], since=given)


@pytest.mark.parametrize("given", [0, 1, "0.2", None, float("nan")])
def test_what_is_no_share_removes_nothing(given: object) -> None:
    with pytest.raises(ValueError, match=r"^share must be in \(0, 1\), got "):
        analysis.removed_overlap(WRONG["DataTree"], share=given)


def test_an_array_over_other_dimensions_is_not_drawn() -> None:
    per_layer = PREDICTION.expand_dims(layer=["a", "b"])
    with pytest.raises(ValueError, match=r"^give a prediction over step alone, got one over layer, step$"):
        figures.draw_over_time(per_layer)
    with pytest.raises(ValueError, match=r"^give a DataArray over layer and step alone, got a DataArray over layer$"):
        figures.draw_layers(OF_LAYERS[0])
    with pytest.raises(ValueError, match=r"^give a DataArray over layer alone, got a DataArray over step, layer$"):
        figures.draw_over_layers(OF_LAYERS)
    of_events = xr.DataArray(
        [[1.0, 2.0]], dims=("event", "layer"), coords={"layer": ["a", "b"], "step": ("event", [4])}
    )
    assert len(figures.draw_layers(of_events.rename("removed")).lines) == 2


@pytest.mark.parametrize("given", ["third_order", "measured", None, 2, ["first_order"]])
def test_what_is_no_order_predicts_nothing(given: object) -> None:
    with pytest.raises(ValueError, match=r"^order must be one of first_order, second_order, got "):
        figures.draw_predicted_measured(PREDICTION, given)


def test_what_was_given_is_said_in_one_line() -> None:
    for function in (analysis.loss_decrease, figures.claim, lambda given: analysis.outcome_table({"a": given})):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            function(WRONG["Dataset"])
        assert "\n" not in str(raised.value)


def test_what_is_no_name_is_no_figure() -> None:
    with pytest.raises(ValueError, match=r"^unknown figure \{\}: choose one of "):
        figures.claim({})


def test_a_group_of_ones_own_is_left_out_of_condensed_records(tmp_path) -> None:
    run = record("magnitude", 0)
    run["mine"] = xr.DataTree(xr.Dataset({"a": ("x", [1.0])}))
    found = analysis.expand(analysis.condense({"run": run}, tmp_path / "one.zarr.zip"))
    assert {"steps", "pruning"} <= set(found["run"].children)
    assert "mine" not in found["run"].children
