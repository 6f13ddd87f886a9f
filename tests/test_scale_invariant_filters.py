"""BatchNorm in training mode makes a loss blind to a filter's length: θ_fᵀg_f = 0 and θ_fᵀ(Hg)_f = −‖g_f‖²."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from prunable import batch, trained
from torch import Tensor, nn

from analysis import MissingQuantityError, grasp_and_gradient
from analysis import scale_invariance as analysed
from dynamics import Recorder, open_run
from dynamics.models import VGG
from dynamics.network.masks import apply_masks
from dynamics.probing.objective import cross_entropy_objective
from dynamics.probing.probe import Probe
from dynamics.pruning import scale_invariance, scores
from figures import FIGURES, draw

Make = Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]


def smooth_batch_norm_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(),
        nn.Flatten(), nn.Linear(3 * 16, 5),
    )  # fmt: skip
    return model, (torch.randn(16, 2, 8, 8), torch.randint(5, (16,)))


def vgg() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = VGG([4, 4, "M", 8, "M", 8, "M", 8, "M", 8, "M"], num_classes=3, in_channels=1)
    return model, (torch.randn(32, 1, 32, 32), torch.randint(3, (32,)))


def per_filter(make: Make, mode: str, epsilon: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """θ_fᵀg_f, θ_fᵀ(Hg)_f and ‖g_f‖² of each filter, one triple a normalised convolution."""
    model, data = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    expansion = Probe(model, cross_entropy_objective, [data], mode=mode).expand()
    products = expansion.hessian_product(expansion.grad)
    triples = []
    for theta, grad, product in zip(expansion.theta.values(), expansion.grad, products, strict=True):
        if theta.ndim == 4:
            theta, grad, product = (tensor.detach().flatten(1) for tensor in (theta, grad, product))
            triples.append(((theta * grad).sum(1), (theta * product).sum(1), grad.square().sum(1)))
    return triples


@pytest.mark.parametrize("make", [smooth_batch_norm_network, vgg])
def test_both_identities_hold_in_training_mode(make: Make) -> None:
    for param_grad, param_hess_grad, grad_sqnorm in per_filter(make, "train", 1e-14):
        torch.testing.assert_close(param_grad, torch.zeros_like(param_grad), atol=1e-12, rtol=0)
        torch.testing.assert_close(param_hess_grad, -grad_sqnorm, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("make", [smooth_batch_norm_network, vgg])
@pytest.mark.parametrize("index", [1, 2])
def test_neither_holds_in_eval_mode(make: Make, index: int) -> None:
    for triple in per_filter(make, "eval", 1e-14):
        expected = (0, torch.zeros_like(triple[0]), -triple[2])[index]
        assert not torch.allclose(triple[index - 1], expected, rtol=0.1, atol=1e-4)


def test_the_identity_survives_the_default_epsilon_of_a_vgg() -> None:
    model, data = vgg()
    expansion = Probe(model, cross_entropy_objective, [data], mode="train").expand()
    # VGG normalises after the ReLU, which is homogeneous: the filter's length drops out all the same.
    for name, grad in zip(expansion.theta, expansion.grad, strict=True):
        if grad.ndim == 4:
            theta = expansion.theta[name].detach()
            alignment = (theta * grad).flatten(1).sum(1) / (theta.flatten(1).norm(dim=1) * grad.flatten(1).norm(dim=1))
            assert float(alignment.abs().max()) < 1e-2


def half_normalised() -> nn.Sequential:
    """Two convolutions of which only the first is normalised."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14), nn.Tanh(),
        nn.Conv2d(4, 3, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 28 * 28, 4),
    )  # fmt: skip


def studied(path: Path, model: nn.Module, data: list) -> xr.DataTree:
    with Recorder(path, model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=data) as event:
            event.add("invariance", scale_invariance(model, data))
    return open_run(path)


def test_the_study_finds_the_filters_that_are_normalised_and_the_mode(tmp_path: Path) -> None:
    data = [batch(1), batch(2)]
    found = analysed(studied(tmp_path / "run", half_normalised(), data), tolerance=1e-6).isel(event=0)
    assert found.invariant.sel(mode="train").values.tolist() == [1] * 4 + [0] * 3
    assert found.invariant.sel(mode="eval").values.tolist() == [0] * 7
    assert found.layer.values.tolist() == ["0"] * 4 + ["3"] * 3


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1", "resnet"])
def test_in_training_mode_grasp_ranks_by_the_gradient_in_the_papers_networks(tmp_path: Path, name: str) -> None:
    model, _ = trained(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    run = studied(tmp_path / "run", model, [batch(1)])
    filters = run["invariance"].to_dataset().isel(event=0).load()
    grasp = scores(model, [batch(1)], "gradient_norm_increase", mode="train")
    ours, theirs = filters.param_hess_grad.sel(mode="train"), torch.cat(list(grasp.values()))
    # their gradients are of other operations: of filters nearly dead, rounding is seen at so small an ε
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-13 * float(theirs.abs().max()))
    seen = filters.grad_sqnorm.sel(mode="train") > 1e-12 * float(filters.grad_sqnorm.max())  # not dead behind a ReLU
    gap = (filters.param_hess_grad + filters.grad_sqnorm).sel(mode="train")[seen]
    assert float(np.abs(gap / filters.grad_sqnorm.sel(mode="train")[seen]).max()) < 1e-3
    rank = grasp_and_gradient(run).rank_correlation.isel(event=0)
    assert float(rank.sel(mode="train")) > 0.999
    assert float(rank.sel(mode="eval")) < 0.9


def test_no_filter_is_drawn_on_the_edge_of_its_panel(tmp_path: Path) -> None:
    """Of -1, 0 and 10⁶ as multiples of ‖g‖², the largest is as far from the edge as the margin is wide."""
    shape, square = ("event", "mode", "unit"), np.ones((1, 2, 3))
    study = xr.Dataset(
        {
            "param_sqnorm": (shape, square), "grad_sqnorm": (shape, square), "param_grad": (shape, square),
            "param_hess_grad": (shape, np.broadcast_to([1.0, 0.0, -1e6], (1, 2, 3))),
        },
        coords={"mode": ["train", "eval"], "layer": ("unit", ["a"] * 3)},
    )  # fmt: skip
    right = draw("scale_invariance", {"run": xr.DataTree.from_dict({"/invariance": study})}).axes[1]
    high, top = (right.transData.transform((1.0, value))[1] for value in (1e6, right.get_ylim()[1]))
    assert top - high > 0.03 * right.bbox.height


def test_what_is_pruned_is_not_counted(tmp_path: Path) -> None:
    model, data = half_normalised(), [batch(1)]
    apply_masks(model, {"0.weight": (torch.arange(4) > 0).view(4, 1, 1, 1).expand(4, 1, 3, 3)})
    found = analysed(studied(tmp_path / "run", model, data)).isel(event=0, unit=0)
    assert all(bool(values.isnull().all()) for values in found.values())


def test_a_dead_network_has_no_rank_among_its_filters(tmp_path: Path) -> None:
    model = half_normalised()
    with torch.no_grad():
        model[-1].weight.zero_()
    run = studied(tmp_path / "run", model, [batch(1)])
    assert not run["invariance"].grad_sqnorm.any()
    assert grasp_and_gradient(run).rank_correlation.isnull().all()
    figure = draw("scale_invariance", {"dead": run})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["no finite value"] * 2
    assert (
        FIGURES["scale_invariance"].finding({"dead": run}).startswith("Both identities hold to 1% for – of the filters")
    )


def test_a_record_without_the_study_says_how_to_get_it(tmp_path: Path) -> None:
    model = half_normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        optimizer.step()
    with pytest.raises(
        MissingQuantityError, match=r'nothing was recorded in /invariance. Call event.add\("invariance"'
    ):
        analysed(open_run(tmp_path / "run"))
