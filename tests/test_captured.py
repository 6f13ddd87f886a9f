"""When work that comes again is captured, and when not; what a graph does is not asked here, for it takes a GPU."""

from __future__ import annotations

import pytest
import torch

from dynamics.hardware import captured
from dynamics.hardware.captured import Repeated


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


def test_work_at_no_place_of_its_own_runs_once_before_it_is_captured() -> None:
    repeated, gpu = Repeated(), torch.device("cuda")
    assert [repeated(lambda: "work", [], gpu) for _ in range(3)] == ["work", "captured work", "captured work"]


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
