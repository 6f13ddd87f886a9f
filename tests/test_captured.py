"""When work that comes again is captured, and when not; what a graph does is not asked here, for it takes a GPU."""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch

from dynamics import captured
from dynamics.blocks import Layout
from dynamics.captured import Repeated


class Graph:
    """In place of a CUDA graph."""

    made = 0

    def __init__(self, work: object, device: object) -> None:
        Graph.made += 1
        self._work = work

    def __call__(self) -> str:
        return f"captured {self._work()}"


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made = 0
    monkeypatch.setattr(captured, "Captured", Graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_work_at_the_same_places_is_captured_when_it_comes_again() -> None:
    repeated, gpu = Repeated(), torch.device("cuda")
    places = [1, 1, 1, 2, 1, 1, 1]
    found = [repeated(lambda: "work", [7, place], gpu) for place in places]
    assert [one == "captured work" for one in found] == [False, True, True, False, False, True, True]
    assert Graph.made == 2


def test_places_that_keep_changing_are_given_up() -> None:
    repeated, gpu = Repeated(), torch.device("cuda")
    found = [repeated(lambda: "work", [number // 2], gpu) for number in range(100)]
    assert Graph.made == 16
    assert found[-50:] == ["work"] * 50


def test_a_processor_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated()
    assert [repeated(lambda: "work", [], torch.device("cpu")) for _ in range(3)] == ["work"] * 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [repeated(lambda: "work", [], torch.device("cuda")) for _ in range(3)] == ["work"] * 3


def test_what_cannot_be_captured_is_done_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: object, device: object) -> None:
        Graph.made += 1
        raise torch.OutOfMemoryError

    monkeypatch.setattr(captured, "Captured", fail)
    repeated = Repeated()
    assert [repeated(lambda: "work", [1], torch.device("cuda")) for _ in range(9)] == ["work"] * 9
    assert Graph.made == 1


class Copies(Graph):
    """As a CUDA graph: copies from what is at an address now to where it copied before."""

    def __init__(self, work: partial, device: object) -> None:
        super().__init__(work, device)
        self._pairs = [
            (view, tensor.data_ptr(), tensor.shape, tensor.nbytes) for view, tensor in zip(*work.args, strict=True)
        ]

    def __call__(self) -> None:
        for view, address, shape, size in self._pairs:
            content = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=view.dtype)
            view.copy_(content.reshape(shape))


def test_a_gradient_is_its_own_parameters_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads trained in turns, whose gradients get the same block of memory."""
    monkeypatch.setattr(captured, "Captured", Copies)
    on_gpu = captured.Repeated.__call__
    monkeypatch.setattr(Repeated, "__call__", lambda self, work, at, _: on_gpu(self, work, at, torch.device("cuda")))
    layout, block = Layout([torch.zeros(3), torch.zeros(3)]), torch.zeros(3)
    layout._on_one_gpu = True
    vector = layout.zeros()
    for step, head in enumerate([0, 0, 1, 1, 0, 0, 0, 1, 0]):
        grads = [block.fill_(step) if index == head else None for index in range(2)]
        vector.take(grads, among=[0, 1])
        assert [float(view.sum()) for view in vector.views] == [3.0 * step * (index == head) for index in range(2)]
    assert Graph.made == 3
