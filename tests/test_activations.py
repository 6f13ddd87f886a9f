"""Networks that compute activations again, or move them, are measured as the same networks that keep them."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import images, recorded
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

from dynamics.probing.activations import activations_stay
from dynamics.pruning import scores


def keeping(part: nn.Sequential, x: Tensor) -> Tensor:
    return part(x)


def anew(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


def anew_within(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=True)


def in_segments(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint_sequential(part, 2, x, use_reentrant=False)


def moved(part: nn.Sequential, x: Tensor) -> Tensor:
    with save_on_cpu():
        return part(x)


KINDS = [anew, anew_within, in_segments, moved]


class Network(nn.Module):
    """Of three parts, the middle one of which runs in a way of its own."""

    def __init__(self, run: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3))
        self.last, self.run = nn.Linear(4, 3), run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.run(self.part, torch.tanh(self.first(inputs))).mean((2, 3)))


def network(run: Callable[[nn.Sequential, Tensor], Tensor]) -> Network:
    torch.manual_seed(0)
    return Network(run).double()


def record(path: Path, model: nn.Module) -> xr.DataTree:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(1)  # of the dropout
    return recorded(path, model, optimizer, images(3), curvature_every=1)


@pytest.mark.parametrize("run", KINDS)
def test_a_record_does_not_depend_on_what_is_kept(tmp_path: Path, run: Callable) -> None:
    models = network(keeping), network(run)
    kept, other = record(tmp_path / "kept", models[0]), record(tmp_path / "other", models[1])
    for node in ("steps", "curvature"):
        for name, expected in kept[node].data_vars.items():
            np.testing.assert_allclose(other[node][name], expected, rtol=1e-9, atol=1e-12, err_msg=name)
    for one, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("measure", ["gradient_norm_preservation", "fisher", "synflow"])
@pytest.mark.parametrize("run", KINDS)
def test_scores_do_not_depend_on_what_is_kept(run: Callable, measure: str) -> None:
    expected, found = (
        scores(network(one), images(2), measure=measure, granularity="filter", mode="eval") for one in (keeping, run)
    )
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer], values, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_none_of_whose_inputs_has_a_gradient_is_a_constant(tmp_path: Path) -> None:
    """As in training, of which torch warns."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner[2](checkpoint(self.inner[:2], inputs, use_reentrant=True))

    batches = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)]
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        run = recorded(tmp_path / "run", Frozen(), torch.optim.SGD(model.parameters(), 0.1), batches)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm[:1], rtol=1e-9)
    assert run["curvature"].grad_sqnorm[0, 0] == 0


def test_hooks_around_the_whole_loop_cost_the_curvature_and_say_why(tmp_path: Path) -> None:
    said = r"saved_tensors_hooks around the whole loop: put these hooks around"
    with save_on_cpu(), pytest.warns(UserWarning, match=said):
        assert record(tmp_path / "run", network(keeping))["steps"].sizes["step"] == 3


def test_hooks_in_another_thread_go_on() -> None:
    packed, inside, left = [], threading.Event(), threading.Event()

    def work() -> None:
        with saved_tensors_hooks(packed.append, lambda _: None):
            inside.set()
            left.wait(10)
            torch.ones(2, requires_grad=True).square()
        torch.ones(2, requires_grad=True).square()
        with saved_tensors_hooks(packed.append, lambda _: None):
            torch.ones(2, requires_grad=True).square()
        torch.ones(2, requires_grad=True).square()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with activations_stay():
        left.set()
        thread.join(10)
        with saved_tensors_hooks(packed.append, lambda _: None):
            torch.ones(2, requires_grad=True).square()
    assert len(packed) == 2


def test_checkpoints_in_another_thread_go_on() -> None:
    runs, x = [], torch.ones(2, requires_grad=True)

    def part(x: Tensor) -> Tensor:
        runs.append(threading.get_ident())
        return x.square()

    thread = threading.Thread(target=lambda: checkpoint(part, x, use_reentrant=True).sum().backward())
    with activations_stay():
        checkpoint(part, x, use_reentrant=True).sum().backward()
        assert len(runs) == 1
        thread.start()
        thread.join(10)
    assert len(runs) == 3  # once more on the way back


def test_of_two_threads_one_waits_and_nothing_is_left_behind() -> None:
    def own() -> list:
        return [saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__, CheckpointFunction.apply]

    before, inside, leave = own(), threading.Event(), threading.Event()

    def work() -> None:
        with activations_stay():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with activations_stay():
        thread.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    leave.set()
    thread.join(10)
    assert own() == before
