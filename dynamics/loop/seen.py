"""What a loop was seen to read, and which of it a step may be made of: those batches whose gradients are there.

A gradient is of the batch that was read last when its backward pass came; where a loop reads ahead, of an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..probing.moment import Moment


@dataclass(slots=True)
class Seen:
    """A batch that a loop has read, with the moments from which its loss may be evaluated again.

    Of what began at which backward pass (``seen_at``, ``passed_at``): how many of them there were before.
    """

    batch: Any
    moment: Moment | None  # its forward pass begins; until then, it was seen
    first_moment: Moment | None = None  # it was seen
    gradient_moment: Moment | None = None  # the last further forward pass before its gradient was there begins, if any
    last_moment: Moment | None = None  # the last further forward pass begins, if any
    next_moment: Moment | None = None  # the first forward pass begins after it was seen, of whatever batch
    later: Moment | None = None  # modules outside the model run after its gradient was there
    changed_since: Callable[[], Any] | None = None  # gives the batch where the loop has changed it by then
    changed: Any = None  # the batch as its forward pass began, if it had been changed by then
    source: Any = None  # the pass over the data that it came from
    seen_at: int = 0
    passed: bool = False  # whether its forward pass, with gradients, has begun
    passed_at: int = 0
    passed_in_eval_at: int | None = None  # as passed_at, if that pass was in eval mode
    ran: bool = False  # whether the model ran with gradients when it was the last
    only_evaluated: bool = False  # the model ran without gradients when it was the last, and not with them since
    again: bool = False  # a step of it has been taken already
    certain: bool = True  # else the loop may have gone on to other batches


class Mark(NamedTuple):
    """Where a loop is between its batches and backward passes."""

    batches: int = 0  # since the last step
    backwards: int = 0  # so far
    first_backward: int = 0  # the first whose gradient is still there
    pending: bool = False  # whether one came since the last step
    used: Sequence[int] = ()  # of a step: behind how many batches each gradient came that is there, if it is known


def used(starts: Sequence[int], total: int, count: int) -> list[int]:
    """Behind how many batches each gradient came that is still there.

    Args:
        starts: the number of backward passes before each batch was seen.
        total: how many there were in all.
        count: of how many the gradients are still there: the last.
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
    """The batches without those that the model only evaluated, where that is known."""
    if any(one.passed for one in seen):
        return [one for one in seen if one.passed or not one.only_evaluated]
    return seen


def candidates(seen: list[Seen], used: Sequence[int], count: int, *, ahead: int, of_epoch: int) -> list[list[Seen]]:
    """What a step may be made of, the likeliest first.

    With m = ``count`` backward passes whose gradients are there: the batches behind which these came or, where a loop
    reads ``ahead``, as many before those; the m before those that were read ahead; the last m; the first m; the last
    one, with m backward passes; the first behind which these may have come; all of this pass over the data, which
    begins behind ``of_epoch`` of them; all; the last one, whatever is known of m. Then those behind which gradients
    came and the first m, of all that were read: what was evaluated need not be what was read last.
    """
    known = trained_on(seen)
    total = len(known)
    came = _behind(seen, used, ahead)
    behind = [came, known[slice(*_window(total, count, ahead))]]
    if len(used) != count and (ahead or total == count):  # more read, or all, before the gradients came
        behind = behind[::-1]
    windows = [(total - count, total), (0, count), (total - 1, total)]
    windows = [known[start:end] for start, end in windows if 0 <= start < end <= total]
    first = _behind(seen, used, used[0] - 1) if used else []
    others = [known[of_epoch:], known, known[-1:]]
    found = [*behind, *windows, first, *others] if count else others
    ours = {id(one) for one in known}
    found = [batches for batches in found if batches and ours.issuperset(map(id, batches))]
    found += [batches for batches in (came, seen[:count]) if batches and count < len(seen)]
    return list({tuple(map(id, batches)): batches for batches in found}.values())


def read_ahead(seen: list[Seen], used: Sequence[int], count: int, ahead: int) -> list[Seen]:
    """The batches that are left when a loop steps: read behind the last of its gradients, or before that, ``ahead``."""
    if not ahead:
        return [one for one in seen[used[-1] :] if not one.only_evaluated] if used else []
    known = trained_on(seen) if count else []
    return known[_window(len(known), count, ahead)[1] if len(used) == count else -ahead :]


def _behind(seen: list[Seen], used: Sequence[int], ahead: int) -> list[Seen]:
    """The batches of gradients that came behind so many, if these were read so far ahead."""
    return [seen[place - 1 - ahead] for place in used] if used and used[0] > ahead else []


def _window(total: int, count: int, ahead: int) -> tuple[int, int]:
    """Where the batches of the last ``count`` backward passes are among all, before those that were read ahead."""
    start = max(total - ahead - count, 0)
    return start, start + count
