"""Resuming: finds the step of the record at which the model had its present parameters."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..measuring.present import Present
from ..record.store import Store
from ..schema import STUDIES
from ..warning import warn
from .past_events import PastEvents
from .resume_points import ResumePoint, ResumePoints

_ORIGIN = ("thetadot", "commit", "torch", "cuda", "device")
_SAME = 16  # rounding errors by which ‖θ‖² may differ where it is the sum of ‖θ‖², 2θᵀΔθ and ‖Δθ‖²


@dataclass(frozen=True)
class Place:
    """The point between two steps at which recording resumes, and how much of the record lies before it.

    ``ended``: whether an epoch was logged at this point. ``within``: whether the record went on with a step of the same
    epoch or, if it ends here, was flushed amid a pass over the data. ``rows``: number of recorded steps before it.
    """

    step: int = 0
    epoch: int = 0
    events: int = 0
    flow_time: float = 0.0
    ended: bool = False
    within: bool = False
    rows: int = 0

    @property
    def begins(self) -> bool:
        """Whether the record begins here: no step and no event is before it."""
        return not (self.rows or self.events)


class Counted(int):
    """A step as a framework counts it, perhaps unlike the recorder: it is ignored where θ is found in the record."""


class Record:
    """The columns of a record that locate its steps and events, compared with the ``present`` model."""

    def __init__(self, store: Store, present: Present) -> None:
        self._store, self._present = store, present
        self.steps, self.epochs = self.column("steps", "step"), self.column("steps", "epoch")
        self.events = self.column("pruning", "step")
        self._sqnorm = self.column("steps", "param_sqnorm")
        self.exact: list[int] = []  # steps at which ‖θ‖² was, to the bit, what it is now

    def column(self, node: str, name: str) -> np.ndarray:
        """A variable's committed values; empty if there is no such variable."""
        try:
            return self._store.read(node, name)
        except KeyError:
            return np.empty(0, int)

    @property
    def end(self) -> tuple[int, int]:
        """Step and number of events at the end of the record; epochs may end after its last step."""
        last = [*self.steps[-1:] + 1, *self.events[-1:], *self.column("epochs", "step")[-1:], 0]
        return int(max(last)), len(self.events)

    def place(self, step: int, events: int) -> Place:
        """The place at a step, with the counters as they were there."""
        before = int(np.searchsorted(self.steps, step))
        of_rows = self.epochs[before - 1 : before].tolist() if before else []
        known, rows = self.logged_by(step), self.column("epochs", "epoch").tolist()
        count = known or 0  # /epochs may know of a later epoch, if few steps are recorded
        epoch = int(max([0, *of_rows, *rows[:count][-1:]]))
        ended = bool(count) and int(self.column("epochs", "step")[count - 1]) == step
        later = rows[count : count + 1] if known is not None else []
        after, point = [*self.epochs[before : before + 1], *later], ResumePoints(self._store).at(step)
        goes_on = epoch in after if after else point is not None and point.within
        time = self._flow_time(step, before, point)
        return Place(step, epoch, events, time, ended, bool(of_rows) and goes_on, before)

    def logged_by(self, step: int) -> int | None:
        """Number of rows of ``/epochs`` logged by a step; None if the rows do not have a step."""
        steps = self.column("epochs", "step")
        return int(np.searchsorted(steps, step, side="right")) if len(steps) else None

    def _flow_time(self, step: int, before: int, point: ResumePoint | None) -> float:
        times, flow_steps = self.column("steps", "flow_time"), self.column("steps", "flow_step")
        if not before:
            return 0.0
        if before < len(times) and self.steps[before] == step:
            return float(times[before])
        if point is not None:
            return point.flow_time
        if not len(times) or not len(flow_steps):
            return float("nan")
        skipped = self.column("steps", "skipped")
        row = flow_steps[before - 1]
        last, others = row[self._present.first], np.unique(row[row != 0])
        if last == 0 and len(others) == 1:  # the layer is frozen, but its group was stepped
            last = others[0]
        last = self._present.flow_step if np.isnan(last) else last  # the layer's parameters differ in it
        taken = step - int(self.steps[before - 1]) - (float(skipped[before - 1]) if len(skipped) else 0.0)
        if taken > 1 and abs(last - self._present.flow_step) > 1e-9 * abs(last):
            warn(
                f"flow_time is not known from step {step} on, because the learning rate changed between recorded "
                "steps: call recorder.flush() before saving a checkpoint, or record with every=1"
            )
            return float("nan")
        return float(times[before - 1] + last * taken)

    def meets(self) -> tuple[int, int] | None:
        """Step and number of events at which ‖θ‖² of every layer was what it is now; None if nowhere.

        That is the last point that matches to the bit; else the record's end, where ‖θ‖² is known only as a sum and so
        inexactly; else the nearest match.
        """
        found = [
            (
                float(np.max(np.abs(then - self._present.sqnorm) / np.maximum(np.abs(then), 1e-300), initial=0.0)),
                (step, events),
            )
            for step, events, then in self._moments()
        ]
        near = [(distance, moment) for distance, moment in found if distance <= _SAME * self._present.rounding]
        exact = [moment for distance, moment in near if distance == 0]
        self.exact = sorted({step for step, _ in exact})
        at_end = [moment for _, moment in near if moment == self.end]
        return max(exact or at_end or [min(near)[1]]) if near else None

    def _moments(self) -> list[tuple[int, int, np.ndarray]]:
        """Each point at which ‖θ‖² is known: step, events before it, ‖θ‖² by layer."""
        moments: list[tuple[int, int, np.ndarray]] = []
        if len(self._sqnorm):
            events = np.searchsorted(self.events, self.steps, side="right")
            moments += zip(self.steps.tolist(), events.tolist(), self._sqnorm, strict=True)
            change, square = self.column("steps", "param_update"), self.column("steps", "update_sqnorm")
            if len(change) and len(square):
                events = np.searchsorted(self.events, self.steps + 1, side="left")
                with np.errstate(invalid="ignore"):  # if the training diverged
                    after = self._sqnorm + 2 * change + square
                moments += zip((self.steps + 1).tolist(), events.tolist(), after, strict=True)
        staged = self.column("pruning", "param_sqnorm")
        for index, step in enumerate(self.events.tolist()):
            moments += [(step, index, staged[index, 0]), (step, index + 1, staged[index, 1])]
        return moments


def begin(
    path: str | os.PathLike,
    attributes: Mapping[str, Any],
    present: Present,
    mode: bool | str,
    step: int | None,
) -> tuple[Store, Place, PastEvents]:
    """A store to write to, the place at which its record resumes, and the events before that.

    The store is new or, with ``mode`` True or "rewind", the existing one.

    Raises:
        FileExistsError, BlockingIOError, RecordError: as :class:`~dynamics.record.store.Store`.
        ValueError: as :func:`resume`.
    """
    if not (mode and Path(path).exists()):
        return Store(path, attributes), Place(step=step or 0), PastEvents()
    store = Store.reopen(path)
    try:
        place = resume(store, present, step, mode == "rewind", attributes)
        return store, place, PastEvents.of(store, place.events)
    except BaseException:
        store.close()
        raise


def resume(store: Store, present: Present, step: int | None, rewind: bool, attributes: Mapping[str, Any]) -> Place:
    """Find where the model is in the record, and drop what lies beyond, if that was asked for.

    Args:
        store: the record, open for writing.
        present: the model as it is now.
        step: the step at which training goes on; None: found by the layers' ‖θ‖².
        rewind: whether rows beyond that step may be dropped.
        attributes: what a record that began now would have; the trace tells in what of its origin this one differs.

    Raises:
        ValueError: the record of another network, a model that is nowhere in it, or rows beyond it without ``rewind``.
    """
    record, path = Record(store, present), store.path
    if not sum(store.lengths.values()):
        return Place(step=step or 0)
    recorded = [str(name) for name in store.read("steps", "layer")]
    if recorded != present.layers:
        raise ValueError(
            f"{path} is the record of another network: it has layers {recorded}, the model has {present.layers}"
        )
    end, met = record.end, _meeting(record, step, rewind, path)
    if met < end and not rewind:
        raise ValueError(
            f"the model is at step {met[0]} of {path} with {met[1]} events before it, but the record "
            f'continues to step {end[0]} with {end[1]}: pass resume="rewind" to drop what was recorded '
            "later, or load a later checkpoint"
        )
    place = record.place(*met)
    _check_masks(record, present, met[1])
    traces = store.attributes.get("resumed", [])
    trace = {"step": place.step, "dropped": end[0] - place.step if met < end else 0, "time": _now()}
    before = {**store.attributes, **{name: value for one in traces for name, value in one.items()}}
    trace |= {name: attributes[name] for name in _ORIGIN if attributes.get(name, before.get(name)) != before.get(name)}
    ResumePoints(store).forget_from(place.step)
    store.note("resumed", [*traces, trace])
    ahead = record.column("curvature", "step") >= met[0]  # curvature of a step whose own row was never written
    if met < end or ahead.any():  # after the trace, so that a kill in between loses neither
        _truncate(store, record, *met)
    return place


def _meeting(record: Record, step: int | None, rewind: bool, path: Path) -> tuple[int, int]:
    """Step and number of events at which the model resumes: where its ‖θ‖² is found, else at the given step."""
    end, met = record.end, record.meets()
    if isinstance(step, Counted) and met is not None and not (rewind and len(record.exact) > 1):
        step = None
    if end == (0, 0):  # no step and no event, at most scalars logged before any
        return step or 0, 0
    if step is None and met is None:
        raise ValueError(
            f"the model's parameters match no step of {path}, which ends at step {end[0]}: load the "
            "checkpoint that belongs to it, or pass step=<the step at which training continues>"
        )
    if step is None and rewind and len(record.exact) > 1:
        first, *_, last = record.exact
        raise ValueError(
            f"the model's parameters match all steps from {first} to {last} of {path}, because they did not "
            "change: pass step=<the step at which training continues>"
        )
    if step is not None and (met is None or met[0] != step):
        return step, int(np.searchsorted(record.events, step, side="right")) if step < end[0] else end[1]
    return met


def _check_masks(record: Record, present: Present, events: int) -> None:
    """Warn if parameters that were pruned at the last of the first ``events`` are free to change now."""
    remaining = record.column("pruning", "remaining")
    if not events or len(remaining) < events:
        return
    left = remaining[events - 1, 1]
    if freed := [name for name, then, now in zip(present.layers, left, present.remaining, strict=True) if now > then]:
        free = int(present.remaining.sum() - left.sum())
        warn(
            f"{free} parameters that were pruned when event {events - 1} was recorded have no mask now and "
            f"will change, first in layer {freed[0]!r}: call dynamics.pruning.apply_masks(model, masks) with "
            "the checkpoint's masks before creating the Recorder"
        )


def _truncate(store: Store, record: Record, step: int, events: int) -> None:
    """Drop all rows from a step on."""
    before = int(np.searchsorted(record.steps, step))
    lengths = {"steps": before, "pruning": events}
    lengths["curvature"] = int(np.searchsorted(record.column("curvature", "step"), step))
    for node in ("units", *STUDIES):
        lengths[node] = int(np.searchsorted(record.column(node, "event"), events))
    if (logged := record.logged_by(step)) is not None:
        lengths["epochs"] = logged
    elif before < len(record.epochs):
        lengths["epochs"] = int(np.searchsorted(record.column("epochs", "epoch"), record.epochs[before]))
    store.truncate(lengths)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
