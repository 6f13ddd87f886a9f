"""The batches that a loop was seen to read, and which of them a step may be made of: those with accumulated gradients.

A gradient belongs to the batch that was read last before its backward pass or, where a loop reads ahead, to an earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..probing.moment import Moment

FURTHER = 8  # batches read ahead that are tried where another number is known


class Ran(NamedTuple):
    """How a model has run while a batch was the latest: with gradients, without, without and never with them."""

    ran: bool
    evaluated: bool
    only_evaluated: bool


@dataclass(slots=True, eq=False)
class Seen:
    """A batch that a loop has read, with the moments from which its loss may be evaluated again.

    The fields in ``_at`` count the backward passes that had come before the batch was seen, or its forward pass began.
    """

    batch: Any
    moment: Moment | None  # when its forward pass began; before that, when it was seen
    first_moment: Moment | None = None  # when it was seen
    gradient_moment: Moment | None = None  # when the last further forward pass before its backward pass began, if any
    last_moment: Moment | None = None  # when the last further forward pass began, if any
    next_moment: Moment | None = None  # when the first forward pass after it was seen began, whichever batch's it was
    later: Moment | None = None  # when the first module outside the model ran after its backward pass
    changed_since: Callable[[], Any] | None = None  # returns a copy of the batch if the loop has changed it, else None
    changed: Any = None  # a copy from when its forward pass began, if the loop had changed the batch by then
    source: Any = None  # the pass over the data that it came from
    seen_at: int = 0
    with_gradients: bool = True  # whether gradients were enabled when it was seen
    passed: bool = False  # whether its forward pass, with gradients, has begun
    passed_at: int = 0
    passed_in_eval_at: int | None = None  # as passed_at, if that pass was in eval mode
    ran: bool = False  # whether the model ran with gradients while this was the latest batch
    evaluated: bool = False  # whether the model ran without gradients while this was the latest batch
    only_evaluated: bool = False  # while this was the latest batch, the model ran without gradients and never with them
    again: bool = False  # whether a step on it has been taken already
    certain: bool = True  # False where the loop may have gone on to other batches

    @property
    def how(self) -> Ran:
        """How the model has run on it so far."""
        return Ran(self.ran, self.evaluated, self.only_evaluated)

    @property
    def is_evaluated(self) -> bool:
        """Whether, for all that is known so far, the loop does not train on it."""
        return self.only_evaluated or not (self.with_gradients or self.ran)


class Position(NamedTuple):
    """The position of a loop, counted in batches and backward passes."""

    batches: int = 0  # seen since the last step
    backwards: int = 0  # backward passes so far
    first_backward: int = 0  # number, from 1, of the first backward pass whose gradient has not been discarded
    pending: bool = False  # whether a backward pass came since the last step
    used: Sequence[int] = ()  # of a step, where known: what `used` returns


def used(starts: Sequence[int], total: int, count: int) -> list[int]:
    """How many batches had been seen when the backward passes came whose gradients are still there, each number once.

    Args:
        starts: the number of backward passes before each batch was seen.
        total: how many backward passes there were in all.
        count: how many of them, the last ones, have left gradients that are still there.
    """
    gone, found = total - count, []
    for place, start in reversed(list(enumerate(starts, 1))):
        if total <= gone:
            break
        if total > start:
            found.append(place)
        total = min(start, total)
    return found[::-1]


def trained_on(seen: list[Seen]) -> list[Seen]:
    """The batches without those that were only evaluated; all of them if no forward pass with gradients was seen."""
    if any(one.passed for one in seen):
        return [one for one in seen if one.passed or not one.only_evaluated]
    return seen


def candidates(seen: list[Seen], used: Sequence[int], count: int, *, ahead: int, of_epoch: int) -> list[list[Seen]]:
    """The lists of batches that a step may be made of, the likeliest first.

    With m = ``count`` backward passes whose gradients are there: the batches after which these passes came or, where a
    loop reads ``ahead`` so many batches, the batches that much earlier; the m before those that were read ahead; the
    last m; the first m; the last one, if it had all m backward passes; the m before the last one, the last two and so
    on, because some may have been read ahead and others passed over; the batches after which the passes came, but
    shifted to begin with the first one read; all of this pass over the data, which begins after the first
    ``of_epoch``; all; the last one, whatever is known of m. Then, with evaluated batches counted too, because these
    need not have been read last: the batches after which the passes came, and the first m.
    """
    known = trained_on(seen)
    total = len(known)
    came = _behind(seen, used, ahead)
    behind = [came, known[slice(*window(total, count, ahead))]]
    if len(used) != count and (ahead or total == count):  # several, or all, were read before a backward pass
        behind = behind[::-1]
    last = [window(total, count, further) for further in range(1, min(total - count, FURTHER) + 1)]
    bounds = [(total - count, total), (0, count), (total - 1, total), *last]
    windows = [known[start:end] for start, end in bounds if 0 <= start < end <= total]
    first = _behind(seen, used, used[0] - 1) if used else []
    others = [known[of_epoch:], known, known[-1:]]
    found = [*behind, *windows, first, *others] if count else others
    ours = {id(one) for one in known}
    found = [batches for batches in found if batches and ours.issuperset(map(id, batches))]
    found += [batches for batches in (came, seen[:count]) if batches and count < len(seen)]
    return list({tuple(map(id, batches)): batches for batches in found}.values())


def window(total: int, count: int, ahead: int) -> tuple[int, int]:
    """Start and end, among ``total`` batches, of the last ``count`` before those that were read ``ahead``."""
    start = max(total - ahead - count, 0)
    return start, start + count


def _behind(seen: list[Seen], used: Sequence[int], ahead: int) -> list[Seen]:
    """The batches of the backward passes that came at ``used``, if the loop had read so many batches ahead by then."""
    return [seen[place - 1 - ahead] for place in used] if used and used[0] > ahead else []
