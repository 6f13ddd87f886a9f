"""Every snippet of the README runs as printed, in order, and every command is one that exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from snippets import run_snippets

import analysis.__main__
import dynamics.__main__
import figures.__main__
from dynamics.schema import markdown_table

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
MAINS = {"dynamics": dynamics.__main__.main, "analysis": analysis.__main__.main, "figures": figures.__main__.main}


def test_snippets_and_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    run_snippets(README)
    commands = re.findall(r"python -m (\w+)((?: [^\s`]+| \"[^\"]*\")+)", README)
    assert len(commands) == 7
    for package, arguments in commands:
        assert MAINS[package](shlex.split(arguments)) == 0
    assert (tmp_path / "out" / "drawn" / "report.html").exists()


def test_the_table_is_the_schemas() -> None:
    assert markdown_table() in README
