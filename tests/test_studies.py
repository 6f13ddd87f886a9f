"""What a study found about the network is a row of its own beside the event it was added to."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import plain_step, smooth_network, vectors
from prunable import batch, trained

from dynamics import Recorder, open_run
from dynamics.experiments.studies import add_studies
from dynamics.network.masks import apply_masks
from dynamics.probing.objective import cross_entropy_objective
from dynamics.pruning import Pruner
from dynamics.recording.event import Event


def scores(seed: int) -> xr.Dataset:
    """As ``resampled_scores`` gives them, of five units by two measures."""
    generator = np.random.default_rng(seed)
    return xr.Dataset(
        {
            "score": (["unit", "measure"], generator.random((5, 2))),
            "resampled_score": (["measure", "draw", "unit"], generator.random((2, 3, 5))),
        },
        coords={"measure": ["magnitude", "taylor"], "layer": ("unit", ["0"] * 5), "index": ("unit", range(5))},
    )


def test_a_study_is_read_back_as_it_was_added(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=batches):
            pass
        for seed in (1, 2):
            with recorder.event("look", probe=batches) as event:
                event.add("scores", scores(seed))
    found = open_run(tmp_path / "run")["scores"].to_dataset().load()
    assert found.event.values.tolist() == [1, 2]
    assert found.score.dims == ("event", "measure", "unit")
    for seed in (1, 2):
        xr.testing.assert_equal(
            found.sel(event=seed).drop_vars("event"), scores(seed).transpose("measure", "draw", ...)
        )


def test_a_study_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=batches) as event:
            with pytest.raises(ValueError, match="takes one of the studies curve, scores, invariance, got 'units'"):
                event.add("units", scores(0))
            with pytest.raises(
                ValueError, match=r"takes 'score' over the dimensions \('measure', 'unit'\), got it over \('unit',\)"
            ):
                event.add("scores", scores(0).isel(measure=0))
            with pytest.raises(ValueError, match=r"event.add\('scores'\) takes the variables .*score.*, got 'loss'$"):
                event.add("scores", scores(0).rename(score="loss"))
            with pytest.raises(
                ValueError, match=r"a coordinate of 'scores' lies along one dimension, but 'trial' has \(\): .*'trial'"
            ):
                event.add("scores", scores(0).assign_coords(trial=3))
    assert not open_run(tmp_path / "run")["scores"].data_vars


@pytest.mark.parametrize("resumed", [False, True])
def test_studies_of_one_record_are_of_the_same_measures_and_units(tmp_path: Path, resumed: bool) -> None:
    """One that is not is refused: it would not fit into the record, nor would anything that came with it."""
    model, batches = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = Recorder(tmp_path / "run", model, optimizer)
    with recorder.event("look", probe=batches) as event:
        event.add("scores", scores(0))
    with recorder.event("look", probe=batches):  # which adds none, and lets none be forgotten
        pass
    if resumed:
        recorder.close()
        recorder = Recorder(tmp_path / "run", model, optimizer, resume=True)
    with recorder, recorder.event("look", probe=batches) as event:
        with pytest.raises(ValueError, match=r"the same 'measure' .*was \['magnitude', .* is \['magnitude'\] now"):
            event.add("scores", scores(0).isel(measure=[0]))
        with pytest.raises(ValueError, match=r"the same 'unit' .*was \[0, 1, 2, 3, 4\] before, and is \[0, 1\] now"):
            event.add("scores", scores(0).isel(unit=[0, 1]))
        with pytest.raises(ValueError, match=r"takes the same 'draw' .*was \[0, 1, 2\] before, and is \[0, 1\] now"):
            event.add("scores", scores(0).isel(draw=[0, 1]))
        event.add("scores", scores(1))
    assert open_run(tmp_path / "run")["scores"].event.values.tolist() == [0, 2]


def test_units_are_filters(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    pruning = Pruner(model, None, "magnitude", granularity="weight").plan(0.5)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=batches) as event:
            with pytest.raises(
                ValueError, match=r"one boolean per filter, \(unit,\), got shape \(5, 4\) for '0': single"
            ):
                event.units(alive=pruning.alive, scores=pruning.scores)


def test_going_back_takes_studies_back_as_well(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            plain_step(model, optimizer, batch)
            with recorder.event("look", probe=batches[:1]) as event:
                event.add("scores", scores(number))
            if number == 1:
                early = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)]
    model.load_state_dict(early[0])
    optimizer.load_state_dict(early[1])
    Recorder(tmp_path / "run", model, optimizer, resume="rewind").close()
    run = open_run(tmp_path / "run")
    assert run["pruning"].event.values.tolist() == run["scores"].event.values.tolist() == [0, 1]


@pytest.mark.long
def test_protected_layers_are_not_studied_and_a_curve_ends_where_layers_do() -> None:
    model, optimizer = trained("resnet")
    for sparsity, studied in ((0.2, {"curve", "scores", "invariance"}), (0.7, {"scores", "invariance"})):
        planned = Pruner(model, optimizer, "magnitude").plan(sparsity)
        add_studies(event := Event(model), model, planned, [batch(1)], cross_entropy_objective, "eval")
        assert set(event.studies) == studied
        for study in ("scores", "invariance"):
            assert "stem" not in event.studies[study].layer
        if "curve" in studied:
            assert (event.studies["curve"].removed.sel(layer="stem") == 0).all()
        for layer, kept in planned.alive.items():  # one filter a layer is left
            weight = model.get_parameter(f"{layer}.weight")
            apply_masks(model, {f"{layer}.weight": (torch.arange(len(kept)) == 0).view(-1, 1, 1, 1).expand_as(weight)})


def curve(**values: np.ndarray) -> xr.Dataset:
    """As ``removal_curve`` gives it, of two extents in a network of two layers; ``values`` over both."""
    given = {name: (["fraction", "layer"], of) for name, of in values.items()}
    return xr.Dataset({"loss": (["fraction", "stage"], np.ones((2, 2))), **given}, coords={"fraction": [0.1, 0.2]})


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float16])
@pytest.mark.parametrize("flushed", [False, True])
def test_numbers_of_a_study_are_recorded_whatever_the_type_of_the_first(
    tmp_path: Path, dtype: type, flushed: bool
) -> None:
    """A study that lacks them has NaN there; a later one may have fractions or 10⁵, which half precision has not."""
    model, batches = smooth_network(), vectors(1)
    values = [np.array([[0, 1], [1, 1]], dtype), None, np.array([[0.5, 1e5], [-1, 0.1]])]
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        for removed in values:
            with recorder.event("look", probe=batches) as event:
                event.add("curve", curve() if removed is None else curve(removed=removed))
            if flushed:
                recorder.flush()
    found = open_run(tmp_path / "run")["curve"].removed.values
    np.testing.assert_array_equal(found, [values[0], np.full((2, 2), np.nan), values[2]])


@pytest.mark.parametrize("values", [[[1j, 0], [0, 0]], [["1", "2"], ["3", "4"]], [[None, 1], [2, 3]]])
def test_what_no_record_can_hold_is_refused_and_the_others_are_kept(tmp_path: Path, values: list) -> None:
    model, batches = smooth_network(), vectors(1)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=batches) as event:
            with pytest.raises(ValueError, match=r"event.add\('curve'\) takes real numbers, got 'removed' of the type"):
                event.add("curve", curve(removed=np.array(values)))
            days, mixed = np.array(["2026-01-01", "2026-01-02"], "datetime64[s]"), np.array(["0", 1], dtype=object)
            for labels in (days, mixed, np.array([b"0", b"1"]), np.array([0, 1], "c16")):
                with pytest.raises(ValueError, match=r"labels of a coordinate of 'curve' .* 'layer' have the type"):
                    event.add("curve", curve(removed=np.ones((2, 2))).assign_coords(layer=labels))
            with pytest.raises(ValueError, match=r"event.add\(\) cannot take the name 'one/other'"):
                event.add("curve", curve().assign_coords({"one/other": ("fraction", [1, 2])}))
            event.add("curve", curve(removed=np.ones((2, 2))))
    assert (open_run(tmp_path / "run")["curve"].removed == 1).all()


def test_labels_that_pandas_keeps_as_objects_are_recorded_as_strings(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    layers = np.array(["conv", "head"], dtype=object)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        for _ in range(2):
            with recorder.event("look", probe=batches) as event:
                event.add("curve", curve(removed=np.ones((2, 2))).assign_coords(layer=layers))
    found = open_run(tmp_path / "run")["curve"].to_dataset()
    assert found.layer.values.tolist() == ["conv", "head"]
    assert found.sizes["event"] == 2
