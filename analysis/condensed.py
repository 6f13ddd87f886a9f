"""Many records in one small file, from which tables, claims and figures are made as from the records themselves."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numcodecs import Blosc

from dynamics.places import check_folder
from dynamics.record.errors import RecordError
from dynamics.record.files import replace
from dynamics.record.metadata import METADATA, Metadata, checked_metadata, chunk_keys
from dynamics.schema import NODES, SCHEMA_VERSION, SPEEDS, STUDIES
from dynamics.words import counted

from .given import check_path
from .prunings import prunings
from .runs import Runs, check_runs

SUFFIX = ".zarr.zip"

_SUMMED = ("steps", "curvature")
_ROUNDED = ("steps", "units", "scores")
_EXACT = ("param_sqnorm",)
_CODEC = Blosc(cname="zstd", clevel=9, shuffle=Blosc.SHUFFLE)


def condense(runs: Runs, path: str | Path) -> Path:
    """Write runs into one file ``*.zarr.zip``, from which :func:`expand` restores them.

    =====================  ======================================================================================
    /steps and /curvature  of the whole network: summed over ``layer``, whose single entry is "network"
    /pruning /units        complete
    /epochs                complete
    /curve /scores ...     of the runs that keep their layers, see below
    groups of your own     left out
    numbers                in single precision, in which networks are trained, in /steps and for the filters' scores,
                           where it can represent them; ‖θ‖², whose change over a step is a small difference of large
                           numbers, and all others are kept as they were, because their differences are compared with
                           predictions
    attributes             all: they say where each record comes from
    =====================  ======================================================================================

    Layers are kept in the first pruned run, whose layers are drawn, in the first run with the most studies, and where
    they cannot be summed because their learning rates differ. Rows of runs with the same layers share one array, in
    which ``run`` says whose they are: a hundred runs take a few hundred arrays.

    Raises:
        ValueError: the runs are not given by label, or the file's name has another ending.
        IsADirectoryError, NotADirectoryError, PermissionError: the file cannot be written there.
    """
    check_runs(runs)
    check_path(path)
    path = Path(path)
    if not path.name.endswith(SUFFIX):
        raise ValueError(
            f"condense needs records and a file named *{SUFFIX}, got {counted(len(runs), 'record')} and {path}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: condensed records are a single file, such as out/sweep{SUFFIX}")
    check_folder(path.parent, "condensed records", f"out/sweep{SUFFIX}")
    tree = xr.DataTree.from_dict(_stacked(runs))
    names = [{"name": label, "attributes": dict(run.attrs)} for label, run in runs.items()]
    tree.attrs = {"schema_version": SCHEMA_VERSION, "runs": json.dumps(names)}
    encoding = {
        group.path: {name: {"chunks": values.shape, "compressors": _CODEC} for name, values in group.variables.items()}
        for group in tree.children.values()
    }
    files: dict = {}
    with zarr.config.set({"array.write_empty_chunks": True}):  # so that an absent chunk is a lost one
        tree.to_zarr(zarr.storage.MemoryStore(files), zarr_format=2, consolidated=True, encoding=encoding)
    _write(path, {name: content.to_bytes() for name, content in files.items()})
    return path


def expand(path: str | Path) -> dict[str, xr.DataTree]:
    """The runs in a file that :func:`condense` wrote, in memory, under the names they had.

    Raises:
        RecordError: there is no such file, or it is of another kind, of another schema version, or damaged.
        ValueError: ``path`` is no path.
    """
    check_path(path)
    path = Path(path)
    named = _names(path, _check(path))
    with zarr.storage.ZipStore(path, mode="r") as store:
        opened: Any = store  # which xarray takes, but its stubs do not
        tree = xr.open_datatree(opened, engine="zarr", consolidated=True, zarr_format=2, chunks=None).load()
    nodes = {name: {"/": xr.Dataset(attrs=attributes)} for name, attributes in named.items()}
    nodes = {name: of_run | {node: xr.Dataset() for node in NODES} for name, of_run in nodes.items()}
    for group, stack in tree.children.items():
        node = group.partition(".")[0]
        stacked = stack.to_dataset()
        rows, owner = stacked.drop_vars("run"), stacked["run"].values
        for number, of_run in enumerate(nodes.values()):
            if (owner == number).any():
                of_run[node] = rows.isel({NODES[node][0]: np.flatnonzero(owner == number)})
    return {name: xr.DataTree.from_dict(of_run) for name, of_run in nodes.items()}


def _stacked(runs: Runs) -> dict[str, xr.Dataset]:
    """``node.0``, ``node.1``, ...: each the rows of a node, from all runs in which its arrays are alike."""
    whole = _whole(runs)
    stacks: dict[tuple, list[xr.Dataset]] = {}
    for number, (label, run) in enumerate(runs.items()):
        for node, rows in _condensed(run, layers=label in whole):
            index = NODES[node][0]
            owned = rows.assign_coords(run=(index, np.full(rows.sizes[index], number)))
            stacks.setdefault((node, _layout(rows, index)), []).append(owned)
    numbers: dict[str, int] = {}
    named = {}
    for (node, _), parts in stacks.items():
        number = numbers[node] = numbers.get(node, -1) + 1
        stack = xr.concat(parts, NODES[node][0], coords="minimal", compat="override", join="exact")
        named[f"{node}.{number}"] = stack.assign_coords(_texts_of_fixed_size(stack))
    return named


def _texts_of_fixed_size(rows: xr.Dataset) -> dict[Hashable, tuple[tuple[Hashable, ...], np.ndarray]]:
    """The coordinates that hold text, as fixed-size strings: concatenation may have turned them into objects."""
    return {name: (of.dims, of.values.astype(str)) for name, of in rows.coords.items() if of.dtype.kind in "OTU"}


def _whole(runs: Runs) -> set[str]:
    """Labels of the runs whose layers and studies are kept: those that figures of a single run show."""
    studies = {label: sum(bool(run[node].data_vars) for node in STUDIES if node in run.children)
               for label, run in runs.items()}  # fmt: skip
    pruned = [label for label, run in runs.items() if len(prunings(run))]
    candidates = pruned or list(runs)
    return {candidates[0], max(candidates, key=studies.get)}


def _condensed(run: xr.DataTree, *, layers: bool) -> Iterator[tuple[str, xr.Dataset]]:
    for node, child in run.children.items():
        if node in NODES and child.data_vars and (layers or node not in STUDIES):
            rows = child.to_dataset().load()
            if node in _SUMMED and not layers and _moves_as_one(run):
                rows = _network(rows)
            yield node, rows.map(_rounded, keep_attrs=True) if node in _ROUNDED else rows


def _moves_as_one(run: xr.DataTree) -> bool:
    """Whether all layers that move have the same learning rate at every step, so that sums over layers lose nothing."""
    rows = run["steps"].to_dataset()
    moves = rows.update_sqnorm != 0 if "update_sqnorm" in rows else True
    for name in SPEEDS:
        if name in rows:
            speed = rows[name].where((rows[name] != 0) | moves)
            unknown = rows[name].isnull()
            if not unknown.all() and (unknown.any() or not ((speed.max("layer") == speed.min("layer")) | ~moves).all()):
                return False
    return True


def _network(rows: xr.Dataset) -> xr.Dataset:
    """The rows summed over layers, as those of a single layer, "network"."""
    summed = rows.map(
        lambda values: (
            values
            if "layer" not in values.dims
            else (values.max("layer") if values.name in SPEEDS else values.sum("layer", skipna=False))
        ),
        keep_attrs=True,
    )
    layered = [name for name in rows if "layer" in rows[name].dims]
    one = {name: summed[name].expand_dims(layer=["network"], axis=1) for name in layered}
    return summed.drop_vars("layer", errors="ignore").assign(one)


def _rounded(values: xr.DataArray) -> xr.DataArray:
    if values.dtype != np.float64 or values.name in _EXACT:
        return values
    sizes, single = np.abs(values.values[np.isfinite(values)]), np.finfo(np.float32)
    holds = (sizes == 0) | ((sizes >= single.tiny) & (sizes <= single.max))
    return values.astype(np.float32) if holds.all() else values


def _layout(rows: xr.Dataset, index: str) -> str:
    """A key for rows that fit into one array: names, types, sizes and labels of all dimensions but the first."""
    variables = [(name, values.dtype.str, values.dims) for name, values in sorted(rows.variables.items())]
    sizes = [(dim, size) for dim, size in sorted(rows.sizes.items()) if dim != index]
    labels = [values.values.tolist() for _, values in sorted(rows.coords.items()) if index not in values.dims]
    return json.dumps([variables, sizes, labels])


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a zip file whose bytes depend on its content alone; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    replace(path, buffer.getbuffer())


def _check(path: Path) -> Metadata:
    """The file's metadata, after a check that the file is complete and safe to read."""
    if not path.exists():
        raise RecordError(f"no records at {path}: give a file that `python -m analysis condense RUN... -o FILE` wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names, text = archive.testzip(), set(archive.namelist()), archive.read(METADATA)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(
            f"{path} is not a file of condensed records, or is damaged ({reason}); copy it again"
        ) from error
    if damaged:
        raise RecordError(f"{path} is damaged: the checksum of {damaged} is wrong; copy the file again")
    found = checked_metadata(path, text)
    version = found.get(".zattrs", {}).get("schema_version", "none")
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {version!s:.20}, but this thetadot reads version {SCHEMA_VERSION}: condense "
            "the records again"
        )
    for key, entry in found.items():
        folder, _, leaf = key.rpartition("/")
        if leaf == ".zarray":
            for chunk in chunk_keys(entry["shape"], entry["chunks"]):
                if f"{folder}/{chunk}" not in names:
                    raise RecordError(f"{path} is damaged: {folder}/{chunk} is missing; copy the file again")
    return found


def _names(path: Path, metadata: Metadata) -> dict[str, dict]:
    """Attributes of each run by its name, in the order of ``run``."""
    try:
        listed = [dict(entry) for entry in json.loads(metadata[".zattrs"]["runs"])]
        names = {entry.pop("name"): dict(entry.get("attributes", entry)) for entry in listed}
        groups = {key.partition("/")[0].partition(".")[0] for key in metadata if "/" in key}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is not a file of condensed records: it does not name its runs") from error
    if len(names) != len(listed) or not groups <= NODES.keys():
        raise RecordError(f"{path} is not a file of condensed records: it contains what `condense` never writes")
    return names
