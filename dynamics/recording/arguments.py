"""Checks of what a user passes to a recorder, before anything is touched."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import schema
from ..network.optimizers import as_given, stepping
from ..network.structure import check_initialised, has_any
from ..record.columns import LONGEST_TEXT
from ..warning import warn

_SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")

_READ = [row.name for row in schema.quantities("epochs")]
_SHARES = ("train_accuracy", "test_accuracy")
_CLOSE = 0.85  # similarity of names, 1 if equal: "test_losses" is close to "test_loss", "train_lr" not to "train_loss"
_ROUNDING = 1e-6  # of a mean in single precision

_KEPT = ("schema_version", "resumed", "finished")  # attributes that the recorder writes itself


def check_arguments(model: nn.Module, objective: Any, every: int, curvature_every: int) -> None:
    """Raise TypeError or ValueError if a recorder cannot work with these arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if sharded := [type(module).__name__ for module in model.modules() if type(module).__name__ in _SHARDING]:
        raise TypeError(
            f"model is sharded by {sharded[0]}, whose parameters are not those of the network: use FSDP2 "
            "(fully_shard) or data parallelism instead"
        )
    check_initialised(model)
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{meta[0]!r} is on the meta device and has no values yet: create the Recorder once it has")
    if not callable(objective):
        raise TypeError(f"objective must be a function (model, batch) -> scalar loss, got {objective!r:.60}")
    if not all(isinstance(count, Integral) for count in (every, curvature_every)) or every < 1 or curvature_every < 0:
        raise ValueError(
            f"every must be a whole number >= 1 and curvature_every a whole number >= 0, got {every!r} and "
            f"{curvature_every!r}"
        )


def check_pair(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError if the optimizers train another model."""
    held = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    if has_any(model, held):
        return
    if Counter(parameter.shape for parameter in held) == Counter(parameter.shape for parameter in model.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters, but others of the same shapes: pass the model that "
            "the optimizer was created with, not a copy of it. Master weights that a loop copies into its model are "
            "not recorded: keep the model itself in float32, and train it under autocast. Of what is detached from the "
            "model, for torch.func.functional_call, the recorder knows nothing either: train model.parameters() instead"
        )
    raise ValueError("the optimizer holds none of the model's parameters: pass the optimizer that trains this model")


def as_plain(attributes: Any) -> Any:
    """Attributes with paths as strings, and arrays and tensors of one element as numbers; anything else unchanged."""
    if not isinstance(attributes, Mapping):
        return attributes
    return {name: _plain(value) for name, value in attributes.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    one = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1)
    return value.item() if one or (isinstance(value, Tensor) and value.numel() == 1) else value


def check_attributes(attributes: Any) -> None:
    """Raise TypeError or ValueError if a record cannot hold them; warn of those by which runs cannot be compared."""
    if not isinstance(attributes, Mapping) or not all(isinstance(name, str) for name in attributes):
        raise TypeError(f"attributes must be a dictionary whose keys are strings, got {attributes!r:.60}")
    if kept := sorted(attributes.keys() & set(_KEPT)):
        raise ValueError(
            f"attributes cannot contain {kept[0]!r}, which the recorder writes itself: choose another name"
        )
    for name, kind in schema.COMPARED_BY.items():
        value = attributes.get(name)
        if value is not None and not isinstance(value, kind):
            said = "a string" if kind is str else "a number"
            warn(f"attribute {name!r} is {value!r:.60}, so runs are not compared by it: give {said}")


def check_resume(resume: Any, step: Any) -> None:
    """Raise ValueError if they do not say how to continue a record."""
    if resume not in (True, False, "rewind"):
        raise ValueError(f'resume must be False, True or "rewind", got {resume!r:.60}')
    if step is not None and (not isinstance(step, Integral) or step < 0 or not resume):
        raise ValueError(
            "step must be the step at which training continues, a whole number >= 0, and needs resume; got "
            f"step={step!r:.60} with resume={resume!r}"
        )


def optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers in what was given (one or several): each itself, or the one that a wrapper steps through.

    Raises:
        TypeError: something given is neither.
    """
    found = [stepping(one) for one in as_given(given)]
    if not found:
        raise TypeError("optimizer must be a torch.optim.Optimizer or a list of them, got an empty list")
    return found


def check_scalar(name: str, value: Any) -> None:
    """Raise ValueError if the value cannot be logged under this name."""
    check_name("log", name)
    row = schema.QUANTITIES.get(name)
    if name in ("step", "layer") or (row and "steps" in row.nodes and name != "loss"):
        raise ValueError(f"log() cannot take {name!r}, which the recorder measures itself: choose another name")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"log() takes scalars, but {name!r} has shape {tuple(value.shape)}: log its mean, for example")
    _check_whole("log", name, value)
    if not _is_number(value):
        raise ValueError(f"log() takes real numbers, but {name!r} is {value!r:.60}")


def _check_whole(method: str, name: str, value: Any) -> None:
    """Raise ValueError if the value is sharded over processes, so that no process alone knows it."""
    if not all(place.is_replicate() for place in getattr(value, "placements", ())):
        raise ValueError(
            f"{method}() cannot take {name!r}, of which each process holds only a part, as with FSDP2: pass its "
            "full_tensor(), which all processes must call"
        )


def check_name(method: str, name: str) -> None:
    """Raise ValueError if no variable of a record can have the name, which the method was given."""
    if not name or name.startswith(".") or set(name) & set("/\\") or len(name) > LONGEST_TEXT:
        raise ValueError(
            f"{method}() cannot take the name {name!r:.80}: a name has 1 to {LONGEST_TEXT} characters, no slash, and "
            "no '.' at the start; val_loss, for example"
        )


def check_epoch(scalars: Mapping[str, Any]) -> None:
    """Raise ValueError if a row of ``/epochs`` cannot hold the scalars; warn if a name looks like a misspelt one."""
    for name, value in scalars.items():
        check_epoch_scalar(name, value)
        near = [one for one in _READ if "_" in name and one.startswith(name)]  # "test_acc"
        near = near or difflib.get_close_matches(name, [one for one in _READ if one[:2] == name[:2]], 1, _CLOSE)
        if near and near[0] not in scalars:
            warn(f"log_epoch() records {name!r}, but tables and figures read {near[0]!r}")
    if counted := sorted({"epoch", "step"} & scalars.keys()):
        raise ValueError(f"log_epoch() cannot take {counted[0]!r}: the recorder counts steps and epochs itself")


def check_epoch_scalar(name: str, value: Any) -> None:
    """Raise ValueError if a row of ``/epochs`` cannot hold this scalar."""
    check_name("log_epoch", name)
    _check_whole("log_epoch", name, value)
    if not _is_number(value):
        raise ValueError(f"log_epoch() takes numbers, but {name!r} is {value!r:.60}")
    waits = isinstance(value, Tensor) and value.is_cuda  # the check is not worth waiting for the GPU
    if name in _SHARES and not waits and abs(float(value) - 0.5) > 0.5 + _ROUNDING:
        raise ValueError(
            f"log_epoch() takes {name} as a fraction of correct answers, from 0 to 1, got {float(value):g}"
        )


def _is_number(value: Any) -> bool:
    """Whether a value is a real number, or a tensor with a single one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not (value.is_complex() or value.is_meta)
    # an int may be too large
    return isinstance(value, Real) and not sys.float_info.max < abs(value) < math.inf  # type: ignore[operator]


def as_number(value: Any) -> Any:
    """A tensor of one number as this process's scalar, without its graph; anything else unchanged."""
    value = value.to_local() if hasattr(value, "to_local") else value
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def check_description(kind: str, attributes: Mapping[str, Any], texts: Mapping[str, bool]) -> None:
    """Raise ValueError if an event's description cannot be recorded.

    ``texts``: for each attribute of earlier events, by name, whether it was a string.
    """
    measured = {"event", "kind", "mode", "step", "epoch", "layer", "stage"}
    measured |= {row.name for row in schema.quantities("pruning") if row.over}  # scalars are the user's description
    if taken := sorted(measured & attributes.keys()):
        raise ValueError(f"event() cannot take {taken}, which the recorder measures itself: choose other names")
    for name, value in {"kind": kind, **attributes}.items():
        check_name("event", name)
        _check_whole("event", name, value)
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(f"event() takes strings of up to {LONGEST_TEXT} characters, but {name!r} has {len(value)}")
        if not isinstance(value, str) and not _is_number(value):
            raise ValueError(f"event() takes numbers and strings, but {name!r} is {value!r:.60}")
        if texts.get(name, isinstance(value, str)) != isinstance(value, str):
            was = "a string" if texts[name] else "a number"
            raise ValueError(f"event() takes {name!r} as {was}, as in the events before, got {value!r:.60}")


def wanted(node: str, names: Iterable[str] | None) -> list[str]:
    """The quantities of a node that are to be recorded, in the table's order; None asks for all.

    Raises:
        ValueError: a name that neither ``/steps`` nor ``/curvature`` has.
    """
    if names is None:
        return [row.name for row in schema.quantities(node)]
    names = list(names)
    known = [row.name for key in ("steps", "curvature") for row in schema.quantities(key)]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown quantities {unknown}: choose from {sorted(set(known))}")
    chosen = [row.name for row in schema.quantities(node) if row.name in names]
    if node == "curvature" and all("steps" in schema.QUANTITIES[name].nodes for name in chosen):
        return []  # quantities that /steps has, too, are no reason to evaluate a probe
    return chosen
