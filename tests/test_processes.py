"""Several processes write one record, and it says what one process on the joined batch would say."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xarray as xr
from networks import Batch, normalised_network, recorded, sequences, smooth_network, vectors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dynamics import open_run
from dynamics.loop import processes as ours

HERE = Path(__file__).parent


class Processes:
    """Three of torchrun's, which fork as many as are asked for."""

    def __init__(self, orders: Path) -> None:
        self.orders = orders
        orders.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
        self.running = subprocess.Popen([*command, HERE / "processes_script.py", orders], stdin=subprocess.PIPE)

    def __call__(self, path: Path, kind: str, count: int = 2) -> tuple[xr.DataTree, str]:
        """The record of ``count`` processes, and what they printed."""
        with self.orders.open("a") as orders:
            print(json.dumps([str(path), kind, count]), file=orders)
        done = [Path(f"{path}.status.{rank}") for rank in range(count)]
        while not all(one.exists() and one.read_text() for one in done):
            assert self.running.poll() is None
            time.sleep(0.01)
        said = "".join(Path(f"{path}.said.{rank}").read_text() for rank in range(count))
        assert [one.read_text() for one in done] == ["0"] * count, said[-3000:]
        return open_run(path), said


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("processes") / "orders")
    yield processes
    processes.running.stdin.close()
    assert processes.running.wait() == 0


def told(folder: Path, what: str) -> list[str]:
    """What the processes noted, each for itself."""
    return [path.read_text() for path in sorted(folder.glob(f"run.{what}.?"))]


def alone(path: Path, batches: list[Batch], *, frozen: bool = False) -> xr.DataTree:
    """The record of one process on the whole batches; the first layer may be frozen."""
    torch.manual_seed(0)
    model = smooth_network()
    model[0].requires_grad_(not frozen)
    return recorded(path, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batches, curvature_every=1)


def assert_same(one: xr.DataTree, other: xr.DataTree, node: str, rtol: float = 1e-9) -> None:
    assert set(one[node].data_vars) == set(other[node].data_vars)
    for name, expected in other[node].data_vars.items():
        least = 1e-12 * float(np.abs(expected).max() or 1)
        np.testing.assert_allclose(one[node][name], expected, rtol, least, err_msg=name)


@pytest.mark.long
def test_replicas_record_what_one_process_would(tmp_path: Path, together: Processes) -> None:
    run, said = together(tmp_path / "run", "replicas")
    assert "is inside what DistributedDataParallel returned" in said  # of the one that each gave by itself
    expected = alone(tmp_path / "alone", vectors(3))
    assert_same(run, expected, "steps")
    assert_same(run, expected, "curvature")
    assert run["pruning"].sizes["event"] == 1
    assert ["exists already" in text for text in told(tmp_path, "second")] == [True, True]
    (other,) = told(tmp_path, "own")
    assert "the model that DistributedDataParallel" in other
    failed = told(tmp_path, "failed")
    assert failed[0] == "event(): the objective failed on the probe's batches in mode 'eval' in another process"
    assert "shapes cannot be multiplied" in failed[1]
    unlike = told(tmp_path, "unlike")
    said = "inside event() the networks of the processes became different"
    assert [text.startswith(said) for text in unlike] == [True, True]


def test_a_replica_that_is_a_part_of_the_model_trains_as_without_a_record(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replica_within_a_model")
    assert told(tmp_path, "same") == ["True", "True"]
    np.testing.assert_allclose(4 * run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_the_first_process_may_write_or_fail_alone_between_optimizers(
    tmp_path: Path, together: Processes, kind: str
) -> None:
    """Of the step that is under way when it fails, nothing is measured then that only all of them can."""
    run, said = together(tmp_path / "run", f"{kind}_in_turn")
    assert run["epochs"].step.values.tolist() == [2, 4, 6]
    assert run["steps"].step.values.tolist() == list(range(6))
    assert "Warning" not in said
    if kind == "replicas":
        assert run["curvature"].step.values.tolist() == list(range(5))
        np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm[:5], rtol=1e-8)


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_a_record_goes_on_behind_a_step_of_only_some_optimizers(tmp_path: Path, together: Processes, kind: str) -> None:
    """Its curvature alone, which was not measured when the record was flushed, is missing."""
    run, _ = together(tmp_path / "run", f"{kind}_going_on_in_turn")
    steps, first = run["steps"], open_run(tmp_path / "run.first")["steps"]
    xr.testing.assert_identical(steps.dataset.isel(step=slice(4)).drop_attrs(), first.dataset.drop_attrs())
    assert steps.loss.values.tolist() == steps.step.values.tolist() == list(range(6))
    after = steps.param_sqnorm + 2 * steps.param_update + steps.update_sqnorm
    np.testing.assert_allclose(after[:-1], steps.param_sqnorm[1:], rtol=1e-12)
    if kind == "replicas":
        assert run["curvature"].step.values.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_a_flush_between_optimizers_ends_no_step(tmp_path: Path, together: Processes, kind: str) -> None:
    run, _ = together(tmp_path / "run", f"{kind}_flushing_between")
    expected = open_run(tmp_path / "run.plain")
    assert run["steps"].step.values.tolist() == [0, 2, 4]
    for node in ("steps", "curvature") if kind == "replicas" else ("steps",):
        xr.testing.assert_identical(run[node].dataset.drop_attrs(), expected[node].dataset.drop_attrs())


def test_processes_that_do_not_train_have_no_part(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replicas_beside_an_actor", 3)
    expected = alone(tmp_path / "alone", vectors(3))
    assert_same(run, expected, "steps")
    assert_same(run, expected, "curvature")


def test_shards_in_two_dimensions_may_be_those_of_some_processes(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "shards_in_two_dimensions_beside_an_actor", 3)
    assert_same(run, alone(tmp_path / "alone", vectors(3)), "steps")


def test_a_batch_that_all_replicas_skip_is_no_part_of_a_step(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replicas_that_skip")
    batches = [batch for number, batch in enumerate(vectors(5)) if number not in (1, 3)]
    assert_same(run, alone(tmp_path / "alone", batches), "curvature")


@pytest.mark.parametrize("count", [2, 3])
def test_batches_in_replicas_count_as_in_the_gradient_applied(tmp_path: Path, together: Processes, count: int) -> None:
    """By their samples, say: 7 and 2 in the one process, 4 and 2 in the other. Each logs its own mean loss."""
    run, said = together(tmp_path / "run", "replicas_by_samples", count)
    del run["steps"]["loss"]
    expected = alone(tmp_path / "alone", [tuple(part[:15] for part in batch) for batch in vectors(3)])
    assert_same(run, expected, "steps")
    assert_same(run, expected, "curvature")
    assert "Warning" not in said


def test_batches_that_accumulate_in_replicas_may_count_equally(tmp_path: Path, together: Processes) -> None:
    """Their gradients add up, whatever their sizes: that of the objective, their mean, is half of it."""
    run, _ = together(tmp_path / "run", "replicas_that_accumulate")
    assert run["curvature"].step.values.tolist() == [0, 1, 2]
    np.testing.assert_allclose(4 * run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)


def test_batches_that_replicas_say_as_they_pass_are_from_where_they_passed(tmp_path: Path, together: Processes) -> None:
    """What dropout draws depends on that; which of the moments it is the gradient tells, to all of them."""
    run, _ = together(tmp_path / "run", "replicas_that_say_their_batches_as_they_pass")
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)
    for losses in told(tmp_path, "losses"):
        np.testing.assert_allclose(run["curvature"].loss_before, json.loads(losses), rtol=1e-8)


def test_what_replicas_log_before_a_turns_backward_pass_is_of_that_turn(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replicas_with_turns_on_a_batch")
    turns = np.reshape(json.loads(told(tmp_path, "losses")[0]), (3, 3))
    expected = np.stack([turns[:, 0], turns[:, 1:].mean(1)], 1)  # the same optimizer again begins another step
    np.testing.assert_allclose(run["steps"].loss, expected.ravel(), rtol=1e-12)


def test_replicas_with_batchnorm_have_curvature(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replicas_with_batchnorm")
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)


def test_a_replica_that_changes_its_batches_has_their_curvature(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "replicas_of_which_one_changes_its_batches")
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)


def test_the_mean_loss_of_all_replicas_is_no_other_loss(tmp_path: Path, together: Processes) -> None:
    run, said = together(tmp_path / "run", "replicas_with_disturbed_gradients")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss)
    of_all = run["curvature"].sum("layer")
    assert (of_all.grad_applied_grad**2 < 0.98 * of_all.grad_sqnorm * of_all.applied_grad_sqnorm).any()
    assert "Warning" not in said


def test_where_processes_end_apart_first_order_is_recorded_and_nothing_waits(
    tmp_path: Path, together: Processes
) -> None:
    run, said = together(tmp_path / "run", "replicas_that_end_apart")
    assert run["steps"].sizes["step"] == 3
    assert "step" not in run["curvature"].sizes
    assert said.count("inside DDP's join() processes end at different times") == 2
    whole = alone(tmp_path / "alone", vectors(3))
    xr.testing.assert_allclose(run["steps"].grad_sqnorm[:2], whole["steps"].grad_sqnorm[:2])


def test_a_failure_in_one_process_ends_the_recording_in_all_and_nothing_waits(
    tmp_path: Path, together: Processes
) -> None:
    run, said = together(tmp_path / "run", "replicas_of_which_one_fails")
    assert "step" not in run["steps"].sizes
    assert "step" not in run["curvature"].sizes
    assert said.count("steps are not recorded from step 0 on: measuring first-order quantities failed with") == 1
    assert said.count("curvature is not recorded from step 0 on: measuring failed in another process") == 1


def test_where_one_process_cannot_keep_a_batch_all_go_on_without_curvature(tmp_path: Path, together: Processes) -> None:
    run, said = together(tmp_path / "run", "replicas_of_which_one_cannot_keep_a_batch")
    assert run["steps"].sizes["step"] == 3
    assert run["curvature"].step.values.tolist() == [0]
    assert said.count("curvature is not recorded from step 1 on: measuring failed in another process") == 1
    assert said.count("the state from which the step starts cannot be kept") == 1


def test_where_one_process_has_no_loss_of_its_batches_all_go_on_without_curvature(
    tmp_path: Path, together: Processes
) -> None:
    run, said = together(tmp_path / "run", "replicas_of_which_one_has_no_loss_of_its_batches")
    assert_same(run, alone(tmp_path / "alone", vectors(6)[1::2]), "steps")
    assert "step" not in run["curvature"].sizes
    assert said.count("curvature is not recorded from step 0 on: measuring failed in another process") == 1
    assert said.count("no loss of this batch") == 1


def test_batches_that_one_process_alone_is_told_of_have_no_curvature_and_nothing_waits(
    tmp_path: Path, together: Processes
) -> None:
    run, said = together(tmp_path / "run", "replicas_of_which_one_is_told_of_batches")
    assert_same(run, alone(tmp_path / "alone", vectors(3)), "steps")
    assert "step" not in run["curvature"].sizes
    assert said.count("curvature is not recorded at step 0, whose batches are not known in other processes") == 1


def test_a_recorder_that_waits_for_other_processes_says_so(tmp_path: Path, together: Processes) -> None:
    """It may be made in the first alone, and would wait in vain."""
    run, said = together(tmp_path / "run", "replicas_of_which_one_comes_late")
    assert_same(run, alone(tmp_path / "alone", vectors(3)), "steps")
    assert said.count("UserWarning: Recorder() is waiting for other processes: create it in all") == 1


def test_shards_record_what_one_process_would(tmp_path: Path, together: Processes) -> None:
    run, _ = together(tmp_path / "run", "shards")
    np.testing.assert_allclose(np.square(run["steps"].norm), run["steps"].grad_sqnorm.sum("layer"), rtol=1e-5)
    del run["steps"]["norm"]
    assert_same(run, alone(tmp_path / "alone", vectors(3)), "steps")
    assert "step" not in run["curvature"].sizes
    of_size, of_event, of_pruning = (told(tmp_path, what) for what in ("size", "event", "prune"))
    assert all(text.startswith("log() cannot take 'size', of which each process holds only a part") for text in of_size)
    assert all(text.startswith("event() needs all parameters in one process, but FSDP2") for text in of_event)
    assert all(text.endswith("(FSDP2): prune the model before sharding it") for text in of_pruning)
    assert len(of_size) == len(of_event) == len(of_pruning) == 2


@pytest.mark.parametrize("kind", ["shards_of_a_part", "shards_after_an_evaluation"])
def test_what_every_process_holds_counts_once(tmp_path: Path, together: Processes, kind: str) -> None:
    run, _ = together(tmp_path / "run", kind)
    assert_same(run, alone(tmp_path / "alone", vectors(3), frozen=kind == "shards_of_a_part"), "steps")


@pytest.mark.parametrize("kind", ["layers_in_parallel", "layers_in_parallel_and_shards"])
def test_layers_in_parallel_record_what_one_process_would(tmp_path: Path, together: Processes, kind: str) -> None:
    """Of the normalisation every process has a term of the gradient, or a whole one of its own."""
    run, said = together(tmp_path / "run", kind)
    torch.manual_seed(0)
    model, batches = normalised_network(), sequences(3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    assert_same(run, recorded(tmp_path / "alone", model, optimizer, batches, step, curvature_every=0), "steps")
    assert said.count("Warning") == said.count("UserWarning: FSDP2-wrapped module")  # torch's own


def test_curvature_of_shards_is_refused_in_a_sentence(tmp_path: Path, together: Processes) -> None:
    run, said = together(tmp_path / "run", "shards_with_curvature")
    assert "curvature is not recorded: it needs all parameters in one process" in said
    assert run["steps"].sizes["step"] == 3


def test_objects_are_sent_by_way_of_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes the present one, which is the first in each process whose loop does not choose another."""
    present, used = [], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        present.append(index)
        yield
        present.pop()

    with FakeTensorMode():
        processes = ours.Processes(nn.Linear(2, 3, device="cuda:1"))
    processes.together = processes.replicated = True
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    for name in ("broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *objects, **options: used.append(present[-1]))
    processes.broadcast("something")
    processes.gathered("something")
    assert used == [1, 1]


def test_what_replicas_average_is_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes nothing else; the flag of approximate curvature is in host memory."""
    averaged = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: averaged.append(str(tensor.device)))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with FakeTensorMode():
        processes = ours.Processes(nn.Linear(2, 3, device="cuda:1"))
        processes.replicated = True
        means = processes.mean([torch.ones((), device="cpu"), torch.ones(3, device="cuda:1")])
    assert averaged == ["cuda:1", "cuda:1"]
    assert [mean.shape for mean in means] == [(), (3,)]
