"""Runs on Dask workers: each reports its progress and, if its worker dies, continues from its checkpoint on another."""

from __future__ import annotations

import logging
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import dask
import torch
from dask.system import CPU_COUNT
from distributed import (
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    Status,
    Worker,
    WorkerPlugin,
    as_completed,
    get_worker,
)

from ..data import Data, DataError, load
from ..errors import named, one_line
from ..hardware.device import find_device
from . import checkpoint
from .experiment import Experiment
from .running import run

_SECONDS = 0.5  # between two messages of a run
_PATIENCE = 60.0  # seconds for which a run waits for a worker that is being shut down and still holds its record
_DEATHS = 10  # tries of a run that never began, as each time its worker died
_OPEN = (Status.running, Status.paused)

Runs = Mapping[Experiment, Path]
Report = Callable[[Experiment, int], object]


@cache
def data_of(name: str, root: str | None, download: bool) -> Data:
    """A data set, read once in each process."""
    return load(name, root=root, download=download)


def here(runs: Runs, report: Report) -> Iterator[tuple[Experiment, str]]:
    """Run one after the other in this process; yields each with its error, "" if there was none."""
    for experiment, path in runs.items():
        yield experiment, _attempt(experiment, path, partial(report, experiment))


@contextmanager
def connected(runs: Runs, *, workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """A client of a scheduler, or of a new one on this machine, with ``workers`` or by default one per GPU or core.

    Raises:
        OSError: there is no scheduler at the address, or a worker died before it was there.
    """
    with ExitStack() as stack:
        if scheduler is None:
            count = workers or _fitting(runs)
            try:
                cluster = stack.enter_context(_cluster(count))
            except RuntimeError as error:
                raise OSError(
                    f"one of {count} workers died while starting, perhaps for lack of memory: ask for fewer, or use "
                    "workers 0 to run everything in this process"
                ) from error
            client = stack.enter_context(Client(cluster))
            client.register_plugin(_Uninterrupted())
            yield client
            return
        log = logging.getLogger("distributed.client")  # its traceback when the scheduler is lost: each run says so
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        try:
            client = stack.enter_context(Client(scheduler))
        except (OSError, TypeError, ValueError) as error:
            advice = "give the address that `dask scheduler` prints, e.g. tcp://10.0.0.1:8786"
            raise OSError(f"no scheduler answers at {scheduler}: {advice}") from error
        if not client.scheduler_info()["workers"]:
            start = f"`dask worker {scheduler} --nthreads 1 --no-nanny` starts one"
            print(f"the scheduler at {scheduler} has no worker yet; runs wait for one: {start}", file=sys.stderr)
        yield client


def on_dask(client: Client, runs: Runs, report: Report) -> Iterator[tuple[Experiment, str]]:
    """Run on a scheduler's workers; as :func:`here`, in any order.

    A run whose worker dies continues on another, as long as it gets an epoch further each time, or was only waiting.
    """
    topic, by_name = f"thetadot-{uuid.uuid4().hex}", {experiment.name: experiment for experiment in runs}
    submitted: dict[Future, tuple[Experiment, int | None]] = {}
    began: set[Experiment] = set()
    waited: Counter[Experiment] = Counter()

    def hear(event: tuple[object, Mapping]) -> None:
        experiment, steps = by_name[event[1]["run"]], event[1]["steps"]
        began.add(experiment)
        if steps is not None:
            report(experiment, steps)

    def submit(experiment: Experiment) -> Future:
        path = runs[experiment]
        began.discard(experiment)
        future = client.submit(_on_worker, _rooted(experiment), path, topic, pure=False)
        submitted[future] = experiment, checkpoint.saved_at(path)
        return future

    def goes_on(experiment: Experiment, before: int | None) -> bool:
        if checkpoint.saved_at(runs[experiment]) != before:
            return True
        waited[experiment] += experiment not in began  # Dask blames all tasks that a worker had, running or not
        return experiment not in began and waited[experiment] < _DEATHS

    client.subscribe_topic(topic, hear)

    completed = as_completed([submit(experiment) for experiment in runs])
    for future in completed:
        experiment, before = submitted.pop(future)
        error = future.exception()
        if isinstance(error, KilledWorker) and goes_on(experiment, before):
            completed.add(submit(experiment))
        elif future.status == "finished":
            yield experiment, future.result()
        else:
            yield experiment, "the scheduler lost this run" if error is None else named(error)


@contextmanager
def _cluster(workers: int) -> Iterator[LocalCluster]:
    """Processes on this machine, one thread each, without a memory limit, as Dask cannot manage a network's memory.

    By default Dask makes workers return freed memory to the system at once, which a training would request again at
    each step; that is switched off. Runs wait at the scheduler, not at a worker, with which they would die.
    """
    trim = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"
    with (
        dask.config.set({trim: None, "distributed.scheduler.worker-saturation": 1.0}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


class _Uninterrupted(WorkerPlugin):
    """Makes workers ignore Ctrl-C, which the terminal sends to all processes: only the first one handles it."""

    def setup(self, worker: Worker) -> None:
        """Called in each worker's main thread."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fitting(runs: Runs) -> int:
    """Number of workers: one per GPU if the runs use GPUs, else one per core; no more than there are runs."""
    on_gpu = any(find_device(name).type == "cuda" for name in {experiment.device for experiment in runs})
    return min(len(runs), torch.cuda.device_count() if on_gpu else CPU_COUNT)


def _on_worker(experiment: Experiment, path: Path, topic: str) -> str:
    """The task of a worker: run an experiment, report its steps, and end if it is cancelled."""
    worker, said = get_worker(), 0.0
    key = worker.get_current_task()

    def report(steps: int) -> None:
        nonlocal said
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled" or worker.status not in _OPEN:
            raise CancelledError("this run was cancelled")
        if time.monotonic() - said > _SECONDS:
            worker.log_event(topic, {"run": experiment.name, "steps": steps})
            said = time.monotonic()

    worker.log_event(topic, {"run": experiment.name, "steps": None})
    placed = _placed(experiment, worker.name, torch.cuda.device_count())
    return _attempt(placed, path, report, patience=_PATIENCE)


def _rooted(experiment: Experiment) -> Experiment:
    """The experiment with the absolute path of its data, because workers may run in other folders."""
    return replace(experiment, root=experiment.root and str(Path(experiment.root).expanduser().absolute()))


def _placed(experiment: Experiment, worker: object, gpus: int) -> Experiment:
    """The experiment, placed on the worker's own GPU if the machine has several and its workers are numbered."""
    if gpus > 1 and isinstance(worker, int) and experiment.device in ("auto", "cuda"):
        return replace(experiment, device=f"cuda:{worker % gpus}")
    return experiment


def _attempt(experiment: Experiment, path: Path, report: Callable[[int], object], *, patience: float = 0.0) -> str:
    """Run an experiment; returns its error in one line, or "". Waits up to ``patience`` seconds for another writer."""
    until = time.monotonic() + patience
    try:
        data = data_of(experiment.data, experiment.root, experiment.download)
        while True:
            try:
                run(experiment, path, data=data, progress=False, report=report)
                return ""
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(_SECONDS)
    except (ValueError, OSError, DataError) as error:
        return one_line(error)
    except Exception as error:
        return named(error)
