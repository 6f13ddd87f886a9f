"""Any loop, any model: what is recorded is what a computation by hand beside the loop says."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from by_hand import ByHand
from networks import convolutional_network, cross_entropy, dense, flat, images, plain_step, smooth_network, vectors
from torch import Tensor, nn
from torch.nn.utils import prune

from dynamics import Recorder, open_run
from dynamics.network.masks import apply_masks

Loss = Callable[[nn.Module, object], Tensor]


def trained(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list,
    loss_of: Loss,
    between: Callable[[], None] = lambda: None,
    **settings: object,
) -> tuple[ByHand, list[float]]:
    """Train on the batches, recorded and by hand; ``between`` happens between backward pass and step."""
    by_hand, losses = ByHand(model), []
    with Recorder(path, model, optimizer, objective=loss_of, **settings) as recorder:
        for batch in recorder.watch(batches):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            between()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            losses.append(loss.item())
    return by_hand, losses


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": partial(torch.optim.SGD, lr=0.1, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    model = convolutional_network()
    by_hand, losses = trained(tmp_path / "run", model, OPTIMIZERS[name](model.parameters()), images(4), cross_entropy)
    by_hand.agrees_with(open_run(tmp_path / "run")["steps"])
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses[:1], rtol=1e-12)


class LanguageModel(nn.Module):
    """A small causal transformer that takes a dictionary; its output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs[:, 0])[0][:, -1])


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(ids=batch["ids"][:, :-1]).flatten(0, 1), batch["ids"][:, 1:].flatten())


def several_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum(parameter.abs().sqrt().sum() for parameter in model.parameters())
    return cross_entropy(model, batch) + 1e-3 * penalty


def pictures(size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, size, size), torch.randint(3, (4,))) for _ in range(3)]


def group_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, dropout=0.1, num_classes=3
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list], Loss]] = {
    "batchnorm and dropout": (partial(convolutional_network, dropout=0.3), partial(images, 3), cross_entropy),
    "groupnorm": (group_normed, partial(images, 3), cross_entropy),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=3), partial(pictures, 32), cross_entropy),
    "vit": (vision_transformer, partial(pictures, 16), cross_entropy),
    "language model": (LanguageModel, lambda: [{"ids": torch.randint(11, (4, 7))} for _ in range(3)], next_token),
    "recurrent": (Recurrent, partial(images, 3), cross_entropy),
    "several terms": (smooth_network, partial(vectors, 3), several_terms),
}
NAMES = [pytest.param(name, marks=pytest.mark.long) if name == "resnet18" else name for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_every_model(tmp_path: Path, name: str) -> None:
    make, batches, loss_of = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    by_hand, losses = trained(tmp_path / "run", model, optimizer, batches(), loss_of, curvature_every=1)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-10)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8, atol=1e-14)
    assert np.isfinite(run["curvature"].grad_hess_grad).all()
    assert not run["curvature"].approximate.any()


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_as_if_nobody_looked(tmp_path: Path, name: str) -> None:
    make, batches, loss_of = MODELS[name]
    states = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(5)
        model, given = make(), batches()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        recorder = Recorder(path, model, optimizer, objective=loss_of, curvature_every=1) if path else None
        for batch in recorder.watch(given) if recorder else given:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if recorder:
            recorder.close()
            assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        states.append([*tensors, *moments, torch.get_rng_state()])
    assert len(states[0]) == len(states[1])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_clipping_weight_decay_groups_and_a_schedule(tmp_path: Path) -> None:
    model = smooth_network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": [model[2].weight], "lr": 0.01, "weight_decay": 0.5},
        {"params": [model[2].bias], "lr": 0.02, "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def between() -> None:
        if optimizer.state[model[2].bias]:
            schedule.step()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    by_hand, _ = trained(tmp_path / "run", model, optimizer, vectors(3), cross_entropy, between)
    steps = open_run(tmp_path / "run")["steps"]
    by_hand.agrees_with(steps)
    assert (np.sqrt(steps.grad_sqnorm.sum("layer")) < 0.1 + 1e-6).all()
    np.testing.assert_allclose(steps.learning_rate.sel(layer="0"), [0.1, 0.05, 0.025])
    assert steps.learning_rate.sel(layer="2").isnull().all()  # two rates in one layer
    decayed = [0.5 * row["2"]["param_sqnorm"] for row in by_hand.rows]
    assert (steps.decay_sqnorm.sel(layer="2") < decayed).all()
    assert (steps.decay_sqnorm.sel(layer="2") > 0.5 * np.array(decayed)).all()


@pytest.mark.parametrize("rates", [(0.1, 0.01), (0.1, 0.0)])
def test_the_norm_balance_holds_for_groups_with_rates_of_their_own(tmp_path: Path, rates: tuple[float, ...]) -> None:
    analysis = pytest.importorskip("analysis")
    model = smooth_network()
    optimizer = torch.optim.SGD(
        [{"params": model[index].parameters(), "lr": rate} for index, rate in zip((0, 2), rates, strict=True)],
        weight_decay=0.1,
    )
    trained(tmp_path / "run", model, optimizer, vectors(4), cross_entropy, curvature_every=1)
    run = open_run(tmp_path / "run")
    balance = analysis.norm_balance(run)
    np.testing.assert_allclose(balance.momentum, 0, atol=1e-13)  # plain gradient descent has none, in any layer
    moving = analysis.norm_rate(run).sel(layer=[layer for layer, rate in zip("02", rates, strict=True) if rate])
    change = run["steps"].param_sqnorm.diff("step", label="lower")
    expected = change / xr_rates(run, change)
    np.testing.assert_allclose(moving.measured[:-1], expected.sel(layer=moving.layer), rtol=1e-9)
    assert analysis.loss_decrease(run).first_order_flow.isnull().all()  # there is no common time


def xr_rates(run: object, like: object) -> object:
    return run["steps"].learning_rate.sel(step=like.step).where(lambda rate: rate > 0)


def test_two_optimizers_are_one_step(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.Adam(model[2].parameters(), 0.01)
    by_hand, losses = ByHand(model), []
    with Recorder(tmp_path / "run", model, [first, second], curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            model.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            by_hand.before()
            first.step()
            second.step()
            by_hand.after()
            losses += [loss.item(), cross_entropy(model, batch).item()]
            recorder.log(loss=loss)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses[::2], rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::2], rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_after, losses[1::2], rtol=1e-12)
    np.testing.assert_allclose(run["steps"].learning_rate, [[0.1, 0.01]] * 4)


def test_optimizers_that_take_turns_each_have_their_step(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    turns = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.Adam(model[2].parameters(), 0.01)]
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, turns, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            model.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer = turns[number % 2]
            by_hand.before(optimizer.param_groups[0]["params"])
            optimizer.step()
            by_hand.after()
            recorder.log(number=number)
    steps = open_run(tmp_path / "run")["steps"]
    by_hand.agrees_with(steps)
    assert steps.number.values.tolist() == [0, 1, 2, 3]
    assert (steps.update_sqnorm.values > 0).tolist() == [[True, False], [False, True]] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_that_skips(tmp_path: Path, fused: bool, set_to_none: bool) -> None:
    model, batches = smooth_network(), vectors(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    by_hand, losses, flow_time = ByHand(model), [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            loss = cross_entropy(model, batch)
            scaler.scale(loss).backward()
            if number in (0, 3):
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer) if not fused else None
            by_hand.before()
            scaler.step(optimizer)
            if number not in (0, 3):
                scale = scaler.get_scale() if fused else 1
                by_hand.grad = {name: grad / scale for name, grad in by_hand.grad.items()}
                by_hand.after()
                losses.append(loss.item())
                flow_time.append(0.1 * len(flow_time))
            scaler.update()
            optimizer.zero_grad(set_to_none=set_to_none)
    run = open_run(tmp_path / "run")
    taken = np.flatnonzero(run["steps"].skipped.values == 0)
    assert taken.tolist() == ([1, 2, 4] if fused else [0, 1, 2])  # without fusing, a skipped step is no step
    by_hand.agrees_with(run["steps"].isel(step=taken))
    np.testing.assert_allclose(run["steps"].flow_time[taken], flow_time, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before[taken], losses, rtol=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_that_is_skipped_is_not_part_of_the_next_step(tmp_path: Path, set_to_none: bool) -> None:
    model, batches = smooth_network(), vectors(12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses: list[float] = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        accumulated = 0.0
        for number, batch in enumerate(recorder.watch(batches)):
            loss = cross_entropy(model, batch) / 2
            if number == 4:
                continue  # before its backward pass
            loss.backward()
            accumulated += loss.item()
            if number in (0, 7):
                optimizer.zero_grad(set_to_none=set_to_none)  # after it
                accumulated = 0.0
            elif number not in (1, 3, 5, 8, 10):
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                losses.append(accumulated)
                accumulated = 0.0
    run = open_run(tmp_path / "run")
    pairs = [(1, 2), (3, 5, 6), (8, 9), (10, 11)]
    assert run["steps"].sizes["step"] == len(pairs)
    right = [index for index, pair in enumerate(pairs) if len(pair) == 2]
    np.testing.assert_allclose(run["curvature"].loss_before[right], np.array(losses)[right], rtol=1e-12)


def test_sparse_empty_complex_and_unused_parameters(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4, sparse=True)
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.unused = nn.Linear(2, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return (self.words(ids).mean(1) * self.phase).abs() + self.nothing.sum()

    model = Odd()
    batches = [(torch.randint(7, (5, 3)), torch.randint(4, (5,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_hand, losses = trained(tmp_path / "run", model, optimizer, batches, cross_entropy, curvature_every=1)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)


def test_a_parameter_that_no_optimizer_holds_has_no_applied_gradient(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(3)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for batch in recorder.watch(batches):
            optimizer.zero_grad()  # those of the first layer pile up
            cross_entropy(model, batch).backward()
            by_hand.before(list(model[2].parameters()))
            optimizer.step()
            by_hand.after()
    steps = open_run(tmp_path / "run")["steps"]
    by_hand.agrees_with(steps)
    assert (steps.grad_sqnorm.sel(layer="0") == 0).all()
    assert (steps.learning_rate.sel(layer="0") == 0).all()


def test_autocast(tmp_path: Path) -> None:
    model, batches = smooth_network().float(), [(inputs.float(), labels) for inputs, labels in vectors(3)]
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    by_hand, losses = trained(tmp_path / "run", model, optimizer, batches, loss_of, curvature_every=1)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"], rtol=1e-6)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-6)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-2)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model(tmp_path: Path, way: str) -> None:
    model = smooth_network()
    compiled = torch.compile(model, backend="aot_eager") if way == "wrapped" else model
    if way == "in place":
        model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_hand, losses = ByHand(model), []
    with Recorder(tmp_path / "run", compiled, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            loss = cross_entropy(compiled, batch)
            loss.backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    assert not run["curvature"].approximate.any()


def test_a_part_that_is_compiled_is_measured_without_a_word(tmp_path: Path) -> None:
    """Torch warns of hooks on all modules when a compiled one runs: in a probe they are the recorder's own."""
    model, losses = nn.Sequential(torch.compile(smooth_network(), backend="eager")), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            losses.append(plain_step(model, optimizer, batch).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("own_class", [False, True])  # torch runs the hooks of its own classes' instances compiled
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # at modules outside the model, once
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_that_the_loop_runs_compiled_is_compiled(
    tmp_path: Path, every: int, own_class: bool, fullgraph: bool
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = smooth_network()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layers(inputs)

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Network() if own_class else smooth_network()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        for batch in recorder.watch(vectors(4)):
            optimizer.zero_grad()
            loss = cross_entropy(compiled, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(graphs) == (2 if every > 1 and not own_class else 1)  # with and without the hook of measured steps
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses[::every], rtol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_a_loss_that_is_compiled_with_the_model(tmp_path: Path, every: int) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, losses = nn.Sequential(smooth_network(), nn.Dropout(0.5)), []
    compiled = torch.compile(lambda batch: cross_entropy(model, batch), backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for batch in recorder.watch(vectors(4)):
            optimizer.zero_grad()
            loss = compiled(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(graphs) == every
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses[::every], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_model_is_traced_while_it_is_recorded(tmp_path: Path) -> None:
    model = nn.Sequential(smooth_network(), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            cross_entropy(model, (inputs, labels)).backward()
            traced = torch.jit.trace(model.eval(), inputs)
            assert "aten::clone" not in str(traced.inlined_graph)
            model.train()
            optimizer.step()


def test_a_model_has_no_hook_between_steps_that_are_measured(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=5) as recorder:
        assert not model._forward_pre_hooks
        for inputs, labels in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            cross_entropy(model, (inputs, labels)).backward()
            optimizer.step()
            assert torch.equal(torch.jit.script(model)(inputs), model(inputs))


class OnceDifferentiable(torch.autograd.Function):
    """The square, with a backward pass that has no derivative, as some fused kernels."""

    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("once", [True, False])
def test_curvature_without_a_second_derivative_is_a_marked_difference(tmp_path: Path, once: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.inner(inputs)
            return self.outer(OnceDifferentiable.apply(hidden) if once else hidden.square())

    curvature = []
    for path, exact in ((tmp_path / "a", False), (tmp_path / "b", True)):
        torch.manual_seed(0)
        once = once and not exact
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        if once:
            with pytest.warns(UserWarning, match="central differences of gradients"):
                trained(path, model, optimizer, vectors(2), cross_entropy, curvature_every=1)
        else:
            trained(path, model, optimizer, vectors(2), cross_entropy, curvature_every=1)
        curvature.append(open_run(path)["curvature"].to_dataset().load())
        assert (curvature[-1].approximate == float(once)).all()
    for name in ("grad_hess_grad", "param_hess_grad", "update_hess_update"):
        np.testing.assert_allclose(curvature[0][name], curvature[1][name], rtol=1e-7)


def test_state_in_plain_attributes_is_left_alone(tmp_path: Path) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)
            self.hidden, self.seen = torch.zeros(5), []

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner(inputs) + self.hidden)
            self.hidden = hidden.mean(0).detach()
            self.seen.append(hidden.mean().item())
            return self.outer(hidden)

    models, losses = [], []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(0)
        model = Stateful()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if path is None:
            for batch in vectors(3):
                plain_step(model, optimizer, batch)
        else:
            losses = trained(path, model, optimizer, vectors(3), cross_entropy, curvature_every=1)[1]
        models.append(model)
    assert models[0].seen == models[1].seen
    assert torch.equal(flat(list(models[0].parameters())), flat(list(models[1].parameters())))
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_normalised_weight_has_the_steps_own_buffers(tmp_path: Path) -> None:
    model = smooth_network()
    nn.utils.parametrizations.spectral_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_hand, losses = trained(tmp_path / "run", model, optimizer, vectors(3), cross_entropy, curvature_every=1)
    run = open_run(tmp_path / "run")
    assert run["steps"].layer.values.tolist() == ["0", "2"]
    total = [sum(layer["grad_sqnorm"] for layer in row.values()) for row in by_hand.rows]
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), total, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-10)


def test_pruning_by_torch_itself(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, watched in enumerate(recorder.watch([batch] * 4)):
            if number == 2:
                whole = model[0].weight.detach().clone()
                with recorder.event("prune", probe=[batch]):
                    prune.l1_unstructured(model[0], "weight", amount=0.5)
            loss = plain_step(model, optimizer, watched)
    run = open_run(tmp_path / "run")
    assert run["steps"].layer.values.tolist() == ["0", "2"]
    removed = whole.abs().flatten().argsort()[:10]
    assert run["pruning"].removed.sel(layer="0").values.tolist() == [10]
    gone = whole.flatten()[removed].square().sum()
    before, after = run["pruning"].param_sqnorm.sel(layer="0").values[0]
    np.testing.assert_allclose(before - after, gone, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before[-1], loss.item(), rtol=1e-12)
    np.testing.assert_allclose(
        run["curvature"].grad_sqnorm.sel(step=3), run["steps"].grad_sqnorm.sel(step=3), rtol=1e-10
    )


@pytest.mark.parametrize("width", [5, 5000])
def test_a_shape_that_changes_inside_an_event_is_refused_by_name(tmp_path: Path, width: int) -> None:
    model, batches = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with pytest.raises(ValueError, match=rf"'0\.weight' changed its shape from \({width}, 4\) to \(3, 4\)"):
            with recorder.event("prune", probe=batches):
                model[0].weight = nn.Parameter(model[0].weight[:3].detach())
                model[0].bias = nn.Parameter(model[0].bias[:3].detach())
                model[2].weight = nn.Parameter(model[2].weight[:, :3].detach())
    assert "event" not in open_run(tmp_path / "run")["pruning"].sizes


def test_parameters_that_are_replaced_are_found_by_name(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        by_hand = None
        for number, batch in enumerate(recorder.watch(batches)):
            if number == 2:
                model[2] = nn.Linear(5, 3)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            by_hand = ByHand(model)
            by_hand.before()
            optimizer.step()
            by_hand.after()
    last = open_run(tmp_path / "run")["steps"].isel(step=[-1]).to_dataset().drop_vars("distance_sqnorm")
    for layer, values in by_hand.rows[0].items():
        for name in set(values) - {"distance_sqnorm"}:
            np.testing.assert_allclose(last[name].sel(layer=layer), values[name], rtol=1e-10, err_msg=name)


class WithItsOrigin(nn.Module):
    """A parameter has the name that torch.nn.utils.prune would give the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.scale_orig = nn.Parameter(torch.ones(4)), nn.Parameter(torch.rand(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale * self.scale_orig)


def test_a_parameter_that_is_called_like_the_origin_of_another_counts_beside_it(tmp_path: Path) -> None:
    model = WithItsOrigin()
    optimizer, by_hand = torch.optim.Adam(model.parameters(), 0.01), ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-10)


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_weight_that_is_made_ready_for_pruning_and_then_parametrized_stays_itself(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(3))):
            if number == 1:
                nn.utils.prune.identity(model[2], "weight")
                nn.utils.parametrize.register_parametrization(model[2], "weight_orig", Same())
            expected = sum(one.square().sum().item() for one in model[2].parameters())
            plain_step(model, optimizer, batch)
    found = open_run(tmp_path / "run")["steps"].param_sqnorm.sel(layer="2")
    np.testing.assert_allclose(found[-1], expected, rtol=1e-6)


def test_a_part_of_a_parametrized_weight_that_is_pruned_by_torch_stays_itself(tmp_path: Path) -> None:
    model = smooth_network()
    nn.utils.parametrizations.weight_norm(model[2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(3))):
            if number == 1:
                nn.utils.prune.l1_unstructured(model[2].parametrizations.weight, "original1", 3)
            magnitudes = [one for name, one in model.named_parameters() if name.startswith("2.")]
            expected = sum(one.square().sum().item() for one in magnitudes)
            if number:
                mask = model[2].parametrizations.weight.original1_mask
                pruned = model[2].parametrizations.weight.original1_orig[mask == 0]
                expected -= pruned.square().sum().item()
            plain_step(model, optimizer, batch)
    found = open_run(tmp_path / "run")["steps"].param_sqnorm.sel(layer="2")
    np.testing.assert_allclose(found[-1], expected, rtol=1e-12)


@pytest.mark.parametrize("watched", [True, False])
def test_an_optimizer_that_never_steps_is_said(tmp_path: Path, watched: bool) -> None:
    model, batches = smooth_network(), vectors(2)
    recorded, trains = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    with pytest.warns(UserWarning, match="batches or gradients were seen, but the optimizer took no step"):
        with Recorder(tmp_path / "run", model, recorded) as recorder:
            for batch in recorder.watch(batches) if watched else batches:
                plain_step(model, trains, batch)


@pytest.mark.parametrize("watched", [True, False])
def test_closing_says_so_too_as_in_a_notebook(tmp_path: Path, watched: bool) -> None:
    """A model and an optimizer that were made anew in another cell are not those of the recorder."""
    old, batches = smooth_network(), vectors(3)
    recorder = Recorder(tmp_path / "run", old, torch.optim.SGD(old.parameters(), 0.1))
    model = smooth_network() if watched else old
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in recorder.watch(batches) if watched else batches:
        plain_step(model, optimizer, batch)
    with pytest.warns(UserWarning, match="batches or gradients were seen, but the optimizer took no step") as said:
        recorder.close()
        recorder.close()
    assert len(said) == 1
    assert said[0].filename == __file__


def test_a_look_at_the_data_is_no_training(tmp_path: Path) -> None:
    model = smooth_network()
    recorder = Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        inputs, _ = next(iter(recorder.watch(vectors(3))))
    model(inputs)
    recorder.close()


def test_curvature_of_a_pruned_network_is_that_of_what_is_left(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    kept = torch.cat([(torch.arange(20) % 3 > 0), torch.ones(23, dtype=torch.bool)])
    expected = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        plain_step(model, optimizer, batches[0])
        apply_masks(model, {"0.weight": kept[:20].view(5, 4)}, optimizer)
        for batch in recorder.watch(batches[1:]):
            theta, grad, hessian = dense(model, batch)
            grad, hessian = grad * kept, hessian * kept * kept[:, None]
            plain_step(model, optimizer, batch)
            update = flat(list(model.parameters())) - theta
            products = (grad @ grad, grad @ hessian @ grad, theta @ hessian @ grad, update @ hessian @ update)
            expected.append([product.item() for product in products])
    total = open_run(tmp_path / "run")["curvature"].to_dataset().sum("layer")
    found = [total.grad_sqnorm, total.grad_hess_grad, total.param_hess_grad, total.update_hess_update]
    np.testing.assert_allclose(np.transpose(found), expected, rtol=1e-10)
