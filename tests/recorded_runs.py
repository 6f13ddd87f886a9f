"""Small runs that were recorded: one whole, one pruned in two events with every study in its record."""

from pathlib import Path

import torch
import xarray as xr
from networks import Batch, convolutional_network, images, plain_step, prune_row, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run
from dynamics.pruning import removal_curve, resampled_scores, scale_invariance, scores
from dynamics.recording.event import Event


def look(event: Event, model: nn.Module, batches: list[Batch]) -> None:
    """Add all studies to an event, before anything is pruned."""
    measures = ["magnitude", "loss_preservation", "taylor"]
    event.add("scores", resampled_scores(model, batches, measures, draws=3))
    event.add("curve", removal_curve(model, batches[:2], scores(model, None, "magnitude"), [0.3, 0.6]))
    event.add("invariance", scale_invariance(model, batches[:2]))


def recorded(folder: Path) -> dict[str, xr.DataTree]:
    """Two small runs, the second with everything in it."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for seed, (measure, make, data) in enumerate(
        [("none", smooth_network, vectors), ("magnitude", convolutional_network, images)]
    ):
        torch.manual_seed(seed)
        model, batches = make(), data(12)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        path = folder / f"{measure}.zarr"
        with Recorder(path, model, optimizer, curvature_every=3, attributes={"seed": 0}) as recorder:
            for batch in recorder.watch(batches[:8]):
                recorder.log(loss=plain_step(model, optimizer, batch))
            for epoch in range(2 if measure == "magnitude" else 0):
                with recorder.event("prune", probe=batches[:2]) as event:
                    look(event, model, batches)
                    prune_row(model, "0.weight", epoch)
                    event.units(alive={"0": torch.arange(4) > epoch}, scores={"0": torch.rand(4)})
            for batch in recorder.watch(batches[8:]):
                recorder.log(loss=plain_step(model, optimizer, batch))
            recorder.log_epoch(train_loss=1.0 + seed, train_accuracy=0.5, test_loss=1.2, test_accuracy=0.4, seconds=1.0)
        found[measure] = open_run(path)
    return found
