"""Every snippet of the README and of docs/record.md runs as printed, in order, and every command is one that exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from snippets import run_snippets

import analysis.__main__
import dynamics.__main__
import figures.__main__
from dynamics.schema import NODES, markdown_table

ROOT = Path(__file__).parents[1]
README, RECORD = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/record.md"))
MAINS = {"dynamics": dynamics.__main__.main, "analysis": analysis.__main__.main, "figures": figures.__main__.main}


def test_snippets_and_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    run_snippets(README + RECORD)
    commands = re.findall(r"python -m (\w+)((?: [^\s`]+| \"[^\"]*\")+)", README)
    assert len(commands) == 7
    for package, arguments in commands:
        assert MAINS[package](shlex.split(arguments)) == 0
    assert (tmp_path / "out" / "drawn" / "report.html").exists()


def test_the_table_is_the_schemas() -> None:
    assert markdown_table() in RECORD, f"docs/record.md is to have this table:\n{markdown_table()}"


def test_every_group_is_told_of() -> None:
    for node, dims in NODES.items():
        assert f"| `/{node}` | {', '.join(dims)} |" in RECORD
