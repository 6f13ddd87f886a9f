"""Opening a path runs nobody's code, and refuses in one line what is not a whole record of this version."""

import contextlib
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from analysis.record import columns
from dynamics import RecordError, open_run
from dynamics.record.metadata import METADATA
from dynamics.record.store import Store


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def _unpickling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Older numcodecs and zarr unpickled without being asked to; from 0.17 and 3.4 on each has to be asked."""
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    with zarr.config.set({"array.allow_unsafe_pickle_decode": True}):
        yield


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    store = Store(path, {"schema_version": 1})
    store.append("steps", {"step": np.arange(5000), "loss": np.sqrt(np.arange(5000))})
    store.commit()
    store.close()
    return path


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


TEXT, PICKLE = {"id": "vlen-utf8"}, {"id": "pickle"}  # the first makes zarr take the array for one of texts
PICKLED = ({"filters": [TEXT, PICKLE], "compressor": None}, {"filters": [TEXT], "compressor": PICKLE})


def poison(record: Path, codecs: dict) -> None:
    """Make the only chunk of ``/steps/loss`` a pickle that makes a file, and say so in the array's own metadata."""
    loss = record / "steps" / "loss"
    edit(loss / ".zarray", lambda content: content.update(codecs, dtype="|O", shape=[1], chunks=[1], fill_value=None))
    for chunk in loss.glob("[0-9]*"):
        chunk.unlink()
    (loss / "0").write_bytes(pickle.dumps(Payload(record.parent / "ran")))


def consolidate(record: Path) -> None:
    own = json.loads((record / "steps/loss/.zarray").read_text())
    edit(record / METADATA, lambda content: content["metadata"].update({"steps/loss/.zarray": own}))


@pytest.mark.parametrize("codecs", PICKLED)
def test_a_stranger_s_code_does_not_run(record: Path, codecs: dict) -> None:
    poison(record, codecs)
    consolidate(record)
    with pytest.raises(
        RecordError, match=r"steps/loss is stored with codecs .*'pickle'.*, but a record uses only 'blosc'"
    ):
        open_run(record)["steps"].loss.load()
    with pytest.raises(RecordError, match="stored with codecs"):
        Store.reopen(record)
    assert not (record.parent / "ran").exists()
    with contextlib.suppress(Exception):  # what the payload returns is no array
        zarr.open_group(str(record), mode="r", zarr_format=2)["steps/loss"][...]
    assert (record.parent / "ran").exists()  # the attack is real: opened plainly, it ran


def test_code_beside_the_metadata_that_is_checked_does_not_run(record: Path) -> None:
    whole = record.parent / "whole.zarr"
    shutil.copytree(record, whole)
    poison(record, PICKLED[0])
    shutil.copytree(whole / "steps/loss", record / "steps/loss", ignore=lambda *_: [".zarray"], dirs_exist_ok=True)
    np.testing.assert_array_equal(open_run(record)["steps"].loss, np.sqrt(np.arange(5000)))
    Store.reopen(record).close()
    edit(record / METADATA, lambda content: content["metadata"].pop("steps/loss/.zarray"))
    with pytest.raises(RecordError, match="not a thetadot record"):
        open_run(record)
    assert not (record.parent / "ran").exists()


def test_a_format_3_store_beside_it_is_refused(record: Path) -> None:
    zarr.create_group(str(record.parent / "three"), zarr_format=3, attributes={"schema_version": 1})
    with pytest.raises(RecordError, match=r"three is not a thetadot record .*: it is a Zarr format 3 store"):
        open_run(record.parent / "three")
    shutil.copy(record.parent / "three" / "zarr.json", record)
    with pytest.raises(RecordError, match="a Zarr format 3 store"):
        open_run(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "|O"}, "steps/loss has the type '|O', but a record holds only numbers and fixed-size strings"),
        ({"dtype": [["a", "<f8"]]}, "steps/loss has the type [['a', '<f8']]"),
        ({"filters": [{"id": "pickle"}]}, "steps/loss is stored with codecs ['blosc', 'pickle']"),
        ({"compressor": None}, "steps/loss is stored with codecs [], but a record uses only 'blosc'"),
        ({"compressor": {"id": "zstd"}}, "steps/loss is stored with codecs ['zstd']"),
        ({"shape": [-1]}, "steps/loss has shape [-1]"),
        ({"shape": [10**15]}, "is damaged: steps/loss/3 is missing; copy the record again"),
        ({"shape": "all"}, "steps/loss has shape 'all'"),
        ({"compressor": {}}, "is damaged: .zmetadata cannot be read ('id'); copy the record again"),
    ],
)
def test_metadata_that_no_record_has(record: Path, change: dict, message: str) -> None:
    edit(record / METADATA, lambda content: content["metadata"]["steps/loss/.zarray"].update(change))
    with pytest.raises(RecordError) as said:
        open_run(record)
    assert message in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("key", ["../steps/.zattrs", "steps/../../x/.zattrs", "/tmp/.zattrs", "a/b/c/.zarray", "x", ""])
def test_names_that_lead_out_of_the_record(record: Path, key: str) -> None:
    edit(record / METADATA, lambda content: content["metadata"].update({key: {}}))
    for opening in (open_run, Store.reopen):
        with pytest.raises(RecordError, match=r"not a thetadot record .* has an entry"):
            opening(record)
    assert sorted(path.name for path in record.parent.iterdir()) == ["run.zarr"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"metadata": 3}', '{"metadata": {"a": 3}}', "[" * 100_000])
def test_damaged_metadata(record: Path, text: str) -> None:
    (record / METADATA).write_text(text)
    with pytest.raises(RecordError, match=r"run\.zarr is (damaged|not a thetadot record)") as said:
        open_run(record)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 500


def test_missing_metadata(record: Path) -> None:
    (record / METADATA).unlink()
    with pytest.raises(RecordError, match=r"it has no \.zmetadata \(No such file or directory\)"):
        open_run(record)


def test_chunks_cut_short_or_missing(record: Path) -> None:
    last = record / "steps" / "loss" / "2"
    whole = last.read_bytes()
    for size in (0, 8, 16, len(whole) - 1):
        last.write_bytes(whole[:size])
        with pytest.raises(RecordError, match=rf"damaged: steps/loss/2 has {size} bytes of \d+; copy the record again"):
            open_run(record)
    last.write_bytes(whole)
    np.testing.assert_array_equal(open_run(record)["steps"].loss, np.sqrt(np.arange(5000)))
    (record / "steps" / "loss" / "1").unlink()
    for opening in (open_run, Store.reopen):
        with pytest.raises(RecordError, match="damaged: steps/loss/1 is missing"):
            opening(record)
    shutil.rmtree(record / "steps" / "loss")
    with pytest.raises(RecordError, match="damaged: steps/loss/0 is missing"):
        open_run(record)


def test_a_damaged_chunk_is_named(record: Path) -> None:
    chunk = record / "steps" / "loss" / "2"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:16] + bytes(255 - byte for byte in content[16:]))  # what follows its header
    with pytest.raises(RecordError, match=r"/steps is damaged .*: copy the record again"):
        columns(open_run(record), "steps", ["loss"])
    with pytest.raises(RecordError, match=r"steps/loss/2 is damaged .*; copy the record again"):
        Store.reopen(record)


def test_another_program_s_store_is_refused(tmp_path: Path) -> None:
    xr.Dataset({"a": ("x", np.arange(3.0))}).to_zarr(tmp_path / "foreign.zarr", zarr_format=2, consolidated=True)
    with pytest.raises(RecordError, match=r"is not a thetadot record|has schema version none"):
        open_run(tmp_path / "foreign.zarr")


def test_opening_while_rows_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store, done, failures = Store(path, {"schema_version": 1}), threading.Event(), []

    def write() -> None:
        for _ in range(30):
            store.append("steps", {"step": np.arange(9000), "loss": np.sqrt(np.arange(9000))})
            store.commit()
            store.truncate({"steps": 0})
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        try:
            assert open_run(path)["steps"].sizes.get("step", 0) in (0, 9000)
        except Exception as error:
            failures.append(error)
    thread.join()
    assert not failures


def test_reading_needs_no_torch(record: Path) -> None:
    code = "import sys, dynamics; dynamics.open_run(sys.argv[1]); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, record], cwd=root, check=False).returncode == 0
