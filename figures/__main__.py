"""``python -m figures RUN... -o DIR``: draw every figure that the records allow, and the report."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
from jsonargparse import ArgumentParser

from analysis import open_runs
from analysis.progress import progress_shown
from dynamics.command_line import exit_status
from dynamics.record.reading import named_damage

from .catalogue import FIGURES
from .report import write_report


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m figures",
        description="Draw every figure that the records allow, as PNG and PDF, and report.html, which holds them all. "
        f"The figures: {', '.join(FIGURES)}.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="records, e.g. out/demo/*.zarr or sweep.zarr.zip")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the figures and report.html")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(partial(_execute, arguments))


def _execute(arguments: list[str] | None) -> None:
    settings = _parser().parse_args(arguments)
    folder = Path(settings.output)
    mpl.use("agg")
    records = [os.path.relpath(path, folder) for path in settings.runs]
    with progress_shown():
        runs = open_runs(settings.runs)
        with named_damage(runs.values()):
            page = write_report(runs, folder, records=records)
    print(f"drew the figures in {folder}; see {page}")


if __name__ == "__main__":
    sys.exit(main())
