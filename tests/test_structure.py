"""Rules worth keeping: imports point one way, everything public is documented, dependencies are said once."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("dynamics", "analysis", "figures")
OF_RECORDS = {"dynamics.command_line", "dynamics.places", "dynamics.schema", "dynamics.words"} | {  # without torch
    f"dynamics.record.{name}" for name in ("errors", "files", "metadata", "reading")
}
MAY_IMPORT = {
    "dynamics": {"dynamics"},
    "analysis": {"analysis", *OF_RECORDS},
    "figures": {"figures", "analysis", *OF_RECORDS},
}
FLOORS = {  # from the ground: whatever stands on one may import what stands below it
    "dynamics": (
        {"errors", "float64", "models", "places", "schema", "warning", "words"},
        {"quantities"},
        {"command_line", "data", "hardware", "network", "record"},
        {"curvature"},
        {"probing"},
        {"loop"},
        {"measuring"},
        {"recording"},
        {"pruning"},
        {"experiments", "frameworks"},
        {"__init__", "__main__"},
    ),
    "dynamics.pruning": (
        {"call", "candidates", "schedule", "selection"},
        {"cost", "importance", "invariance", "latency", "protocol", "shrinking"},
        {"curve", "plan"},
        {"pruner"},
        {"__init__"},
    ),
}
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.parts[: -node.level] if node.level else ()
            module = ".".join([*here, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    package = path.parts[0]
    for name in imported(path):
        if name.split(".")[0] in PACKAGES:
            assert any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_IMPORT[package]), name
        if package != "dynamics":
            assert name.split(".")[0] not in ("torch", "torchvision")


def room_in(building: str, path: Path) -> str:
    """The room of a building in which a file stands; "" if that is elsewhere."""
    inside = ".".join(path.with_suffix("").parts)
    return inside.removeprefix(f"{building}.").split(".")[0] if inside.startswith(f"{building}.") else ""


@pytest.mark.parametrize("building", FLOORS)
@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "dynamics"], ids=str)
def test_rooms_import_from_the_floors_below(path: Path, building: str) -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[building]) for room in rooms}
    if own := room_in(building, path):
        for name in imported(path):
            room = room_in(building, Path(*name.split(".")))
            if room in floor_of and room != own:
                assert floor_of[room] < floor_of[own], name


@pytest.mark.parametrize("building", FLOORS)
def test_every_room_has_a_floor(building: str) -> None:
    rooms = {room for path in FILES if (room := room_in(building, path))}
    assert rooms == set.union(*FLOORS[building])


def test_a_record_is_studied_without_torch() -> None:
    code = "import analysis, figures, dynamics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_completion_and_help_know_all_public_names(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))


def test_help_asks_for_no_recorder_where_there_is_no_torch() -> None:
    """``help`` reads all that ``dir`` lists, and would stop at what cannot be imported."""
    code = (
        "import sys, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); sys.modules['torch'] = None\n"
        "import dynamics, pydoc; pydoc.render_doc(dynamics)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=str)
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def requirements(project: dict) -> list[Requirement]:
    """What the project needs, and all that it may: ``make test`` installs every extra."""
    return [Requirement(one) for one in chain(project["dependencies"], *project["optional-dependencies"].values())]


def test_conda_and_pip_install_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = {requirement.name: str(requirement.specifier) for requirement in requirements(project)}
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (only_pip,) = [package["pip"] for package in packages if not _text(package)]
    conda = [*filter(_text, packages), *(package for package in only_pip if not package.startswith("-"))]
    conda = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, conda)}
    conda["torch"] = conda.pop("pytorch")
    of_an_extra = {"docstring_parser", "typeshed_client"}  # what pip's jsonargparse[signatures] brings
    assert conda.pop("python") == project["requires-python"]
    assert {name: version for name, version in conda.items() if name not in of_an_extra | {"pip"}} == pip


def test_what_was_tested_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        Requirement(line).name.lower(): Requirement(line) for line in (ROOT / "constraints.txt").read_text().split()
    }
    for requirement in requirements(project):
        (pin,) = pins[requirement.name.lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version)


def _text(package: object) -> bool:
    return isinstance(package, str)
