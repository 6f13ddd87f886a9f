"""How many units are left after each round of pruning."""

from __future__ import annotations


def share_left(sparsity: float, rounds: int, round_number: int) -> float:
    """Share of units left after round k of n for a final sparsity p: n(1−p) / (n(1−p) + kp).

    The compression 1/share grows linearly with k and is 1/(1−p) at the end; equivalently round k removes the fraction
    r_k = p / (kp + n(1−p)) of what round k−1 left. Source: the paper's code, as facts.

    Raises:
        ValueError: sparsity outside [0, 1), rounds < 1, or k outside 0 … n.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}: 0.75 removes three filters of four")
    if rounds < 1 or not 0 <= round_number <= rounds:
        raise ValueError(f"a round must be in 0 … rounds and rounds >= 1, got round {round_number} of {rounds}")
    kept = rounds * (1 - sparsity)
    return kept / (kept + round_number * sparsity)
