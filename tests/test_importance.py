"""Scores that the reference does not hold, the arguments of `scores`, and that scoring leaves no trace."""

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, images
from prunable import NETWORKS, batch, goes_with, train, trained
from scipy.stats import kstest
from torch import Tensor, nn

from analysis.names import name_of
from dynamics.models import ResNet, build
from dynamics.network.masks import apply_masks, filters_left, parameter_masks
from dynamics.pruning import MEASURES, Pruner, resampled_scores, scores
from dynamics.pruning.candidates.units import unit_layers


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_equals_a_loop_over_samples(name: str) -> None:
    model, _ = trained(name)
    batches = [tuple(tensor[:3] for tensor in batch(50)), batch(51)]  # uneven: the mean is over samples
    found = scores(model, batches, "fisher", temperature=2.0)
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in goes_with(model)}
    expected = {layer: torch.zeros(len(weight)) for layer, weight in weights.items()}
    model.eval()
    for inputs, labels in batches:
        for sample, target in zip(inputs.split(1), labels.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(sample) / 2, target), list(weights.values()))
            for (layer, weight), grad in zip(weights.items(), grads, strict=True):
                expected[layer] += (weight.detach() * grad).flatten(1).sum(1).square() / 11 / 2
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer], values, rtol=1e-9, atol=1e-12 * float(values.max()))


def test_fisher_leaves_the_bias_alone() -> None:
    model, (one,) = convolutional_network().eval(), images(1, size=1)
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(one[0]), one[1]), [model[0].weight])
    expected = (model[0].weight.detach() * grad).flatten(1).sum(1).square() / 2
    torch.testing.assert_close(scores(model, [one], "fisher")["0"], expected)


def feeding(model: nn.Module) -> dict[str, str]:
    """Which ranked layer alone feeds each ranked layer, by the networks' own naming."""
    ranked = list(goes_with(model))
    if isinstance(model, ResNet):  # what reads a stream reads a sum of several
        return {name: name.replace("conv2", "conv1") for name in ranked if name.endswith("conv2")}
    return dict(itertools.pairwise(ranked[::-1]))


@pytest.mark.parametrize("name", NETWORKS)
def test_magnitude_is_of_what_is_left_where_filters_that_were_read_are_gone(name: str) -> None:
    """As the paper's code has it, which cuts pruned filters out, with all that would have read them, but for sums."""
    model, optimizer = trained(name)
    Pruner(model, optimizer, "random", seed=0).prune(0.4)
    train(model, optimizer, 1)
    fed_by, sliced = feeding(model), 0
    for measure, norm in (("magnitude", 2), ("magnitude_l1", 1)):
        found = scores(model, None, measure)
        for layer, values in found.items():
            weight = model.get_parameter(f"{layer}.weight").detach()
            if layer in fed_by:
                left = filters_left(model, fed_by[layer])
                sliced += int((~left).sum())
                weight = weight[:, left]
            torch.testing.assert_close(values, weight.flatten(1).norm(norm, dim=1))
    assert sliced
    assert all(
        (model.get_parameter(f"{layer}.weight")[:, ~filters_left(model, other)] != 0).any()
        for layer, other in fed_by.items()
        if not filters_left(model, other).all()
    )  # they are there


@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Flatten(2)], ids=["channels", "pixels"])
def test_neurons_that_read_a_flattened_channel_lose_all_of_its_pixels(flatten: nn.Module) -> None:
    """They lie channel after channel; where a linear layer reads along the pixels, no weight is one channel's alone."""
    side = 4 if flatten.start_dim == 1 else 1
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), flatten, nn.Dropout(), nn.Linear(4 * 4 * side, 6), nn.ReLU(),
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    kept = {"0": torch.tensor([1, 0, 1, 1]).bool(), "4": torch.tensor([1, 1, 0, 1, 0, 1]).bool()}
    apply_masks(model, {f"{layer}.weight": rows.view(-1, *[1] * (model[int(layer)].weight.ndim - 1)).expand_as(
        model[int(layer)].weight) for layer, rows in kept.items()})  # fmt: skip
    found = scores(model, None, "magnitude_l1")
    hidden, last = (model[place].weight.detach().abs() for place in (4, 6))
    expected = hidden.view(6, 4, -1)[:, [0, 2, 3]] if side == 4 else hidden
    torch.testing.assert_close(found["4"], expected.flatten(1).sum(1))
    torch.testing.assert_close(found["6"], last[:, [0, 1, 3, 5]].sum(1))


class Averaged(nn.Sequential):
    """Channels, their mean over all pixels in one of several ways, a normalisation and neurons that read them."""

    def __init__(self, mean: Callable[[Tensor], Tensor]) -> None:
        channels, neurons = nn.Conv2d(1, 4, 3), nn.Linear(4, 6)
        super().__init__(channels, nn.BatchNorm1d(4), neurons, nn.ReLU(), nn.Linear(6, 2))
        self.mean = mean

    def forward(self, inputs: Tensor) -> Tensor:
        averaged = self[1](self.mean(self[0](inputs).relu()))
        return self[4](self[3](self[2](averaged)))


MEANS = {
    "module": lambda channels: F.adaptive_avg_pool2d(channels, 1).flatten(1),
    "method": lambda channels: channels.mean((2, 3)),
    "function": lambda channels: torch.mean(channels, dim=[-1, -2]),
    "kept": lambda channels: channels.mean((2, 3), keepdim=True).flatten(1),
}


@pytest.mark.parametrize("mean", MEANS)
def test_channels_averaged_over_their_pixels_are_followed_however_that_is_written(mean: str) -> None:
    model = Averaged(MEANS[mean])
    kept = Pruner(model, None, "random", seed=0, protected=["2"]).prune(0.5).alive["0"]
    assert set(parameter_masks(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    found = scores(model, None, "magnitude_l1")["2"]
    torch.testing.assert_close(found, model[2].weight.detach().abs()[:, kept].sum(1))


@pytest.mark.parametrize("dims", [(1, 2), 3, (0, 2, 3)])
def test_what_is_averaged_over_other_dimensions_is_mixed(dims: int | tuple[int, ...]) -> None:
    model = Averaged(lambda channels: channels.mean(dims))
    assert unit_layers(model)[0].modules == ("0",)
    assert not unit_layers(model)[0].readers


FORMULAS = {
    "magnitude": lambda theta, grad, hess_grad: theta.square().sum(1).sqrt(),
    "magnitude_l1": lambda theta, grad, hess_grad: theta.abs().sum(1),
    "loss_preservation": lambda theta, grad, hess_grad: (theta * grad).abs().sum(1),
    "loss_preservation_times_magnitude": lambda theta, grad, hess_grad: (theta**2 * grad).abs().sum(1),
    "gradient_norm_increase": lambda theta, grad, hess_grad: (theta * hess_grad).sum(1),
    "gradient_norm_preservation": lambda theta, grad, hess_grad: (theta * hess_grad).sum(1).abs(),
    "grasp": lambda theta, grad, hess_grad: -(theta * hess_grad).sum(1),
    "taylor": lambda theta, grad, hess_grad: (theta * grad).sum(1).abs(),
}
# Of something else than a layer's θ, g and Hg, each in tests of its own; the first two are sums of what is positive.
ELSEWHERE = ("loss_preservation_times_distance", "synflow", "bn_scale", "fisher", "snip", "random")


def test_acronyms_and_names_are_printed_as_such() -> None:
    assert [name_of(name) for name in ("snip", "grasp", "taylor")] == ["SNIP", "GraSP", "Taylor"]


def test_every_measure_is_computed_in_another_way() -> None:
    assert {*FORMULAS, *ELSEWHERE} == {*MEASURES}, "write a measure's formula in FORMULAS, or a test of its own"


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_distance_from_initialisation_weighs_loss_preservation(granularity: str) -> None:
    """Σ|θ−θ₀||θg| by a loop over weights: trained by steps, so that θ₀ is what a user has of it, or a Pruner."""
    model, batches = convolutional_network(), [*images(1, seed=3, size=5), *images(1, seed=4, size=9)]
    optimizer, initial = torch.optim.SGD(model.parameters(), 0.3), copy.deepcopy(model.state_dict())
    pruner = Pruner(
        model, optimizer, "loss_preservation_times_distance", granularity=granularity, initial=model.state_dict()
    )  # fmt: skip
    train_on(model, optimizer, images(2, seed=5))
    pruning = pruner.plan(0.5, batches)
    model.eval()
    loss = sum(F.cross_entropy(model(inputs) / 5, labels, reduction="sum") for inputs, labels in batches) / 14
    (grad,) = torch.autograd.grad(loss, [model[0].weight])
    expected, start = torch.zeros(4, 9), initial["0.weight"].view(4, 9)
    for number, (theta, slope) in enumerate(zip(model[0].weight.view(4, 9), grad.view(4, 9), strict=True)):
        for index in range(9):
            expected[number, index] = abs(theta[index] - start[number, index]) * abs(theta[index] * slope[index])
    expected = expected.sum(1) if granularity == "filter" else expected.view(4, 1, 3, 3)
    torch.testing.assert_close(pruning.scores["0"], expected.detach(), rtol=1e-12, atol=0)
    found = scores(
        model, batches, "loss_preservation_times_distance", temperature=5.0, granularity=granularity, initial=initial
    )  # fmt: skip
    torch.testing.assert_close(found["0"], expected.detach(), rtol=1e-12, atol=0)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list) -> None:
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def test_where_training_began_has_to_be_said() -> None:
    model, batches, measure = convolutional_network(), images(1), "loss_preservation_times_distance"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    needs = r"needs θ₀ of '0.weight', of shape \(4, 1, 3, 3\), got {}: pass initial=, a copy"
    cases = (
        (None, "nothing"),
        ({"0.bias": torch.zeros(4)}, "nothing"),
        ({"0.weight": torch.zeros(3, 1, 3, 3)}, r"shape \(3, 1, 3, 3\)"),
        (model.state_dict(), "the model's own tensor"),
    )
    for initial, got in cases:
        with pytest.raises(ValueError, match=needs.format(got)):
            scores(model, batches, measure, initial=initial)
        if got != "the model's own tensor":  # a Pruner copies it
            with pytest.raises(ValueError, match=needs.format(got)):
                Pruner(model, optimizer, measure, initial=initial)
    with pytest.raises(ValueError, match=needs.format("nothing")):
        resampled_scores(model, images(2), [measure])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("measure", FORMULAS)
def test_measure_equals_its_formula_by_double_backward(measure: str, mode: str) -> None:
    model, batches = convolutional_network(), [*images(1, seed=3, size=5), *images(1, seed=4, size=9)]
    found = scores(model, batches, measure, temperature=3.0, mode=mode)["0"]
    model.train(mode == "train")
    loss = sum(F.cross_entropy(model(inputs) / 3, labels, reduction="sum") for inputs, labels in batches) / 14
    theta = list(model.parameters())
    grad = torch.autograd.grad(loss, theta, create_graph=True)
    norm = sum(part.square().sum() for part in grad) / 2  # its gradient is Hg
    (hess_grad,) = torch.autograd.grad(norm, theta[:1])
    expected = FORMULAS[measure](*(part.detach().flatten(1) for part in (theta[0], grad[0], hess_grad)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def regression(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["inputs"]), batch["wanted"])


def regressions() -> tuple[nn.Sequential, list[dict[str, Tensor]]]:
    """A network with BatchNorm and batches of different sizes, which no cross-entropy is of."""
    inputs = [inputs for inputs, _ in [*images(1, seed=3, size=5), *images(1, seed=4, size=9)]]
    return convolutional_network(), [{"inputs": one, "wanted": one.flatten(1)[:, :3].sin()} for one in inputs]


@pytest.mark.parametrize("measure", FORMULAS)
def test_importance_may_be_of_another_loss(measure: str) -> None:
    model, batches = regressions()
    found = scores(model, batches, measure, objective=regression)["0"]
    model.eval()
    theta = list(model.parameters())
    wanted = [one["wanted"] for one in batches]
    loss = (model(torch.cat([one["inputs"] for one in batches])) - torch.cat(wanted)).square().sum() / (14 * 3)
    grad = torch.autograd.grad(loss, theta, create_graph=True)
    (hess_grad,) = torch.autograd.grad(sum(part.square().sum() for part in grad) / 2, theta[:1])
    expected = FORMULAS[measure](*(part.detach().flatten(1) for part in (theta[0], grad[0], hess_grad)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    study = resampled_scores(model, batches, [measure], objective=regression, draws=2)
    torch.testing.assert_close(torch.from_numpy(study.score.values[0]), expected, rtol=1e-9, atol=1e-13)


def test_fisher_of_another_loss_is_the_mean_over_samples() -> None:
    model, batches = regressions()
    expected = torch.zeros(4, dtype=torch.float64)
    for one in batches:
        for sample, wanted in zip(one["inputs"].split(1), one["wanted"].split(1), strict=True):
            loss = (model.eval()(sample) - wanted).square().mean()
            (grad,) = torch.autograd.grad(loss, [model[0].weight])
            expected += (grad * model[0].weight.detach()).flatten(1).sum(1).square() / 14 / 2
    torch.testing.assert_close(scores(model.train(), batches, "fisher", objective=regression)["0"], expected)


@pytest.mark.parametrize("measure", ["gradient_norm_increase", "snip", "synflow"])
def test_a_pruner_of_another_loss_has_no_temperature(measure: str) -> None:
    """Of measures whose paper has one, too."""
    model, batches = regressions()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, optimizer, measure, objective=regression)
    found = scores(model, batches, measure, objective=regression)["0"]
    pruning = pruner.prune(0.5, batches)
    torch.testing.assert_close(pruning.scores["0"], found)
    assert pruning.attributes["score_temperature"] == 1
    assert pruning.alive["0"].tolist() == (found.argsort().argsort() >= 2).tolist()


def test_the_temperature_is_of_the_cross_entropy_alone() -> None:
    model, batches = regressions()
    with pytest.raises(ValueError, match=r"a temperature, 5\.0, divides the logits of the cross-entropy"):
        scores(model, batches, "taylor", objective=regression, temperature=5.0)
    with pytest.raises(ValueError, match="leave it out"):
        Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "taylor", objective=regression, temperature=5.0)
    with pytest.raises(
        ValueError, match=r"batches \(inputs, labels\), got a dict of 2: for another loss pass objective="
    ):
        scores(model, batches, "taylor")


@pytest.mark.parametrize("granularity", ["filter", "weight"])
@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "snip"])
def test_what_is_frozen_has_no_gradient_to_be_ranked_by(measure: str, granularity: str) -> None:
    model, batches = convolutional_network(), images(2)
    model[0].weight.requires_grad_(False)
    refused = (
        rf"^{measure} is computed from gradients, but '0.weight' is frozen .* it would be pruned first. "
        r"Name .* in protected="
    )
    with pytest.raises(ValueError, match=refused):
        Pruner(model, None, measure, granularity=granularity).plan(0.3, batches)
    with pytest.raises(ValueError, match=refused):
        resampled_scores(model, batches, [measure])
    for of_frozen in ("magnitude", "fisher", "synflow"):
        assert (scores(model, batches, of_frozen)["0"] > 0).all()


@pytest.mark.parametrize("measure", ["taylor", "fisher", "gradient_norm_increase"])
def test_what_the_loss_does_not_look_at_has_no_importance(measure: str) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.other = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1)
            self.label, self.place = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.image(inputs).relu()
            return self.label(hidden.mean((2, 3))), self.place(self.other(hidden).mean((2, 3)))

    def of_labels(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[0], batch[1])

    found = scores(TwoHeads(), images(2), measure, objective=of_labels)
    assert (found["other"] == 0).all()
    assert (found["image"] != 0).any()


class Frames(nn.Module):
    """Images of a film, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, films: Tensor) -> Tensor:
        images = self.image(films.flatten(0, 1)).relu().mean((2, 3))
        return self.head(images.view(films.shape[0], -1, 4).mean(1))


def test_fisher_says_that_it_needs_the_samples_one_by_one() -> None:
    films = [(torch.randn(3, 5, 1, 6, 6), torch.arange(3) % 2)]
    with pytest.raises(ValueError, match=r"^fisher .* layer 'image' gives 15 outputs for a batch of 3: choose another"):
        scores(Frames(), films, "fisher")
    assert scores(Frames(), films, "taylor").keys() == {"image"}


def test_random_scores_follow_the_seed() -> None:
    model = convolutional_network()
    first, second = (scores(model, None, "random")["0"] for _ in range(2))
    assert first.shape == (4,)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    one = scores(model, None, "random")["0"]
    torch.manual_seed(5)
    assert torch.equal(scores(model, None, "random")["0"], one)


def test_random_scores_are_uniform_whatever_the_kernel_s_size() -> None:
    found = scores(build("mobilenet_v1", num_classes=10), None, "random")
    assert all(kstest(values.numpy(), "uniform").pvalue > 1e-3 for values in found.values())


@pytest.mark.parametrize("measure", [*FORMULAS, *ELSEWHERE[:2]])
def test_a_single_weight_is_a_filter_of_one(measure: str) -> None:
    """Of one that its measure takes an absolute value of, too: by hand, and as filters of one weight are scored."""
    model, batches = convolutional_network(), images(2)
    start = convolutional_network().state_dict()
    initial = {name: one + 0.1 for name, one in start.items()}
    weights = scores(model, batches, measure, granularity="weight", initial=initial, temperature=2.0)["0"]
    filters = scores(model, batches, measure, initial=initial, temperature=2.0)["0"]
    model.eval()
    loss = sum(F.cross_entropy(model(inputs) / 2, labels) for inputs, labels in batches) / 2
    theta = list(model.parameters())
    grad = torch.autograd.grad(loss, theta, create_graph=True)
    (hess_grad,) = torch.autograd.grad(sum(part.square().sum() for part in grad) / 2, theta[:1])
    first = [theta[0].detach(), grad[0].detach(), hess_grad]
    if measure in FORMULAS:
        each = FORMULAS[measure](*(part.reshape(-1, 1) for part in first)).view(theta[0].shape)
        torch.testing.assert_close(weights, each, rtol=1e-9, atol=1e-13)
        whole = FORMULAS[measure](*(part.flatten(1) for part in first))
        torch.testing.assert_close(filters, whole, rtol=1e-9, atol=1e-13)
    else:  # sums of what is positive
        torch.testing.assert_close(weights.flatten(1).sum(1), filters)
        assert (weights >= 0).all()


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "fisher"])
def test_data_may_come_in_any_pieces(measure: str) -> None:
    model, ((inputs, labels),) = convolutional_network(), images(1, size=12)
    pieces = list(zip(inputs.split(5), labels.split(5), strict=True))
    whole = scores(model, [(inputs, labels)], measure)
    torch.testing.assert_close(scores(model, pieces, measure), whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("measure", ["magnitude", "magnitude_l1", "random"])
def test_weights_of_few_digits_are_ranked_with_all_of_their_own(measure: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 200, 3), nn.Flatten(), nn.Linear(200, 2)).bfloat16()
    found = scores(model, None, measure, seed=0)["0"]
    assert len(found.unique()) == 200
    assert measure == "random" or torch.equal(found, scores(model.float(), None, measure)["0"])


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "fisher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_batches_of_few_digits_add_up(measure: str, dtype: torch.dtype) -> None:
    model, ((inputs, labels),) = convolutional_network().to(dtype), images(1)
    one, many = (scores(model, [(inputs.to(dtype), labels)] * count, measure)["0"] for count in (1, 300))
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "random"])
def test_scoring_leaves_no_trace(measure: str, mode: str) -> None:
    model, batches, initial = convolutional_network(dropout=0.4), images(2), convolutional_network().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    scores(model, batches, measure, mode=mode, initial=initial)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_mode_matters() -> None:
    model, batches = convolutional_network(), images(2)
    train, evaluated = (scores(model, batches, "gradient_norm_increase", mode=mode)["0"] for mode in ("train", "eval"))
    assert not torch.allclose(train, evaluated, rtol=0.1)


def test_bad_arguments_are_said() -> None:
    model, batches = convolutional_network(), images(1)
    with pytest.raises(ValueError, match="unknown measure 'magic': choose one of magnitude, loss_preservation"):
        scores(model, batches, "magic")
    with pytest.raises(ValueError, match="loss_preservation needs data"):
        scores(model, None, "loss_preservation")
    with pytest.raises(ValueError, match=r"fisher needs data: pass batches of \(inputs, labels\), got none"):
        scores(model, [], "fisher")
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
            scores(model, batches, "taylor", temperature=temperature)
    with pytest.raises(ValueError, match="got 'channel', 'eval'"):
        scores(model, batches, "taylor", granularity="channel")
    with pytest.raises(ValueError, match="got 'filter', 'test'"):
        scores(model, batches, "taylor", mode="test")
    with pytest.raises(ValueError, match="no score for single weights"):
        scores(model, batches, "fisher", granularity="weight")
    with pytest.raises(ValueError, match=r"bn_scale needs a normalisation.*but '3' has none after it"):
        scores(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3)), None, "bn_scale")
    for lazy in (nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d()):
        for granularity in ("filter", "weight"):
            with pytest.raises(ValueError, match=r"'0\.\w+' has no shape yet: run a batch"):
                scores(nn.Sequential(lazy, nn.Conv2d(2, 2, 3)), None, "magnitude", granularity=granularity)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device and has no values yet: initialise"):
        Pruner(empty, None, "magnitude")
    with pytest.raises(ValueError, match="layer '0' has 2 groups"):
        scores(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), None, "magnitude")

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 2, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.convolution(inputs) if inputs.sum() > 0 else inputs

    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx"):
        scores(Branching(), None, "magnitude")


class Stream(torch.utils.data.IterableDataset):
    """Batches whose number nobody knows."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from images(2)


def test_a_loader_that_does_not_know_its_length_is_read() -> None:
    model = convolutional_network()
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    expected = scores(model, images(2), "taylor")
    assert all(torch.equal(found, expected[name]) for name, found in scores(model, loader, "taylor").items())
