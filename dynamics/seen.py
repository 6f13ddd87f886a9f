"""What a loop was seen to read, and which of it a step may be made of: those batches whose gradients are there.

A gradient is of the batch that was read last when its backward pass came; where a loop reads ahead, of an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .moment import Moment


@dataclass
class Seen:
    """A batch, and the moments at which its forward pass starts, it was seen, and further passes start, if any did."""

    batch: Any
    moment: Moment | None
    first_moment: Moment | None = None
    gradient_moment: Moment | None = None  # of the last further pass before its gradient was there
    last_moment: Moment | None = None
    later: Moment | None = None  # when modules outside the model ran after its gradient was there
    source: Any = None  # the pass over the data that it came from
    seen_at: int = 0  # the number of backward passes before it was seen
    passed: bool = False
    looked: bool = False  # the model ran without gradients when it was the last
    passed_at: int = 0  # the number of backward passes before its forward pass
    again: bool = False  # a step of it has been taken already
    certain: bool = True  # else the loop may have gone on to other batches
    evaluated_at: int | None = None  # the number of backward passes before its forward pass, if that was in eval mode


class Mark(NamedTuple):
    """Where a loop is between its batches and backward passes."""

    batches: int = 0  # since the last step
    used: Sequence[int] | None = None  # behind how many of them each gradient came that is still there, if it is known
    backwards: int = 0  # so far
    first_backward: int = 0  # the first whose gradient is still there
    pending: bool = False  # whether one came since the last step
    counts: bool = False  # whether backward passes are counted


def used(starts: Sequence[int], total: int, count: int) -> list[int]:
    """Behind how many batches each gradient came that is still there.

    Args:
        starts: the number of backward passes before each batch was seen.
        total: how many there were in all.
        count: of how many the gradients are still there: the last.
    """
    gone, found = total - count, []
    for place, start in reversed(list(enumerate(starts, 1))):
        if total > max(start, gone):
            found.append(place)
        total = min(start, total)
        if total <= gone:
            break
    return found[::-1]


def trained_on(seen: list[Seen]) -> list[Seen]:
    """The batches without those that the model only evaluated, where that is known."""
    if any(one.passed for one in seen):
        return [one for one in seen if one.passed or not one.looked]
    return seen


def candidates(seen: list[Seen], used: Sequence[int], count: int, *, ahead: int, of_epoch: int) -> list[list[Seen]]:
    """What a step may be made of, the likeliest first.

    With m = ``count`` backward passes whose gradients are there: the batches behind which these came or, where a loop
    reads ``ahead``, the m before those that were read ahead; the last m; the first m; the last one, with m backward
    passes; all of this pass over the data, which begins behind ``of_epoch`` of them; all; the last one, whatever is
    known of m.
    """
    known = trained_on(seen)
    total = len(known)
    windows = [(total - count, total), (0, count), (total - 1, total)] if count else []
    windows += [(of_epoch, total), (0, total), (total - 1, total)]
    found = [known[start:end] for start, end in windows if 0 <= start < end <= total]
    places = range(*_window(total, count, ahead)) if ahead else ()
    likeliest = [known[place] for place in places if place < total] if ahead else [
        seen[place - 1] for place in used if any(seen[place - 1] is one for one in known)
    ]  # fmt: skip
    found = [likeliest, *found] if count and likeliest else found
    return list({tuple(map(id, one)): one for one in found}.values())


def read_ahead(seen: list[Seen], count: int, ahead: int) -> list[Seen]:
    """Of a loop that reads ``ahead``, the batches that are left when it steps with ``count`` gradients."""
    known = trained_on(seen)
    return known[_window(len(known), count, ahead)[1] :] if ahead and count else []


def _window(total: int, count: int, ahead: int) -> tuple[int, int]:
    """Where the batches of the last ``count`` backward passes are among all, before those that were read ahead."""
    start = max(total - ahead - count, 0)
    return start, start + count
