"""Batches that no gradient came of, before, between and after those of a step: a step is of the others alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batch, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run
from dynamics.loop.reading_ahead import read_ahead
from dynamics.loop.seen import Seen, candidates, used

VALIDATION = vectors(1, seed=9)[0][0]


class Loop:
    """A network, its recorder, and what the loop itself knew of each step."""

    def __init__(self, path: Path, **how: object) -> None:
        torch.manual_seed(0)
        self.path, self.how, self.model = path, {"curvature_every": 1} | how, smooth_network().double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.losses: list[float] = []  # of each step
        self.waiting: list[float] = []  # of the micro-batches of the step to come

    @contextmanager
    def recorded(self) -> Iterator[Recorder]:
        with Recorder(self.path, self.model, self.optimizer, **self.how) as self.recorder:
            yield self.recorder

    def validate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(VALIDATION)
        self.model.train()

    def backward(self, batch: Batch, micro_batches: int = 1) -> None:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.recorder.log(loss=loss)
        (loss / micro_batches).backward()
        self.waiting.append(loss.item())

    def drop(self) -> None:
        self.optimizer.zero_grad()
        self.waiting = []

    def step(self) -> None:
        self.optimizer.step()
        self.losses.append(np.mean(self.waiting))
        self.drop()

    def check(self) -> None:
        """The recorded losses are the loop's, and as many steps have curvature as were due."""
        run = open_run(self.path)
        np.testing.assert_allclose(run["steps"].loss, self.losses, rtol=1e-12)
        every = self.how["curvature_every"]
        if every:
            np.testing.assert_allclose(run["curvature"].loss_before, self.losses[::every], rtol=1e-12)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_batch_left_over_does_not_count_the_next_pass_as_its_own(tmp_path: Path, every: int) -> None:
    loop, epochs = Loop(tmp_path / "run", curvature_every=every), []
    data = [*vectors(4), tuple(part[:2] for part in vectors(1)[0])]
    with loop.recorded() as recorder:
        for epoch in range(3):
            for number, batch in enumerate(recorder.watch(data)):
                if len(batch[0]) < 5:  # the last, small one
                    continue
                if number == 0:
                    loop.validate()
                loop.backward(batch)
                loop.step()
                epochs.append(epoch)
    loop.check()
    assert open_run(loop.path)["steps"].epoch.values.tolist() == epochs


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_leftover_of_an_accumulation_that_is_dropped(tmp_path: Path, every: int) -> None:
    loop, epochs = Loop(tmp_path / "run", curvature_every=every), []
    with loop.recorded() as recorder:
        for epoch in range(4):
            loop.drop()
            for batch in recorder.watch(vectors(4)):
                loop.validate()
                loop.backward(batch, 3)
                if len(loop.waiting) == 3:
                    loop.step()
                    epochs.append(epoch)
    loop.check()
    assert open_run(loop.path)["steps"].epoch.values.tolist() == epochs


def test_a_batch_is_trained_on_that_was_looked_at_first(tmp_path: Path) -> None:
    """Selective backpropagation: what is easy is left out, after a look at its loss."""
    loop = Loop(tmp_path / "run")
    with loop.recorded() as recorder:
        for number, batch in enumerate(recorder.watch(vectors(9))):
            loop.validate()
            if number % 3 == 1:
                continue
            loop.backward(batch)
            loop.step()
    loop.check()


@pytest.mark.parametrize("after", ["reading", "the forward pass"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_batch_is_skipped_among_those_that_accumulate(tmp_path: Path, micro_batches: int, after: str) -> None:
    loop = Loop(tmp_path / "run")
    with loop.recorded() as recorder:
        for number, batch in enumerate(recorder.watch(vectors(13))):
            if number % 4 == 1:
                if after == "the forward pass":
                    recorder.log(loss=F.cross_entropy(loop.model(batch[0]), batch[1]))
                continue
            loop.backward(batch, micro_batches)
            if len(loop.waiting) == micro_batches:
                loop.step()
    loop.check()


@pytest.mark.parametrize("dropped", [False, True])
def test_two_backward_passes_of_each_batch(tmp_path: Path, dropped: bool) -> None:
    loop = Loop(tmp_path / "run", objective=lambda model, batch: sum(both(model, batch)))

    def both(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1]), 0.1 * outputs.square().mean()

    micro_batches = 2 if dropped else 1
    with loop.recorded() as recorder:
        for number, batch in enumerate(recorder.watch(vectors(12))):
            one, other = both(loop.model, batch)
            recorder.log(loss=(one + other).detach())
            if number % 3 == 1 and not dropped:
                continue
            (one / micro_batches).backward(retain_graph=True)
            (other / micro_batches).backward()
            loop.waiting.append((one + other).item())
            if number % 4 == 1 and dropped:
                loop.drop()
            elif len(loop.waiting) == micro_batches:
                loop.step()
    loop.check()


def test_gradients_of_what_no_optimizer_holds_are_not_counted(tmp_path: Path) -> None:
    """They are never set to zero, so that all backward passes add up there."""
    loop = Loop(tmp_path / "run")
    loop.optimizer = torch.optim.SGD(loop.model[2].parameters(), 0.1)
    with loop.recorded() as recorder:
        for number, batch in enumerate(recorder.watch(vectors(12))):
            loop.backward(batch, 2)
            if number % 4 == 1:
                loop.drop()
            elif len(loop.waiting) == 2:
                loop.step()
    loop.check()


def test_where_gradients_are_clipped_by_value_the_likeliest_batch_is_taken(tmp_path: Path) -> None:
    """No candidate's gradient points where the applied one does; that of another batch may be the nearest by chance."""
    for seed in range(6):
        loop = Loop(tmp_path / str(seed))
        generator = torch.Generator().manual_seed(seed)
        data = [
            (0.3 * torch.randn(8, 4, generator=generator, dtype=torch.float64) + 1,
             (torch.rand(8, generator=generator) < 0.85).long())
            for _ in range(20)
        ]  # fmt: skip
        with loop.recorded() as recorder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "/curvature may be of another loss")
            for number, batch in enumerate(recorder.watch(data)):
                if number % 2 == 1:
                    continue
                loop.backward(batch)
                nn.utils.clip_grad_value_(loop.model.parameters(), 0.01)
                loop.step()
        loop.check()


@pytest.mark.filterwarnings("error")
def test_a_part_of_each_layer_is_trained(tmp_path: Path) -> None:
    """Biases alone: the gradient by the weights says nothing of which batches the step is of, and how they count."""
    loop = Loop(tmp_path / "run")
    loop.optimizer = torch.optim.SGD([one for name, one in loop.model.named_parameters() if "bias" in name], 0.1)
    with loop.recorded() as recorder:
        for batch in vectors(4):
            for part in (slice(12), slice(12, None)):  # unequal, and count equally
                recorder.observe(micro_batch := (3 * batch[0][part], batch[1][part]))
                loop.backward(micro_batch, 2)
            loop.step()
    loop.check()


def test_a_step_whose_batch_is_not_known_is_said_where_steps_are_recorded_seldom(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", every=2)
    with loop.recorded() as recorder, pytest.warns(UserWarning, match="curvature is not recorded at step 1, whose"):
        for batch in vectors(2):
            recorder.observe(batch)
            for _ in range(2):  # and once more on the same batch
                loop.backward(batch)
                loop.step()
    assert open_run(loop.path)["curvature"].step.values.tolist() == [0, 2]


@pytest.mark.filterwarnings("error")
def test_layers_that_are_clipped_each_by_itself_point_where_they_did(tmp_path: Path) -> None:
    """The noise that the loss draws before it runs the network is that of the step, says the gradient."""
    loop = Loop(tmp_path / "run", objective=lambda model, batch: noisy(model, batch))

    def noisy(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])

    with loop.recorded() as recorder:
        for batch in recorder.watch(vectors(6)):
            loss = noisy(loop.model, batch)
            loss.backward()
            loop.waiting.append(loss.item())
            recorder.log(loss=loss)
            for number, layer in enumerate((loop.model[0], loop.model[2])):
                nn.utils.clip_grad_norm_(layer.parameters(), (0.001, 1.0)[number])
            loop.step()
    loop.check()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("log", ["before the backward pass", "after the next is read"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_next_batch_is_read_before_the_step(
    tmp_path: Path, watched: bool, every: int, log: str, micro_batches: int
) -> None:
    """As where data are copied to a GPU while it computes."""
    loop = Loop(tmp_path / "run", curvature_every=every)
    with loop.recorded() as recorder:
        data = iter(recorder.watch(vectors(12)) if watched else vectors(12))

        def read() -> Batch | None:
            batch = next(data, None)
            if batch is not None and not watched:
                recorder.observe(batch)
            return batch

        batch = read()
        while batch is not None:
            loss = F.cross_entropy(loop.model(batch[0]), batch[1])
            if log == "before the backward pass":
                recorder.log(loss=loss)
            (loss / micro_batches).backward()
            loop.waiting.append(loss.item())
            batch = read()
            if log != "before the backward pass":
                recorder.log(loss=loss)
            if len(loop.waiting) == micro_batches:
                loop.step()
    loop.check()


@pytest.mark.parametrize("to_none", [True, False])
def test_branches_that_are_used_in_turn(tmp_path: Path, to_none: bool) -> None:
    """Backward passes are counted at few parameters, which some of them do not reach."""
    loop = Loop(tmp_path / "run", objective=lambda model, batch: loss_of(model, batch))
    loop.model = nn.ModuleList([smooth_network().double() for _ in range(3)])
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 0.1)

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model[int(batch[1].sum()) % 3](batch[0]), batch[1])

    with loop.recorded() as recorder:
        for batch in recorder.watch(vectors(12)):
            loss = loss_of(loop.model, batch)
            recorder.log(loss=loss)
            loss.backward()
            loop.optimizer.step()
            loop.losses.append(loss.item())
            loop.optimizer.zero_grad(set_to_none=to_none)
    loop.check()


def test_a_batch_that_is_said_after_its_backward_pass(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    with loop.recorded() as recorder:
        for batch in vectors(6):
            loop.backward(batch)
            recorder.observe(batch)
            loop.step()
    loop.check()


@pytest.mark.filterwarnings("ignore:/curvature may be of another loss")
def test_all_are_read_before_their_backward_passes(tmp_path: Path) -> None:
    """And gradients are disturbed, so that none is surely the one applied."""
    loop = Loop(tmp_path / "run")
    with loop.recorded() as recorder:
        for number in range(6):
            batches = vectors(4, seed=number)
            for batch in batches:
                recorder.observe(batch)
            for batch in batches:
                loop.backward(batch, 4)
            for parameter in loop.model.parameters():
                parameter.grad.add_(0.05 * torch.randn_like(parameter))
            loop.step()
    np.testing.assert_allclose(open_run(loop.path)["curvature"].loss_before, loop.losses, rtol=1e-12)


def test_gradients_are_of_the_batches_behind_which_they_came() -> None:
    """Against each backward pass one by one, on random orders of reading and backward passes."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        reads = draw.integers(0, 2, draw.integers(1, 12)).astype(bool)
        behind, starts = [], []  # how many batches were read before each backward pass, and the other way round
        for read in reads:
            (starts if read else behind).append(len(behind) if read else len(starts))
        count = int(draw.integers(0, len(behind) + 1))
        expected = sorted({place for place in behind[len(behind) - count :] if place > 0})
        assert used(starts, len(behind), count) == expected


def test_what_was_read_behind_the_last_gradient_is_left_but_not_what_was_only_looked_at() -> None:
    seen = [Seen(name, None) for name in "abcd"]
    seen[3].only_evaluated = True
    assert [one.batch for one in read_ahead(seen, [1, 2], 2, 0, once=False)] == ["c"]
    assert read_ahead(seen, [], 0, 0, once=True) == read_ahead(seen, [], 0, 1, once=False) == []
    assert [one.batch for one in read_ahead(seen[:3], [2], 1, 1, once=False)] == ["c"]
    assert [one.batch for one in read_ahead(seen[:2], [2], 2, 1, once=False)] == ["b"]  # two gradients of one batch


def test_several_gradients_of_a_batch_that_was_read_ahead_are_a_candidate() -> None:
    seen = [Seen(name, None) for name in "abc"]
    tried = [[one.batch for one in batches] for batches in candidates(seen, [3], 2, ahead=0, of_epoch=0)]
    assert tried[0] == ["c"]
    assert ["a"] in tried
    assert candidates(seen, [3], 2, ahead=1, of_epoch=0)[:2] == [seen[:2], [seen[1]]]


@pytest.mark.filterwarnings("ignore:/curvature may be of another loss")
@pytest.mark.parametrize("seed", range(4))
def test_layers_of_one_parameter_point_the_same_way_by_chance(tmp_path: Path, seed: int) -> None:
    """Each layer's cosine is 1 or -1 then: the whole gradient's tells, though it is disturbed a little."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.register_buffer("mixing", torch.randn(4, 4, dtype=torch.float64))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + self.weight * torch.tanh(inputs @ self.mixing)

    loop = Loop(tmp_path / "run")
    torch.manual_seed(seed)
    loop.model = nn.Sequential(Gate(), Gate(), Gate())
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 0.02)
    with loop.recorded() as recorder:
        data = iter(recorder.watch(vectors(20, seed=seed)))
        batch = next(data)
        for following in data:
            loop.backward(batch)
            for parameter in loop.model.parameters():
                parameter.grad.mul_(1 + 0.01 * torch.randn((), dtype=torch.float64))
            loop.step()
            batch = following
    np.testing.assert_allclose(open_run(loop.path)["curvature"].loss_before, loop.losses, rtol=1e-12)


@pytest.mark.parametrize("also", ["validated", "noisy"])
def test_a_batch_that_is_left_out_of_some_that_accumulate(tmp_path: Path, also: str) -> None:
    """A validation comes between its micro-batches; or each is changed by noise, and dropped out."""
    torch.manual_seed(0)
    model, losses, parts = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)).double(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch([list(batch) for batch in vectors(7)])):
            if number == 3:
                continue
            if also == "noisy":
                batch[0] = batch[0] + torch.randn_like(batch[0])
            loss = F.cross_entropy(model(batch[0]), batch[1])
            (loss / 3).backward()
            parts.append(loss.item())
            if number in (2, 6):
                optimizer.step()
                optimizer.zero_grad()
                losses.append(np.mean(parts))
                parts = []
            if also == "validated" and number == 5:
                model.eval()
                with torch.no_grad():
                    model(VALIDATION)
                model.train()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
