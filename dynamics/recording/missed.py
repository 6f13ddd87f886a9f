"""What a recorder that ends has missed of a training, in sentences for its user."""

from __future__ import annotations

from collections.abc import Iterator

from ..loop.batches import Batches
from .steps import Steps

_FEW = 16  # batches or backward passes at the end that led to no step: a loop may skip so many
_LOOKED_AT = 2  # batches before any step: a first one, of two loaders, say
_PASSES = 2  # over the data at the end: a loop may evaluate another network, such as an average, or count labels


def missed(steps: Steps, batches: Batches, *, unseen: int) -> Iterator[str]:
    """A sentence for each way in which batches, gradients or curvature led to no rows.

    Args:
        steps: the steps that were taken.
        batches: the batches that were seen.
        unseen: at how many steps curvature was due before any batch was seen.
    """
    last = steps.number - 1
    if steps.taken and batches.wasted > _FEW:
        yield (
            f"{batches.wasted} backward passes after step {last} led to no optimizer step: if another optimizer took "
            "over, pass both from the start, Recorder(..., [first, second])"
        )
    elif steps.taken and batches.idle_passes > _PASSES and len(batches) > _FEW:
        yield (
            f"{batches.idle_passes} passes over watched data after step {last} led to no optimizer step: if model and "
            "optimizer were made anew, make a recorder anew, too"
        )
    if unseen and not batches.told:
        yield (
            "no batch was seen, so no curvature was recorded: iterate over recorder.watch(loader), call "
            "recorder.observe(batch) for each batch, or set curvature_every=0"
        )
    if not steps.taken and (len(batches) > _LOOKED_AT or batches.position.backwards):
        yield (
            "batches or gradients were seen, but the optimizer took no step: the one that trains the model is not the "
            "one that the recorder was given. A copy of an optimizer has no hooks; of one that steps through another, "
            "as SAM does, pass the inner one, its base_optimizer"
        )
