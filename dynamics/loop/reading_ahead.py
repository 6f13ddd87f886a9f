"""How far a loop reads ahead of its steps, as the applied gradients tell, and so which batches a step leaves for later.

A loop may read one batch ahead, to copy it to a device, or by twos and threes, and reads nothing ahead any more at the
end of its data.
"""

from __future__ import annotations

from collections.abc import Sequence

from .seen import FURTHER, Seen, trained_on, window

_LOOKS = 4  # steps that are looked at although nothing is recorded of them


class ReadingAhead:
    """Learns from each step whose batches the gradient has :meth:`chosen`; the steps between go on alike.

    If more batches were read by one of these than that explains, some were skipped, or the loop reads further ahead
    than it did: the last ones are left for the next step, which has to be looked at.

    Attributes:
        count: how many batches the loop reads before it uses them.
        unclear: whether the next step has to be looked at.
    """

    def __init__(self) -> None:
        self.count, self.unclear = 0, False
        self._once = False  # whether each batch has one backward pass, for all that is known
        self._without = 0  # how many batches of a step have no backward pass of their own
        self._looks = _LOOKS
        self._left: list[Seen] | None = None  # the batches after those of the present step, if these are known

    def chosen(self, batches: Sequence[Seen], seen: Sequence[Seen], count: int, *, expected: bool) -> None:
        """The step is of these ``batches`` of those ``seen``, with ``count`` backward passes: the rest was read ahead.

        If this was not what was ``expected``, the loop reads another number of batches ahead than was thought.
        """
        end = next(place for place, one in enumerate(seen, 1) if one is batches[-1])
        self._left = [one for one in seen[end:] if not one.only_evaluated]
        self._once, self._without = len(batches) == count, max(0, len(batches) - count)
        if expected:
            return
        self.count = len(self._left)
        for one in batches:
            one.passed, one.only_evaluated = True, False
        for one in seen[end:]:  # the forward passes belonged to the step's batches
            one.passed = False

    def none_chosen(self, seen: list[Seen]) -> None:
        """The step is of none of the batches ``seen``: all were read ahead."""
        self._left = list(seen)

    def left(self, seen: list[Seen], used: Sequence[int], count: int, *, looks: bool) -> list[Seen]:
        """The batches that the present step leaves for later; the next one is the present step from then on.

        ``looks``: whether the next step can be looked at.
        """
        (known, self._left), trained = (self._left, None), trained_on(seen)
        many = len(trained) > count + self.count + self._without and not _in_turn(used, count, self.count, self._once)
        self.unclear = looks and known is None and bool(count) and many and self._looks > 0
        if self.unclear:
            self._looks -= 1
            return trained[-FURTHER:]
        return read_ahead(seen, used, count, self.count, once=self._once) if known is None else known


def read_ahead(seen: list[Seen], used: Sequence[int], count: int, ahead: int, *, once: bool) -> list[Seen]:
    """The batches that a step leaves for later: those read after its last backward pass, or those read ``ahead``.

    Args:
        seen: the batches seen since the step before.
        used: what :func:`~dynamics.loop.seen.used` returns for them.
        count: how many backward passes have left gradients that are still there.
        ahead: how many batches the loop reads before it uses them.
        once: whether each batch has one backward pass.
    """
    known = trained_on(seen) if count else []
    if count and _in_turn(used, count, ahead, once):
        return known[count:]
    if not ahead:
        return [one for one in seen[used[-1] :] if not one.only_evaluated] if used else []
    return known[window(len(known), count, ahead)[1] if len(used) == count else -ahead :]


def _in_turn(used: Sequence[int], count: int, ahead: int, once: bool) -> bool:
    """Whether a step's batches are surely the first ``count``, as each has ``once`` a backward pass.

    They are if the first of these passes came before so many batches were read ahead, or if several came after the same
    batch was read.
    """
    return once and bool(used) and (len(used) < count or used[0] <= ahead)
