"""What a pruning does is predicted the better, the less it removes; a real one is accounted for to the parameter."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, dense, flat, images, plain_step, smooth_network, vectors
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import prune

from analysis import pruning_effect, pruning_effect_per_layer, removed_decrease
from dynamics import Recorder, open_run
from dynamics.network.masks import apply_masks

Vector = Callable[[torch.Tensor], torch.Tensor]
SHRINKAGES = (0.08, 0.04, 0.02, 0.01)


def decoder() -> nn.Sequential:
    """A convolution, a normalisation on the batch's statistics, and a transposed convolution as decoders have it."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


NETWORKS = {"layers": (smooth_network, vectors, "eval"), "a decoder": (decoder, images, "train")}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("quantity", "order", "expected"),
    [
        ("loss", "first_order", 2),
        ("loss", "second_order", 3),
        ("grad_sqnorm", "first_order", 2),
        ("grad_sqnorm", "second_order", 3),
        ("param_sqnorm_rate", "first_order", 2),
        ("param_sqnorm_rate", "second_order", 3),
        ("param_hess_grad", "first_order", 2),
    ],
)
def test_effect_of_a_vanishing_pruning(tmp_path: Path, network: str, quantity: str, order: str, expected: int) -> None:
    errors, (build, data, mode) = [], NETWORKS[network]
    for shrinkage in SHRINKAGES:
        torch.manual_seed(0)
        model, batches = build(), data(2)
        model(batches[0][0])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        path = tmp_path / str(shrinkage)
        with Recorder(path, model, optimizer) as recorder:
            with recorder.event("shrink", probe=batches, mode=mode), torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 1 - shrinkage
        effect = pruning_effect(open_run(path)).sel(quantity=quantity).isel(event=0)
        errors.append(abs(float(effect.measured - effect[order])))
    slope = np.polyfit(np.log(SHRINKAGES), np.log(errors), 1)[0]
    assert slope == pytest.approx(expected, abs=0.12)


def test_gradient_norm_change_matches_grasp(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    filter_entries = slice(4, 8)  # the second row of the first weight
    grasp = (theta * (hessian @ grad))[filter_entries].sum()
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("shrink", probe=[batch]), torch.no_grad():
            model[0].weight[1] *= 1 - 1e-6
    effect = pruning_effect(open_run(tmp_path / "run")).sel(quantity="grad_sqnorm").isel(event=0)
    np.testing.assert_allclose(effect.first_order, -2e-6 * grasp, rtol=1e-9)
    np.testing.assert_allclose(effect.measured, -2e-6 * grasp, rtol=1e-4)


def test_a_masked_pruning_is_accounted_for(tmp_path: Path) -> None:
    model, batches = convolutional_network(), images(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    keep = torch.tensor([True, False, True, True])

    def loss_and_grad() -> tuple[float, torch.Tensor]:
        model.eval()
        loss = torch.stack([F.cross_entropy(model(inputs), labels) for inputs, labels in batches]).mean()
        grad = flat(torch.autograd.grad(loss, list(model.parameters())))
        model.train()
        return loss.item(), grad

    loss_before, grad_before = loss_and_grad()
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("prune", probe=batches, measure="by hand", target=0.25):
            masks = {"0.weight": keep.view(-1, 1, 1, 1).expand(4, 1, 3, 3)}
            apply_masks(model, masks | dict.fromkeys(("0.bias", "1.weight", "1.bias"), keep), optimizer)
    loss_after, grad_after = loss_and_grad()
    events = open_run(tmp_path / "run")["pruning"].to_dataset().isel(event=0)
    np.testing.assert_allclose(events.loss, [loss_before, loss_after], rtol=1e-12)
    kept = torch.cat([torch.ones_like(p).reshape(-1) for p in model.parameters()]).bool()
    kept[9:18], kept[37], kept[41], kept[45] = False, False, False, False
    np.testing.assert_allclose(
        events.grad_sqnorm.sum("layer"), [grad_before.square().sum(), grad_after[kept].square().sum()], rtol=1e-10
    )
    assert events.removed.values.tolist() == [10, 2, 0]
    assert events.remaining.sum("layer").values.tolist() == [len(kept), len(kept) - 12]
    np.testing.assert_allclose(events.removed_grad_sqnorm.sum(), grad_before[~kept].square().sum(), rtol=1e-10)
    assert str(events.measure.values) == "by hand"
    assert str(events["mode"].values) == "eval"


def test_the_effect_on_the_layers_adds_up_and_the_removed_part_of_the_decrease_too(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=[batch]):
            apply_masks(model, {"0.weight": (torch.arange(5) != 1).view(5, 1).expand(5, 4)})
    run = open_run(tmp_path / "run")
    layers, total = pruning_effect_per_layer(run).isel(event=0), pruning_effect(run).isel(event=0)
    assert layers.measured.sel(quantity="loss").isnull().all()
    for order in ("first_order", "second_order"):  # of θᵀHg, NaN in second order
        summed = layers[order].sum("layer", skipna=False)
        np.testing.assert_allclose(summed, total[order], rtol=1e-12)
    gone = ["grad_sqnorm", "param_sqnorm_rate", "param_hess_grad"]
    np.testing.assert_allclose(
        layers.measured.sel(quantity=gone).sum("layer"), total.measured.sel(quantity=gone), rtol=1e-12
    )
    removal, kept = torch.zeros(43), torch.ones(43, dtype=torch.bool)
    removal[4:8], kept[4:8] = -theta[4:8], False
    moved = hessian @ removal
    first = slice(0, 25)  # weight and bias of the first layer
    inside = 2 * (grad * moved)[first][kept[first]].sum() - grad[4:8].square().sum()
    np.testing.assert_allclose(layers.first_order.sel(quantity="grad_sqnorm", layer="0"), inside, rtol=1e-10)
    carried = removed_decrease(run).isel(event=0)
    share = grad[4:8].square().sum() / grad.square().sum()
    np.testing.assert_allclose(carried.decrease.sum("layer"), share, rtol=1e-12)
    np.testing.assert_allclose(carried.parameters.sum("layer"), 4 / 43, rtol=1e-12)
    of_layer = grad[4:8].square().sum() / grad[first].square().sum()
    np.testing.assert_allclose(carried.of_layer, [of_layer, 0], rtol=1e-12)


class Once(torch.autograd.Function):
    """tanh, whose derivative has none."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, inputs: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(inputs.tanh())
        return inputs.tanh()

    @staticmethod
    @once_differentiable
    def backward(context: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 - context.saved_tensors[0].square())


class OnceTanh(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return Once.apply(inputs)


def test_what_autograd_cannot_derive_thrice_is_missing_not_wrong(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    model[1] = OnceTanh()
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("shrink", probe=batches), torch.no_grad():
            model[0].weight *= 0.99
    effect = pruning_effect(open_run(tmp_path / "run")).isel(event=0)
    np.testing.assert_allclose(effect.second_order[0], effect.measured[0], rtol=1e-3)
    assert np.isnan(effect.second_order[1:]).all()
    assert np.isnan(effect.first_order.sel(quantity="param_hess_grad"))
    assert np.isfinite(effect.first_order[:3]).all()


def test_an_event_that_fails_leaves_no_row(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with pytest.raises(RuntimeError, match="out of luck"), recorder.event("prune", probe=batches):
            raise RuntimeError("out of luck")
        with pytest.raises(ValueError, match="needs a list of batches"), recorder.event("prune", probe=batches[0][0]):
            pass
        with pytest.raises(ValueError, match="'train' or 'eval'"), recorder.event("p", probe=batches, mode="test"):
            pass
        for wrong, message in (
            ({"step": 3}, r"cannot take \['step'\], which the recorder measures itself"),
            ({"removed": 3}, r"cannot take \['removed'\]"),
            ({"source": "x" * 65}, "strings of up to 64 characters, but 'source' has 65"),
            ({"rates": [0.1, 0.2]}, r"takes numbers and strings, but 'rates' is \[0.1, 0.2\]"),
        ):
            with pytest.raises(ValueError, match=message), recorder.event("prune", probe=batches, **wrong):
                pass
    assert "event" not in open_run(tmp_path / "run")["pruning"].sizes


def hess_kept_grad(model: torch.nn.Module, batches: list, kept: torch.Tensor, mask: torch.Tensor) -> Vector:
    """θ ↦ H(θ) g_K(θ) of the mean loss whose parameters are masked, from dense derivatives."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = (theta * mask).split([shape.numel() for shape in shapes.values()])
        values = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        outputs = [(torch.func.functional_call(model, values, inputs), labels) for inputs, labels in batches]
        return torch.stack([F.cross_entropy(*output) for output in outputs]).mean()

    return lambda theta: torch.func.hessian(loss)(theta) @ (torch.func.grad(loss)(theta) * kept)


@pytest.mark.parametrize("count", [1, 2])
def test_the_change_of_the_curvature_is_predicted_from_third_derivatives(tmp_path: Path, count: int) -> None:
    model, batches = smooth_network(), vectors(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    theta, everything = flat(list(model.parameters())), torch.ones(43)
    kept = everything.clone()
    kept[4:8] = 0
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("prune", probe=batches):
            apply_masks(model, {"0.weight": (torch.arange(5) != 1).view(5, 1).expand(5, 4)}, optimizer)
    whole = hess_kept_grad(model, batches, everything, everything)
    parts = torch.func.jvp(hess_kept_grad(model, batches, kept, everything), (theta,), (theta * (kept - 1),))
    expected = (theta * kept) @ sum(parts) - theta @ whole(theta)
    change = open_run(tmp_path / "run")["pruning"].to_dataset().param_hess_grad_first_order.isel(event=0)
    np.testing.assert_allclose(change.sum("layer"), expected, rtol=1e-10)
    effect = pruning_effect(open_run(tmp_path / "run")).sel(quantity="param_hess_grad").isel(event=0)
    pruned = hess_kept_grad(model, batches, kept, kept)(theta * kept)
    np.testing.assert_allclose(effect.measured, (theta * kept) @ pruned - theta @ whole(theta), rtol=1e-10)
    np.testing.assert_allclose(effect.first_order, expected, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_pruning_is_predicted_from_the_network_before_it(tmp_path: Path, count: int) -> None:
    model, batches = smooth_network(), vectors(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for number in range(2):
            theta = flat(list(model.parameters())).clone()
            pieces = [dense(model, batch)[1:] for batch in batches]
            with recorder.event("prune", probe=batches):
                keep = torch.ones(5, 4, dtype=torch.bool)
                keep[number] = False
                apply_masks(model, {"0.weight": keep}, optimizer)
    grad, hessian = (torch.stack(parts).mean(0) for parts in zip(*pieces, strict=True))
    grad[:4] = 0  # pruned before: a constant zero, without gradient
    removal = flat(list(model.parameters())) - theta
    assert int((removal != 0).sum()) == 4
    total = open_run(tmp_path / "run")["pruning"].to_dataset().isel(event=1).drop_vars(["kind", "mode"]).sum("layer")
    np.testing.assert_allclose(total.grad_removal, grad @ removal, rtol=1e-10)
    np.testing.assert_allclose(total.removal_hess_removal, removal @ hessian @ removal, rtol=1e-10)
    hess_grad = hessian @ grad
    np.testing.assert_allclose(total.grad_hess_removal, removal @ hess_grad, rtol=1e-10)
    part = slice(4, 8)
    expected = hess_grad @ removal - grad[part] @ (hessian @ removal)[part]
    np.testing.assert_allclose(total.kept_grad_hess_removal, expected, rtol=1e-10)
    kept = torch.ones(len(theta), dtype=torch.bool)
    kept[part] = False
    changed = theta[kept] @ (grad + hessian @ removal)[kept] - theta @ grad
    np.testing.assert_allclose(total.param_grad_first_order, changed, rtol=1e-10)


class Square(torch.autograd.Function):
    """x², whose derivatives are wrong from the given order on."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, order: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.order = order
        return x.square()

    @staticmethod
    def backward(ctx: object, cotangent: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.order == 2:
            return 2 * x * cotangent.detach(), None
        return 2 * Slip.apply(x, cotangent), None


class Slip(torch.autograd.Function):
    """x times a cotangent, whose derivative takes the cotangent for a constant."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, cotangent)
        return x * cotangent

    @staticmethod
    def backward(ctx: object, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, cotangent = ctx.saved_tensors
        return outer * cotangent.detach(), outer * x


@pytest.mark.parametrize("order", [2, 3])
def test_a_wrong_derivative_of_an_operation_is_found_out(tmp_path: Path, order: int) -> None:
    class Squares(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Square.apply(x, order)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Squares(), nn.Linear(5, 3))
    which = "second" if order == 2 else "third"
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter("always")
            with recorder.event("shrink", probe=vectors(1)):
                model[0].weight *= 0.5
                model[3].weight *= 0.9
    texts = [str(one.message) for one in said]
    (text,) = [one for one in texts if one.startswith(f"the {which} derivatives of the loss are not symmetric")]
    assert text.endswith("that use it are wrong" if order == 2 else "that use it are recorded as NaN")
    effect = pruning_effect(open_run(tmp_path / "run")).isel(event=0)
    assert bool(effect.second_order.sel(quantity="grad_sqnorm").isnull())
    assert bool(effect.second_order.sel(quantity="loss").notnull())


class Attention(nn.Module):
    """Attention: the softmax over keys takes no notice of the bias of the keys, which shifts all of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 4, 1) * torch.eye(4, dtype=x.dtype)
        return (torch.softmax(self.query(x) @ self.bias(x).mT, -1) @ self.value(x)).mean(1)


class Shifted(nn.Module):
    """A number that is added to all logits: the cross-entropy takes no notice of it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.bias = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x) + self.bias(x)


def normalised() -> nn.Module:
    """A bias in front of a normalisation on the batch's statistics, which subtracts it."""
    layers = {"bias": nn.Linear(4, 5), "normalisation": nn.BatchNorm1d(5), "tanh": nn.Tanh(), "logits": nn.Linear(5, 3)}
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [0, 100])
@pytest.mark.parametrize("build", [Attention, Shifted, normalised])
def test_removing_what_the_loss_does_not_depend_on_has_no_effect(
    tmp_path: Path, build: Callable[[], nn.Module], trained: int, dtype: torch.dtype
) -> None:
    model, probe = build().to(dtype), [(inputs.to(dtype), labels) for inputs, labels in vectors(1)]
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(trained):
        plain_step(model, optimizer, probe[0])
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("prune", probe=probe, mode="train"):  # a warning would be an error
            apply_masks(model, {"bias.bias": torch.zeros(len(model.bias.bias), dtype=torch.bool)})
    effect = pruning_effect(open_run(tmp_path / "run")).isel(event=0)
    second_order = effect.second_order.drop_sel(quantity="param_hess_grad")  # which has none
    for predicted in (effect.first_order, second_order):
        np.testing.assert_allclose(predicted, 0, atol=100 * torch.finfo(dtype).eps)


class Phases(nn.Module):
    """A complex parameter between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.phases = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).tanh().to(torch.complex128) @ self.phases).abs().square().tanh())


def test_a_complex_parameter_is_a_pair_of_real_ones(tmp_path: Path) -> None:
    model, (batch,) = Phases(), vectors(1)
    kept = torch.rand(3, 3) > 0.4
    parts = [(name, one.detach().clone()) for name, one in model.named_parameters()]
    theta = flat([torch.view_as_real(one) if one.is_complex() else one for _, one in parts])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        values, rest = {}, vector
        for name, one in parts:
            own, rest = rest.tensor_split([one.numel() * (1 + one.is_complex())])
            pair = own.view(*one.shape, 2).unbind(-1) if one.is_complex() else ()
            values[name] = torch.complex(*pair) if pair else own.view(one.shape)
        return F.cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])

    mask = flat([(kept if one.is_complex() else one == one)[..., None].expand(*one.shape, 1 + one.is_complex())
                 for _, one in parts]).double()  # fmt: skip
    removal, grad, hessian = theta * mask - theta, torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)
    along = torch.func.jacrev(lambda vector: torch.func.hessian(loss)(vector) @ removal)(theta) @ removal
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=[batch]):
            apply_masks(model, {"phases": kept})
    pruning = open_run(tmp_path / "run").pruning.isel(event=0)
    expected = {
        "removed": (1 - mask).sum(),
        "removed_grad_sqnorm": ((1 - mask) * grad.square()).sum(),
        "kept_grad_hess_removal": mask * grad @ hessian @ removal,
        "grad_sqnorm_second_order": (mask * ((hessian @ removal).square() + grad * along)).sum(),
        "param_grad_second_order": mask * theta @ along / 2,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(pruning[name].sum("layer", skipna=False), value, rtol=1e-9, err_msg=name)
    assert pruning.remaining.sum("layer").values.tolist() == [len(theta), mask.sum()]


@pytest.mark.parametrize("touched", [False, True])
def test_what_frozen_parameters_do_is_not_predicted(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, touched: bool
) -> None:
    model, batches = smooth_network(), vectors(2)
    model[0].requires_grad_(False)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model[2:].parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=batches), torch.no_grad():
            prune.random_unstructured(model[0 if touched else 2], "weight", 0.1)
    run = open_run(tmp_path / "run")
    assert (run["pruning"].removed.sum("layer") > 0).all()
    effect = pruning_effect(run).isel(event=0).sel(quantity="loss")
    assert np.isfinite(effect.measured)
    assert np.isnan(effect.first_order) == np.isnan(effect.second_order) == touched
    said = [str(one.message) for one in recwarn if "frozen" in str(one.message)]
    text = "frozen parameters are removed or changed, first '0.weight"
    assert [one.startswith(text) for one in said] == [True] * touched
