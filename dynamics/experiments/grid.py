"""The experiments of a configuration: the grid that its lists span."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from .experiment import Experiment

_LISTS = ("epochs", "learning_rates")


def grid(configuration: Mapping[str, Any]) -> list[Experiment]:
    """All experiments of a configuration: a mapping of Experiment's fields, where a list stands for each of its values.

    ``grids`` may hold a list of such mappings: each is a grid of its own, with the other settings in common. Points
    that would compute the same, e.g. measure "none" with several sparsities, are one experiment. What is listed first
    varies slowest; so do, over all grids, the common settings up to the first one that a grid sets itself.

    Raises:
        ValueError: a field that Experiment does not have, or an impossible value.
    """
    grids = configuration.get("grids", [{}])
    if not isinstance(grids, list) or not grids or not all(isinstance(part, Mapping) for part in grids):
        raise ValueError(f"grids must be a list of settings like `- model: vgg13`, got {grids!r:.80}")
    common = {name: value for name, value in configuration.items() if name != "grids"}
    leading = dict(itertools.takewhile(lambda setting: not any(setting[0] in part for part in grids), common.items()))
    found = [
        Experiment(**point)
        for outer in _product(leading)
        for part in grids
        for point in _product({**common, **_alone(outer), **part})
    ]
    different: dict[str, Experiment] = {}
    for experiment in found:
        different.setdefault(json.dumps(experiment.identity), experiment)
    return list(different.values())


def _alone(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a grid as a grid that contains only it."""
    return {name: value if name in _LISTS else [value] for name, value in point.items()}


def _product(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = [field.name for field in dataclasses.fields(Experiment)]
    if unknown := sorted(map(str, set(settings) - set(known))):
        near = [name for one in unknown for name in difflib.get_close_matches(one, known, 1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"unknown settings {', '.join(unknown)}{meant}: an experiment has {', '.join(known)}")
    varied: dict[str, list[Any]] = {}
    for name, value in settings.items():
        if isinstance(value, list) and not value:
            raise ValueError(f"{name} is an empty list: give at least one value, or leave the setting out")
        varied[name] = value if isinstance(value, list) and name not in _LISTS else [value]
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
