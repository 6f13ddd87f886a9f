"""``python -m dynamics run | sweep | protocols | show``: train, prune and record from the command line."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from .command_line import exit_status, printing, status_of, termination_interrupts
from .data import DataError
from .errors import one_line
from .experiments.experiment import Experiment
from .experiments.grid import grid
from .experiments.protocols import Comparison, compare
from .experiments.running import run
from .record.reading import named_damage, open_run
from .record.summary import summary


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dynamics",
        description="Train and prune a network and record the dynamics, in xarray's Zarr format.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("run", _run_parser(), help="run one experiment and record it")
    commands.add_subcommand("sweep", _sweep_parser(), help="run many experiments")
    commands.add_subcommand("protocols", _protocols_parser(), help="prune a fresh network under every protocol")
    show = ArgumentParser(description="Print what a record holds, in a few lines.", exit_on_error=False)
    show.add_argument("record", help="a record, e.g. out/run.zarr")
    commands.add_subcommand("show", show, help="print what a record holds")
    for name, command in commands.choices.items():  # there are no options before its name
        command.prog = f"{parser.prog} {name}"
    return parser


def _run_parser() -> ArgumentParser:
    one = ArgumentParser(description="Run one experiment: train, prune in rounds, train on.", exit_on_error=False)
    one.add_argument("--config", action=_File, help="YAML file with any of the settings below; flags override it.")
    one.add_argument("-o", "--output", required=True, help="where the record goes: a new folder, such as out/run.zarr")
    one.add_argument(
        "--download", type=bool, nargs="?", const=True, default=False,
        help="Let torchvision download a data set that is not on disk.",
    )  # fmt: skip
    one.add_class_arguments(Experiment, skip={"download"}, help="settings of the experiment")
    return one


def _protocols_parser() -> ArgumentParser:
    several = ArgumentParser(
        description="Prune the same fresh network in rounds, without training: by the default protocol, with each "
        "quirk of the paper's code alone, and as the paper's code does it. `python -m analysis "
        "protocol-diff` prints what differs.",
        exit_on_error=False,
    )
    several.add_argument("-o", "--output", required=True, help="folder for the records, one per protocol")
    several.add_class_arguments(Comparison, help="settings of the comparison")
    return several


def _sweep_parser() -> ArgumentParser:
    many = ArgumentParser(
        description="Run the grid of experiments that the lists in a YAML file span, on Dask. What is already "
        "recorded is skipped; what was interrupted continues from its last epoch.",
        exit_on_error=False,
    )
    many.add_argument(
        "configuration", help="YAML file with settings of `run`, where a list stands for each of its values in turn"
    )
    many.add_argument("-o", "--output", required=True, help="folder for the records")
    many.add_argument(
        "--workers", type=int | None, default=None,
        help="Processes on this machine, with one thread each; 0 runs everything in this one. The default is one per "
        "GPU, or one per core if the runs use none.",
    )  # fmt: skip
    many.add_argument(
        "--scheduler", type=str | None, default=None,
        help="Address of a Dask scheduler whose workers run the experiments, such as tcp://10.0.0.1:8786.",
    )  # fmt: skip
    return many


class _Loader(yaml.SafeLoader):
    """YAML as jsonargparse reads it for `run`: 1e-4 is a number. A setting stands once in a mapping, as YAML says.

    What is in itself, by an anchor, is refused: there is no end to it.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping as it stands there, before others are merged into it.

        Raises:
            MarkedYAMLError: it has a key twice, of which PyYAML would take the last.
        """
        node, names = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if (name := str(key.value)) in names:
                raise yaml.MarkedYAMLError(problem=f"{name} is set twice", problem_mark=key.start_mark)
            names.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """What a node stands for, whole at once."""
        return super().construct_object(node, deep=True)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _configuration(path: str) -> dict:
    if not Path(path).is_file():
        there = f"{path} is not a plain file" if Path(path).exists() else f"no configuration file {path}"
        raise FileNotFoundError(f"{there}: give a YAML file, e.g. configs/demo.yaml")
    content = Path(path).read_bytes()
    try:
        settings = yaml.load(content.decode(), _Loader)
    except Exception as error:  # PyYAML lets through what Python says of a date, a number or a depth that cannot be
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings like `measure: magnitude`, got {type(settings).__name__}")
    return settings


def _experiments(path: str) -> list[Experiment]:
    """The grid that a file spans; what is wrong with its settings is said with the file's name."""
    settings = _configuration(path)
    try:
        return grid(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


class _File(ActionConfigFile):
    """A file of settings for `run`, which is to be as good YAML as a sweep's."""

    def __call__(self, parser: Any, settings: Any, path: Any, option: str | None = None) -> None:
        """Read it, after a check: jsonargparse would take the last of a setting that stands twice."""
        _configuration(path)
        super().__call__(parser, settings, path, option)


def _execute(arguments: list[str] | None) -> int:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    command = parsed.command
    if parsed[command].get("output") == "":
        raise ValueError("-o/--output is empty: give a folder, such as out/sweep, or . for this one")
    if command == "run":
        settings = parsed.run
        experiment = Experiment(**{name: settings[name] for name in Experiment.__dataclass_fields__})
        path = run(experiment, settings.output)
        print(f"recorded {path}; see it with: python -m analysis {quote(str(path))}")
    elif command == "sweep":
        return _sweep(parsed.sweep)
    elif command == "protocols":
        return _protocols(parsed.protocols)
    else:
        with printing():
            opened = open_run(parsed.show.record)
            with named_damage([opened]):
                print(summary(opened))
    return 0


def _sweep(settings: Namespace) -> int:
    """Run a grid; 1 if not all of it is recorded, with a line on stderr for each run that failed."""
    from .experiments.sweep import failure, sweep  # and with it Dask, which no other command needs

    experiments, folder = _experiments(settings.configuration), Path(settings.output)
    with termination_interrupts():
        failed = sweep(experiments, folder, workers=settings.workers, scheduler=settings.scheduler)
    for name, error in failed.items():
        print(failure(name, error), file=sys.stderr)
    recorded = len(experiments) - len(failed)
    if recorded:
        runs, them = ("run", "it") if recorded == 1 else ("runs", "them")
        see = f"python -m analysis {quote(str(folder))}/*.zarr"
        print(f"recorded {recorded} {runs} in {folder}; see {them} with: {see}")
    return 1 if failed else 0


def _protocols(settings: Namespace) -> int:
    """Compare protocols; if it is interrupted, half of a comparison is not kept."""
    comparison = Comparison(**{name: settings[name] for name in Comparison.__dataclass_fields__})
    folder = Path(settings.output)
    try:
        with termination_interrupts():
            paths = compare(comparison, folder)
    except KeyboardInterrupt as interrupt:
        print("interrupted; nothing is kept", file=sys.stderr)
        return status_of(interrupt)
    print(f"recorded {len(paths)} protocols in {folder}")
    quoted = quote(str(folder))
    print(f"see them with: python -m analysis protocol-diff {quoted}/default.zarr {quoted}/*.zarr")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if some of several runs failed."""
    said = "interrupted; what was recorded so far is kept, and the same command continues it"
    return exit_status(partial(_execute, arguments), mistakes=(DataError,), interrupted=said)


if __name__ == "__main__":
    sys.exit(main())
