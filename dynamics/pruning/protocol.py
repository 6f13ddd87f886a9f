"""The protocol of a pruning: correct by default, or with quirks of the paper's code, each behind one switch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .schedule import share_left, share_left_in_whole_percent


@dataclass(frozen=True)
class Protocol:
    """Which quirks of the paper's published code are reproduced. By default none is.

    Args:
        whole_percent: in residual networks each round truncates the percentage of filters left to a whole number, so
            that more is pruned than was asked: 75% in 25 rounds leave 18%.
        floor_by_index: a layer always keeps its last filters by index, ⌊5% of their number⌋ + 1, instead of its best;
            residual networks have no such rule, except that each layer keeps its one best filter.
        revive_silenced: filters whose channels end in a sum are ranked again in every round, even when silenced; with a
            signed measure their score of 0 is not the lowest, and they come back, starting from zero.
        count_copies: a filter with which a depthwise filter is pruned counts twice towards the number to prune.
        prune_ties: all filters that score no more than the last one pruned are pruned with it, as by a threshold. The
            paper's code counts instead, and so does "reference".
        score_augmented: if the training samples are augmented, so are those on which an experiment scores.
        select_on_test: the epoch that counts is the best on the test set, not the last.

    No switch reproduces how the paper's code rounds: it rounds down the number to prune in each round, so that 75% in
    25 rounds leave 744 of VGG-13's 2944 filters and not 736; and where it leaves a layer of a residual network its last
    filter, no other is pruned instead.

    Source: the code published with Lubana & Dick, ICLR 2021 (github.com/EkdeepSLubana/flowandprune), but for ties.
    """

    whole_percent: bool = False
    floor_by_index: bool = False
    revive_silenced: bool = False
    count_copies: bool = False
    prune_ties: bool = False
    score_augmented: bool = False
    select_on_test: bool = False

    def share_left(self, sparsity: float, rounds: int, round_number: int, *, residual: bool) -> float:
        """Share of units that a round leaves: :func:`dynamics.pruning.share_left`, or as the quirk has it."""
        cut = self.whole_percent and residual
        return (share_left_in_whole_percent if cut else share_left)(sparsity, rounds, round_number)


QUIRKS = tuple(field.name for field in dataclasses.fields(Protocol))

# By name: without quirks, with each quirk alone, and as the paper's code does it.
PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol(),
    **{quirk: Protocol(**{quirk: True}) for quirk in QUIRKS},
    "reference": dataclasses.replace(Protocol(**dict.fromkeys(QUIRKS, True)), prune_ties=False),
}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
