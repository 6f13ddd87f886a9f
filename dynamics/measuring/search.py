"""The search for the batches that a step is of: compares the gradient of each candidate with the applied one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..loop.processes import Processes
from .all_or_none import AllOrNone
from .candidates import Candidate, Found
from .captured_curvature import CapturedCurvature
from .probed_step import ProbedStep, shares


class Search:
    """Tries a step's candidates in turn until the gradient of one surely is the applied one."""

    def __init__(
        self,
        probed: ProbedStep,
        captured: ProbedStep | CapturedCurvature,
        processes: Processes,
        all_or_none: AllOrNone,
    ) -> None:
        self._probed, self._captured, self._processes, self._all_or_none = probed, captured, processes, all_or_none
        self._in_shares = False  # whether the last step weighted its batches neither by samples nor equally

    def found(self, candidates: Sequence[Candidate], step: int) -> list[Found]:
        """The candidates tried, in turn, without those on which the objective failed; only the last may be sure.

        It is empty if the training goes on without curvature.
        """
        if not candidates:
            return []
        likeliest = candidates[0]
        if self._in_shares and (shared := self._found_in_shares(likeliest, step)):
            return [shared]
        by = self._captured if len(candidates) == 1 else self._probed  # a captured graph overwrites its last result
        found: list[Found] = []
        for one in candidates:
            others = bool(found) or one is not candidates[-1]
            if tried := self._found(one, by, step, others=others):
                found.append(tried)
                if tried.sure:
                    return found
        if found and self._is_left_out(likeliest, found):  # measured again, for its warning
            found = [again, *found] if (again := self._found(likeliest, by, step)) else []
        return [*found, *self._nearest_in_shares(found, step)]

    def _nearest_in_shares(self, found: Sequence[Found], step: int) -> list[Found]:
        """The likeliest batches that have a gradient, in their nearest way, with fitted shares; empty if none fit."""
        ways = [one for one in found if one.candidate.number == found[0].candidate.number]
        if not ways:
            return []
        shared = self._found_in_shares(max(ways, key=lambda one: one.cosine).candidate, step)
        return [shared] if shared else []

    def _is_left_out(self, likeliest: Candidate, found: Sequence[Found]) -> bool:
        """Whether the objective failed on the likeliest batches, in any process."""
        if found[0].candidate is likeliest:
            return False
        return not self._all_or_none.all_agree(found[0].candidate.number == likeliest.number)

    def _found(
        self, candidate: Candidate, by: ProbedStep | CapturedCurvature, step: int, *, others: bool = False
    ) -> Found | None:
        """The candidate with its gradient, compared with the applied one; None if the objective fails on it."""
        if (measured := self._all_or_none.measured(partial(by.gradient, candidate.probe), step, others=others)) is None:
            return None
        grad = self._probed.mean(measured[1])
        return Found(candidate, by, measured[0], grad, *self._probed.alignment(grad))

    def _found_in_shares(self, candidate: Candidate, step: int) -> Found | None:
        """The candidate with its batches in shares fitted to the applied gradient; None unless that is surely theirs.

        Micro-batches may be weighted by their tokens, say, across replicas as well; then each replica's loss is scaled
        so that the mean over replicas is the whole loss.
        """
        self._in_shares = False
        counts = self._processes.gathered(len(candidate.probe))
        if sum(counts) < 2:
            return None
        entries = self._all_or_none.measured(partial(self._probed.entries, candidate.probe, sum(counts)), step)
        if entries is None:
            return None
        grads, applied = entries
        of_all = self._processes.broadcast(shares(torch.cat(self._processes.gathered(grads), 1), applied))
        if not of_all:
            return None
        before = sum(counts[: self._processes.place])
        own = [share * len(counts) for share in of_all[before : before + len(candidate.probe)]]
        found = self._found(candidate._replace(probe=candidate.probe.in_shares(own)), self._probed, step)
        self._in_shares = found is not None and found.sure
        return found if self._in_shares else None
