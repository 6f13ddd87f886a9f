"""The fewer filters go, the better their removal is predicted from the scale of their output, and only from that."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import images
from prunable import batch, parameters_with, trained
from torch import Tensor, nn

from analysis import removal_curve as analysed
from dynamics import Recorder, open_run
from dynamics.network.masks import apply_masks, parameter_masks
from dynamics.pruning import Pruner, scores
from dynamics.pruning.curve import removal_curve

FILTERS, FRACTIONS = 64, (1 / 32, 1 / 16, 1 / 8)


def alike() -> nn.Module:
    """64 filters that are all the same, a 64th of the output each: removing k of them scales the logits by 1 − k/64."""
    model = nn.Sequential(
        nn.Conv2d(1, FILTERS, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(FILTERS),
        nn.Flatten(), nn.Linear(FILTERS * 36, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:1].expand_as(model[0].weight))
        model[0].bias.fill_(0.3)
        model[2].weight.fill_(1.5)
        model[2].bias.fill_(0.2)
        head = 30 * model[4].weight[:, :36].repeat(1, FILTERS) / FILTERS
        model[4].weight.copy_(head)
    return model


def recorded(path: Path, model: nn.Module, batches: list, curve: xr.Dataset) -> xr.Dataset:
    with Recorder(path, model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("look", probe=batches) as event:
            event.add("curve", curve)
    return analysed(open_run(path)).isel(event=0)


@pytest.mark.parametrize(
    ("quantity", "direction", "order", "expected"),
    [
        ("loss", "output", "first_order", 2),
        ("loss", "output", "second_order", 3),
        ("grad_sqnorm", "output", "first_order", 1),  # the weights that read a silent channel lose their gradient whole
        ("grad_sqnorm", "output", "second_order", 2),
        ("param_sqnorm_rate", "output", "first_order", 2),
        ("param_sqnorm_rate", "output", "second_order", 3),
        ("loss", "parameters", "first_order", 1),  # never exact: however few go, each is counted twice
        ("loss", "parameters", "second_order", 1),
    ],
)
def test_order_of_the_error_in_the_fraction_removed(
    tmp_path: Path, quantity: str, direction: str, order: str, expected: int
) -> None:
    model, batches = alike(), images(1)
    curve = removal_curve(model, batches, {"0": torch.arange(FILTERS)}, FRACTIONS)
    found = recorded(tmp_path / "run", model, batches, curve).sel(quantity=quantity)
    errors = np.abs(found.measured - found[order].sel(direction=direction))
    slope = np.polyfit(np.log(FRACTIONS), np.log(errors.values), 1)[0]
    assert slope == pytest.approx(expected, abs=0.15)


def plain_loss(model: nn.Module, batches: list) -> Tensor:
    return torch.stack([F.cross_entropy(model(inputs), labels) for inputs, labels in batches]).mean()


@pytest.mark.parametrize("name", ["vgg13", pytest.param("mobilenet_v1", marks=pytest.mark.long), "resnet"])
def test_both_directions_lead_to_the_pruned_network(name: str) -> None:
    model, _ = trained(name)
    protected = ("stem",) if name == "resnet" else ()
    batches, mask_of = [batch(10), batch(11)], parameters_with(model)
    found = scores(model, batches, "magnitude", protected=protected)
    before = copy.deepcopy(model.state_dict())
    curve = removal_curve(model, batches, found, [0.1, 0.3], protected=protected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not parameter_masks(model)
    lowest = sorted(
        (value.item(), layer, index)
        for layer, values in found.items()
        for index, value in enumerate(values)
        if value != values.max()
    )
    gone = lowest[: round(0.3 * sum(map(len, found.values())))]
    model.eval()
    grad = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(plain_loss(model, batches), model.parameters()),
            strict=True,
        )
    )
    along = {"parameters": 0.0, "output": 0.0}
    pruned, silenced = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for _, layer, index in gone:
            for parameter in mask_of[layer]:
                theta = model.get_parameter(parameter)
                pruned.get_parameter(parameter)[index] = 0
                along["parameters"] -= (theta * grad[parameter])[index].sum()
            for parameter in mask_of[layer][-2:]:  # the last normalisation's
                silenced.get_parameter(parameter)[index] = 0
                along["output"] -= (model.get_parameter(parameter) * grad[parameter])[index].sum()
        losses = [plain_loss(one, batches) for one in (pruned, silenced)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    largest = curve.sel(fraction=0.3)
    np.testing.assert_allclose(largest.loss.sel(stage="after"), losses[0], rtol=1e-10)
    assert int(largest.removed.sum()) == sum(
        model.get_parameter(parameter)[index].numel() for _, layer, index in gone for parameter in mask_of[layer]
    )
    for direction, expected in along.items():
        np.testing.assert_allclose(largest.grad_removal.sel(direction=direction).sum("layer"), expected, rtol=1e-9)


def test_what_is_pruned_already_does_not_go_again() -> None:
    model, batches = alike(), images(1)
    apply_masks(model, dict.fromkeys(("0.bias", "2.weight", "2.bias"), torch.arange(FILTERS) >= 32))
    apply_masks(model, {"0.weight": (torch.arange(FILTERS) >= 32).view(-1, 1, 1, 1).expand(FILTERS, 1, 3, 3)})
    curve = removal_curve(model, batches, {"0": torch.arange(FILTERS)}, [0.25])
    assert curve.removed.sel(layer="2").values.tolist() == [2 * 8]  # a quarter of 32
    assert float(curve.loss.sel(stage="after")[0]) != float(curve.loss.sel(stage="before")[0])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_as_many_go_as_by_a_pruner(share: float) -> None:
    """Of five filters the half is between two numbers, and so are 0.3 and 0.7: 1.5 and 3.5."""
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh(), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 3))
    curve = removal_curve(model, images(1), scores(model, None, "magnitude"), [share])
    pruning = Pruner(model, None, "magnitude").plan(share)
    assert int(curve.removed.sel(layer="2").sum()) == 2 * int((~pruning.alive["0"]).sum())


def test_fractions_may_be_an_array() -> None:
    model, batches, ranking = alike(), images(1), {"0": torch.arange(FILTERS)}
    curve = removal_curve(model, batches, ranking, np.array(FRACTIONS))
    assert curve.identical(removal_curve(model, batches, ranking, FRACTIONS))


def test_impossible_curves_are_refused() -> None:
    model, batches, ranking = alike(), images(1), {"0": torch.arange(FILTERS)}
    for fractions in ([], [0.2, 0.1], [0.0, 0.5], [0.5, 1.0]):
        with pytest.raises(ValueError, match=r"fractions must increase within \(0, 1\), got \["):
            removal_curve(model, batches, ranking, fractions)
    with pytest.raises(ValueError, match="asks for 64 filters to be pruned, but only 63 can be"):
        removal_curve(model, batches, ranking, [0.999])
    for found, said in (
        ("magnitude", "a tensor by the name of each layer, got 'magnitude'"),
        ({"4": torch.arange(3)}, "there are none of layer '0', only of '4'"),
        ({"0": torch.arange(3)}, r"those of layer '0', which has 64 filters, have the shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            removal_curve(model, batches, found, [0.5])
