"""A loop that goes on in its record: what shows when it begins is seen again, what is not known is not guessed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batch, smooth_network, vectors

from dynamics import Recorder, open_run


def one_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """As a loader that copies to a GPU while the network computes."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_loop_that_reads_ahead_goes_on_at_any_step(tmp_path: Path, stop: int) -> None:
    model, batches, losses = smooth_network(), vectors(10), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part in (batches[:stop], batches[stop:]):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=4, resume=True) as recorder:
            for inputs, labels in one_ahead(recorder.watch(part)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    curvature = open_run(tmp_path / "run")["curvature"]
    assert curvature.step.values.tolist() == [0, 4, 8]
    np.testing.assert_allclose(curvature.loss_before, losses[::4], rtol=1e-12)
