"""Many experiments, each recorded once: finished ones are skipped, interrupted ones continue."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from numbers import Integral
from pathlib import Path

from tqdm.auto import tqdm

from ..hardware.device import find_device
from ..places import check_folder
from .experiment import Experiment
from .running import is_finished, tidy
from .training import steps_of
from .workers import connected, data_of, here, on_dask


def sweep(
    experiments: Iterable[Experiment],
    folder: str | os.PathLike,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
) -> dict[str, str]:
    """Run all experiments that are not finished; each is recorded at ``folder / NAME.zarr``.

    Args:
        experiments: see :func:`~dynamics.experiments.grid.grid`.
        folder: where the records go; with several machines, a folder that all of them share.
        workers: processes on this machine, each with one thread; 0: this process; None: one per GPU, or one per core if
            the runs use no GPU.
        scheduler: address of a Dask scheduler whose workers run the experiments instead, e.g. ``tcp://10.0.0.1:8786``.

    Returns:
        What went wrong, by the name of the run; the other runs continued. Empty if all are recorded.

    Raises:
        FileExistsError, NotADirectoryError: something else is at one of the paths; then none is run.
        PermissionError: the folder may not be written.
        KeyboardInterrupt: as somebody wished; its notes say what went wrong until then.
        ValueError: two of the experiments would have the same name, or a device cannot be used; then none is run.
        FileNotFoundError, DataError: a data set is not on disk, or damaged; then none is run.
    """
    if workers is not None and (not isinstance(workers, Integral) or workers < 0 or scheduler is not None):
        raise ValueError(
            "workers must be a whole number, 0 or more, and not be given with a scheduler, which has its own; got "
            f"{workers=}, {scheduler=}"
        )
    experiments, folder = list(experiments), Path(folder)
    paths = {experiment: folder.resolve() / f"{experiment.name}.zarr" for experiment in experiments}
    _check_names(experiments)
    left = {experiment: path for experiment, path in paths.items() if not is_finished(path, experiment)}
    for experiment in paths.keys() - left:
        tidy(paths[experiment])
    if not left:
        return {}
    check_folder(folder, "the records of a sweep", "out/sweep")
    for name in sorted({experiment.device for experiment in left} if scheduler is None else ()):
        find_device(name)
    steps = {one: steps_of(one, data_of(one.data, one.root, one.download)) for one in left}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        on = here
        if workers != 0:
            on = partial(on_dask, stack.enter_context(connected(left, workers=workers, scheduler=scheduler)))
        bar = stack.enter_context(closing(_Bar(steps, len(paths))))
        try:
            for experiment, error in on(left, bar.report):
                bar.end(experiment, error)
                if error:
                    failed[experiment.name] = error
        except KeyboardInterrupt as interrupt:
            for name, error in failed.items():
                interrupt.add_note(failure(name, error))
            raise
    return failed


def _check_names(experiments: Iterable[Experiment]) -> None:
    """Check that each experiment has a record of its own.

    Raises:
        ValueError: two experiments have the same name.
    """
    named: dict[str, Experiment] = {}
    for experiment in experiments:
        if experiment.name in named:
            first, other = named[experiment.name].identity, experiment.identity
            differing = [f"{name} {first[name]!r} and {other[name]!r}" for name in first if first[name] != other[name]]
            raise ValueError(
                f"{', '.join(differing) or 'one experiment twice'} would write the same record "
                f"{experiment.name}.zarr: sweep each value into a folder of its own; `python -m analysis` "
                "compares the records of several folders"
            )
        named[experiment.name] = experiment


def failure(name: str, error: str) -> str:
    """A line that says how a run failed."""
    return f"failed: {name}: {error}"


class _Bar:
    """One bar over the steps of all runs."""

    def __init__(self, steps: Mapping[Experiment, int], runs: int) -> None:
        self._steps, self._done = steps, dict.fromkeys(steps, 0)
        self._ended: set[Experiment] = set()
        self._runs, self._failed = runs, 0
        self._bar = tqdm(total=sum(steps.values()), desc="sweep", unit="step")
        self._say()

    def report(self, experiment: Experiment, steps: int) -> None:
        """A run has done ``steps`` steps so far."""
        if experiment not in self._ended:
            self._bar.update(steps - self._done[experiment])
            self._done[experiment] = steps

    def end(self, experiment: Experiment, error: str) -> None:
        """A run has ended."""
        if not error:
            self.report(experiment, self._steps[experiment])
        self._ended.add(experiment)
        self._failed += bool(error)
        self._say()

    def close(self) -> None:
        """Close the bar, which stays as it is."""
        self._bar.close()

    def _say(self) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        ended = self._runs - len(self._steps) + len(self._ended) - self._failed
        self._bar.set_postfix_str(f"{ended} of {self._runs} runs recorded{failed}")
