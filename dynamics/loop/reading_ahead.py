"""How far a loop reads ahead of its steps, as the applied gradients tell, and so which batches a step leaves for later.

A loop may read one batch ahead, to copy it to a device, or by twos and threes, and reads nothing ahead any more at the
end of its data.
"""

from __future__ import annotations

from collections.abc import Sequence

from .seen import Seen, trained_on, window


class ReadingAhead:
    """Learns from each step whose batches the gradient has :meth:`chosen`; the steps between go on alike.

    Attributes:
        count: how many batches the loop reads before it uses them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._once = False  # whether each batch has one backward pass, for all that is known
        self._left: list[Seen] | None = None  # the batches after those of the present step, if these are known

    def chosen(self, batches: Sequence[Seen], seen: Sequence[Seen], count: int, *, expected: bool) -> None:
        """The step is of these ``batches`` of those ``seen``, with ``count`` backward passes: the rest was read ahead.

        If this was not what was ``expected``, the loop reads another number of batches ahead than was thought.
        """
        end = next(place for place, one in enumerate(seen, 1) if one is batches[-1])
        self._left = [one for one in seen[end:] if not one.only_evaluated]
        self._once = len(batches) == count
        if expected:
            return
        self.count = len(self._left)
        for one in batches:
            one.passed, one.only_evaluated = True, False
        for one in seen[end:]:  # the forward passes belonged to the step's batches
            one.passed = False

    def left(self, seen: list[Seen], used: Sequence[int], count: int) -> list[Seen]:
        """The batches that the present step leaves for later; the next one is the present step from then on."""
        known, self._left = self._left, None
        return read_ahead(seen, used, count, self.count, once=self._once) if known is None else known


def read_ahead(seen: list[Seen], used: Sequence[int], count: int, ahead: int, *, once: bool) -> list[Seen]:
    """The batches that a step leaves for later: those read after its last backward pass, or those read ``ahead``.

    Where each batch has ``once`` a backward pass, they are those after the first ``count`` if the first of these passes
    came before so many batches were read ahead, or if several came after the same batch was read.

    Args:
        seen: the batches seen since the step before.
        used: what :func:`~dynamics.loop.seen.used` returns for them.
        count: how many backward passes have left gradients that are still there.
        ahead: how many batches the loop reads before it uses them.
        once: whether each batch has one backward pass.
    """
    known = trained_on(seen) if count else []
    if once and used and (len(used) < count or used[0] <= ahead):
        return known[count:]
    if not ahead:
        return [one for one in seen[used[-1] :] if not one.only_evaluated] if used else []
    return known[window(len(known), count, ahead)[1] if len(used) == count else -ahead :]
