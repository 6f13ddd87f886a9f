"""The examples of docs/frameworks.md run as printed, and each leaves a record with curvature."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snippets import run_snippets

from dynamics import open_run

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

TEXT = Path(__file__).parents[1].joinpath("docs", "frameworks.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _one_accelerator_a_test() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, .tensorboardX. has been removed")
@pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true but no accelerator is found")
def test_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    run_snippets(TEXT)
    for name in ("lightning", "trainer", "accelerate"):
        run = open_run(tmp_path / "out" / f"{name}.zarr")
        assert run["curvature"].sizes["step"] == -(-run["steps"].sizes["step"] // 2)
