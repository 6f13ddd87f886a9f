"""How many units are left after each round of pruning."""

from __future__ import annotations

from numbers import Real


def share_left(sparsity: float, rounds: int, round_number: int) -> float:
    """Share of units left after round k of n for a final sparsity p: n(1−p) / (n(1−p) + kp).

    The compression 1/share grows linearly with k and is 1/(1−p) at the end; equivalently round k removes the fraction
    r_k = p / (kp + n(1−p)) of what round k−1 left. Source: the paper's code, as facts.

    Raises:
        ValueError: sparsity outside [0, 1), rounds < 1, or k outside 0 … n.
    """
    _check(sparsity, rounds, round_number)
    kept = rounds * (1 - sparsity)
    return kept / (kept + round_number * sparsity)


def exponential_share_left(sparsity: float, rounds: int, round_number: int) -> float:
    """Share of units left after round k of n for a final sparsity p: (1−p)^(k/n), the same fraction every round.

    Source: Tanaka et al., NeurIPS 2020, algorithm 1, which takes 100 rounds of synflow without training in between.

    Raises:
        ValueError: as :func:`share_left`.
    """
    _check(sparsity, rounds, round_number)
    return (1 - sparsity) ** (round_number / rounds)


def share_left_in_whole_percent(sparsity: float, rounds: int, round_number: int) -> float:
    """:func:`share_left` where each round cuts the percentage that is left down to a whole number.

    c_k = ⌊c_{k−1} (1 − r_k)⌋ with c_0 = 100. What is cut adds up: 75% in 25 rounds leave 18% and not 25%. Source:
    the paper's code for residual networks, as facts.

    Raises:
        ValueError: as :func:`share_left`.
    """
    _check(sparsity, rounds, round_number)
    percent = 100
    for number in range(1, round_number + 1):
        percent = int(percent * (1 - sparsity / (number * sparsity + rounds * (1 - sparsity))))
    return percent / 100


def _check(sparsity: float, rounds: int, round_number: int) -> None:
    check_sparsity(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    if not 0 <= round_number <= rounds:
        raise ValueError(f"round must be from 0 to rounds, got round {round_number} of {rounds}")


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError if a sparsity is not in [0, 1)."""
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}: 0.75 removes three of every four units")
