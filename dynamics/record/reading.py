"""Opening a record: its metadata file is checked first, so that opening never runs a stranger's code.

Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr
from numcodecs import Blosc

from ..schema import COMPARED_BY, SCHEMA_VERSION
from .errors import AGAIN, RecordError, damaged, foreign, said
from .metadata import Metadata, chunk_keys, read_metadata


def open_run(path: str | os.PathLike) -> xr.DataTree:
    """Open a record as an :class:`xarray.DataTree`, lazily, also while it is being written.

    The same as ``xr.open_datatree(path)``, after checks that the path holds a record of this schema version, that it is
    complete as far as names and sizes of files tell, and that it names no codec other than a record's own.

    Raises:
        RecordError: there is nothing, something else, a record of another schema version, or a damaged one.
    """
    path = Path(path)
    check(path)
    try:
        return xr.open_datatree(path, engine="zarr", consolidated=True, zarr_format=2)
    except Exception as error:
        if chunk := _undecodable(path):
            raise damaged(chunk, error) from error
        raise foreign(path, said(error)) from error


@contextmanager
def named_damage(runs: Iterable[xr.DataTree]) -> Iterator[None]:
    """A context for reading records: if that fails because of damage, the error names the file and the record.

    Raises:
        RecordError: a chunk cannot be decoded.
    """
    try:
        yield
    except (RuntimeError, RecordError) as error:  # a RuntimeError is the codec's, when a column is first read
        cause = error if isinstance(error, RuntimeError) else error.__cause__
        for run in runs if isinstance(cause, RuntimeError) else ():
            if "source" in run.encoding and (chunk := _undecodable(Path(run.encoding["source"]))):
                raise damaged(chunk, cause) from error
        raise


def experiment(run: xr.DataTree) -> dict[str, Any]:
    """Configuration of the experiment that wrote the record; empty for any other training loop."""
    found = configured(run, "experiment")
    return found if found.keys() >= set(COMPARED_BY) else {}


def planned_epochs(run: xr.DataTree) -> int:
    """The number of epochs that the record's experiment has; 0 for any other training loop, where it is unknown."""
    return sum(experiment(run).get("epochs", ()))


def configured(run: xr.DataTree, name: str) -> dict[str, Any]:
    """The dictionary in an experiment's attribute of this name; empty if the attribute is someone else's or absent."""
    try:
        found = json.loads(run.attrs.get(name, "{}"))
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check(path: Path) -> Metadata:
    """Metadata of a record that can be read: ``steps/loss/.zarray`` → its description, ``.zattrs`` → attributes.

    Raises:
        RecordError: as :func:`open_run`.
    """
    while True:
        found = read_metadata(path)
        version = found.get(".zattrs", {}).get("schema_version", "none")
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"{path} has schema version {version!s:.20}, but this thetadot reads version {SCHEMA_VERSION}: "
                "open it with the thetadot that wrote it, or, if you trust it, with xr.open_datatree"
            )
        damage = next(_damage(path, found), None)
        if damage is None:
            return found
        if read_metadata(path) == found:  # else a writer dropped rows meanwhile: check again
            raise RecordError(f"{path} is damaged: {damage}; {AGAIN}")


def _damage(path: Path, metadata: Metadata) -> Iterator[str]:
    """Damage that names and sizes of files show: a missing chunk, or an array's last chunk cut short."""
    for key in metadata:
        if key.endswith("/.zarray"):
            folder = path / key.removesuffix("/.zarray")
            present = set(os.listdir(folder)) if folder.is_dir() else set()
            chunk = None
            for chunk in chunk_keys(metadata[key]["shape"], metadata[key]["chunks"]):
                if chunk not in present:
                    yield f"{folder.relative_to(path) / chunk} is missing"
                    break
            else:
                if chunk and (size := _cut_short(folder / chunk)):
                    yield f"{folder.relative_to(path) / chunk} has {size[0]} bytes of {size[1]}"


def _undecodable(path: Path) -> Path | None:
    """The first chunk of a record that its codec cannot read."""
    metadata = read_metadata(path)
    for key in metadata:
        if key.endswith("/.zarray"):
            for number in chunk_keys(metadata[key]["shape"], metadata[key]["chunks"]):
                chunk = path / key.removesuffix(".zarray") / number
                try:
                    Blosc().decode(chunk.read_bytes())
                except (OSError, RuntimeError, ValueError):
                    return chunk
    return None


def _cut_short(chunk: Path) -> tuple[int, int] | None:
    """Bytes that a chunk has and should have, or None if these agree; Blosc's header ends with the length."""
    with chunk.open("rb") as file:
        header, size = file.read(16), os.fstat(file.fileno()).st_size
    promised = int.from_bytes(header[12:16], "little")
    return None if len(header) == 16 and size == promised else (size, max(promised, 16))
