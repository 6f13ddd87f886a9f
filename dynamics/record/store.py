"""The record on disk: rows appended to a plain Zarr directory that plain xarray opens, also while it is written.

Readers take every shape from the consolidated metadata, one file that is replaced by an atomic rename. So an append
first writes the chunks, and only :meth:`Store.commit` lets readers see them. What a killed writer left half done lies
beyond the committed shapes, invisible, and is discarded when the record is next opened for writing.

The files are written here in Zarr's format 2, but not by zarr: that writes several at once, and if one fails, another
may still arrive after the retry and overwrite newer rows.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..errors import one_line
from ..places import check_folder, dead_link
from ..schema import NODES, QUANTITIES, STUDIES
from .errors import RecordError, damaged
from .files import PARTIAL, locked, replace
from .metadata import (
    CODEC,
    METADATA,
    Metadata,
    array_entry,
    as_json,
    chunk_key,
    chunk_keys,
    consolidated,
    empty_nodes,
    is_name,
    read_metadata,
)
from .reading import check

_CHUNK_ROWS = {"steps": 2048, "curvature": 2048, "pruning": 16, "units": 1} | dict.fromkeys(STUDIES, 1)
_OTHER_CHUNK_ROWS = 256
_LABELS = dict.fromkeys(("units", "scores", "invariance"), ("layer", "index"))
_LOCK = ".lock"


class Store:
    """A new record at ``path``. One writer: the path is locked until :meth:`close`, or until the process ends.

    It is not thread-safe; while a :mod:`~dynamics.record.buffer` has it, only the buffer's thread calls it.

    Raises:
        FileExistsError: there is something at ``path``, which is left untouched.
        OSError: the folder cannot be created.
    """

    def __init__(self, path: str | os.PathLike, attributes: Mapping[str, Any]) -> None:
        self.path = Path(path)
        _create(self.path, attributes)
        self._take()
        self._load(read_metadata(self.path))

    @classmethod
    def reopen(cls, path: str | os.PathLike) -> Store:
        """Continue writing a record as if it had never been closed; what was not committed is discarded.

        Raises:
            RecordError: there is no record, or not one of this schema version.
            BlockingIOError: another writer has it.
        """
        store = cls.__new__(cls)
        store.path = Path(path)
        check(store.path)  # before creating a lock file in a folder that may be somebody else's
        store._take()
        try:
            committed = check(store.path)
            store._make_good(committed)
            store._load(committed)
        except BaseException:
            store._lock.release()
            raise
        return store

    @property
    def lengths(self) -> dict[str, int]:
        """Number of rows of each node, including those not committed yet."""
        return dict(self._length)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the record."""
        return copy.deepcopy(self._metadata[".zattrs"])

    def read(self, node: str, name: str) -> np.ndarray:
        """The committed values of a variable, in memory.

        Raises:
            KeyError: the record has no such variable.
        """
        group = zarr.open_group(str(self.path), mode="r", zarr_format=2, use_consolidated=True)
        values: Any = group[f"{node}/{name}"]
        return np.asarray(values[...])

    def coordinates(self, node: str) -> dict[str, np.ndarray]:
        """The coordinates of a node that do not grow, by name; for a dimension without one, the positions along it."""
        positions: dict[str, np.ndarray] = {}
        for name, values in self._open[node].items():
            positions |= {dim: np.arange(size) for dim, size in zip(_dims(node, name), values.shape, strict=True)}
        return {dim: of for dim, of in positions.items() if dim != NODES[node][0]} | self._coordinates[node]

    def texts(self, node: str) -> dict[str, bool]:
        """For each variable of a node that grows, by name, whether it holds strings."""
        return {name: values.dtype.kind == "U" for name, values in self._open[node].items()}

    def write_coordinate(self, node: str, name: str, dim: str, values: np.ndarray) -> None:
        """Write a coordinate that does not grow, e.g. the layers' names. An existing one stays as it is.

        Raises:
            ValueError: it exists with other values.
        """
        if not len(values):
            return
        self._check_still_there()
        if name not in self._coordinates[node]:
            self._write_chunk(node, name, 0, values)
            self._declare(node, name, values, len(values), [dim])
            self._coordinates[node][name] = values
        elif not np.array_equal(self._coordinates[node][name], values):
            raise ValueError(
                f"coordinate {name!r} of /{node} changed, but a record's {dim}s are fixed at their first use"
            )

    def append(self, node: str, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows to a node: name → values whose first dimension is the node's index. Invisible until commit.

        A variable is missing (NaN) in rows without it, if it is new or absent this time. An existing one keeps its
        type.
        """
        start = self._length[node]
        self._write(node, rows, self._open[node].keys() | rows.keys(), start, start + len(next(iter(rows.values()))))

    def amend(self, node: str, row: Mapping[str, np.ndarray]) -> None:
        """Add to the last row of a node, or change it: name → an array with the one value.

        If the row is committed, readers see new values of existing variables at once.
        """
        length = self._length[node]
        self._write(node, row, row.keys(), length - 1, length)

    def _write(self, node: str, rows: Mapping[str, np.ndarray], names: Iterable[str], start: int, length: int) -> None:
        """Write the variables' values in the last rows, from ``start`` on."""
        self._check_still_there()
        still_open = {name: self._write_rows(node, name, rows.get(name), start, length) for name in names}
        # only after all were written: if one fails, the whole call can be repeated
        for name, values in still_open.items():
            if name not in self._open[node]:
                self._declare(node, name, values, self._chunk[node], list(_dims(node, name)))
            self._metadata[f"{node}/{name}/.zarray"]["shape"][0] = length
        self._open[node] |= still_open
        self._length[node] = length

    def commit(self) -> None:
        """Make everything that was appended visible to readers, at once."""
        self._check_still_there()
        self._replace(METADATA, consolidated(self._metadata))

    def truncate(self, lengths: Mapping[str, int]) -> None:
        """Drop the rows beyond the given lengths, of several nodes in one commit.

        Their chunks stay until they are overwritten or the store is closed, for readers who opened the record before.

        Raises:
            ValueError: a node has fewer rows than it should keep.
        """
        for node, length in lengths.items():
            if not 0 <= length <= self._length[node]:
                raise ValueError(f"cannot keep {length} rows of /{node} in {self.path}: it has {self._length[node]}")
        shorter = copy.deepcopy(self._metadata)
        for node, length in lengths.items():
            for name in self._open[node]:
                shorter[f"{node}/{name}/.zarray"]["shape"][0] = length
        self._replace(METADATA, consolidated(shorter))
        self._load(shorter)

    def note(self, key: str, value: Any) -> None:
        """Set an attribute of the record, e.g. a list of its resumes: anything that JSON holds."""
        self._metadata[".zattrs"][key] = json.loads(as_json(value))
        self.commit()
        self._replace(".zattrs", as_json(self._metadata[".zattrs"]))  # where zarr reads the root's attributes

    def keep(self, name: str, array: np.ndarray) -> None:
        """Keep an array beside the record's variables, where xarray does not see it."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self._replace(f".{name}.npy", buffer.getbuffer())

    def kept(self, name: str) -> np.ndarray | None:
        """The array that was kept under the name; None if there is none."""
        path = self.path / f".{name}.npy"
        try:
            return np.load(path, allow_pickle=False) if path.exists() else None
        except (ValueError, EOFError) as error:
            raise RecordError(f"{path} cannot be read ({one_line(error)}): copy it again, or remove it") from error

    def drop_kept(self) -> None:
        """Delete all kept arrays, which only resuming needs."""
        for path in self.path.glob(".*.npy"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the record for the next writer. What was not committed is lost."""
        with contextlib.suppress(OSError, RecordError):
            self._check_still_there()
            self._make_good(read_metadata(self.path))
        self._lock.release()

    # what is on disk and what is in memory

    def _take(self) -> None:
        """Lock the folder, and remember the lock file's identity, by which the folder is recognised later."""
        taken = (
            f"{self.path} is being written by another recorder: close that one, if necessary with its process "
            "(such as a notebook's kernel), or choose another path"
        )
        self._lock = locked(self.path / _LOCK, taken)
        self._place = (self.path / _LOCK).stat()

    def _check_still_there(self) -> None:
        """Raise FileNotFoundError if the folder was removed, and perhaps replaced by another record."""
        if not os.path.samestat((self.path / _LOCK).stat(), self._place):
            raise FileNotFoundError(f"the record was removed, and {self.path} is now another one")

    def _load(self, metadata: Metadata) -> None:
        """Take lengths, coordinates and the rows of the last, open chunks from committed metadata and files."""
        self._metadata = empty_nodes() | metadata
        self._length = dict.fromkeys(NODES, 0)
        self._chunk = {node: _CHUNK_ROWS.get(node, _OTHER_CHUNK_ROWS) for node in NODES}
        self._coordinates: dict[str, dict[str, np.ndarray]] = {node: {} for node in NODES}
        self._open: dict[str, dict[str, np.ndarray]] = {node: {} for node in NODES}
        for node, name in self._variables():
            entry = metadata[f"{node}/{name}/.zarray"]
            if metadata[f"{node}/{name}/.zattrs"]["_ARRAY_DIMENSIONS"][0] != NODES[node][0]:  # it does not grow
                self._coordinates[node][name] = self._read_chunk(node, name, 0, entry["shape"][0])
            else:
                self._length[node], self._chunk[node] = entry["shape"][0], entry["chunks"][0]
                last = max(self._length[node] - 1, 0) // self._chunk[node]
                rows = self._length[node] - last * self._chunk[node]
                self._open[node][name] = self._read_chunk(node, name, last, rows)

    def _variables(self) -> list[tuple[str, str]]:
        found = [tuple(key.split("/")[:2]) for key in self._metadata if key.endswith("/.zarray")]
        return [(node, name) for node, name in found if node in NODES]

    def _make_good(self, metadata: Metadata) -> None:
        """Make the folder contain what is committed, and nothing else.

        Groups and arrays get metadata files of their own, for tools that do not read METADATA. What a killed writer
        left is removed: arrays and chunks that were never committed, and partial files.
        """
        for key, entry in (empty_nodes() | metadata).items():
            path, text = self.path / key, as_json(entry)
            if not path.exists() or path.read_bytes() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._replace(key, text)
        for group in (self.path, *(self.path / node for node in NODES)):
            for half in group.glob(f".*{PARTIAL}"):
                half.unlink()
        for folder in [folder for node in NODES for folder in (self.path / node).iterdir() if folder.is_dir()]:
            entry = metadata.get(f"{folder.parent.name}/{folder.name}/.zarray")
            if entry is None:
                shutil.rmtree(folder)
                continue
            committed = {".zarray", ".zattrs", *chunk_keys(entry["shape"], entry["chunks"])}
            for name in set(os.listdir(folder)) - committed:
                (folder / name).unlink()

    def _write_rows(self, node: str, name: str, block: np.ndarray | None, start: int, length: int) -> np.ndarray:
        """Write the chunks that a block falls into, whole, from memory; returns the last, which may still be open."""
        values, chunk = self._open[node].get(name), self._chunk[node]
        if values is None:
            values = _missing(block, chunk)
            for before in range(start // chunk):
                self._write_chunk(node, name, before, values)
        elif block is not None and values.shape[1:] != block.shape[1:]:
            raise ValueError(f"a row of /{node}/{name} has shape {values.shape[1:]}, got {block.shape[1:]}")
        for first in range(start - start % chunk, length, chunk):
            opened, closed = max(start, first), min(length, first + chunk)
            if opened == first:
                values = _missing(values, chunk)
            given = _missing(values, closed - opened) if block is None else block[opened - start : closed - start]
            values[opened - first : closed - first] = given
            self._write_chunk(node, name, first // chunk, values)
        return values

    def _declare(self, node: str, name: str, values: np.ndarray, chunk: int, dims: list[str]) -> None:
        """Describe a new array, and tell xarray by CF's convention which are coordinates without being dimensions."""
        self._metadata[f"{node}/{name}/.zarray"] = array_entry(values, chunk)
        row = QUANTITIES.get(name)
        self._metadata[f"{node}/{name}/.zattrs"] = (row.attributes if row else {}) | {"_ARRAY_DIMENSIONS": dims}
        present = {variable for group, variable in self._variables() if group == node}
        if labels := [label for label in _LABELS.get(node, ()) if label in present]:
            self._metadata.setdefault(f"{node}/.zattrs", {})["coordinates"] = " ".join(labels)

    def _write_chunk(self, node: str, name: str, number: int, values: np.ndarray) -> None:
        if not is_name(name):
            raise ValueError(
                "a variable's name becomes a folder in the record, so it has no '/' and no '.' at the start, got "
                f"{name!r}"
            )
        (self.path / node / name).mkdir(exist_ok=True)
        self._replace(f"{node}/{name}/{chunk_key(number, values.ndim)}", CODEC.encode(np.ascontiguousarray(values)))

    def _read_chunk(self, node: str, name: str, number: int, rows: int) -> np.ndarray:
        """A whole chunk, of which the first ``rows`` are committed; the others are set to missing."""
        entry = self._metadata[f"{node}/{name}/.zarray"]
        values = np.empty((entry["chunks"][0], *entry["shape"][1:]), entry["dtype"])
        if rows:
            path = self.path / node / name / chunk_key(number, values.ndim)
            try:
                CODEC.decode(path.read_bytes(), values)
            except (RuntimeError, ValueError) as error:
                raise damaged(path, error) from error
        values[rows:] = _missing(values, len(values) - rows)
        return values

    def _replace(self, key: str, data: bytes | memoryview) -> None:
        replace(self.path / key, data)


def _create(path: Path, attributes: Mapping[str, Any]) -> None:
    """Create an empty record beside its path, and rename it into place."""
    taken = FileExistsError(
        f"{path} exists already: choose another path, remove it first, or continue it (resume=True)"
    )
    if link := dead_link(path):
        raise FileExistsError(f"{path} {link}: choose another path")
    if path.exists():
        raise taken
    check_folder(path.parent, "records", "out/run.zarr")
    metadata = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(attributes)} | empty_nodes()
    files = {key: as_json(entry) for key, entry in metadata.items()} | {METADATA: consolidated(metadata)}
    sibling = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        sibling.mkdir(parents=True)
        for key, text in files.items():
            (sibling / key).parent.mkdir(exist_ok=True)
            (sibling / key).write_bytes(text)
        sibling.rename(path)
    except OSError as error:
        raise (taken if path.exists() else error) from error
    finally:
        shutil.rmtree(sibling, ignore_errors=True)  # which is there no more, unless this failed or was interrupted


def _dims(node: str, name: str) -> tuple[str, ...]:
    if name in QUANTITIES and node in QUANTITIES[name].nodes:
        return QUANTITIES[name].dims(node)
    return (NODES[node][0],)


def _missing(like: np.ndarray, rows: int) -> np.ndarray:
    nothing = np.nan if like.dtype.kind == "f" else np.zeros((), like.dtype)
    return np.full((rows, *like.shape[1:]), nothing, like.dtype)
