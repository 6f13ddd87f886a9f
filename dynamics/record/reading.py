"""Opening a record: what is in its one file of metadata is checked first, so that opening never runs a stranger's code.

A Zarr array names the codecs its bytes go through, and one of them unpickles. Only the codec and the types that a
record is written with are let through. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr
from numcodecs import Blosc

from ..errors import one_line
from ..schema import COMPARED_BY, SCHEMA_VERSION

METADATA = ".zmetadata"
CODEC = "blosc"
_DTYPE = re.compile(r"[<>|][biufU]\d+")
_NAME = re.compile(r"(?!\.)[^/\\\0]+")  # a folder, inside the one it is looked for in
_AGAIN = "copy the record again from where it was written"

Metadata = dict[str, dict[str, Any]]


class RecordError(ValueError):
    """A path that is not a record this version can read. The message is one line."""


def open_run(path: str | os.PathLike) -> xr.DataTree:
    """Open a record as an :class:`xarray.DataTree`, lazily, also while it is written.

    The same as ``xr.open_datatree(path)`` after checks: that the path holds a record of this schema version, complete
    as far as names and sizes of files tell, which names no codec but a record's own.

    Raises:
        RecordError: nothing there, not a record, one of another schema version, or a damaged one.
    """
    path = Path(path)
    check(path)
    try:
        return xr.open_datatree(path, engine="zarr", consolidated=True, zarr_format=2)
    except Exception as error:
        if chunk := _undecodable(path):
            raise damaged(chunk, error) from error
        raise _foreign(path, _one_line(error)) from error


@contextmanager
def named_damage(runs: Iterable[xr.DataTree]) -> Iterator[None]:
    """Inside, what is opened is read. Where that fails for damage, it is looked for in which file of which record.

    Raises:
        RecordError: a chunk cannot be decoded.
    """
    try:
        yield
    except (RuntimeError, RecordError) as error:  # the codec raises the one, wherever a column is first looked at
        cause = error if isinstance(error, RuntimeError) else error.__cause__
        for run in runs if isinstance(cause, RuntimeError) else ():
            if "source" in run.encoding and (chunk := _undecodable(Path(run.encoding["source"]))):
                raise damaged(chunk, cause) from error
        raise


def experiment(run: xr.DataTree) -> dict[str, Any]:
    """Configuration of the experiment that wrote the record; empty for a loop that someone instrumented."""
    found = configured(run, "experiment")
    return found if found.keys() >= set(COMPARED_BY) else {}


def configured(run: xr.DataTree, name: str) -> dict[str, Any]:
    """What an experiment's record says under the name; empty where someone else's attribute has it."""
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
                f"{path} has schema version {version!s:.20}, this thetadot reads version "
                f"{SCHEMA_VERSION}: open it with the thetadot that wrote it, or, if you trust it, with xr.open_datatree"
            )
        damage = next(_damage(path, found), None)
        if damage is None:
            return found
        if read_metadata(path) == found:  # else a writer took rows back meanwhile
            raise RecordError(f"{path} is damaged: {damage}; {_AGAIN}")


def read_metadata(path: Path) -> Metadata:
    """What was last committed, after a check that it is harmless to obey.

    Raises:
        RecordError: it is missing, damaged, or holds what no record holds.
    """
    if not path.exists():
        raise RecordError(f"no record at {path}: give the path of a run, e.g. one that `python -m dynamics run` wrote")
    if path.is_file() and path.suffix == ".zip":
        raise _foreign(path, "analysis.open_runs and `python -m analysis` read condensed records, named *.zarr.zip")
    if (path / "zarr.json").exists():
        raise _foreign(path, "it is a Zarr format 3 store, a record is format 2")
    try:
        text = (path / METADATA).read_bytes()
    except OSError as error:
        if any(path.glob(f"*/{METADATA}")):
            raise RecordError(f"{path} is a folder of records, not one itself: give {path}/*.zarr") from error
        raise _foreign(path, f"it has no {METADATA} ({error.strerror})") from error
    return checked_metadata(path, text)


def checked_metadata(path: Path, text: bytes) -> Metadata:
    """What a file of metadata says, after a check that it is harmless to obey.

    Raises:
        RecordError: it is damaged, or holds what no record holds.
    """
    try:
        found = json.loads(text)["metadata"]
        for key, entry in found.items():
            *folders, leaf = key.split("/")
            depths = {".zgroup": (0, 1), ".zattrs": (0, 1, 2), ".zarray": (2,)}.get(leaf, ())
            if len(folders) not in depths or not all(map(is_name, folders)) or not isinstance(entry, dict):
                raise _foreign(path, f"{METADATA} has an entry {key!r:.60}")
            if leaf == ".zarray":
                _check_array(path, "/".join(folders), entry)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is damaged: {METADATA} cannot be read ({_one_line(error)}); {_AGAIN}") from error
    return found


def _check_array(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Let through only what a record is written with: numbers and texts of fixed size, compressed by Blosc."""
    compressor, filters, dtype = entry["compressor"], entry["filters"], entry["dtype"]
    if filters or not isinstance(compressor, dict) or compressor["id"] != CODEC:
        codecs = [codec.get("id") for codec in (compressor, *(filters or ())) if codec]
        raise _foreign(path, f"{name} is stored with codecs {codecs!r:.80}, a record only with {CODEC!r}")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise _foreign(path, f"{name} has the type {dtype!r:.60}, a record only numbers and texts of fixed size")
    shape, chunks = entry["shape"], entry["chunks"]
    whole = isinstance(shape, list) and isinstance(chunks, list) and all(type(n) is int for n in [*shape, *chunks])
    if not whole or not shape or shape[0] < 0 or chunks[0] < 1 or shape[1:] != chunks[1:]:
        raise _foreign(path, f"{name} has shape {shape!r:.60} and chunks {chunks!r:.60}")


def _damage(path: Path, metadata: Metadata) -> Iterator[str]:
    """What names and sizes of files show: a chunk that is missing, or an array's last chunk cut short."""
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


def is_name(name: str) -> bool:
    """Whether a group or a variable of a record may have the name."""
    return bool(_NAME.fullmatch(name))


def chunk_key(number: int, dimensions: int) -> str:
    """Name of the file of an array's chunk: rows are cut into chunks, the other dimensions are not."""
    return ".".join([str(number), *["0"] * (dimensions - 1)])


def chunk_keys(shape: list[int], chunks: list[int]) -> Iterator[str]:
    """Names of the files of an array, in the array's order."""
    return (chunk_key(number, len(shape)) for number in range(-(-shape[0] // chunks[0])))


def _cut_short(chunk: Path) -> tuple[int, int] | None:
    """Bytes that a chunk has and should have, where the two differ: Blosc's header ends with its length."""
    with chunk.open("rb") as file:
        header, size = file.read(16), os.fstat(file.fileno()).st_size
    promised = int.from_bytes(header[12:16], "little")
    return None if len(header) == 16 and size == promised else (size, max(promised, 16))


def _foreign(path: Path, reason: str) -> RecordError:
    return RecordError(f"{path} is not a thetadot record (a folder written by Recorder): {reason}")


def damaged(chunk: Path, error: Exception) -> RecordError:
    """A chunk cannot be decoded: what to say, and to do."""
    return RecordError(f"{chunk} is damaged ({_one_line(error)}); {_AGAIN}")


def _one_line(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__
