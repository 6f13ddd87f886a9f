"""docs/results.md says what the records in docs/records say: its tables, and its pictures' names."""

import re
from pathlib import Path

import pandas as pd
import pytest

import analysis
from analysis.overview import overview
from analysis.typeset import as_markdown
from figures import FIGURES, claim

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parts() -> dict[str, pd.DataFrame | list[str]]:
    return overview(analysis.open_runs([str(DOCS / "records" / "laptop.zarr.zip")]))


def test_its_tables_are_those_of_the_records(parts: dict[str, pd.DataFrame | list[str]]) -> None:
    tables = [part for part in parts.values() if isinstance(part, pd.DataFrame)]
    assert len(tables) == 5
    assert all(as_markdown(table) in PAGE for table in tables)
    assert len(re.findall(r"^\| --- ", PAGE, re.MULTILINE)) == len(tables)


def test_its_pictures_are_figures_with_their_claims() -> None:
    shown = re.findall(r"!\[(.*)\]\(results/(\w+)\.png\)", PAGE)
    assert shown
    for text, name in shown:
        assert text == claim(name)
        assert (DOCS / "results" / f"{name}.png").is_file()
        assert name in FIGURES
