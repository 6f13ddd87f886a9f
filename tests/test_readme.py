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


COMMANDS = re.findall(r"python -m (\w+)((?: [^\s`]+| \"[^\"]*\")+)", README)
OF_SNIPPETS = [command for command in COMMANDS if "out/run.zarr" in command[1]]  # which make that record


@pytest.mark.long
def test_snippets_run_as_printed_and_commands_on_what_they_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    run_snippets(README + RECORD)
    assert len(OF_SNIPPETS) == 2
    run_commands(OF_SNIPPETS)
    assert (tmp_path / "out" / "drawn" / "report.html").exists()


@pytest.mark.long
def test_the_other_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    others = [command for command in COMMANDS if command not in OF_SNIPPETS]
    assert len(others) == 5
    run_commands(others)
    assert (tmp_path / "out" / "magnitude" / "report.html").exists()


def run_commands(commands: list[tuple[str, str]]) -> None:
    for package, arguments in commands:
        assert MAINS[package](shlex.split(arguments)) == 0


def test_the_table_is_the_schemas() -> None:
    lacking = [row for row in markdown_table().splitlines() if row not in RECORD.splitlines()]
    assert not lacking, "docs/record.md is to have these rows of the table:\n" + "\n".join(lacking)
    as_is = markdown_table() in RECORD
    assert as_is, "docs/record.md is to have the rows of the table in the schema's order, and no others"


def test_every_group_is_told_of() -> None:
    for node, dims in NODES.items():
        assert f"| `/{node}` | {', '.join(dims)} |" in RECORD
