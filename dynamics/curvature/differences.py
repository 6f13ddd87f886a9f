"""Derivatives as differences: how far apart is found out, because too far bends them and too near rounds them away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FACTOR = 4  # from one distance to the next
_NEAR = 0.1  # where two differences are farther apart than this, relative to their norm, the next may be even farther


def extrapolated(difference: Callable[[float], list[Tensor]], distance: float, tolerance: float) -> list[Tensor]:
    """The limit of central differences for small distances, from the two neighbouring distances that agree best.

    It begins at the given distance and the next smaller one. Unless these agree to a ``tolerance``, relative to the
    norm, smaller ones are tried as long as agreement gets better or, if none agree better, larger ones. The error of a
    central difference grows with the square of the distance, which two of them tell (Richardson 1911; Ridders 1982,
    "Accurate computation of F'(x) and F'(x) F''(x)").
    """
    known = {0: difference(distance)}
    if not math.isfinite(distance):
        return known[0]

    def pair(power: int) -> tuple[float, list[Tensor]]:
        """How far the difference at a distance is from that at the next larger one, and the limit of the two."""
        for one in (power - 1, power):
            if one not in known:
                known[one] = difference(distance / _FACTOR**one)
        for one in known.keys() - {0, power - 1, power}:  # each is as large as the parameters
            del known[one]
        change = torch._foreach_sub(known[power], known[power - 1])
        limit = list(torch._foreach_add(known[power], change, alpha=1 / (_FACTOR**2 - 1)))
        apart, size = norm(change).item(), norm(known[power]).item()
        return (0.0 if not apart else apart / size if math.isfinite(apart) and size else math.inf), limit

    best = pair(1)
    for way in (range(2, 6), range(0, -2, -1)):  # to smaller distances, else to larger ones
        begun = best
        for power in way:
            if best[0] <= tolerance:
                break
            try:
                found = pair(power)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # there may be no loss as far away as that
                break
            if found[0] < best[0] / 2:  # by chance, noise agrees a little better
                best = found
            elif best[0] < _NEAR:
                break
        if best is not begun:
            break
    return best[1]


@torch.no_grad()
def norm(vector: Sequence[Tensor]) -> Tensor:
    """‖v‖ of a vector in pieces."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(vector))))
