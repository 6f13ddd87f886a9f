"""The search for what a step is of: the gradient of each candidate beside the one applied."""

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
    """Tries the candidates for what a step is of until the gradient of one surely is the one applied."""

    def __init__(
        self,
        probed: ProbedStep,
        captured: ProbedStep | CapturedCurvature,
        processes: Processes,
        all_or_none: AllOrNone,
    ) -> None:
        self._probed, self._captured, self._processes, self._all_or_none = probed, captured, processes, all_or_none
        self._in_shares = False  # whether the last step's batches counted neither by their samples nor equally

    def found(self, candidates: Sequence[Candidate], step: int) -> list[Found]:
        """Those on which the objective did not fail, in turn: only of the last the gradient may surely be the applied.

        None where the training goes on without curvature.
        """
        if not candidates:
            return []
        likeliest = candidates[0]
        if self._in_shares and (shared := self._found_in_shares(likeliest, step)):
            return [shared]
        by = self._captured if len(candidates) == 1 else self._probed  # graphs write over what they found before
        found: list[Found] = []
        for one in candidates:
            others = bool(found) or one is not candidates[-1]
            if tried := self._found(one, by, step, others=others):
                found.append(tried)
                if tried.sure:
                    return found
        if found and self._is_left_out(likeliest, found):  # then it is said why
            found = [again, *found] if (again := self._found(likeliest, by, step)) else []
        return [*found, *self._nearest_in_shares(found, step)]

    def _nearest_in_shares(self, found: Sequence[Found], step: int) -> list[Found]:
        """Of the likeliest batches of which there is a gradient those in the nearest way, in shares, if that fits."""
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
        """The candidate's gradient, beside the one applied; None where the objective fails on it."""
        if (measured := self._all_or_none.measured(partial(by.gradient, candidate.probe), step, others=others)) is None:
            return None
        grad = self._probed.mean(measured[1])
        return Found(candidate, by, measured[0], grad, *self._probed.alignment(grad))

    def _found_in_shares(self, candidate: Candidate, step: int) -> Found | None:
        """The candidate with its batches in the shares that the gradient applied has, if it surely is theirs then.

        Micro-batches may count by their tokens, say, also those of several replicas, each of which has the part of the
        loss of which the mean over replicas is the loss.
        """
        self._in_shares = False
        counts = self._processes.gathered(len(candidate.probe))
        if sum(counts) < 2:
            return None
        entries = self._all_or_none.measured(partial(self._probed.entries, candidate.probe, sum(counts)), step)
        if entries is None:
            return None
        grads, applied = entries
        of_all = self._processes.told(shares(torch.cat(self._processes.gathered(grads), 1), applied))
        if not of_all:
            return None
        before = sum(counts[: self._processes.place])
        own = [share * len(counts) for share in of_all[before : before + len(candidate.probe)]]
        found = self._found(candidate._replace(probe=candidate.probe.in_shares(own)), self._probed, step)
        self._in_shares = found is not None and found.sure
        return found if self._in_shares else None
