"""A warning shows the user's own line that led to it, however deep inside the recorder it comes from."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from networks import convolutional_network, images, plain_step, smooth_network, vectors
from torch import nn

from dynamics import Recorder
from dynamics.pruning import Pruner


def line() -> int:
    """The line that calls this."""
    return inspect.currentframe().f_back.f_lineno


@contextmanager
def warned(text: str, at: list[int]) -> Iterator[None]:
    """The only warning inside begins with a text, and shows a line of this file that ``at`` holds in the end."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    (one,) = said
    assert str(one.message).startswith(text)
    assert one.filename == __file__
    assert one.lineno in at


def recorder_of(model: nn.Module, path: Path, **settings: object) -> Recorder:
    return Recorder(path, model, torch.optim.SGD(model.parameters(), 0.1), curvature_every=0, **settings)


def test_of_an_event(tmp_path: Path) -> None:
    model, at = smooth_network(), []
    model[0].requires_grad_(False)
    with recorder_of(model, tmp_path / "frozen") as recorder, warned("frozen parameters are removed or changed", at):
        at.append(line() + 1)
        with recorder.event("noise", probe=vectors(1)), torch.no_grad():
            model[0].weight *= 2
    model = convolutional_network()
    with torch.no_grad():
        model[1].running_var.fill_(1e-6)
    with recorder_of(model, tmp_path / "lag") as recorder, warned("the probe's loss is ", at):
        at.append(line() + 1)
        with recorder.event("nothing", probe=images(1)):
            pass


def test_of_a_recorder(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warned("attribute 'model' is 3", [line() + 1]):
        Recorder(tmp_path / "run", model, optimizer, attributes={"model": 3}).close()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_of_a_step(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    model = smooth_network()
    optimizer = kind(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        plain_step(model, optimizer, vectors(1)[0])
        model.append(nn.Linear(3, 3))
        with warned("parameters that were added after recording began", [line() + 1]):
            optimizer.step()


def test_of_the_end(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer, at = torch.optim.SGD(model.parameters(), 0.1), []
    with warned("no batch was seen, so no curvature was recorded", at):
        at.append(line() + 1)
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1):
            plain_step(model, optimizer, vectors(1)[0])


def test_of_a_pruner() -> None:
    pruner = Pruner(smooth_network(), None, "magnitude")
    pruner.prune(0.4)
    with warned("nothing is pruned", [line() + 1]):
        pruner.prune(0.4)
