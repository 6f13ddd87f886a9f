"""A command over many runs says on a terminal how far it is, and leaves no trace of that."""

import io
import re
import sys
from pathlib import Path

import pytest
from synthetic_runs import record, runs

import analysis
import figures.__main__
from analysis.__main__ import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_each_pass_over_the_runs_and_nothing_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analysis.__main__.open_runs", lambda paths: runs())
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["runs"]) == 0
    bars = terminal.getvalue().split("\r")
    assert [name for name in dict.fromkeys(re.findall(r"(\w+):", terminal.getvalue())) if name.isalpha()] == [
        "accuracy", "convergence", "theory", "claims",
    ]  # fmt: skip
    assert "0/15" in terminal.getvalue()
    assert not "".join(bars[-2:]).strip()
    assert "\r" not in capsys.readouterr().out


@pytest.mark.long
def test_so_it_does_of_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("figures.__main__.open_runs", lambda paths: {"run": record("magnitude", 0)})
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert figures.__main__.main(["run", "-o", str(tmp_path)]) == 0
    assert f"figures:   0%|          | 0/{len(figures.FIGURES)}" in terminal.getvalue()
    assert not "".join(terminal.getvalue().split("\r")[-2:]).strip()


def test_a_file_gets_no_bars_nor_does_a_library_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analysis.__main__.open_runs", lambda paths: runs())
    assert main(["runs"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    analysis.claims(runs())
    assert terminal.getvalue() == ""
