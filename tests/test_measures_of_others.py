"""SNIP, GraSP and synaptic flow are what their authors' algorithms give, written out here; several cost one product."""

import copy
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, images
from prunable import NETWORKS, batch, trained
from torch import Tensor, nn

from dynamics.curvature.expansion import Expansion
from dynamics.pruning import MEASURES, Pruner, exponential_share_left, scores, scores_by_measure


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """What SNIP, GraSP and synaptic flow score: the weights of convolutions and linear layers."""
    return {name: one.weight for name, one in model.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12 * float(values.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_snip_is_the_sensitivity_to_gates_on_the_weights(name: str) -> None:
    """Lee et al. 2019, eq. 4 and 5: s_j = |∂L(c ⊙ w)/∂c_j| / Σ_k |∂L(c ⊙ w)/∂c_k| at c = 1."""
    model, _ = trained(name)
    inputs, labels = batch(3)
    gates = {layer: torch.ones_like(weight, requires_grad=True) for layer, weight in weights_of(model).items()}
    gated = {f"{layer}.weight": gates[layer] * weight for layer, weight in weights_of(model).items()}
    loss = F.cross_entropy(torch.func.functional_call(model.eval(), gated, (inputs,)), labels)
    parts = [part.abs() for part in torch.autograd.grad(loss, list(gates.values()))]
    total = sum(part.sum() for part in parts)
    expected = {layer: part / total for layer, part in zip(gates, parts, strict=True)}
    close(scores(model, [batch(3)], "snip", granularity="weight"), expected)


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_snip_of_a_dead_network_is_zero(granularity: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    batches = [(torch.randn(5, 4), torch.arange(5) % 3)]
    pruning = Pruner(model, None, "snip", granularity=granularity).prune(0.5, batches)
    assert all((values == 0).all() for values in pruning.scores.values())
    assert pruning.sparsity == 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_grasp_is_its_authors_algorithm_where_only_weights_train(name: str) -> None:
    """Wang et al. 2020, algorithm 2: −θ ⊙ Hg at T = 200 by backward through gᵀg; the share of highest scores goes."""
    model, optimizer = trained(name)
    weights = weights_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights.values()))
    inputs, labels = batch(3)
    loss = F.cross_entropy(model.eval()(inputs) / 200, labels)
    grad = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    inner = sum((part.detach() * part).sum() for part in grad)
    products = torch.autograd.grad(inner, list(weights.values()))
    expected = {layer: -weights[layer].detach() * part for layer, part in zip(weights, products, strict=True)}
    close(scores(model, [batch(3)], "grasp", granularity="weight", temperature=200.0), expected)
    pruned = Pruner(model, optimizer, "grasp", granularity="weight").prune(0.4, [batch(3)])
    entries = torch.cat([values.flatten() for values in expected.values()])
    alive = torch.cat([kept.flatten() for kept in pruned.alive.values()])
    assert entries[~alive].min() >= entries[alive].max()


@pytest.mark.parametrize("name", NETWORKS)
def test_synaptic_flow_is_its_authors_algorithm(name: str) -> None:
    """Tanaka et al. 2020: take absolute values of all in the state dict, pass ones through, and score |θ ∂R/∂θ|."""
    model, _ = trained(name)
    positive = copy.deepcopy(model).eval()
    with torch.no_grad():
        for tensor in positive.state_dict().values():
            tensor.abs_()
    positive.zero_grad()
    positive(torch.ones(1, 1, 32, 32)).sum().backward()
    expected = {layer: (weight.grad * weight).detach().abs() for layer, weight in weights_of(positive).items()}
    for batches in ([batch(3)], [(torch.full((5, 1, 32, 32), torch.nan), torch.zeros(5))]):  # no value is looked at
        for mode in ("eval", "train"):
            close(scores(model, batches, "synflow", granularity="weight", mode=mode), expected)


def test_synaptic_flow_of_two_layers_is_a_product_of_sums_and_conserved() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    first, second = (model[index].weight.detach().abs() for index in (0, 2))
    found = scores(model, [(torch.zeros(1, 3), torch.zeros(1))], "synflow", granularity="weight")
    close(found, {"0": first * second.sum(0)[:, None], "2": second * first.sum(1)})
    flow = (second @ first).sum()
    torch.testing.assert_close(torch.stack([values.sum() for values in found.values()]), flow.expand(2))


def test_iterative_synaptic_flow_empties_no_layer_where_one_shot_would() -> None:
    """Tanaka et al. 2020, theorem 3, at the compression where one round of magnitude has long cut the network."""
    widths = [8, 64, 64, 4]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    one_shot = copy.deepcopy(model)
    with torch.no_grad():
        for network in (model, one_shot):
            network[1].weight.mul_(0.01)
    shape = [(torch.zeros(1, 8), torch.zeros(1))]
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "synflow", granularity="weight")
    for number in range(1, 51):
        pruner.prune(1 - exponential_share_left(0.98, 50, number), shape)
    assert model(torch.ones(1, 8)).abs().sum() > 0
    Pruner(one_shot, torch.optim.SGD(one_shot.parameters(), 0.1), "magnitude", granularity="weight").prune(0.98)
    assert model[1].weight.count_nonzero() > 1 == one_shot[1].weight.count_nonzero()


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_random_scores_of_a_seed_touch_no_generator(granularity: str) -> None:
    model = convolutional_network()
    state = torch.get_rng_state()
    one, same, other = (scores(model, None, "random", granularity=granularity, seed=seed)["0"] for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (model[0].weight.shape if granularity == "weight" else (4,))


def test_one_hessian_product_serves_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, products = convolutional_network(), []
    product = Expansion.hessian_product
    monkeypatch.setattr(Expansion, "hessian_product", lambda self, v: products.append(1) or product(self, v))
    batches = images(3)
    initial = convolutional_network().state_dict()
    found = scores_by_measure(model, batches, list(MEASURES), temperature=2.0, initial=initial, seed=0)
    assert len(products) == len(batches)
    for measure, by_layer in found.items():
        close(by_layer, scores(model, batches, measure, temperature=2.0, initial=initial, seed=0))


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "fisher", "synflow"])
def test_batches_may_come_from_a_generator(measure: str) -> None:
    model, batches = convolutional_network(), images(4)
    close(scores(model, iter(batches), measure), scores(model, batches, measure))


class Counted:
    """A loader that knows how many of its batches are in somebody's hands at once."""

    def __init__(self, batches: int) -> None:
        self._batches, self.most = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen: list[weakref.ref[Tensor]] = []
        for number in range(self._batches):
            (one,) = images(1, seed=number)
            seen.append(weakref.ref(one[0]))
            self.most = max(self.most, sum(tensor() is not None for tensor in seen))
            yield one
            del one


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "fisher"])
def test_batches_are_let_go(measure: str) -> None:
    model, loader = convolutional_network(), Counted(8)
    found = scores(model, loader, measure)
    assert loader.most <= 2  # the one in use, and the next
    close(found, scores(model, [images(1, seed=number)[0] for number in range(8)], measure))


def test_a_loader_that_yields_others_at_the_second_pass_is_refused() -> None:
    class Augmenting:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(torch.randn(8, 1, 6, 6), torch.arange(8) % 3)])

    with pytest.raises(
        ValueError, match="second-order measures iterate over the batches twice, and the second time these were others"
    ):
        scores(convolutional_network(), Augmenting(), "gradient_norm_increase")


def test_no_batch_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="scores need at least one batch"):
        scores(convolutional_network(), iter([]), "taylor")
    for measure in ("synflow", "snip", "grasp"):
        with pytest.raises(ValueError, match=f"{measure} needs data"):
            scores(convolutional_network(), None, measure)


def test_a_model_on_two_devices_is_refused() -> None:
    model = convolutional_network()
    model[5].to("meta")
    with pytest.raises(ValueError, match=r"on 2 devices \('0\.weight' on cpu, '5\.weight' on meta\).*move it with"):
        scores(model, images(1), "magnitude")
