"""Operations of someone's own that run a part of the network again in a backward pass."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import prune_row
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dynamics import Recorder, open_run
from dynamics.models import build

Batches = list[tuple[Tensor, Tensor]]


class RunsAgain(torch.autograd.Function):
    """Keeps the part of the network that it runs, not what that computes."""

    @staticmethod
    def forward(ctx, part, x, *parameters):
        ctx.part, ctx.parameters, ctx.random = part, parameters, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return part(x)


class Checkpointed(RunsAgain):
    """As Megatron's: the part runs again in the backward pass, and gives its parameters their gradients itself."""

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        x, after = x.detach().requires_grad_(), torch.get_rng_state()
        torch.set_rng_state(ctx.random)
        with torch.enable_grad():
            y = ctx.part(x)
        torch.set_rng_state(after)
        torch.autograd.backward(y, cotangent)
        return None, x.grad


class Adjoint(RunsAgain):
    """As torchdiffeq's: gradients are taken by the parameters that were handed in, of the part as it is then."""

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.part(x)
            return None, *torch.autograd.grad(y, (x, *ctx.parameters), cotangent)


class MemoryEfficientNorm(torch.autograd.Function):
    """A BatchNorm that is computed again in the backward pass, by functions: no module runs there."""

    @staticmethod
    def forward(ctx, norm, x, weight, bias):
        ctx.norm = norm
        ctx.save_for_backward(x, weight, bias)
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, training=True)

    @staticmethod
    def backward(ctx, cotangent):
        x, weight, bias = (one.detach().requires_grad_() for one in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.batch_norm(x, ctx.norm.running_mean, ctx.norm.running_var, weight, bias, training=True)
            torch.autograd.backward(y * ctx.norm.weight.sum() / ctx.norm.weight.sum().detach(), cotangent)
        return None, x.grad, weight.grad, bias.grad


class NotTwice(torch.autograd.Function):
    """x³, whose backward pass autograd takes for linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * (3 * x**2).detach()


class Twice(NotTwice):
    """x³."""

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * 3 * x**2


class Net(nn.Module):
    def __init__(self, runs: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.out, self.runs = nn.Linear(4, 6), nn.Linear(6, 3), runs
        self.part = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(6, momentum=0.0))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(self.runs(self.part, torch.tanh(self.first(x))))


KINDS = {
    "plain": lambda part, x: part(x),
    "checkpointed": lambda part, x: Checkpointed.apply(part, x),
    "adjoint": lambda part, x: Adjoint.apply(part, x, *part.parameters()),
    "norm": lambda part, x: part[2](
        MemoryEfficientNorm.apply(part[3], part[1](part[0](x)), part[3].weight, part[3].bias)
    ),
}
BY_HAND = ("grad_sqnorm", "param_grad", "grad_update", "loss_before", "loss_after")


def train(path: Path | None, kind: str) -> list[Tensor | None]:
    """Two optimizers, of which one steps at every second batch, so that gradients are carried over."""
    torch.manual_seed(0)
    model = Net(KINDS[kind])
    first = torch.optim.SGD([*model.first.parameters(), *model.part.parameters()], 0.1)
    last = torch.optim.SGD(model.out.parameters(), 0.1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
    seen = []
    recorder = None if path is None else Recorder(path, model, [first, last], curvature_every=1)
    for number, (x, y) in enumerate(batches if recorder is None else recorder.watch(batches)):
        first.zero_grad()
        F.cross_entropy(model(x), y).backward()
        first.step()
        if number % 2:
            last.step()
            last.zero_grad()
        seen += [None if one.grad is None else one.grad.clone() for one in model.parameters()]
    if recorder is not None:
        recorder.close()
    return [*seen, *model.state_dict().values(), torch.get_rng_state(), torch.tensor(model.calls)]


@pytest.mark.filterwarnings(
    "ignore:curvature", "ignore:/curvature may be of another loss", "ignore:the gradient applied"
)
@pytest.mark.parametrize("kind", ["checkpointed", "adjoint", "norm"])
def test_a_network_that_runs_again_in_its_backward_pass_trains_as_without(tmp_path: Path, kind: str) -> None:
    plain, recorded = train(None, kind), train(tmp_path / "run.zarr", kind)
    assert len(plain) == len(recorded)
    for one, other in zip(plain, recorded, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def record(path: Path, kind: str, dropout: float) -> xr.Dataset:
    """Curvature of steps on one batch each, in double precision."""
    torch.manual_seed(0)
    model = Net(KINDS[kind]).double()
    model.part[2].p = dropout
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)]
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for x, y in recorder.watch(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return open_run(path)["curvature"].load()


@pytest.mark.parametrize("kind", ["checkpointed", "adjoint"])
def test_its_curvature_is_that_of_the_network_that_runs_once(tmp_path: Path, kind: str) -> None:
    dropout = 0.3 * (kind == "checkpointed")  # the other one draws other numbers when it runs again
    expected = record(tmp_path / "plain.zarr", "plain", dropout)
    with pytest.warns(UserWarning, match="curvature is approximate from step 0 on"):
        found = record(tmp_path / "run.zarr", kind, dropout)
    assert found.approximate.values.tolist() == [1, 1, 1]
    assert expected.approximate.values.tolist() == [0, 0, 0]
    for name in BY_HAND:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-14, err_msg=name)
    for name in ("grad_hess_grad", "param_hess_grad", "update_hess_update"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-8, err_msg=name)


def test_an_event_measures_it_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runs = {}
    for kind in ("plain", "checkpointed"):
        torch.manual_seed(0)
        model = Net(KINDS[kind]).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        probe = [(torch.randn(8, 4).double(), torch.randint(3, (8,)))]
        with Recorder(tmp_path / kind, model, optimizer) as recorder, recorder.event("prune", probe=probe):
            prune_row(model, "part.0.weight", 0)
        runs[kind] = open_run(tmp_path / kind)["pruning"].load()
        assert all(parameter.grad is None for parameter in model.parameters())
    for name in ("loss", "grad_sqnorm", "param_grad", "grad_removal"):
        np.testing.assert_allclose(runs["checkpointed"][name], runs["plain"][name], rtol=1e-9, atol=1e-14)
    for name in ("grad_hess_grad", "removal_hess_removal"):
        np.testing.assert_allclose(runs["checkpointed"][name], runs["plain"][name], rtol=1e-5, atol=1e-8)
    assert runs["checkpointed"].grad_sqnorm_second_order.isnull().all()


@pytest.mark.parametrize("once", [False, True])
def test_a_backward_pass_that_has_no_derivative_is_said(tmp_path: Path, once: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    operation = NotTwice
    if once:
        backward = torch.autograd.function.once_differentiable(NotTwice.backward)
        operation = type("Once", (NotTwice,), {"backward": staticmethod(backward)})

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model[1](operation.apply(model[0](batch[0]))), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said = "curvature is approximate" if once else "operation that is not torch.s is not the change of its gradient"
    with pytest.warns(UserWarning, match=said):
        with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
            for batch in recorder.watch([(torch.randn(8, 4).double(), torch.randint(3, (8,)))]):
                optimizer.zero_grad()
                objective(model, batch).backward()
                optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].approximate.values.tolist() == [float(once)]


@pytest.mark.parametrize("implicit", [True, False])
def test_a_hook_that_has_no_derivative_is_said(tmp_path: Path, implicit: bool) -> None:
    """Of deep equilibrium models, as in the tutorial of Kolter and others; one that only looks changes nothing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": nn.Linear(6, 6), "inject": nn.Linear(4, 6), "out": nn.Linear(6, 3)}).double()
    nn.init.orthogonal_(model["inner"].weight)

    def step(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.9 * model["inner"](z) + model["inject"](x))

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z = torch.zeros(len(batch[0]), 6).double()
        with torch.no_grad():
            for _ in range(30):
                z = step(z, batch[0])
        z = step(z, batch[0])
        start = z.clone().detach().requires_grad_()
        again = step(start, batch[0])

        def solve(grad: Tensor) -> Tensor:
            solution = grad
            for _ in range(30):
                solution = torch.autograd.grad(again, start, solution, retain_graph=True)[0] + grad
            return solution

        if z.requires_grad:
            z.register_hook(solve if implicit else lambda grad: seen.append(grad.sum()))
        return F.cross_entropy(model["out"](z), batch[1])

    optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
    said = pytest.warns(UserWarning, match="autograd cannot differentiate its backward pass, or a hook on a tensor")
    with said if implicit else nullcontext():
        with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
            for batch in recorder.watch([(torch.randn(8, 4).double() / 5, torch.randint(3, (8,)))]):
                objective(model, batch).backward()
                optimizer.step()


def test_an_operation_with_a_derivative_is_believed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model[1](Twice.apply(model[0](batch[0]))), batch[1])

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch([(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]):
            optimizer.zero_grad()
            objective(model, batch).backward()
            optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].approximate.values.tolist() == [0, 0, 0]


class Reversed(torch.autograd.Function):
    """The identity, with a gradient turned around, as a feature extractor is trained against a discriminator."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, share: float) -> Tensor:
        ctx.share = share
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.share * grad, None


class Binary(torch.autograd.Function):
    """The sign, whose gradient is passed straight through."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, share: float) -> Tensor:
        return inputs.sign()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("operation", [Reversed, Binary])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operation_that_passes_on_another_gradient_is_said(tmp_path: Path, operation: type, dtype: object) -> None:
    """Also where it begins to later on, as in domain-adversarial training, whose share grows from zero."""
    torch.manual_seed(0)
    parts = {"features": nn.Linear(4, 6), "classes": nn.Linear(6, 3), "domains": nn.Linear(6, 2)}
    model, shares = nn.ModuleDict(parts).to(dtype), iter([0.0, 0.5, 1.0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.ModuleDict, batch: tuple[Tensor, Tensor, float]) -> Tensor:
        features = torch.tanh(model["features"](batch[0]))
        reversed_ = operation.apply(features, batch[2])
        domains = F.cross_entropy(model["domains"](reversed_), batch[1] % 2)
        return F.cross_entropy(model["classes"](features), batch[1]) + 3 * domains

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
            for share in shares:
                batch = torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,)), share
                recorder.observe(batch)
                optimizer.zero_grad()
                objective(model, batch).backward()
                optimizer.step()
    texts = [str(one.message) for one in said]
    assert sum("passes on a gradient other than that of what it computes" in text for text in texts) == 1
    assert all("a gradient other than" in text for text in texts)


class MemoryEfficientSwish(torch.autograd.Function):
    """x σ(x), which keeps x alone, as in published networks; its backward pass has a derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs * torch.sigmoid(inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        share = torch.sigmoid(inputs)
        return grad * share * (1 + inputs * (1 - share))


class Swish(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return MemoryEfficientSwish.apply(inputs)


@pytest.mark.parametrize("seed", range(3))
def test_an_operation_with_a_derivative_is_believed_in_a_deep_network(tmp_path: Path, seed: int) -> None:
    """In single precision, where what is far enough for its rounding is too far for its curvature."""
    torch.manual_seed(seed)
    model = build("vgg13", num_classes=10, in_channels=1, width=0.125).float()
    for part in list(model.modules()):
        for name in [name for name, child in part.named_children() if isinstance(child, nn.ReLU)]:
            setattr(part, name, Swish())
    optimizer, data = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.randn(2, 16, 1, 32, 32).float()
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch([(inputs, torch.randint(10, (16,))) for inputs in data]):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def swish_network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), Swish(), nn.Linear(width, width), Swish(), nn.Linear(width, 3))


def test_an_operation_of_a_step_without_gradient_has_curvature_as_any_other(tmp_path: Path) -> None:
    """As where all triplets of a batch are far enough apart."""
    torch.manual_seed(0)
    model = swish_network(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        return F.relu(model(batch).sum(1).abs() - 100).mean()

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(list(torch.randn(2, 8, 4))):
            optimizer.zero_grad()
            objective(model, batch).backward()
            optimizer.step()
    assert (open_run(tmp_path / "run")["curvature"].grad_hess_grad == 0).all()


def train_swish(path: Path, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, dtype: object = None) -> None:
    """Train a network by Adam, in ``dtype`` where it is given, as autocast has it; that it warns of anything fails."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    with Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder:
        for given in recorder.watch([batch] * steps):
            optimizer.zero_grad()
            objective(model, given).backward()
            optimizer.step()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_an_operation_with_a_derivative_is_believed_where_the_loss_has_come_to_nothing(
    tmp_path: Path, seed: int
) -> None:
    """A cross-entropy of 1e-9 is the difference of numbers that are rounded to 1e-7."""
    torch.manual_seed(seed)
    train_swish(tmp_path / "run", swish_network(64).float(), (torch.randn(4, 4).float(), torch.arange(4) % 3), 260)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_operation_with_a_derivative_is_believed_in_half_precision(
    tmp_path: Path, autocast: bool, seed: int
) -> None:
    """The parameters' own, or what autocast inside the objective, or the model, rounds to."""
    torch.manual_seed(seed)
    dtype = torch.float32 if autocast else torch.bfloat16
    batch = torch.randn(16, 4, dtype=dtype), torch.randint(3, (16,))
    train_swish(tmp_path / "run", swish_network(64).to(dtype), batch, 20, torch.bfloat16 if autocast else None)
