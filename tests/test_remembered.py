"""Inside a report what is found of a run is computed once, and is what it would be otherwise."""

from collections import Counter
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_runs import runs

from analysis.overview import overview
from analysis.remembered import remembered, remembering
from analysis.statistics import STATISTICS
from figures import FIGURES, write_report


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def mean(calls: list[str]):
    @remembered
    def mean(run: xr.DataTree, *, since: int = 0) -> xr.Dataset:
        """The mean from a step on."""
        calls.append(run.name)
        if since >= run["steps"].sizes["step"]:
            raise ValueError("no such step")
        return run["steps"].to_dataset().isel(step=slice(since, None)).mean()

    return mean


def run(name: str, *loss: float) -> xr.DataTree:
    return xr.DataTree.from_dict({"/steps": xr.Dataset({"loss": ("step", list(loss))})}, name=name)


def test_once_a_run_and_setting(mean, calls: list[str]) -> None:
    one, other = run("one", 1.0, 3.0), run("other", 1.0, 5.0)
    with remembering():
        found = [float(mean(of, **given).loss) for of in (one, other) * 2 for given in ({}, {"since": 1})]
    assert found == [2.0, 3.0, 3.0, 5.0] * 2
    assert calls == ["one", "one", "other", "other"]


def test_once_a_mapping_of_runs(calls: list[str]) -> None:
    @remembered
    def lengths(runs: dict[str, xr.DataTree]) -> pd.Series:
        calls.append("|".join(runs))
        return pd.Series({label: one["steps"].sizes["step"] for label, one in runs.items()})

    both = {"one": run("one", 1.0, 3.0), "other": run("other", 1.0)}
    with remembering():
        for _ in range(2):
            found = lengths(both)
            assert found.tolist() == [2, 1]
            found["one"] = 0  # the caller's own
            assert lengths({"other": both["other"]}).tolist() == [1]
    assert calls == ["one|other", "other", "other"]


def test_a_memory_within_a_memory_is_one_and_ends_with_the_outer(mean, calls: list[str]) -> None:
    one = run("one", 1.0, 3.0)
    with remembering():
        with remembering():
            mean(one)
        mean(one)
    assert calls == ["one"]
    mean(one)
    mean(one)
    assert calls == ["one"] * 3


def test_a_run_that_is_gone_is_not_taken_for_another(mean) -> None:
    with remembering():
        found = [float(mean(run("one", float(number))).loss) for number in range(50)]
    np.testing.assert_array_equal(found, range(50))


def test_each_has_a_copy_of_its_own(mean) -> None:
    one = run("one", 1.0, 3.0)
    with remembering():
        first = mean(one)
        first["loss"] = 7.0
        first.attrs["mine"] = True
        assert float(mean(one).loss) == 2.0
        assert not mean(one).attrs


def test_a_run_may_be_given_by_name(mean, calls: list[str]) -> None:
    one = run("one", 1.0, 3.0)
    assert float(mean(run=one).loss) == 2.0
    with remembering():
        assert [float(mean(run=one).loss), float(mean(one).loss)] == [2.0, 2.0]
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'run'"):
            mean(since=1)
    assert calls == ["one"] * 2


def test_what_fails_fails_again(mean, calls: list[str]) -> None:
    one = run("one", 1.0, 3.0)
    with remembering():
        for _ in range(2):
            with pytest.raises(ValueError, match="no such step"):
                mean(one, since=5)
    assert len(calls) == 2


def test_what_is_wrapped_is_described_as_before(mean) -> None:
    assert mean.__doc__ == "The mean from a step on."


@pytest.mark.long
def test_a_report_takes_its_claims_from_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figure, what was found and its tables all need them."""
    looked, accuracy = Counter(), STATISTICS["accuracy"]

    @wraps(accuracy)
    def counted(run: xr.DataTree) -> float:
        looked[id(run)] += 1
        return accuracy(run)

    monkeypatch.setitem(STATISTICS, "accuracy", counted)
    monkeypatch.setattr("figures.report.FIGURES", {"claims": FIGURES["claims"]})
    several = runs()
    write_report(several, tmp_path, records=[])
    assert looked == {id(run): 1 for run in several.values()}


def test_the_tables_take_each_runs_prunings_epochs_and_losses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tables and claims are about them. Each is found by one of these methods of xarray, on dims of its own."""
    done, original = Counter(), {name: getattr(xr.DataArray, name) for name in ("rolling", "sum")}
    to_dataframe = xr.Dataset.to_dataframe

    def rolling(of: xr.DataArray, *given: object, **windows: object) -> object:
        done["losses"] += (
            of.name == "loss" and of.dtype.kind == "f"
        )  # xarray counts what is known in windows of booleans
        return original["rolling"](of, *given, **windows)

    def summed(of: xr.DataArray, *given: object, **how: object) -> xr.DataArray:
        done["prunings"] += of.name == "removed" and not how
        return original["sum"](of, *given, **how)

    def as_rows(of: xr.Dataset) -> pd.DataFrame:
        done["epochs"] += "test_accuracy" in of
        return to_dataframe(of)

    monkeypatch.setattr(xr.DataArray, "rolling", rolling)
    monkeypatch.setattr(xr.DataArray, "sum", summed)
    monkeypatch.setattr(xr.Dataset, "to_dataframe", as_rows)
    several = runs()
    overview(several)
    assert done == dict.fromkeys(("losses", "prunings", "epochs"), len(several))
