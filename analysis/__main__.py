"""``python -m analysis RUN...``: print the outcome of runs, and theory against measurement.

``python -m analysis protocol-diff [RUN...]``: compare what protocols prune in the same rounds.

``python -m analysis condense RUN... -o FILE``: write the runs into one small file that stands for them all.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from functools import partial

from jsonargparse import ArgumentParser

from dynamics.command_line import exit_status, printing
from dynamics.record.reading import named_damage
from dynamics.words import counted

from .condensed import SUFFIX, condense
from .opening import open_runs
from .overview import overview
from .progress import progress_shown
from .protocol import fresh_runs, protocol_table
from .typeset import FORMATS, as_text, page

# Settings of `python -m dynamics protocols` that `protocol-diff` passes on, with what they are there if not given.
_FRESH = {
    "model": "resnet56", "measure": "gradient_norm_increase", "sparsity": 0.75, "rounds": 5, "width": 0.25,
}  # fmt: skip


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m analysis",
        description="Print the outcome of recorded runs, and how well theory predicts what was measured: median "
        "relative error, slope of measured on predicted, R² and rank correlation, in first and second order. For runs "
        "with several seeds: accuracy and convergence by model, data, rounds and measure, and a verdict on each claim "
        "of the paper's abstract. Two more commands, each with its own --help: `python -m analysis condense` writes "
        "many records into one small file *.zarr.zip, and `protocol-diff` compares what protocols prune.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="records, e.g. out/demo/*.zarr or sweep.zarr.zip")
    parser.add_argument("--brief", action="store_true", help="print only the outcome, and median errors or verdicts")
    parser.add_argument("--format", default="text", help=f"one of {', '.join(FORMATS)}")
    return parser


def _protocol_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m analysis protocol-diff",
        description="Compare what the default protocol, each quirk alone and the paper's code prune: sparsity asked "
        "for and reached, layers emptied, and filters that differ from those of the first record.",
        exit_on_error=False,
    )
    parser.add_argument(
        "runs", nargs="*", default=SUPPRESS, metavar="RUN",
        help="records of the same rounds under different protocols; without any, a small fresh network is pruned now",
    )  # fmt: skip
    for name, default in _FRESH.items():
        parser.add_argument(f"--{name}", default=SUPPRESS, help=f"{name} for the fresh network (default: {default})")
    return parser


def _protocol_diff(arguments: list[str]) -> None:
    settings = _protocol_parser().parse_args(arguments)
    runs = settings.pop("runs", [])
    fresh = [f"--{name}={value}" for name, value in vars(settings).items()]
    if runs and fresh:
        raise ValueError(f"{' '.join(fresh)} is for a fresh network: give either that or records")
    opened = open_runs(runs) if runs else fresh_runs(fresh)
    with named_damage(opened.values()):
        print(as_text(protocol_table(opened)))


def _condense_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m analysis condense",
        description="Write records into one small file that all tables, claims and figures can be made from: steps are "
        "summed over layers and kept in single precision; one or two runs keep their layers and studies.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="records, e.g. out/sweep/*.zarr")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=f"the file, *{SUFFIX}")
    return parser


def _condense(arguments: list[str]) -> None:
    settings = _condense_parser().parse_args(arguments)
    runs = open_runs(settings.runs)
    with named_damage(runs.values()):
        path = condense(runs, settings.output)
    print(f"wrote {counted(len(runs), 'run')} to {path}, {path.stat().st_size / 1e6:.2f} MB")


def _overview(arguments: list[str]) -> None:
    settings = _parser().parse_args(arguments)
    with progress_shown():
        runs = open_runs(settings.runs)
        with named_damage(runs.values()):
            parts = overview(runs, brief=settings.brief)
    print(page(parts, settings.format))


_COMMANDS = {"protocol-diff": _protocol_diff, "condense": _condense}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(partial(_execute, sys.argv[1:] if arguments is None else arguments))


def _execute(given: list[str]) -> None:
    with printing():
        if given and given[0] in _COMMANDS:
            _COMMANDS[given[0]](given[1:])
        else:
            _overview(given)


if __name__ == "__main__":
    sys.exit(main())
