"""Which batches a step is of: those whose gradients are in it, however the loop reads and leaves them."""

import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import Batch, convolutional_network, images, plain_step, prefetched, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run
from dynamics.measuring.probed_step import ProbedStep
from dynamics.probing.probe import Probe


def halves(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    return [F.cross_entropy(model(part[0]), part[1]) / 2 for part in zip(*(t.chunk(2) for t in batch), strict=True)]


def accumulated(
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    parts: int,
    after: Callable[[Batch, bool], None] = lambda batch, steps: None,
) -> list[float]:
    """The losses of the steps, each of so many batches, of a loop that calls ``after`` behind each of them."""
    losses, waiting = [], []
    for batch in batches:
        loss = loss_of(batch)
        (loss / parts).backward()
        waiting.append(loss.item())
        if steps := len(waiting) == parts:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(np.mean(waiting))
            waiting = []
        after(batch, steps)
    return losses


def test_two_backward_passes_a_batch_and_batches_that_are_left_out(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(6))):
            if number in (0, 3):
                continue
            optimizer.zero_grad()
            parts = halves(model, batch)
            for part in parts:
                part.backward()
            optimizer.step()
            losses.append(sum(parts).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("evaluated", ["each batch", "the last of a step"])
def test_batches_that_are_read_ahead_and_evaluated_when_they_were_trained_on(
    tmp_path: Path, parts: int, evaluated: str, dropout: float
) -> None:
    """The model runs without gradients on a batch that is not the one which was read last."""
    model = nn.Sequential(smooth_network(), nn.Dropout(dropout))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @torch.no_grad()
    def evaluate(batch: Batch, steps: bool) -> None:
        if steps or evaluated == "each batch":
            model(batch[0])

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        batches = prefetched(recorder.watch(vectors(9)))
        losses = accumulated(
            optimizer, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), parts, evaluate
        )
    found = open_run(tmp_path / "run")["curvature"].loss_before.values
    if dropout and parts == 3 and evaluated == "each batch":  # its first step may begin from a later forward pass
        found, losses = found[1:], losses[1:]
    np.testing.assert_allclose(found, losses, rtol=1e-12)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """As a trainer that counts the items of a step before it."""
    waiting = iter(batches)
    while group := list(islice(waiting, size)):
        yield from group


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("reads", "count"), [(prefetched, 1), (prefetched, 2), (in_groups, 2), (in_groups, 3)])
def test_how_many_batches_are_read_ahead_may_change_and_there_are_none_when_a_pass_is_over(
    tmp_path: Path, reads: Callable, count: int, parts: int, every: int
) -> None:
    """A batch that is kept for a later step, although it was used, would shift which forward pass is whose."""
    model, losses = nn.Sequential(nn.Dropout(0.3), smooth_network()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = vectors(12)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for _ in range(3):
            read = reads(recorder.watch(batches), count)
            losses += accumulated(optimizer, read, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), parts)
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::every], rtol=1e-12)
    assert run["steps"].epoch.values.tolist() == np.repeat(range(3), 12 // parts).tolist()


@pytest.mark.parametrize("every", [1, 3, 4, 5])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize(("first_pass", "skipped"), [(1, 0), (2, 0), (3, 0), (7, 1), (7, 3)])
def test_how_far_a_loop_reads_ahead_may_not_show_at_its_first_step(
    tmp_path: Path, first_pass: int, skipped: int, ahead: int, every: int
) -> None:
    """After a checkpoint, a loop passes over the batches that it has used, or reads the few that are left."""
    model, losses = nn.Sequential(nn.Dropout(0.3), smooth_network()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for epoch, count in enumerate([first_pass, 7, 7]):
            read = prefetched(recorder.watch(vectors(count)), ahead)
            used = islice(read, skipped, None) if epoch == 0 else read
            losses += accumulated(optimizer, used, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), 1)
    run = open_run(tmp_path / "run")["curvature"]
    assert run.step.values.tolist() == list(range(0, len(losses), every))
    np.testing.assert_allclose(run.loss_before, losses[::every], rtol=1e-12)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_step_of_batches_that_are_not_known_has_no_curvature(tmp_path: Path, ahead: int, every: int) -> None:
    """Each batch is used twice, and others are read before: at its second step it is not among those that wait."""
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)  # gradients of all batches are much alike
    inputs, labels = vectors(1)[0]
    alike = [(inputs + 0.1 * noise, labels) for noise, _ in vectors(6, seed=2)]
    with (
        pytest.warns(UserWarning, match="whose batch is not known"),
        Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder,
    ):
        for _ in range(2):
            for batch in prefetched(recorder.watch(alike), ahead):
                losses += [plain_step(model, optimizer, batch).item() for _ in range(2)]
    run = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(run.loss_before, np.array(losses)[run.step], rtol=1e-12)
    assert 0 in run.step


def test_a_loop_that_begins_to_change_its_gradients_is_measured_again(tmp_path: Path) -> None:
    """It cannot be told at once from one that uses other batches than those that are known."""
    model, losses, noise = smooth_network(), [], torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.warns(UserWarning, match="whose batch is not known"),
        Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder,
    ):
        for number, (inputs, labels) in enumerate(prefetched(recorder.watch(vectors(30)))):
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            for parameter in model.parameters() if number >= 5 else ():
                parameter.grad += 0.02 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            recorder.log(loss=loss)
    run = open_run(tmp_path / "run")["curvature"]
    assert run.step.values.tolist() == [*range(5), *range(9, 30)]
    np.testing.assert_allclose(run.loss_before, np.array(losses)[run.step], rtol=1e-12)


def test_a_loop_that_skips_batches_is_not_looked_at_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped batch may also be one that was read ahead, which only a gradient can tell."""
    model, looks, gradient = smooth_network(), [], ProbedStep.gradient
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def counted(self: ProbedStep, probe: Probe) -> tuple:
        looks.append(recorder)
        return gradient(self, probe)

    monkeypatch.setattr(ProbedStep, "gradient", counted)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=50) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(150))):
            if number % 2:
                loss = plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    assert run["curvature"].step.values.tolist() == [0, 50]
    assert run["steps"].sizes["step"] == 75
    assert len(looks) <= 20
    assert loss.isfinite()


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("validates", [(1,), (4,), (1, 3), (0, 2, 5)])
def test_batches_that_were_read_before_a_validation_are_not_taken_to_be_evaluated(
    tmp_path: Path, validates: tuple[int, ...], ahead: int, every: int
) -> None:
    model, losses = nn.Sequential(nn.Dropout(0.3), smooth_network()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for _ in range(2):
            for number, batch in enumerate(prefetched(recorder.watch(vectors(6)), ahead)):
                losses.append(plain_step(model, optimizer, batch).item())
                if number in validates:
                    with torch.no_grad():
                        for inputs, _ in recorder.watch(vectors(3, seed=2)):
                            model(inputs)
    run = open_run(tmp_path / "run")["curvature"]
    assert run.step.values.tolist() == list(range(0, len(losses), every))
    np.testing.assert_allclose(run.loss_before, losses[::every], rtol=1e-12)


@pytest.mark.parametrize(("reads", "count", "every"), [(prefetched, 2, 1), (in_groups, 4, 2)])
def test_a_batch_that_has_no_share_in_a_step_is_left_for_the_next(
    tmp_path: Path, reads: Callable, count: int, every: int
) -> None:
    """Each batch has two backward passes, and others are read before: what each has of the step is fitted."""
    model, losses, waiting = smooth_network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    size = 2 if reads is prefetched else 1
    batches = vectors(9 if reads is prefetched else 12)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for _ in range(2):
            for number, (inputs, labels) in enumerate(reads(recorder.watch(batches), count), 1):
                for _ in range(2):
                    loss = F.cross_entropy(model(inputs), labels)
                    (loss / (2 * size)).backward()
                waiting.append(loss.item())
                if number % size == 0 or number == len(batches):
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(np.mean(waiting))
                    waiting = []
    run = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(run.loss_before, np.array(losses)[run.step], rtol=1e-9)
    assert run.sizes["step"] == len(losses[::every])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_batch_that_is_told_by_a_hook_of_the_model(tmp_path: Path, parts: int) -> None:
    """Hooks that the recorder then puts on the model come too late for this pass; a second one has no gradients."""

    def tell(*called: object) -> None:
        if torch.is_grad_enabled() and not recorder.measuring:
            recorder.observe(present[-1])

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        logits = model(inputs)
        with torch.no_grad():
            earlier = model(inputs)
        return F.cross_entropy(logits - earlier / 2, labels)

    def loss_of(batch: Batch) -> torch.Tensor:
        present.append(batch)
        return objective(model, batch)

    model, present = nn.Sequential(nn.Dropout(0.3), smooth_network()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        model.register_forward_pre_hook(tell)
        losses = accumulated(optimizer, vectors(6), loss_of, parts)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("log", ["before the backward pass", "after the step"])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_batches_that_are_read_ahead(tmp_path: Path, ahead: int, every: int, log: str) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for _ in range(2):
            for batch in prefetched(recorder.watch(vectors(5)), ahead):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0]), batch[1])
                if log == "before the backward pass":
                    recorder.log(loss=loss)
                loss.backward()
                by_hand.before()
                optimizer.step()
                by_hand.after()
                if log == "after the step":
                    recorder.log(loss=loss)
                losses.append(loss.item())
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::every], rtol=1e-12)


def test_a_model_that_changes_its_precision(tmp_path: Path) -> None:
    model = smooth_network().float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = []

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0].to(model[0].weight.dtype)), batch[1])

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                model.double()
            by_hand = ByHand(model)
            optimizer.zero_grad()
            objective(model, batch).backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            rows += by_hand.rows
    steps = open_run(tmp_path / "run")["steps"]
    for name in ("grad_sqnorm", "param_grad", "update_sqnorm", "grad_update"):
        expected = np.array([[row[layer][name] for layer in ("0", "2")] for row in rows])
        np.testing.assert_allclose(steps[name][2:], expected[2:], rtol=1e-12, err_msg=name)
    assert steps.distance_sqnorm.notnull().all()


class Centring(nn.Module):
    """Subtracts a running mean, which each forward pass moves in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(9))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.centre.lerp_(inputs.detach().mean(0), 0.5)
        return torch.tanh(inputs - self.centre)


@pytest.mark.parametrize("between", [lambda: nn.Dropout(0.3), Centring], ids=["draws", "moves a buffer"])
def test_a_forward_pass_for_another_sake_comes_first(tmp_path: Path, between: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, scale = nn.Sequential(nn.Linear(4, 9), between(), nn.Linear(9, 3)), nn.Parameter(torch.ones(()))
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([scale], 0.1)
    losses = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch, held_out in zip(recorder.watch(vectors(6)), vectors(6, seed=2), strict=True):
            other.zero_grad()  # as architectures are searched for
            (scale * F.cross_entropy(model(held_out[0]), held_out[1])).backward()
            other.step()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_micro_batches_of_different_sizes_count_as_the_loop_counts_them(tmp_path: Path, weighted: bool) -> None:
    torch.manual_seed(0)
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(x[:size], y[:size]) for (x, y), size in zip(vectors(6), (16, 3) * 3, strict=True)]
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (x, y) in enumerate(recorder.watch(batches)):
            loss = F.cross_entropy(model(x), y) * (len(x) / 19 if weighted else 0.5)
            loss.backward()
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, np.reshape(losses, (-1, 2)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


def check(path: Path, model: nn.Module, objective: Callable, loop: Callable) -> None:
    """The record of a loop says of each step what the loop computed: it is measured on what that was of."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder:
        losses = loop(recorder, optimizer)
    run = open_run(path)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


def step_of(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_micro_batches_that_count_by_their_tokens_are_one_batch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    steps = [[(x, y.masked_fill(torch.rand(16) < share, -100)) for x, y in vectors(2)] for share in (0.1, 0.5, 0.8)]

    def total(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def of_tokens(model: nn.Module, batches: list[Batch]) -> torch.Tensor:
        return sum(total(model, batch) for batch in batches) / sum((y >= 0).sum() for _, y in batches)

    def loop(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for batches in steps:
            recorder.observe(batches)
            optimizer.zero_grad()
            parts = []
            for batch in batches:
                parts.append(total(model, batch) / sum((y >= 0).sum() for _, y in batches))
                parts[-1].backward()
            optimizer.step()
            losses.append(sum(parts).item())
        return losses

    check(tmp_path / "run", model, of_tokens, loop)


@pytest.mark.parametrize("passes", [1, 2])
def test_two_loaders_of_different_batch_sizes_count_equally(tmp_path: Path, passes: int) -> None:
    """As FixMatch: few labelled samples and many that are not, their two losses added up."""
    model = smooth_network()

    def objective(model: nn.Module, batch: tuple) -> torch.Tensor:
        guess = batch[1] if len(batch) == 2 else model(batch[0]).detach().argmax(-1)
        return F.cross_entropy(model(batch[0]), guess)

    def loop(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        labelled, others = vectors(4), [(torch.cat([x, x + 1, x - 1]),) for x, _ in vectors(4, seed=5)]
        for pair in zip(recorder.watch(labelled), recorder.watch(others), strict=True):
            optimizer.zero_grad()
            parts = [objective(model, batch) / 2 for batch in pair]
            for loss in [sum(parts)] if passes == 1 else parts:
                loss.backward()
            optimizer.step()
            losses.append(sum(parts).item())
        return losses

    check(tmp_path / "run", model, objective, loop)


@pytest.mark.parametrize("how", ["in the order of reading", "the other way round", "together"])
def test_pairs_of_two_loaders_are_watched_with_an_objective_of_both(tmp_path: Path, how: str) -> None:
    def of_both(model: nn.Module, pair: tuple[Batch, Batch]) -> torch.Tensor:
        if how == "together":
            return F.cross_entropy(model(torch.cat([pair[0][0], pair[1][0]])), torch.cat([pair[0][1], pair[1][1]]))
        first, second = pair if how == "in the order of reading" else pair[::-1]
        return F.cross_entropy(model(first[0]), first[1]) + F.cross_entropy(model(second[0]), second[1]) / 2

    model, losses = nn.Sequential(nn.Dropout(0.3), smooth_network()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=of_both, curvature_every=1) as recorder:
        for pair in recorder.watch(zip(vectors(4), vectors(4, seed=5), strict=True)):
            optimizer.zero_grad()
            loss = of_both(model, pair)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_random_numbers_before_the_network_runs_in_batches_of_different_sizes(tmp_path: Path) -> None:
    """As diffusion models are trained: the loss draws its noise first; the last batch of an epoch is smaller."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def objective(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(batch)
        return F.mse_loss(model(batch + noise), noise)

    def loop(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        batches = [x[:size] for (x, _), size in zip(vectors(4), (8, 8, 8, 2), strict=True)]
        for number, batch in enumerate(recorder.watch(batches)):
            loss = objective(model, batch) / 2
            loss.backward()
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return np.reshape(losses, (-1, 2)).sum(1)

    check(tmp_path / "run", model, objective, loop)


@pytest.mark.parametrize("every", [1, 2])
def test_random_numbers_before_the_network_runs_on_batches_with_one_backward_pass(tmp_path: Path, every: int) -> None:
    def noisy(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])

    for seed in range(4):
        torch.manual_seed(seed)
        model, losses, waiting = smooth_network(), [], []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        path = tmp_path / str(seed)
        with Recorder(path, model, optimizer, objective=noisy, curvature_every=every) as recorder:
            for batch in recorder.watch(vectors(8, seed=seed)):
                waiting.append(noisy(model, batch))
                if len(waiting) == 2:
                    optimizer.zero_grad()
                    loss = sum(waiting) / 2
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                    waiting = []
        np.testing.assert_allclose(open_run(path)["curvature"].loss_before, losses[::every], rtol=1e-12)


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_model_whose_parts_alone_are_called(tmp_path: Path, loaders: int) -> None:
    """An encoder with dropout and a head in a ModuleDict; something else draws before they run."""
    encoder = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3))
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(9, 3)})

    def objective(model: nn.ModuleDict, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model["head"](model["encoder"](batch[0])), batch[1])

    def loop(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for batches in zip(*(recorder.watch(vectors(5, seed=seed)) for seed in range(loaders)), strict=True):
            torch.randn(3)
            losses.append(step_of(optimizer, sum(objective(model, batch) for batch in batches) / loaders))
        return losses

    check(tmp_path / "run", model, objective, loop)
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("watch", ["inside", "outside"])
def test_a_closure_that_reads_the_whole_loader_is_one_step(tmp_path: Path, watch: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3)
    x, y = torch.randn(20, 4).double(), torch.arange(20) % 3
    loader, whole = list(zip(x.split(8), y.split(8), strict=True)), []
    with Recorder(tmp_path / "run", model, optimizer, every=3, curvature_every=1) as recorder:
        for _ in range(4):
            losses: list[float] = []

            def closure(losses: list[float] = losses) -> torch.Tensor:
                optimizer.zero_grad()
                total = 0.0
                for inputs, labels in recorder.watch(loader) if watch == "inside" else loader:
                    if watch == "outside":
                        recorder.observe((inputs, labels))
                    loss = F.cross_entropy(model(inputs), labels, reduction="sum") / 20
                    loss.backward()
                    total += loss.detach()
                losses.append(float(total))
                return torch.as_tensor(total)

            optimizer.step(closure)
            whole.append(losses[0])
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, whole, rtol=1e-12)
    applied, own = (run["curvature"][name].sum("layer") for name in ("applied_grad_sqnorm", "grad_sqnorm"))
    np.testing.assert_allclose(applied, own, rtol=1e-10)
    assert run["steps"].epoch.values.tolist() == ([0, 3] if watch == "inside" else [0, 0])


@pytest.mark.parametrize("evaluations", [30, 300])
def test_a_closure_that_observes_at_each_evaluation_is_one_step(tmp_path: Path, evaluations: int) -> None:
    """However many there are, between which the optimizer moves the parameters: no other one does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    settings = {"max_iter": evaluations, "tolerance_grad": 0, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, **settings)
    first: list[list[float]] = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for x, y in [(torch.randn(8, 4).double(), torch.arange(8) % 3) for _ in range(3)]:
            losses: list[float] = []

            def closure(x: torch.Tensor = x, y: torch.Tensor = y, losses: list[float] = losses) -> torch.Tensor:
                recorder.observe((x, y))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                losses.append(loss.item())
                recorder.log(loss=loss)
                return loss

            optimizer.step(closure)
            assert len(losses) == evaluations
            first.append(losses[0])
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, first, rtol=1e-12)
    np.testing.assert_allclose(run["steps"].loss, first, rtol=1e-12)


@pytest.mark.parametrize("trains", ["here", "in another thread"])
def test_a_thread_that_reads_ahead_changes_nothing(tmp_path: Path, trains: str) -> None:
    """Its batches cannot be told from those of the step, and random numbers are drawn while it tells of them."""

    def read_ahead(batches: Iterable) -> Iterator:
        waiting: queue.Queue = queue.Queue(2)

        def read() -> None:
            for one in batches:
                waiting.put(one)
            waiting.put(None)

        threading.Thread(target=read, daemon=True).start()
        yield from iter(waiting.get, None)

    def train(recorder: Recorder | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        torch.manual_seed(0)
        losses, batches = [], images(40)
        watched = recorder.watch(batches) if recorder else batches
        for inputs, labels in watched if trains == "in another thread" else read_ahead(watched):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def trained(*, recorded: bool) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)
        model, losses = convolutional_network(dropout=0.5), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=2) if recorded else None
        if trains == "here":
            losses = train(recorder, model, optimizer)
        else:
            thread = threading.Thread(target=lambda: losses.extend(train(recorder, model, optimizer)))
            thread.start()
            thread.join()
        if recorder:
            recorder.close()
        return torch.cat([one.detach().flatten() for one in model.parameters()]), losses

    bare, losses = trained(recorded=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(trained(recorded=True)[0], bare)
    run = open_run(tmp_path / "run")
    assert run["steps"].sizes["step"] == 40
    if trains == "here":
        assert "curvature" not in run.children or not run["curvature"].data_vars
        (text,) = (str(one.message) for one in said)
        assert text.startswith(
            "curvature is not recorded from step 0 on: measuring failed with RuntimeError: batches are"
        )
        assert "read in a thread other than that of the steps" in text
    else:
        assert not said
        np.testing.assert_allclose(run["curvature"].loss_before, losses[::2], rtol=1e-12)


def test_random_generators_are_let_alone_by_a_thread_that_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that trains may be drawing just then: what it drew between a look and a restoration would come again."""
    model, restored = convolutional_network(dropout=0.5), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    restore = torch.set_rng_state
    monkeypatch.setattr(
        torch, "set_rng_state", lambda state: restored.append(threading.current_thread().name) or restore(state)
    )
    recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=1)
    watched = iter(recorder.watch(images(2)))
    reader = threading.Thread(target=lambda: next(watched), name="reader")
    reader.start()
    reader.join()
    next(watched)
    recorder.close()
    assert restored
    assert "reader" not in restored


def test_a_batch_that_was_read_ahead_is_not_tried_from_where_an_earlier_step_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop changes its gradients, so that all candidates are tried: each of other batches, as all draw nothing."""
    tried: list[list[tuple[float, ...]]] = []
    gradient = ProbedStep.gradient

    def counted(self: ProbedStep, probe: Probe) -> object:
        tried[-1].append(tuple(batch[0].sum().item() for batch, _ in probe._at))
        return gradient(self, probe)

    monkeypatch.setattr(ProbedStep, "gradient", counted)
    model = smooth_network().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in prefetched(recorder.watch(vectors(6))):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            for parameter in model.parameters():
                parameter.grad += 0.01 * torch.randn_like(parameter.grad)
            tried.append([])
            optimizer.step()
            recorder.log(loss=loss)
    assert len(tried[-2]) > 1
    assert all(len(set(batches)) == len(batches) for batches in tried)


def test_a_batch_on_which_the_objective_fails_is_not_mistaken_for_another_that_was_read(tmp_path: Path) -> None:
    """All batches are alike, and gradients are clipped: that of the next one would pass for the step's."""
    model = smooth_network().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs, labels = vectors(1)[0]
    batches = [(inputs + 0.1 * number, labels) for number in range(6)]

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        if torch.equal(batch[0], batches[3][0]):
            raise ValueError("the fourth is odd")
        return F.cross_entropy(model(batch[0]), batch[1])

    with (
        pytest.warns(match=r"not recorded from step 3 on: the objective failed .*the fourth is odd"),
        Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder,
    ):
        for inputs, labels in prefetched(recorder.watch(batches)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].step.values.tolist() == [0, 1, 2]
