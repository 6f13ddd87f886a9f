"""Where a step begins and ends: optimizers that step by their parent's step or by another optimizer, and odd calls."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run


class Projected(torch.optim.SGD):
    """Decays before its parent's step, and projects after it."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.95)
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.3, 0.3)
        return loss


class Lookahead(torch.optim.Optimizer):
    """As published: never called its parent's ``__init__``, so that it has no hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer, within: str) -> None:
        setattr(self, within, optimizer)
        self.inner, self.param_groups, self.state, self.taken = optimizer, optimizer.param_groups, defaultdict(dict), 0

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = self.inner.step(closure)
        self.taken += 1
        for parameter in (one for group in self.param_groups for one in group["params"] if self.taken % 2 == 0):
            slow = self.state[parameter].setdefault("slow", torch.zeros_like(parameter))
            parameter.copy_(slow.add_(parameter - slow, alpha=0.5))
        return loss


class ScheduleFree:
    """Steps from another point than that of the gradient, and goes to the point between there and an average."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base, self.taken = optimizer, 0
        self.end = {one: one.detach().clone() for group in optimizer.param_groups for one in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        averages = {parameter: (parameter - 0.1 * end) / 0.9 for parameter, end in self.end.items()}
        for parameter, end in self.end.items():
            parameter.copy_(end)
        self.base.step(closure)
        self.taken += 1
        for parameter, end in self.end.items():
            averages[parameter].lerp_(end.copy_(parameter), 1 / self.taken)
            parameter.copy_(0.9 * averages[parameter] + 0.1 * end)


class Noam:
    """No optimizer at all: sets the learning rate, and steps by one; twice if asked."""

    def __init__(self, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
        self.optimizer, self.times, self.taken = optimizer, times, 0

    def step(self) -> None:
        for _ in range(self.times):
            self.taken += 1
            self.optimizer.param_groups[0]["lr"] = 0.1 / self.taken
            self.optimizer.step()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)  # one that is made has the step of its class hooked for good


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "subclass": lambda parameters: (sgd(parameters), Projected(parameters, 0.1))[1],
    "lookahead": lambda parameters: Lookahead(sgd(parameters), "optimizer"),
    "lookahead of timm": lambda parameters: Lookahead(sgd(parameters), "_base_optimizer"),
    "as torch's PostLocalSGDOptimizer": lambda parameters: Lookahead(sgd(parameters), "optim"),
    "schedule-free": lambda parameters: ScheduleFree(sgd(parameters)),
    "noam": lambda parameters: Noam(sgd(parameters)),
    "noam, twice": lambda parameters: Noam(sgd(parameters), 2),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_done_around_a_step_is_part_of_it(tmp_path: Path, name: str, closure: bool) -> None:
    if closure and "noam" in name:
        pytest.skip("takes none")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, hand = OPTIMIZERS[name](list(model.parameters())), ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in vectors(6):
            recorder.observe((inputs.double(), labels))
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            hand.before()
            optimizer.step(*[lambda: None] * closure)
            hand.after()
    run = open_run(tmp_path / "run")
    hand.agrees_with(run.steps)
    np.testing.assert_allclose(run.curvature.grad_applied_grad, run.curvature.grad_sqnorm, 1e-9)
    assert "step" not in vars(optimizer)
    taken = optimizer.step.__func__  # its class's own
    assert taken in (type(optimizer).step, getattr(type(optimizer).step, "__wrapped__", None))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_wrapper_that_something_else_wraps_meanwhile_goes_on(tmp_path: Path, when: str) -> None:
    model, calls = nn.Linear(4, 3), []
    optimizer = Noam(sgd(list(model.parameters())))

    def wrap() -> None:
        inner = optimizer.step
        optimizer.step = lambda: (calls.append(1), inner())

    if when == "before":
        wrap()
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        if when == "meanwhile":
            wrap()
        optimizer.step()
    optimizer.step()
    assert len(calls) == optimizer.taken == 2
    assert open_run(tmp_path / "run").steps.sizes["step"] == 1


def test_a_wrapper_is_scheduled_copied_and_saved_as_it_was(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = Lookahead(sgd(list(model.parameters())), "optimizer")
    optimizer.defaults = optimizer.inner.defaults
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step by its function
        optimizer.step()
        scheduler.step()
    assert (optimizer.taken, open_run(tmp_path / "run").steps.sizes["step"]) == (1, 1)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with Recorder(tmp_path / "scheduled", model, optimizer, curvature_every=0):
        optimizer.step()
        scheduler.step()  # which looks for its own mark on the step
    other = Noam(sgd(list(model.parameters())))
    with Recorder(tmp_path / "other", model, other):
        copies = [copy.deepcopy(other), pickle.loads(pickle.dumps(other))]
        for one in copies:
            one.step()
    assert [one.taken for one in (*copies, other)] == [1, 1, 0]
    other.step = own = MethodType(Noam.step, other)
    with Recorder(tmp_path / "third", model, other, curvature_every=0):
        assert other.step is not own
        other.step()
    assert other.step is own
    assert (other.taken, open_run(tmp_path / "third").steps.sizes["step"]) == (1, 1)


class Forwarding:
    """Forwards what it is given to the optimizer within."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__["optimizer"] = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["optimizer"], name, value)

    def step(self) -> None:
        self.optimizer.step()


@dataclass(frozen=True)
class Frozen:
    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        self.optimizer.step()


class ByProperty:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def step(self) -> Callable:
        return self.optimizer.step


@pytest.mark.parametrize("kind", [Forwarding, Frozen, ByProperty])
def test_a_wrapper_of_any_make(tmp_path: Path, kind: Callable) -> None:
    model = nn.Linear(4, 3)
    optimizer = kind(sgd(list(model.parameters())))
    recorders = [Recorder(tmp_path / name, model, optimizer, curvature_every=0) for name in ("one", "other")]
    for _ in range(3):
        optimizer.step()
    for recorder in recorders:  # in the order in which they were made
        recorder.close()
    assert [open_run(tmp_path / name).steps.sizes["step"] for name in ("one", "other")] == [3, 3]
    assert "step" not in vars(optimizer)
    assert "step" not in vars(optimizer.optimizer)


def test_a_wrapper_of_two_is_refused_and_said_what_to_give(tmp_path: Path) -> None:
    class Both:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.of_matrices, self.of_others = sgd(parameters[:1]), sgd(parameters[1:])

    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"got test_stepping\.Both, which wraps 2 optimizers: pass these"):
        Recorder(tmp_path / "run", model, Both(list(model.parameters())))


@pytest.mark.parametrize("first", ["inner", "other"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_wrapper_that_steps_another_given_optimizer_too(tmp_path: Path, first: str, wrapped: bool) -> None:
    class Chain(Noam):
        def step(self) -> None:
            steps = [super().step, other.step]
            for step in steps if first == "inner" else steps[::-1]:
                step()

    model = smooth_network()
    inner, other = (sgd(list(model[index].parameters())) for index in (0, 2))
    other, hand = Noam(other) if wrapped else other, ByHand(model)
    chain = Chain(inner)
    with Recorder(tmp_path / "run", model, [chain, other], curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(4)):
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            hand.before()
            chain.step()
            hand.after()
    run = open_run(tmp_path / "run")
    hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].grad_applied_grad, run["curvature"].grad_sqnorm, 1e-9)


def test_a_hook_that_was_registered_later_stays_where_a_wrapper_steps_another_optimizer(tmp_path: Path) -> None:
    """The other one has stepped already, so that a step of the record ends while torch calls its hooks."""

    class Chain(Noam):
        def step(self) -> None:
            super().step()
            hand.after()
            hand.before(list(model[2].parameters()))
            other.step()

    model, calls = smooth_network(), []
    inner, other = (sgd(list(model[index].parameters())) for index in (0, 2))
    chain, hand = Chain(inner), ByHand(model)
    with Recorder(tmp_path / "run", model, [chain, other], curvature_every=0):
        other.register_step_pre_hook(lambda *_: calls.append(1))
        for inputs, labels in vectors(3):
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            hand.before()
            other.step()
            chain.step()
            hand.after()
    assert len(calls) == 6
    hand.agrees_with(open_run(tmp_path / "run")["steps"])


def test_a_wrapper_that_fails_after_the_step_within_has_stepped(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = Noam(sgd(list(model.parameters())))
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        optimizer.step()
        Noam.step, plain = lambda self: (plain(self), 1 / 0), Noam.step
        try:
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
        finally:
            Noam.step = plain
        optimizer.step()
    assert optimizer.taken == open_run(tmp_path / "run").steps.sizes["step"] == 3


@pytest.mark.parametrize("setting", [{"lr": torch.tensor([0.1, 0.2])}, {"momentum": (0.9, 0.99)}])
def test_settings_that_are_no_numbers(tmp_path: Path, setting: dict) -> None:
    class Own(torch.optim.SGD):
        def step(self) -> None:
            pass

    model = nn.Linear(4, 3)
    optimizer = Own(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        optimizer.step()
        optimizer.param_groups[0].update(setting)
        optimizer.step()
    assert open_run(tmp_path / "run").steps.sizes["step"] == 2


def test_a_wrapped_step_that_fails_is_none(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = Noam(sgd(list(model.parameters())))
    optimizer.optimizer.register_step_post_hook(lambda *given: 1 / 0 if optimizer.taken == 1 else None)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        optimizer.step()
        optimizer.step()
    assert open_run(tmp_path / "run").steps.sizes["step"] == 2


def test_a_step_that_failed_within_one_of_another_optimizer_goes_on_no_more(tmp_path: Path) -> None:
    """That other one is not given to the recorder, and its step is on the call stack each time."""

    class Outer(torch.optim.SGD):
        def step(self) -> None:
            self.inner.step()

    model, outer = nn.Linear(4, 3), Outer([nn.Parameter(torch.zeros(1))], 0.1)
    outer.inner, hand = sgd(list(model.parameters())), ByHand(model)
    with Recorder(tmp_path / "run", model, outer.inner, curvature_every=0):
        for rate in (0.1, None, 0.1, 0.1):
            outer.inner.param_groups[0]["lr"] = rate
            model.zero_grad()
            model(torch.randn(2, 4)).square().sum().backward()
            hand.before()
            if rate is None:
                with pytest.raises(TypeError):
                    outer.step()
            else:
                outer.step()
                hand.after()
    hand.agrees_with(open_run(tmp_path / "run").steps)


def test_what_moves_after_a_wrapper_that_did_not_step_is_no_part_of_the_next_step(tmp_path: Path) -> None:
    """A wrapper that accumulates is called in vain; then θ moves, and the inner optimizer steps by itself."""

    class Accumulating:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            pass

    model, (batch,) = smooth_network(), vectors(1)
    wrapper = Accumulating(sgd(list(model.parameters())))
    with Recorder(tmp_path / "run", model, wrapper, curvature_every=0) as recorder:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        wrapper.step()
        with torch.no_grad():
            model[0].weight.mul_(2)
        before = sum(one.detach().square().sum().item() for one in model.parameters())
        wrapper.optimizer.step()
        recorder.log(loss=0.0)
    np.testing.assert_allclose(open_run(tmp_path / "run").steps.param_sqnorm.sum("layer"), [before], rtol=1e-12)


def test_what_is_given_to_a_step_need_not_be_a_closure(tmp_path: Path) -> None:
    class Polyak(torch.optim.SGD):
        def step(self, loss: float) -> None:  # its step size is by the loss
            self.param_groups[0]["lr"] = 0.1 * loss
            super().step()

    model = nn.Linear(4, 3)
    optimizer = Polyak(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step(loss.item())
            recorder.log(loss=loss.detach().numpy(), accuracy=np.array([0.5]))
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run.curvature.loss_before, run.steps.loss, 1e-6)
    assert (run.steps.accuracy == 0.5).all()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_step_is_recorded_as_any(tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inner, hand = sgd(list(model.parameters())), ByHand(model)
    optimizer = Noam(inner) if wrapped else inner
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):
            inner.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            hand.before()
            step()
            hand.after()
    run = open_run(tmp_path / "run")
    hand.agrees_with(run.steps)
    np.testing.assert_allclose(run.curvature.grad_applied_grad, run.curvature.grad_sqnorm, 1e-9)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("both", [True, False])
def test_schedulers_that_step_before_the_next_optimizer(tmp_path: Path, both: bool, every: int) -> None:
    """Each optimizer's step has the rate and decay that it had then; so it is if the other never steps."""
    model = smooth_network()
    first = torch.optim.SGD(model[0].parameters(), 1.0, weight_decay=0.5)
    second = torch.optim.SGD(model[2].parameters(), 0.5)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (first, second)]
    used, decays, norms = [], [], []
    with Recorder(tmp_path / "run", model, [first, second], curvature_every=0, every=every) as recorder:
        for inputs, labels in recorder.watch(vectors(4)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            used.append([one.param_groups[0]["lr"] for one in (first, second)])
            decays.append(first.param_groups[0]["weight_decay"])
            norms.append(sum(one.square().sum().item() for one in model[0].parameters()))
            for optimizer, scheduler in list(zip((first, second), schedulers, strict=True))[: 1 + both]:
                optimizer.step()
                scheduler.step()
            first.param_groups[0]["weight_decay"] /= 2
    steps, used = open_run(tmp_path / "run")["steps"], np.array(used)
    used[:, 1] *= both
    np.testing.assert_allclose(steps.learning_rate, used[::every])
    np.testing.assert_allclose(steps.flow_step, used[::every])
    np.testing.assert_allclose(steps.flow_time, np.cumsum([0, *used[:-1, 0]])[::every])
    np.testing.assert_allclose(steps.decay_sqnorm.sel(layer="0"), (np.array(decays) * norms)[::every])


def test_the_loss_after_a_step_of_one_of_two_optimizers_is_that_right_after_it(tmp_path: Path) -> None:
    """As in the Wasserstein GAN: weights are clipped before the other one steps, on another batch."""
    model, after, before = smooth_network(), [], []
    optimizers = [torch.optim.RMSprop(part.parameters(), 0.01) for part in (model[0], model[2])]

    def loss_at(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with Recorder(tmp_path / "run", model, optimizers, curvature_every=1) as recorder:
        for number, batch in enumerate(vectors(6)):
            recorder.observe(batch)
            model.zero_grad()
            loss = loss_at(batch)
            loss.backward()
            optimizers[number % 3 == 2].step()
            with torch.no_grad():
                before.append(loss.item())
                after.append(loss_at(batch).item())
                for parameter in model.parameters():
                    parameter.clamp_(-0.3, 0.3)
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(curvature.loss_before, before, rtol=1e-12)
    np.testing.assert_allclose(curvature.loss_after, after, rtol=1e-12)
