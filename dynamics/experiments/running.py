"""Runs an experiment: begins its record, continues it where it ended, or leaves it if it is finished."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..data import Data, load
from ..errors import named, one_line
from ..hardware.device import find_device
from ..hardware.reproducible import reproducible
from ..models import build
from ..places import check_folder
from ..record.errors import RecordError
from ..record.files import locked
from ..record.metadata import read_metadata
from ..record.reading import check
from ..record.store import Store
from ..recording.recorder import Recorder
from ..words import counted
from . import checkpoint
from .experiment import Experiment, configuration
from .training import Training, chosen

_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(
    experiment: Experiment,
    path: str | os.PathLike,
    *,
    data: Data | None = None,
    progress: bool = True,
    report: Callable[[int], object] = lambda steps: None,
) -> Path:
    """Run an experiment and record it at ``path``; returns the path.

    An unfinished record of the same experiment is continued from the end of its last epoch, as if it had never been
    interrupted: on the same machine the record is the same bit for bit; on a GPU, up to the rounding of sums. A
    finished record is left as it is.

    Args:
        experiment: what to run.
        path: where the record goes.
        data: the data set, if it is already loaded.
        progress: print to stderr what is trained, and show a bar with one tick per step.
        report: called with the number of steps done, at the start and after each step.

    Raises:
        FileExistsError: something else is at ``path``. BlockingIOError: another process runs the experiment there.
        FileNotFoundError: the data set is not on disk and ``download`` is off.
        ValueError: the training diverged, so that nothing can be ranked. What was recorded until then is kept.
        OSError: the disk is full.
    """
    path = Path(path)
    if not is_finished(path, experiment):
        with _said_if_full(path), _alone(path):
            if not is_finished(path, experiment):  # another process may have finished it meanwhile
                _run(experiment, path, data, report, progress=progress)
                _finish(path)
    tidy(path)
    return path


def _run(
    experiment: Experiment, path: Path, data: Data | None, report: Callable[[int], object], *, progress: bool
) -> None:
    device = find_device(experiment.device)
    data = chosen(data or load(experiment.data, root=experiment.root, download=experiment.download), experiment)
    torch.manual_seed(experiment.seed)
    model = build(
        experiment.model, num_classes=data.num_classes, in_channels=data.channels, width=experiment.width
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), experiment.learning_rates[0], experiment.momentum, weight_decay=experiment.weight_decay,
        fused=True,
    )  # fmt: skip
    training = Training(experiment, data, device, model, optimizer)
    if (state := checkpoint.load(path)) is not None:
        _restore(training, state, path)
    with reproducible(), Recorder(
        path, training.trained, optimizer, objective=training.objective, curvature_every=experiment.curvature_every,
        capture=True, attributes=configuration(dataclasses.asdict(experiment)), resume="rewind", step=training.steps,
    ) as recorder:  # fmt: skip
        if progress:
            print(_said(experiment, device), file=sys.stderr)
        training.run(recorder, path, report, progress=progress)
    if (failure := recorder.failure) is not None:
        if getattr(failure, "errno", None) in _FULL:
            raise failure
        raise OSError(f"the record {path} is incomplete: {failure}") from failure


@contextmanager
def _said_if_full(path: Path) -> Iterator[None]:
    """What is raised inside says which record a full disk has stopped, and how to continue it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        advice = "make room, and the same command continues it"
        raise OSError(error.errno, f"{error.strerror}, so {path} is not finished: {advice}") from error


def _said(chosen: Experiment, device: torch.device) -> str:
    """A line that says what is trained."""
    epochs = len(chosen.schedule())
    pruned = "" if chosen.measure == "none" else (
        f", pruned by {chosen.measure} to a sparsity of {chosen.sparsity:.0%} in "
        f"{counted(chosen.rounds, 'round')}"
    )  # fmt: skip
    return (
        f"training {chosen.model} of width {chosen.width:g} on {chosen.data} for "
        f"{counted(epochs, 'epoch')} on {device}{pruned}"
    )


def _restore(training: Training, state: dict[str, Any], path: Path) -> None:
    """Restore the training's state from a checkpoint.

    Raises:
        ValueError: the checkpoint is from another network, or from a later step than the record's end.
    """
    advice = f"remove {checkpoint.place(path)} to start the run anew"
    try:
        training.restore(state)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint in {path} is from another training ({named(error)[:120]}); {advice}"
        ) from error
    recorded = read_metadata(path).get("steps/step/.zarray", {"shape": [0]})["shape"][0]
    if recorded < training.steps:
        raise ValueError(
            f"the checkpoint in {path} is from step {training.steps}, but the record ends at step {recorded}: "
            f"copy both again, or {advice}"
        )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process runs the experiment; a lock file beside the record prevents it until that is finished.

    The record's own lock does not suffice: after a look at the record, and before the recorder takes its lock, another
    process may have continued the record, or finished it.
    """
    check_folder(path.parent, "records", "out/run.zarr")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = locked(file, f"{path} is being written by another process that runs the same experiment")
    finished = False
    try:
        yield
        finished = True
    finally:
        if finished or not path.exists():
            with suppress(OSError):
                file.unlink()  # whoever opened it meanwhile finds the record finished, or absent
        lock.release()


def is_finished(path: Path, experiment: Experiment) -> bool:
    """Whether the record of an experiment is complete; False where there is none.

    Raises:
        FileExistsError: what is at ``path`` is not the record of this experiment.
    """
    if not path.exists():
        return False
    try:
        attributes = check(path)[".zattrs"]
    except RecordError as error:
        reason = one_line(error).removeprefix(f"{path} ")
        raise FileExistsError(
            f"{path} exists already, and {reason}: choose another path, or remove it first"
        ) from error
    try:
        recorded = Experiment(**json.loads(attributes["experiment"])).identity
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # not an experiment's, or of another version
        unknown = f", and this version does not know its experiment ({one_line(error)})"
        reason = unknown if "experiment" in attributes else ""
        raise FileExistsError(f"{path} exists already{reason}: choose another path, or remove it first") from error
    asked = experiment.identity
    differing = [name for name in asked if recorded.get(name) != asked[name]]
    if other := [f"{name} {recorded.get(name)!r}, not {asked[name]!r}" for name in differing]:
        raise FileExistsError(
            f"{path} holds another experiment, with {', '.join(other)}; choose another path, or remove it first"
        )
    return bool(attributes.get("finished"))


def tidy(path: Path) -> None:
    """Delete what a process that was killed while it finished a record left in and beside it, if that can be done."""
    if checkpoint.place(path).exists():
        with suppress(OSError), _alone(path):
            _finish(path)


def _finish(path: Path) -> None:
    """Mark the record as finished, and delete what only continuing it needed."""
    store = Store.reopen(path)
    try:
        store.note("finished", True)
        store.drop_kept()
    finally:
        store.close()
    checkpoint.remove(path)
