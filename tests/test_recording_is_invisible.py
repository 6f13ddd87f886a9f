"""Parameters, buffers, optimizer state, gradients, random numbers: bit-identical with and without the recorder."""

import copy
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batch, closure_step, convolutional_network, images, plain_step, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.probing.moment import Moment
from dynamics.pruning import scores

Loop = Callable[[nn.Module, torch.optim.Optimizer, Batch], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    for half in zip(*(part.chunk(2) for part in batch), strict=True):
        (F.cross_entropy(model(half[0]), half[1]) / 2).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


CASES: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], Loop]] = {
    "momentum": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, weight_decay=1e-3), plain),
    "nesterov": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, nesterov=True, foreach=True), plain),
    "adam": (lambda theta: torch.optim.Adam(theta, 0.01, weight_decay=1e-3), clipped),
    "adamw fused": (lambda theta: torch.optim.AdamW(theta, 0.01, fused=True), plain),
    "adamw foreach": (lambda theta: torch.optim.AdamW(theta, 0.01, foreach=True), plain),
    "accumulated": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9), accumulated),
    "closure": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9), closure_step),
    "lbfgs": (lambda theta: torch.optim.LBFGS(theta, 0.1, max_iter=4), closure_step),
}


def state_after(case: str, path: Path | None, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """All tensors of a training's state after it, and its random state; recorded where a path is given."""
    make, step = CASES[case]
    torch.manual_seed(3)
    model = convolutional_network(dropout=0.3).to(device)
    batches = [tuple(part.to(device) for part in batch) for batch in images(5)]
    optimizer = make(list(model.parameters()))
    recorder = Recorder(path, model, optimizer, curvature_every=1) if path else None
    with recorder or nullcontext():
        for number, batch in enumerate(recorder.watch(batches) if recorder else batches):
            step(model, optimizer, batch)
            if recorder:
                with recorder.event("look", probe=batches[:2], mode=("train", "eval")[number % 2]):
                    pass
    if recorder:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert model.training
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [*tensors, *(value for value in states if isinstance(value, Tensor))], torch.get_rng_state()


@pytest.mark.filterwarnings("ignore:the gradient applied")  # half a batch is normalised, and masked, by itself
@pytest.mark.parametrize("case", CASES)
def test_recording_is_invisible(tmp_path: Path, case: str) -> None:
    (without, random_without), (with_it, random_with) = state_after(case, None), state_after(case, tmp_path / "run")
    assert len(without) == len(with_it)
    for one, other in zip(without, with_it, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(random_without, random_with)
    assert open_run(tmp_path / "run")["curvature"].sizes["step"] == 5


def test_an_exception_in_the_loop_loses_nothing(tmp_path: Path) -> None:
    model, batches = convolutional_network(), images(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(KeyboardInterrupt, match="enough"), Recorder(tmp_path / "run", model, optimizer) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            plain(model, optimizer, batch)
            if number == 2:
                raise KeyboardInterrupt("enough")
    assert open_run(tmp_path / "run")["steps"].step.values.tolist() == [0, 1, 2]
    assert not optimizer._optimizer_step_pre_hooks


def test_random_numbers_of_python_and_numpy_are_untouched(tmp_path: Path) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) * (random.random() + np.random.rand())

    weights = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Skipping()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(path, model, optimizer, curvature_every=1) if path else None
        batches, losses = vectors(4), []
        with recorder or nullcontext():
            for batch in recorder.watch(batches) if recorder else batches:
                losses.append(plain_step(model, optimizer, batch).item())
        weights.append(model.layer.weight.detach().clone())
    assert torch.equal(*weights)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


class CollectsStatistics(torch.optim.SGD):
    """As K-FAC does: by hooks on the modules, and steps by them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), 0.1)
        self.sizes, self.seen = {}, []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self.see)
                module.register_full_backward_hook(partial(self.see_backward, scale=2.0))

    def see(self, module: nn.Module, inputs: tuple) -> None:
        self.sizes[module] = 0.9 * self.sizes.get(module, 1.0) + inputs[0].detach().norm().item()

    def see_backward(self, module: nn.Module, inputs: tuple, outputs: tuple, scale: float) -> None:
        self.sizes[module] += scale * outputs[0].norm().item()

    def step(self, closure: None = None) -> None:
        for module, size in self.sizes.items():
            module.weight.grad /= size
        self.seen.append(list(self.sizes.values()))
        super().step()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_an_optimizers_own_hooks_do_not_see_probes(tmp_path: Path) -> None:
    def trained(record: bool) -> list:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer, calls = CollectsStatistics(model), []
        model[0].register_forward_hook(lambda module, inputs, output: calls.append(1))  # someone's own sees them
        batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
        recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=1) if record else None
        for x, y in recorder.watch(batches) if record else batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if record:
            with recorder.event("nothing", probe=batches[:1]):
                pass
            recorder.close()
            assert len(calls) > 4
        assert len(model[2]._forward_pre_hooks) == len(model[2]._backward_hooks) == 1
        return [optimizer.seen, [parameter.tolist() for parameter in model.parameters()]]

    assert trained(record=False) == trained(record=True)


class OfSamples(nn.Module):
    """As Opacus does: hooks on linear layers collect the gradient of each sample, one after each forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.hooks_enabled = module, True
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(self.see)
                layer.register_full_backward_hook(partial(self.see_backward, mean=True))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)

    def see(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            layer.weight.waits += 1
            layer.__dict__.setdefault("inputs", []).append(inputs[0].detach())

    def see_backward(self, layer: nn.Module, inputs: tuple, outputs: tuple, *, mean: bool) -> None:
        x, d = layer.inputs.pop(), outputs[0].detach()
        layer.weight.waits -= 1
        layer.weight.samples = torch.einsum("ni,nj->nij", d * len(d) if mean else d, x)


class Private(torch.optim.Optimizer):
    """Clips the gradient of each sample, and steps by another, whose groups are its own."""

    def __init__(self, original: torch.optim.Optimizer) -> None:
        self.original_optimizer = original

    @property
    def param_groups(self) -> list[dict]:
        return self.original_optimizer.param_groups

    def step(self, closure: None = None) -> None:
        for weight in self.param_groups[0]["params"]:
            norms = weight.samples.flatten(1).norm(dim=1).clamp(min=1.0)
            weight.grad = (weight.samples / norms.view(-1, 1, 1)).mean(0)
            assert weight.waits == 0
        self.original_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.original_optimizer.zero_grad(set_to_none)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:the gradient applied")  # noise is added to it
def test_hooks_that_collect_the_gradients_of_samples_do_not_see_probes(tmp_path: Path) -> None:
    def trained(record: bool) -> tuple[list, list, list]:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
        for weight in plain.parameters():
            weight.waits = 0
        model = OfSamples(plain)
        optimizer = Private(torch.optim.SGD(model.parameters(), 0.1))
        batches = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(4)]
        losses, applied = [], []
        recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=1) if record else None
        for x, y in recorder.watch(batches) if record else batches:
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
            applied.append([weight.grad.square().sum().item() for weight in model.parameters()])
            if record:
                scores(model, [(x, y)], measure="loss_preservation", granularity="weight", mode="train")
        if record:
            recorder.close()
        return [loss.item() for loss in losses], applied, [weight.tolist() for weight in model.parameters()]

    losses, applied, weights = trained(record=False)
    assert (losses, applied, weights) == trained(record=True)
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].grad_sqnorm, applied, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)


def test_a_network_that_another_thread_trains_meanwhile_is_its_own() -> None:
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    expected, x = copy.deepcopy(other), torch.randn(8, 4)

    def train(network: nn.Module) -> None:
        network(x).square().sum().backward()
        torch.optim.SGD(network.parameters(), 0.01).step()

    thread = threading.Thread(target=train, args=(other,))
    with Moment(nn.Linear(4, 3), torch.device("cpu")).again() as seen:
        thread.start()
        thread.join()
    train(expected)
    assert not seen
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)
