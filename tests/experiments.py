"""Small experiments, and what to hold their records to."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from dynamics import open_run
from dynamics.data import Data, load
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.running import run


def few_digits(train: int, test: int) -> Data:
    """Digits, always the same few."""
    digits, drawn = load("digits"), torch.Generator().manual_seed(0)
    return replace(digits, train=digits.train.sample(train, drawn), test=digits.test.sample(test, drawn))


def recorded(path: Path, experiment: Experiment, data: Data) -> xr.DataTree:
    return open_run(run(experiment, path, data=data, progress=False))


def assert_agree(found: xr.DataTree, expected: xr.DataTree, nodes: Iterable[str], rtol: float = 1e-9) -> None:
    """Equal but for rounding in double precision."""
    for node in nodes:
        for name, values in expected[node].data_vars.items():
            if values.dtype.kind == "f":
                scale = float(np.abs(values).max())  # some are differences of what nearly cancels
                np.testing.assert_allclose(found[node][name], values, rtol, rtol / 100 * scale, err_msg=name)
            else:
                np.testing.assert_array_equal(found[node][name], values, err_msg=name)
