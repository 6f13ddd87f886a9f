"""A record's single metadata file, attributes and arrays by name, checked so that opening the record is safe.

A Zarr array names the codecs that decode its bytes, and one of these unpickles. Only the codec and the data types that
a record is written with are accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc

from ..schema import NODES
from .errors import AGAIN, RecordError, foreign, said

METADATA = ".zmetadata"
CODEC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)  # as small as zstd on such numbers, three times as fast
_DTYPE = re.compile(r"[<>|][biufU]\d+")
_NAME = re.compile(r"(?!\.)[^/\\\0]+")  # a folder's name that cannot lead out of its parent

Metadata = dict[str, dict[str, Any]]


def read_metadata(path: Path) -> Metadata:
    """The metadata that was last committed, after a check that it is safe to use.

    Raises:
        RecordError: it is missing, damaged, or contains something that no record contains.
    """
    if not path.exists():
        raise RecordError(f"no record at {path}: give the path of a run, e.g. one that `python -m dynamics run` wrote")
    if path.is_file() and path.suffix == ".zip":
        raise foreign(path, "analysis.open_runs and `python -m analysis` read condensed records, named *.zarr.zip")
    if (path / "zarr.json").exists():
        raise foreign(path, "it is a Zarr format 3 store, but records are format 2")
    try:
        text = (path / METADATA).read_bytes()
    except OSError as error:
        if any(path.glob(f"*/{METADATA}")):
            raise RecordError(f"{path} is a folder of records, not a record: give {path}/*.zarr") from error
        raise foreign(path, f"it has no {METADATA} ({error.strerror})") from error
    return checked_metadata(path, text)


def checked_metadata(path: Path, text: bytes) -> Metadata:
    """The contents of a metadata file, after a check that it is safe to use.

    Raises:
        RecordError: it is damaged, or contains something that no record contains.
    """
    try:
        found = json.loads(text)["metadata"]
        for key, entry in found.items():
            *folders, leaf = key.split("/")
            depths = {".zgroup": (0, 1), ".zattrs": (0, 1, 2), ".zarray": (2,)}.get(leaf, ())
            if len(folders) not in depths or not all(map(is_name, folders)) or not isinstance(entry, dict):
                raise foreign(path, f"{METADATA} has an entry {key!r:.60}")
            if leaf == ".zarray":
                _check_array(path, "/".join(folders), entry)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is damaged: {METADATA} cannot be read ({said(error)}); {AGAIN}") from error
    return found


def _check_array(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Accept only what a record is written with: numbers and fixed-size strings, compressed by Blosc."""
    compressor, filters, dtype = entry["compressor"], entry["filters"], entry["dtype"]
    if filters or not isinstance(compressor, dict) or compressor["id"] != CODEC.codec_id:
        codecs = [codec.get("id") for codec in (compressor, *(filters or ())) if codec]
        raise foreign(path, f"{name} is stored with codecs {codecs!r:.80}, but a record uses only {CODEC.codec_id!r}")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise foreign(
            path, f"{name} has the type {dtype!r:.60}, but a record holds only numbers and fixed-size strings"
        )
    shape, chunks = entry["shape"], entry["chunks"]
    whole = isinstance(shape, list) and isinstance(chunks, list) and all(type(n) is int for n in [*shape, *chunks])
    if not whole or not shape or shape[0] < 0 or chunks[0] < 1 or shape[1:] != chunks[1:]:
        raise foreign(path, f"{name} has shape {shape!r:.60} and chunks {chunks!r:.60}")


def is_name(name: str) -> bool:
    """Whether a group or a variable of a record may have the name."""
    return bool(_NAME.fullmatch(name))


def chunk_key(number: int, dimensions: int) -> str:
    """File name of an array's chunk; only the first dimension, the rows, is divided into chunks."""
    return ".".join([str(number), *["0"] * (dimensions - 1)])


def chunk_keys(shape: list[int], chunks: list[int]) -> Iterator[str]:
    """File names of an array's chunks, in order."""
    return (chunk_key(number, len(shape)) for number in range(-(-shape[0] // chunks[0])))


def array_entry(values: np.ndarray, chunk: int) -> dict[str, Any]:
    """The description of an array that begins with these values, in chunks of ``chunk`` rows."""
    return {
        "zarr_format": 2, "shape": list(values.shape), "chunks": [chunk, *values.shape[1:]],
        "dtype": values.dtype.str, "order": "C", "dimension_separator": ".", "filters": None,
        "compressor": CODEC.get_config(), "fill_value": "NaN" if values.dtype.kind == "f" else None,
    }  # fmt: skip


def empty_nodes() -> Metadata:
    """The descriptions of a record's groups, all empty."""
    leaves = {".zgroup": {"zarr_format": 2}, ".zattrs": {}}
    return {f"{node}/{leaf}": dict(entry) for node in NODES for leaf, entry in leaves.items()}


def consolidated(metadata: Metadata) -> bytes:
    """The file from which readers take every shape; sorted, as zarr loses arrays of a group that are not adjacent."""
    return as_json({"zarr_consolidated_format": 1, "metadata": dict(sorted(metadata.items()))})


def as_json(entry: Any) -> bytes:
    """An entry of the metadata as JSON.

    Raises:
        TypeError: JSON cannot hold it.
    """
    return json.dumps(entry, default=_plain).encode()


def _plain(value: Any) -> Any:
    """A numpy number or array as Python's numbers."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(
        f"an attribute of a record must be a number, a string or a list of these, got {type(value).__name__}"
    )
