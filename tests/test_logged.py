"""Of which step is what a loop logs: of that whose backward passes it came with, announced or not."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import plain_step, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run
from dynamics.recording.steps import Steps

WHENS = ("before the backward pass", "after the backward pass", "after the step", "once, before", "once, after")


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("when", WHENS)
def test_each_row_has_the_mean_of_its_own(tmp_path: Path, when: str, micro_batches: int) -> None:
    model, optimizer_of = smooth_network(), torch.optim.SGD
    optimizer = optimizer_of(model.parameters(), 0.1)
    expected, of_step = [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(vectors(4 * micro_batches)):
            loss = F.cross_entropy(model(inputs), labels)
            if when == "before the backward pass" or (when == "once, before" and number % micro_batches == 0):
                recorder.log(loss=loss)
            (loss / micro_batches).backward()
            of_step.append(loss.item())
            if when == "after the backward pass":
                recorder.log(loss=loss)
            stepped = (number + 1) % micro_batches == 0
            if stepped:
                optimizer.step()
                optimizer.zero_grad()
            if when == "after the step" or (when == "once, after" and stepped):
                recorder.log(loss=loss)
            if stepped:
                logged = {"once, before": of_step[:1], "once, after": of_step[-1:]}.get(when, of_step)
                expected.append(np.mean(logged))
                of_step = []
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


@pytest.mark.parametrize("announce", ["watch", "observe"])
@pytest.mark.parametrize("when", ["before the gradient", "before the step", "after the step"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients_that_the_loop_sets_itself(tmp_path: Path, announce: str, when: str, micro_batches: int) -> None:
    """By torch.autograd.grad or torch.func.grad: no backward pass tells what came before a step."""
    model = smooth_network()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        batches = vectors(4 * micro_batches)
        for number, batch in enumerate(recorder.watch(batches) if announce == "watch" else batches, 1):
            if announce == "observe":
                recorder.observe(batch)
            loss = F.cross_entropy(model(batch[0]), batch[1])
            losses.append(loss.item())
            if when == "before the gradient":
                recorder.log(loss=loss)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            if when == "before the step":
                recorder.log(loss=loss)
            if number % micro_batches == 0:
                optimizer.step()
                optimizer.zero_grad()
            if when == "after the step":
                recorder.log(loss=loss)
    expected = np.reshape(losses, (-1, micro_batches)).mean(1)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


@pytest.mark.parametrize("announce", ["watch", "observe", "nothing"])
@pytest.mark.parametrize("ends", ["by itself", "with flushes"])
def test_a_backward_pass_for_another_network_comes_before_the_log(tmp_path: Path, announce: str, ends: str) -> None:
    critic, generator = smooth_network(), nn.Linear(2, 4)
    optimizers, expected = [torch.optim.SGD(one.parameters(), 0.1) for one in (critic, generator)], []
    with Recorder(tmp_path / "run", critic, optimizers[0], curvature_every=0) as recorder:
        batches = vectors(4)
        for real in recorder.watch(batches) if announce == "watch" else batches:
            if announce == "observe":
                recorder.observe(real)
            critic.zero_grad()
            loss = F.cross_entropy(critic(real[0]), real[1])
            loss.backward()
            optimizers[0].step()
            generator.zero_grad()
            critic(generator(real[0][:, :2])).mean().backward()  # adds to the critic's gradients as well
            optimizers[1].step()
            recorder.log(loss=loss)
            if ends == "with flushes":
                recorder.flush()
            expected.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


@pytest.mark.parametrize("announce", ["watch", "nothing"])
def test_a_log_after_a_backward_pass_for_another_network_fills_the_rows_that_lack_it(
    tmp_path: Path, announce: str
) -> None:
    """Those of every second step, which does not log that name itself."""
    critic, generator = smooth_network(), nn.Linear(2, 4)
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    with Recorder(tmp_path / "run", critic, optimizer, curvature_every=0) as recorder:
        batches = vectors(6)
        for number, (inputs, labels) in enumerate(recorder.watch(batches) if announce == "watch" else batches):
            critic.zero_grad()
            F.cross_entropy(critic(inputs), labels).backward()
            if number % 2 == 0:
                recorder.log(value=number)
            optimizer.step()
            critic(generator(inputs[:, :2])).mean().backward()
            recorder.log(value=100 + number)
    assert open_run(tmp_path / "run")["steps"].value.values.tolist() == [0, 101, 2, 103, 4, 105]


def test_a_log_now_and_then_between_backward_pass_and_step(tmp_path: Path) -> None:
    model, expected = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(vectors(7)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            if number % 3 == 2:
                recorder.log(loss=loss)
            optimizer.step()
            expected.append(loss.item() if number % 3 == 2 else np.nan)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


@pytest.mark.parametrize("validation", ["watched", "not watched"])
@pytest.mark.parametrize(
    "leaves", ["nothing", "a batch that was read", "the last batch", "gradients", "gradients, set to zero"]
)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("closes", ["itself", "after a flush"])
def test_an_evaluation_after_an_epoch_is_of_its_last_step(
    tmp_path: Path, validation: str, leaves: str, first: bool, closes: str
) -> None:
    """Whatever the epoch leaves behind; one before all training is of the first step, which starts from there."""
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    per_step = 2 if "gradients" in leaves else 1
    batches, held_out, losses, evaluations = vectors(5), vectors(2, seed=9), [], {}
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:

        def evaluate() -> float:
            with torch.no_grad():
                watched = recorder.watch(held_out) if validation == "watched" else held_out
                return sum(F.cross_entropy(model(inputs), labels).item() for inputs, labels in watched)

        if first:
            evaluations[0] = evaluate()
            recorder.log(validation=evaluations[0])
        for _ in range(3):
            for number, (inputs, labels) in enumerate(recorder.watch(batches)):
                if leaves == "a batch that was read" and number == 3:
                    break
                if leaves == "the last batch" and number == 4:  # it is smaller, say
                    continue
                if leaves == "gradients, set to zero" and number == 0:
                    optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                if number % per_step == per_step - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                    recorder.log(loss=loss)
                    losses.append(loss.item())
            evaluations[len(losses) - 1] = evaluate()
            recorder.log(validation=evaluations[len(losses) - 1])
            if closes == "after a flush":
                recorder.flush()
    steps = open_run(tmp_path / "run")["steps"]
    expected = [evaluations.get(number, np.nan) for number in range(len(losses))]
    np.testing.assert_allclose(steps.loss, losses, rtol=1e-12)
    np.testing.assert_allclose(steps.validation, expected, rtol=1e-12)


@pytest.mark.parametrize("told", ["watched", "observed", "not told"])
@pytest.mark.parametrize("evaluated", ["itself", "compiled", "a copy", "not watched"])
@pytest.mark.parametrize("first", ["never", "before training", "on the first batch"])
def test_an_evaluation_tells_nothing_of_the_order_of_a_step(
    tmp_path: Path, told: str, evaluated: str, first: str
) -> None:
    """Neither of what it logs itself nor of the loss, which is logged before its backward pass every time."""
    if evaluated == "not watched" and told != "watched":
        return  # it cannot be told from what is logged before each batch
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    network = torch.compile(model, backend="eager") if evaluated == "compiled" else model
    batches, held_out, losses, rates = vectors(5), vectors(3, seed=9), [], []
    with Recorder(tmp_path / "run", network, optimizer, curvature_every=0) as recorder:

        def evaluate() -> None:
            other = copy.deepcopy(model) if evaluated == "a copy" else network.eval()
            with torch.no_grad():
                for number, (inputs, _) in enumerate(
                    held_out if evaluated == "not watched" else recorder.watch(held_out)
                ):
                    other(inputs)
                    recorder.log(validation=number)  # 0, 1 and 2, whose mean is 1
            network.train()

        if first == "before training":
            evaluate()
        for _ in range(3):
            for batch in recorder.watch(batches) if told == "watched" else batches:
                if not losses and first == "on the first batch":
                    evaluate()
                if told != "watched":
                    rates.append(len(rates))
                    recorder.log(learning_rate_of_mine=rates[-1])
                if told == "observed":
                    recorder.observe(batch)
                loss = F.cross_entropy(network(batch[0]), batch[1])
                recorder.log(loss=loss)
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            evaluate()
    steps = open_run(tmp_path / "run")["steps"]
    at = [*([0] if first != "never" else []), 4, 9, 14]
    np.testing.assert_allclose(steps.loss, losses, rtol=1e-12)
    np.testing.assert_array_equal(steps.validation, [1 if number in at else np.nan for number in range(15)])
    if told != "watched":
        np.testing.assert_array_equal(steps.learning_rate_of_mine, rates)


@pytest.mark.parametrize("told", ["observed", "not told"])
@pytest.mark.parametrize("when", ["before its batch", "between its batch and its step"])
def test_a_watched_evaluation_leaves_what_waits_where_it_is(tmp_path: Path, told: str, when: str) -> None:
    """A learning rate, which is the same object each time, is logged before the batch of every third step."""
    model, rate = smooth_network(), 0.1
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:

        def evaluate() -> None:
            with torch.no_grad():
                for inputs, _ in recorder.watch(vectors(2, seed=9)):
                    model(inputs)

        for number, batch in enumerate(vectors(9)):
            if number % 3 == 0:
                recorder.log(rate_of_mine=rate)
                if when == "before its batch":
                    evaluate()
            if told == "observed":
                recorder.observe(batch)
            if when != "before its batch":
                evaluate()
            plain_step(model, optimizer, batch)
    expected = [rate if number % 3 == 0 else np.nan for number in range(9)]
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].rate_of_mine, expected)


@pytest.mark.parametrize("told", ["observed", "not told"])
def test_a_flush_within_a_step_moves_nothing(tmp_path: Path, told: str) -> None:
    """Every second step logs after the first of its two backward passes, when the last step lacks that name."""
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(vectors(16)):
            if told == "observed":
                recorder.observe(batch)
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            if number % 4 == 2:
                recorder.log(now_and_then=number)
                recorder.flush()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    found = open_run(tmp_path / "run")["steps"].now_and_then
    np.testing.assert_array_equal(found, [np.nan, 2, np.nan, 6, np.nan, 10, np.nan, 14])


@pytest.mark.parametrize("told", ["observed", "not told"])
def test_a_loss_of_an_evaluation_before_training_moves_no_other(tmp_path: Path, told: str) -> None:
    model = smooth_network()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        with torch.no_grad():
            for inputs, labels in recorder.watch(vectors(2, seed=9)):
                recorder.log(loss=F.cross_entropy(model(inputs), labels), before=1.0)
        for batch in vectors(5):
            if told == "observed":
                recorder.observe(batch)
            losses.append(plain_step(model, optimizer, batch).item())
            recorder.log(loss=losses[-1])
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_allclose(steps.loss, losses, rtol=1e-12)
    np.testing.assert_array_equal(steps.before, [1.0] + [np.nan] * 4)


def test_data_that_are_read_without_gradients_are_trained_on(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for _ in range(2):
            with torch.no_grad():
                batches = list(recorder.watch(vectors(4)))
            for batch in batches:
                losses.append(plain_step(model, optimizer, batch).item())
                recorder.log(loss=losses[-1])
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    assert run["steps"].epoch.values.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_logged_before_each_batch_is_observed_is_of_its_step(tmp_path: Path, every: int) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(vectors(6)):
            if number % every == 0:
                recorder.log(number=number)
            recorder.observe(batch)
            loss = plain_step(model, optimizer, batch)
            recorder.log(loss=loss)
            losses.append(loss.item())
        recorder.log(last=7.0)
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_equal(steps.number.values, [n if n % every == 0 else np.nan for n in range(6)])
    np.testing.assert_allclose(steps.loss, losses, rtol=1e-12)
    np.testing.assert_equal(steps["last"].values, [*[np.nan] * 5, 7.0])


def test_a_loss_that_was_logged_before_training_is_not_that_of_the_first_step(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        recorder.log(loss=99.0)
        for batch in recorder.watch(vectors(3)):
            loss = plain_step(model, optimizer, batch)
            recorder.log(loss=loss)
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, losses, rtol=1e-12)


@pytest.mark.parametrize("when", ["before the backward pass", "before the step", "after the step"])
@pytest.mark.parametrize("said", ["watched", "observed", "nothing"])
@pytest.mark.parametrize("turns", ["ab", "aab", "aaab", "abab", "abaab"])
def test_optimizers_that_take_turns_on_a_batch(tmp_path: Path, turns: str, said: str, when: str) -> None:
    """A row is of a step of each optimizer, or of those that stepped before one of them steps again."""
    model = smooth_network()
    optimizers = {name: torch.optim.SGD(model[index].parameters(), 0.1) for name, index in (("a", 0), ("b", 2))}
    rows: list[dict[str, float]] = []
    with Recorder(tmp_path / "run", model, list(optimizers.values()), curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(vectors(3)) if said == "watched" else vectors(3):
            if said == "observed":
                recorder.observe((inputs, labels))
            rows.append({})
            for turn in turns:
                if turn in rows[-1] or len(rows[-1]) == 2:
                    rows.append({})
                model.zero_grad()
                loss = F.cross_entropy(model(inputs), labels) * (1 if turn == "a" else 10)
                rows[-1][turn] = loss.item()
                for moment in ("before the backward pass", "before the step", "after the step"):
                    if moment == "before the step":
                        loss.backward()
                    if moment == "after the step":
                        optimizers[turn].step()
                    if moment == when:
                        recorder.log(**{turn: loss}, loss=loss)
    steps = open_run(tmp_path / "run")["steps"]
    for name in "ab":
        np.testing.assert_allclose(steps[name], [row.get(name, np.nan) for row in rows], rtol=1e-12)
    np.testing.assert_allclose(steps.loss, [np.mean(list(row.values())) for row in rows], rtol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_a_flush_while_a_step_of_only_some_optimizers_is_under_way_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """As among several processes. The first loss that has two steps is of the first of them."""
    monkeypatch.setattr(Steps, "together", True)
    for act in (Recorder.flush, Recorder.__repr__):
        model = smooth_network()
        optimizers = {name: torch.optim.SGD(model[index].parameters(), 0.1) for name, index in (("a", 0), ("b", 2))}
        with Recorder(
            tmp_path / act.__name__, model, list(optimizers.values()), curvature_every=0, every=every
        ) as recorder:
            for number, (which, (inputs, labels)) in enumerate(zip(["b", "ab", "b", "b"], vectors(4), strict=True)):
                model.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                recorder.log(loss=number)
                act(recorder)
                for name in which:
                    optimizers[name].step()
                    act(recorder)
        steps = open_run(tmp_path / act.__name__)["steps"]
        np.testing.assert_array_equal(steps.loss, np.array([0.5, np.nan, 2, 3])[::every])


def test_a_flush_within_a_step_of_two_optimizers_costs_no_row_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As among several processes, of which one flushes alone."""
    monkeypatch.setattr(Steps, "together", True)
    model = smooth_network()
    optimizers, hand = [torch.optim.SGD(model[index].parameters(), 0.1) for index in (0, 2)], ByHand(model)
    with Recorder(tmp_path / "run", model, optimizers, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(vectors(4)):
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            recorder.log(loss=number)
            hand.before()
            optimizers[0].step()
            if number == 2:
                recorder.flush()
            optimizers[1].step()
            hand.after()
    steps = open_run(tmp_path / "run")["steps"]
    hand.agrees_with(steps)
    assert steps.loss.values.tolist() == [0, 1, 2, 3]
