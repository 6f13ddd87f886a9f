"""Every test runs in float64, from one seed, on one rule: a warning is an error (pyproject.toml)."""

import sys
from collections.abc import Iterator

import pytest
import torch
import xarray as xr

xr.set_options(arithmetic_join="exact")  # analyses are of what belongs together: nothing is dropped in silence
torch.set_num_threads(1)  # the networks are small; threads that wait for each other cost more than they give


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    """A figure that a test left open would be another one's current axes."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.long)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
