"""A training that stops and goes on from a checkpoint has the record of one that never stopped."""

import copy
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import Batch, plain_step, prune_row, smooth_network, vectors
from torch import nn

from dynamics import Recorder, RecordError, open_run
from dynamics.network.masks import apply_masks
from dynamics.record import provenance
from dynamics.record.store import Store
from dynamics.recording.resume_points import ResumePoint, ResumePoints

HERE = Path(__file__).parent
Pair = tuple[nn.Module, torch.optim.Optimizer]


def fresh() -> Pair:
    torch.manual_seed(0)
    model = smooth_network()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def checkpoint(pair: Pair) -> list[dict]:
    return [copy.deepcopy(part.state_dict()) for part in pair]


def loaded(state: list[dict]) -> Pair:
    pair = fresh()
    for part, values in zip(pair, state, strict=True):
        part.load_state_dict(copy.deepcopy(values))
    return pair


def train(path: Path, pair: Pair, batches: list[Batch], **settings: object) -> list[dict]:
    """Train and record, one epoch a call; the checkpoint at the end."""
    with Recorder(path, *pair, curvature_every=2, **settings) as recorder:
        for batch in recorder.watch(batches):
            recorder.log(loss=plain_step(*pair, batch))
        recorder.log_epoch(test_accuracy=len(batches) / 10)
    return checkpoint(pair)


def assert_equal(one: xr.DataTree, other: xr.DataTree) -> None:
    for node in ("steps", "curvature", "pruning", "epochs"):
        assert set(one[node].variables) == set(other[node].variables)
        for name, expected in other[node].variables.items():
            same = np.testing.assert_array_equal if expected.dtype.kind in "UO" else np.testing.assert_allclose
            same(one[node][name], expected, err_msg=name)


def test_a_resumed_record_equals_one_that_never_stopped(tmp_path: Path) -> None:
    batches, parts = vectors(9), (slice(0, 3), slice(3, 7), slice(7, 9))
    state = checkpoint(fresh())
    for part in parts:
        state = train(tmp_path / "stopped", loaded(state), batches[part], resume=True)
    pair = fresh()
    with Recorder(tmp_path / "whole", *pair, curvature_every=2) as recorder:
        for part in parts:
            for batch in recorder.watch(batches[part]):
                recorder.log(loss=plain_step(*pair, batch))
            recorder.log_epoch(test_accuracy=len(batches[part]) / 10)
    stopped = open_run(tmp_path / "stopped")
    assert_equal(stopped, open_run(tmp_path / "whole"))
    assert stopped["steps"].step.values.tolist() == list(range(9))
    assert stopped["epochs"].epoch.values.tolist() == [0, 1, 2]
    assert [trace["step"] for trace in stopped.attrs["resumed"]] == [3, 7]
    assert "resumed" not in open_run(tmp_path / "whole").attrs


def test_going_back_is_refused_unless_asked_for(tmp_path: Path) -> None:
    batches = vectors(9)
    early = train(tmp_path / "run", fresh(), batches[:4])
    train(tmp_path / "run", loaded(early), batches[4:7], resume=True)
    files = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match=r"model is at step 4 of .*, but the record continues to step 7 .* resume=\"rewind\""
    ):
        train(tmp_path / "run", loaded(early), batches[4:], resume=True)
    assert files == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    train(tmp_path / "run", loaded(early), batches[4:], resume="rewind")
    train(tmp_path / "whole", loaded(train(tmp_path / "whole", fresh(), batches[:4])), batches[4:], resume=True)
    assert_equal(open_run(tmp_path / "run"), open_run(tmp_path / "whole"))
    assert [(trace["step"], trace["dropped"]) for trace in open_run(tmp_path / "run").attrs["resumed"]] == [
        (4, 0),
        (4, 3),
    ]


@pytest.mark.parametrize(("every", "step"), [(1, None), (10, None), (1, 3)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_knows_on_which_side_of_a_pruning_it_is(
    tmp_path: Path, when: str, every: int, step: int | None
) -> None:
    pair, batches = fresh(), vectors(6)
    keep = {"0.weight": (torch.arange(5) > 1).view(5, 1).expand(5, 4)}
    state = {}
    with Recorder(tmp_path / "run", *pair, curvature_every=2, every=every) as recorder:
        for batch in recorder.watch(batches[:3]):
            plain_step(*pair, batch)
        state["before"] = checkpoint(pair)
        with recorder.event("prune", probe=batches[:1]) as event:
            apply_masks(pair[0], keep, pair[1])
            event.units(alive={"0": torch.arange(5) > 1})
        state["after"] = checkpoint(pair)
    if when == "before":
        with pytest.raises(
            ValueError,
            match=r"at step 3 .* with 0 events before it, .* to step 3 with 1: .* drop what was recorded later",
        ):
            Recorder(tmp_path / "run", *loaded(state[when]), resume=True)
    pair = loaded(state[when])
    if when == "after":
        with pytest.warns(UserWarning, match="8 parameters that were pruned when event 0 .* no mask now .* layer '0'"):
            Recorder(tmp_path / "run", *pair, curvature_every=2, every=every, resume=True).close()
        apply_masks(pair[0], keep)
    Recorder(tmp_path / "run", *pair, curvature_every=2, every=every, resume="rewind", step=step).close()
    run = open_run(tmp_path / "run")
    assert run["steps"].sizes["step"] == (3 if every == 1 else 1)
    assert run["pruning"].sizes["event"] == run["units"].sizes["event"] == (1 if when == "after" else 0)


def test_complex_parameters_without_the_mask_they_had_are_said(tmp_path: Path) -> None:
    model = nn.Linear(4, 3, dtype=torch.complex128)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = [torch.randn(2, 4, dtype=torch.complex128)]
    recorder = Recorder(tmp_path / "run", model, optimizer, objective=lambda model, x: model(x).abs().sum())
    with recorder, recorder.event("prune", probe=probe):
        apply_masks(model, {"weight": torch.arange(3).view(3, 1).expand(3, 4) > 0}, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(tmp_path / "run", model, optimizer, resume=True).close()
    free = nn.Linear(4, 3, dtype=torch.complex128)
    free.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="8 parameters that were pruned when event 0 .* no mask now"):  # 4, of 2 each
        Recorder(tmp_path / "run", free, torch.optim.SGD(free.parameters(), 0.1), resume=True).close()


def test_a_checkpoint_that_is_later_than_the_record_needs_its_step(tmp_path: Path) -> None:
    batches, pair = vectors(8), fresh()
    train(tmp_path / "run", pair, batches[:4])
    for batch in batches[4:6]:
        plain_step(*pair, batch)  # what a kill took from the record
    with pytest.raises(ValueError, match=r"match no step of .*, which ends at step 4: .* pass step=<the step"):
        train(tmp_path / "run", pair, batches[6:], resume=True)
    train(tmp_path / "run", pair, batches[6:], resume=True, step=6)
    assert open_run(tmp_path / "run")["steps"].step.values.tolist() == [0, 1, 2, 3, 6, 7]


def test_what_cannot_be_gone_on_with_is_refused_in_a_line(tmp_path: Path) -> None:
    batches, pair = vectors(3), fresh()
    train(tmp_path / "run", pair, batches)
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"record of another network: it has layers \['0', '2'\], the model has \['1'\]"
    ):
        Recorder(tmp_path / "run", other, torch.optim.SGD(other.parameters(), 0.1), resume=True)
    with pytest.raises(ValueError, match='resume must be False, True or "rewind", got 2'):
        Recorder(tmp_path / "run", *pair, resume=2)
    with pytest.raises(
        ValueError, match=r"step must be the step at which training continues, .* got step=3 with resume="
    ):
        Recorder(tmp_path / "run", *pair, step=3)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(RecordError, match="thesis is not a thetadot record"):
        Recorder(tmp_path / "thesis", *pair, resume=True)
    with Recorder(tmp_path / "run", *pair, resume=True):
        with pytest.raises(BlockingIOError, match="is being written by another recorder"):
            Recorder(tmp_path / "run", *pair, resume=True)
    assert not pair[1]._optimizer_step_pre_hooks


def test_distances_go_on_from_where_recording_began(tmp_path: Path) -> None:
    batches, start = vectors(4), nn.utils.parameters_to_vector(fresh()[0].parameters())
    train(tmp_path / "run", loaded(train(tmp_path / "run", fresh(), batches[:2])), batches[2:3], resume=True)
    pair = loaded(train(tmp_path / "other", fresh(), batches[:3]))
    train(tmp_path / "run", pair, batches[3:], resume=True)
    before_last = loaded(train(tmp_path / "again", fresh(), batches[:3]))[0]
    expected = (nn.utils.parameters_to_vector(before_last.parameters()) - start).square().sum().item()
    found = open_run(tmp_path / "run")["steps"].distance_sqnorm.sum("layer").values[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def distances(path: Path) -> np.ndarray:
    return open_run(path)["steps"].distance_sqnorm.sum("layer", skipna=False).values


def test_a_record_that_begins_late_has_distances_from_there(tmp_path: Path) -> None:
    batches = vectors(4)
    state = train(tmp_path / "run", fresh(), batches[:2])
    train(tmp_path / "late", loaded(state), batches[2:], resume=True, step=1000)
    assert distances(tmp_path / "late")[0] == 0
    np.testing.assert_array_less(0, distances(tmp_path / "late")[1:])


def test_distances_go_on_after_an_event_before_the_first_step(tmp_path: Path) -> None:
    pair, (batch, *_) = fresh(), vectors(1)
    with Recorder(tmp_path / "run", *pair) as recorder, recorder.event("prune", probe=[batch]):
        removed = pair[0][0].weight[0].square().sum().item()
        prune_row(pair[0], "0.weight", 0)
    train(tmp_path / "run", pair, [batch], resume=True)
    np.testing.assert_allclose(distances(tmp_path / "run"), [removed], rtol=1e-12)


def test_distances_from_what_is_not_known_any_more_are_said(tmp_path: Path) -> None:
    batches = vectors(3)
    state = train(tmp_path / "run", fresh(), batches[:2])
    for kept in (tmp_path / "run").glob(".start-*"):
        kept.unlink()
    with pytest.warns(UserWarning, match=r"‖θ−θ₀‖² \(distance_sqnorm\) is NaN from step 2 on: .*run holds no θ₀"):
        train(tmp_path / "run", loaded(state), batches[2:], resume=True)
    assert np.isnan(distances(tmp_path / "run")).tolist() == [False, False, True]


def test_a_recorder_that_could_not_begin_lets_the_record_go(tmp_path: Path) -> None:
    """Also while what was raised is still at hand, as in a notebook."""
    batches = vectors(3)
    state = train(tmp_path / "run", fresh(), batches[:2])
    (start,) = (tmp_path / "run").glob(".start-*")
    start.write_bytes(b"half")
    with pytest.raises(RecordError, match=r"start-.* cannot be read .*: copy it again, or remove it") as said:
        Recorder(tmp_path / "run", *loaded(state), resume=True)
    start.unlink()
    with pytest.warns(UserWarning, match="distance_sqnorm"):
        Recorder(tmp_path / "run", *loaded(state), resume=True).close()
    assert said.value.__traceback__ is not None


def test_a_record_that_begins_late_counts_its_epochs_from_0(tmp_path: Path) -> None:
    state, batches = checkpoint(fresh()), vectors(2)
    train(tmp_path / "watched", loaded(state), batches, resume=True, step=1000)
    model, optimizer = loaded(state)
    with Recorder(tmp_path / "counted", model, optimizer, curvature_every=0, resume=True, step=1000) as recorder:
        for _ in range(2):
            recorder.begin_epoch()
            plain_step(model, optimizer, batches[0])
    assert open_run(tmp_path / "watched")["steps"].epoch.values.tolist() == [0, 0]
    assert open_run(tmp_path / "counted")["steps"].epoch.values.tolist() == [0, 1]


def test_a_training_that_goes_on_with_another_optimizer_is_told_so(tmp_path: Path) -> None:
    batches = vectors(3)
    model, optimizer = loaded(train(tmp_path / "run", fresh(), batches[:2]))
    given = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="the optimizer took no step: the one that trains the model is not the one"):
        with Recorder(tmp_path / "run", model, given, resume=True) as recorder:
            for batch in recorder.watch(batches[2:]):
                plain_step(model, optimizer, batch)


def look(path: Path, *, note: float | str = 1.0, layers: Sequence[str] = ("0", "2"), pair: Pair | None = None) -> Pair:
    """A step, and an event that describes itself so and tells of its units; again, if a pair did so before."""
    model, optimizer = pair or fresh()
    with Recorder(path, model, optimizer, curvature_every=0, resume=pair is not None) as recorder:
        plain_step(model, optimizer, vectors(1)[0])
        with recorder.event("look", probe=vectors(1), note=note) as event:
            alive = {layer: torch.ones(len(model.get_submodule(layer).weight)) for layer in layers}
            event.units(alive=alive)
    return model, optimizer


def test_what_events_say_is_of_one_kind_over_a_resumption_too(tmp_path: Path) -> None:
    pair = look(tmp_path / "run")
    with pytest.raises(ValueError, match="event\\(\\) takes 'note' as a number, as in the events before, got 'three'"):
        look(tmp_path / "run", note="three", pair=pair)
    with pytest.raises(
        ValueError, match=r"the same units in all events of a record, but unit 0 of layer '2' is not in all"
    ):
        look(tmp_path / "run", layers=["0"], pair=pair)
    look(tmp_path / "run", layers=["2", "0"], pair=pair)  # in another order
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0, 1, 2, 3]
    assert run["pruning"].note.values.tolist() == [1, 1]
    assert list(dict.fromkeys(run["units"].layer.values)) == ["0", "2"]


@pytest.mark.parametrize("sparsity", [0.3, "three in ten"])
def test_what_the_last_pruning_reached_is_known_over_a_resumption(tmp_path: Path, sparsity: float | str) -> None:
    model, optimizer = fresh()
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        plain_step(model, optimizer, vectors(1)[0])
        with recorder.event("prune", probe=vectors(1), sparsity=sparsity):
            prune_row(model, "0.weight", 0)
        with recorder.event("prune", probe=vectors(1), target=0.0):
            pass
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume=True) as recorder:
        with warnings.catch_warnings(action="error"):  # as of a pruning that was to do something
            with recorder.event("prune", probe=vectors(1), sparsity=sparsity):
                pass
    assert open_run(tmp_path / "run")["pruning"].sizes["event"] == 3


def test_what_is_kept_to_resume_does_not_grow_for_ever(tmp_path: Path) -> None:
    points = ResumePoints(store := Store(tmp_path / "run", {"schema_version": 1}))
    for step in range(1, 1003):
        points.keep(step, ResumePoint(step / 10, step % 2 == 0))
    assert [points.at(step) for step in (2, 3, 1002)] == [None, (0.3, False), (100.2, True)]
    assert len(store.kept("flow-times")) == 1000
    store.close()


TRAINING = """
import sys, time, torch
from networks import plain_step, vectors
from test_recorder_resumes import checkpoint, fresh, loaded
from dynamics import Recorder

def main(path, state, delay):
    pair = loaded(torch.load(state)) if state else fresh()
    done = pair[1].state_dict()["param_groups"][0].get("done", 0)
    with Recorder(path, *pair, curvature_every=2, resume="rewind") as recorder:
        for number, batch in enumerate(recorder.watch(vectors(200)[done:]), start=done + 1):
            recorder.log(loss=plain_step(*pair, batch))
            if number % 10 == 0:
                recorder.flush()
                pair[1].param_groups[0]["done"] = number
                torch.save(checkpoint(pair), f"{path}.half")
                __import__("os").replace(f"{path}.half", f"{path}.pt")
                print(number, flush=True)
            time.sleep(delay)

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, 0.005)
"""


def launch(path: Path, *state: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), str(path), *state]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path, state = tmp_path / "run", ()
    for checkpoints in (2, 4):
        with launch(path, *state) as child:
            for _ in range(checkpoints):
                child.stdout.readline()
            child.kill()
        state = (f"{path}.pt",)
    with launch(path, *state) as child:
        child.communicate()
    pair = fresh()
    with Recorder(tmp_path / "whole", *pair, curvature_every=2) as recorder:
        for batch in recorder.watch(vectors(200)):
            recorder.log(loss=plain_step(*pair, batch))
    run, whole = open_run(path), open_run(tmp_path / "whole")
    assert run["steps"].step.values.tolist() == list(range(200))
    for name in set(whole["steps"].data_vars) - {"epoch"}:
        np.testing.assert_allclose(run["steps"][name], whole["steps"][name], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(run["curvature"].grad_hess_grad, whole["curvature"].grad_hess_grad, rtol=1e-9)


def test_sigterm_writes_what_is_left(tmp_path: Path) -> None:
    with launch(tmp_path / "run") as child:
        child.stdout.readline()
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
    assert child.returncode == -signal.SIGTERM
    assert open_run(tmp_path / "run")["steps"].sizes["step"] > 10


@pytest.mark.parametrize("mode", [True, "rewind"])
def test_epochs_are_counted_on_where_steps_are_recorded_seldom(tmp_path: Path, mode: bool | str) -> None:
    states = []
    for path in ("whole", "run"):
        pair = fresh()
        with Recorder(tmp_path / path, *pair, every=25, curvature_every=0) as recorder:
            for epoch in range(6):
                for batch in recorder.watch(vectors(10)):
                    plain_step(*pair, batch)
                recorder.log_epoch(test_accuracy=epoch / 10)
                recorder.flush()
                states.append(checkpoint(pair))
                if path == "run" and mode is True and epoch == 3:
                    break
    pair = loaded(states[3])
    with Recorder(tmp_path / "run", *pair, every=25, curvature_every=0, resume=mode, step=40) as recorder:
        for epoch in range(4, 6):
            for batch in recorder.watch(vectors(10)):
                plain_step(*pair, batch)
            recorder.log_epoch(test_accuracy=epoch / 10)
    assert_equal(open_run(tmp_path / "run"), open_run(tmp_path / "whole"))


def test_a_rewound_training_finds_its_epoch_where_steps_are_recorded_seldom(tmp_path: Path) -> None:
    """No step of the rest of the epoch is recorded, but its end was logged."""
    batches, model, how = vectors(5), smooth_network(), {"every": 10, "curvature_every": 0}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, **how) as recorder:
        for epoch in range(4):
            for number, batch in enumerate(recorder.watch(batches)):
                plain_step(model, optimizer, batch)
                if (epoch, number) == (2, 1):
                    recorder.flush()
                    saved = copy.deepcopy(model.state_dict())
            recorder.log_epoch(test_accuracy=0.5)
    model.load_state_dict(saved)
    with Recorder(tmp_path / "run", model, optimizer, **how, resume="rewind", step=12) as recorder:
        for rest in (batches[2:], batches, batches):
            for batch in recorder.watch(rest):
                plain_step(model, optimizer, batch)
    assert open_run(tmp_path / "run")["steps"].epoch.values.tolist() == [0, 2, 4]


def test_a_trace_tells_where_a_record_was_continued_by_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [
        {"commit": "one"},
        {"commit": "two", "torch": "3.0"},
        {"commit": "two", "torch": "3.0"},
        {"commit": "one"},
    ]
    model, optimizer = fresh()
    origin = provenance.attributes()
    for version in versions:
        monkeypatch.setattr(provenance, "attributes", lambda version=version: origin | {"torch": "2.0"} | version)
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume=True) as recorder:
            for batch in recorder.watch(vectors(1)):
                plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    told = [{name: one[name] for name in ("commit", "torch") if name in one} for one in run.attrs["resumed"]]
    assert (run.attrs["commit"], told) == ("one", [versions[1], {}, {"commit": "one", "torch": "2.0"}])


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_rewound_training_is_in_the_epoch_in_which_it_stopped(tmp_path: Path, stop: int) -> None:
    """Its first pass is the rest of that epoch, or the next one if it stopped at an end."""
    batches, model = vectors(5), smooth_network()
    optimizer, saved = torch.optim.SGD(model.parameters(), 0.1), {}
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for _ in range(3):
            for batch in recorder.watch(batches):
                plain_step(model, optimizer, batch)
                if len(saved) < stop:
                    recorder.flush()
                    saved[len(saved)] = copy.deepcopy(model.state_dict())
    epoch, done = divmod(stop, 5)
    model.load_state_dict(saved[stop - 1])
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume="rewind") as recorder:
        for rest in (batches[done:], *[batches] * (2 - epoch)):
            for batch in recorder.watch(rest):
                plain_step(model, optimizer, batch)
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.epoch.values.tolist() == [number // 5 for number in range(15)]


def test_epochs_are_counted_on_whatever_quantities_are_recorded(tmp_path: Path) -> None:
    pair, batches = fresh(), vectors(2)
    for step, quantities in ((0, ["grad_sqnorm"]), (4, ["epoch"]), (8, ["grad_sqnorm"])):
        settings = {"curvature_every": 0, "quantities": quantities, "resume": True, "step": step}
        with Recorder(tmp_path / "run", *pair, **settings) as recorder:
            for _ in range(2):
                for batch in recorder.watch(batches):
                    plain_step(*pair, batch)
            with recorder.event("look", probe=batches):
                pass
    run = open_run(tmp_path / "run")
    assert run["steps"].epoch.values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert run["pruning"].epoch.values.tolist() == [1, 3, 5]


def test_epochs_logged_behind_the_last_recorded_step_are_taken_back_as_well(tmp_path: Path) -> None:
    pair, states = fresh(), []
    with Recorder(tmp_path / "run", *pair, every=100, curvature_every=0) as recorder:
        for epoch in range(3):
            for batch in recorder.watch(vectors(10)):
                plain_step(*pair, batch)
            recorder.log_epoch(test_accuracy=epoch / 10)
            states.append(checkpoint(pair))
    settings = {"every": 100, "curvature_every": 0, "step": 10}
    with pytest.raises(ValueError, match=r"model is at step 10 of .*, but the record continues to step 30 with 0"):
        Recorder(tmp_path / "run", *loaded(states[0]), resume=True, **settings)
    Recorder(tmp_path / "run", *loaded(states[0]), resume="rewind", **settings).close()
    run = open_run(tmp_path / "run")
    assert (run["epochs"].step.values.tolist(), run["epochs"].epoch.values.tolist()) == ([10], [0])
    assert run.attrs["resumed"][0]["dropped"] == 20


def test_epochs_without_watched_data_go_on_where_they_were(tmp_path: Path) -> None:
    def trained(path: Path, pair: Pair, epochs: int, **settings: object) -> list[dict]:
        with Recorder(path, *pair, curvature_every=0, **settings) as recorder:
            if not settings:
                recorder.log_epoch(test_accuracy=0.1)  # which ends no epoch, as no step was taken
            for _ in range(epochs):
                for batch in batches:
                    plain_step(*pair, batch)
                recorder.log_epoch(test_accuracy=0.5)
        return checkpoint(pair)

    batches = vectors(3)
    trained(tmp_path / "whole", fresh(), 3)
    state = trained(tmp_path / "parts", fresh(), 0)
    for epochs in (1, 2):
        state = trained(tmp_path / "parts", loaded(state), epochs, resume=True)
    whole, parts = (open_run(tmp_path / name) for name in ("whole", "parts"))
    assert whole["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert_equal(parts, whole)


def test_where_parameters_stood_still_the_step_is_asked_for(tmp_path: Path) -> None:
    pair = fresh()
    pair[1].param_groups[0]["lr"] = 0.0
    state = train(tmp_path / "run", pair, vectors(4))
    with pytest.raises(ValueError, match=r"match all steps from 0 to 4 of .*pass step="):
        Recorder(tmp_path / "run", *loaded(state), resume="rewind")
    Recorder(tmp_path / "run", *loaded(state), resume=True).close()  # what is at the end goes on from there
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 4
    Recorder(tmp_path / "run", *loaded(state), resume="rewind", step=np.int64(2)).close()
    assert open_run(tmp_path / "run")["steps"].step.values.tolist() == [0, 1]


@pytest.mark.parametrize("also", [[], ["param_update"], ["update_sqnorm"], ["param_update", "update_sqnorm"]])
def test_the_step_is_found_by_the_norms_of_parameters_that_are_recorded(tmp_path: Path, also: list[str]) -> None:
    """After the last step, that takes those of its update, too."""
    pair, states = fresh(), []
    settings = {"curvature_every": 0, "quantities": ["param_sqnorm", *also]}
    with Recorder(tmp_path / "run", *pair, **settings):
        for batch in vectors(3):
            plain_step(*pair, batch)
            states.append(checkpoint(pair))
    known = len(also) == 2
    with nullcontext() if known else pytest.raises(ValueError, match="parameters match no step of"):
        Recorder(tmp_path / "run", *loaded(states[2]), resume=True, **settings).close()
    Recorder(tmp_path / "run", *loaded(states[0]), resume="rewind", **settings).close()
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0]
    assert [trace["step"] for trace in run.attrs["resumed"]] == [3, 1][not known :]


def test_a_record_of_no_step_yet_is_gone_on_with_from_its_beginning(tmp_path: Path) -> None:
    pair = fresh()
    with Recorder(tmp_path / "run", *pair, curvature_every=0) as recorder:
        recorder.log_epoch(test_accuracy=0.1)
    store = Store.reopen(tmp_path / "run")
    store.append("curvature", {"step": np.array([0])})  # as an automatic flush may leave it, and a kill
    store.commit()
    store.close()
    train(tmp_path / "run", pair, vectors(3), resume=True)
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0, 1, 2]
    assert run["curvature"].step.values.tolist() == [0, 2]
    assert run["epochs"].test_accuracy.values.tolist() == [0.1, 0.3]
    assert distances(tmp_path / "run")[0] == 0


def test_curvature_of_a_step_that_was_not_recorded_any_more_is_taken_back(tmp_path: Path) -> None:
    state = train(tmp_path / "run", fresh(), vectors(4))
    store = Store.reopen(tmp_path / "run")
    store.append("curvature", {"step": np.array([4])})  # as an automatic flush may leave it, and a kill
    store.commit()
    store.close()
    pair = loaded(state)
    train(tmp_path / "run", pair, vectors(2), resume=True)
    assert open_run(tmp_path / "run")["curvature"].step.values.tolist() == [0, 2, 4]


def test_a_record_whose_epochs_do_not_say_their_step_is_gone_on_with_by_its_steps(tmp_path: Path) -> None:
    pair, states = fresh(), []
    with Recorder(tmp_path / "run", *pair, curvature_every=0) as recorder:
        for epoch in range(4):
            for batch in recorder.watch(vectors(3)):
                plain_step(*pair, batch)
            recorder._rows.add("epochs", {"epoch": epoch, "test_accuracy": epoch / 10})  # as it was written once
            states.append(checkpoint(pair))
    pair = loaded(states[1])
    with Recorder(tmp_path / "run", *pair, curvature_every=0, resume="rewind") as recorder:
        for batch in recorder.watch(vectors(3)):
            plain_step(*pair, batch)
    run = open_run(tmp_path / "run")
    assert run["epochs"].epoch.values.tolist() == [0, 1]
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("every", [1, 3])
def test_flow_time_goes_on_where_the_first_layer_is_frozen(tmp_path: Path, every: int) -> None:
    """Its own flow step is 0, but the optimizer steps the group that it is in."""

    def train(pair: Pair, resume: bool) -> None:
        pair[0][0].requires_grad_(False)
        with Recorder(tmp_path / "run", *pair, curvature_every=0, every=every, resume=resume) as recorder:
            for batch in vectors(4):
                recorder.observe(batch)
                plain_step(*pair, batch)

    train(pair := fresh(), resume=False)
    train(loaded(checkpoint(pair)), resume=True)
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.sizes["step"] == len(range(0, 8, every))
    np.testing.assert_allclose(steps.flow_time, 0.1 / (1 - 0.9) * steps.step, rtol=1e-12)


def test_flow_time_goes_on_where_another_optimizer_stepped_last(tmp_path: Path) -> None:
    """The flow step of that step's row is 0 in the layers of the first, as if they were frozen."""
    model = smooth_network()
    first, second = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.7)
    for _ in range(2):
        with Recorder(tmp_path / "run", model, [first, second], curvature_every=0, resume=True) as recorder:
            for number, batch in enumerate(recorder.watch(vectors(4))):
                model.zero_grad()
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                second.step()
                if number % 2 == 0:
                    first.step()
    times = open_run(tmp_path / "run")["steps"].flow_time
    np.testing.assert_allclose(times, 0.1 * np.array([0, 1, 1, 2, 2, 3, 3, 4]), rtol=1e-12)
