"""Many experiments from one configuration: the grid of all its lists."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .data import load
from .experiment import Experiment
from .training import find_device, run

_LISTS = ("epochs", "learning_rates")


def grid(configuration: Mapping[str, Any]) -> list[Experiment]:
    """All experiments of a configuration: a mapping of Experiment's fields, where a list stands for each of its values.

    Raises:
        ValueError: a field that Experiment does not have, or an impossible value.
    """
    known = [field.name for field in dataclasses.fields(Experiment)]
    if unknown := sorted(map(str, set(configuration) - set(known))):
        raise ValueError(f"unknown settings {', '.join(unknown)}: an experiment has {', '.join(known)}")
    varied: dict[str, list[Any]] = {}
    for name, value in configuration.items():
        if value == []:
            raise ValueError(f"{name} is an empty list: give at least one value, or leave the setting out")
        varied[name] = value if isinstance(value, list) and name not in _LISTS else [value]
    experiments = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    return [Experiment(**{name: _tuple(value) for name, value in settings.items()}) for settings in experiments]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def sweep(experiments: list[Experiment], folder: Path) -> list[Path]:
    """Run the experiments one after the other; each record goes to ``folder / NAME.zarr``. Returns their paths.

    Raises:
        FileExistsError: one of the records exists; then none is run.
        ValueError: two of the experiments would have the same name, or a device cannot be used; then none is run.
    """
    paths = [folder / f"{experiment.name}.zarr" for experiment in experiments]
    if len(set(paths)) < len(paths):
        raise ValueError(
            "two experiments of the grid would write the same record: vary model, data, measure, ... or seed"
        )
    if existing := [path for path in paths if path.exists()]:
        raise FileExistsError(f"{existing[0]} exists already: choose another folder, or remove it first")
    for name in sorted({experiment.device for experiment in experiments}):
        find_device(name)
    keys = {(experiment.data, experiment.root, experiment.download) for experiment in experiments}
    data = {key: load(key[0], root=key[1], download=key[2]) for key in keys}
    for experiment, path in tqdm(list(zip(experiments, paths, strict=True)), desc="experiments", unit="run"):
        run(experiment, path, data=data[experiment.data, experiment.root, experiment.download])
    return paths
