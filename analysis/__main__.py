"""``python -m analysis RUN...``: print what the runs came to, and theory against measurement."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentError, ArgumentParser

from .record import open_runs
from .tables import agreement_table, brief_table, format_table, outcome_table


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m analysis",
        description="Print what the recorded runs came to, and how well theory predicts what was measured: median "
        "relative error, slope of measured on predicted, R² and rank correlation, in first and second order.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="records, e.g. out/demo/*.zarr")
    parser.add_argument("--brief", action="store_true", help="one table: what the runs came to, and median errors only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 with one line on stderr for what the user can mend."""
    try:
        settings = _parser().parse_args(arguments)
        runs = open_runs(settings.runs)
        if settings.brief:
            print(format_table(brief_table(runs)))
            return 0
        outcomes, agreements = format_table(outcome_table(runs)), format_table(agreement_table(runs))
        print(f"What the runs came to\n\n{outcomes}\n\nTheory against measurement\n\n{agreements}")
    except (ArgumentError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
