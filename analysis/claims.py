"""The claims of the paper's abstract: what each of them compares, and why."""

from __future__ import annotations

from dataclasses import dataclass

from .names import name_of

_AGNOSTIC = ("loss_preservation", "gradient_norm_increase", "gradient_norm_preservation")
_NOT_FIRST_ORDER = ("magnitude", "gradient_norm_increase", "gradient_norm_preservation")
_NOT_INCREASE = ("magnitude", "loss_preservation", "loss_preservation_times_magnitude", "gradient_norm_preservation")


@dataclass(frozen=True)
class Claim:
    """A claim as a comparison within each seed: one statistic of ``measure`` against its mean over ``others``.

    Args:
        name: its place in the abstract, (i) to (iii), and a letter.
        says: the claim, as far as this statistic can support it.
        statistic: name in :data:`analysis.statistics.STATISTICS`.
        measure: the importance measure that the claim is about.
        others: the measures it is compared with; without any, a ratio is compared with 1.
        expected: the sign of the effect that the claim states: +1 for more, −1 for less.
        compare: "ratio" to the others' geometric mean, whose null is 1, or "difference" from their mean, null 0.
        reason: why this statistic, and why these others.
        rounds: the only number of rounds that the claim is about, if there is just one.
    """

    name: str
    says: str
    statistic: str
    measure: str
    others: tuple[str, ...]
    expected: int
    compare: str
    reason: str
    rounds: int | None = None

    @property
    def definition(self) -> str:
        """What is compared with what, what the claim expects of it, and why."""
        others = " and ".join(", ".join(map(name_of, self.others)).rsplit(", ", 1))
        ratio = self.compare == "ratio"
        those = f"the {'geometric ' * ratio}mean over" if len(self.others) > 1 else "that of"
        against = f" {'divided by' if ratio else 'minus'} {those} {others}" * bool(others)
        side = f"{'above' if self.expected > 0 else 'below'} {1 if ratio else 0}"
        rounds = f" with {self.rounds} round of pruning" * bool(self.rounds)
        return f"{self.statistic} of {name_of(self.measure)}{against} is {side}{rounds}. {self.reason}"


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "i.a", "What magnitude pruning removes contributes less to reducing the loss than the average parameter",
            "decrease_per_parameter", "magnitude", (), -1, "ratio",
            "Along gradient flow, dL/dt = −‖g‖², to which parameter i contributes −gᵢ². Per parameter, as measures "
            "remove different numbers of parameters with the same number of filters; parameters at random give 1.",
        ),
        Claim(
            "i.b", "What magnitude pruning removes contributes less than the average parameters of the same layers",
            "decrease_within_layers", "magnitude", (), -1, "ratio",
            "The part of i.a that is due to the choice of filters: a measure that chose layers with small gradients, "
            "but arbitrary filters within them, would show in i.a alone.",
        ),
        *(
            Claim(
                name, f"What magnitude pruning removes contributes less than what {name_of(other)} removes",
                "decrease_per_parameter", "magnitude", (other,), -1, "ratio",
                'The abstract says "least", so each magnitude-agnostic measure is compared separately: they may differ '
                "by orders of magnitude in both directions, and their mean would describe none of them. Loss "
                "preservation × magnitude is not magnitude-agnostic.",
            )
            for name, other in zip(("i.c", "i.d", "i.e"), _AGNOSTIC, strict=True)
        ),
        Claim(
            "i.f", "Models converge faster when pruned by magnitude than by magnitude-agnostic measures",
            "training_area", "magnitude", _AGNOSTIC, -1, "ratio",
            "The area under the training curve after the last pruning needs no threshold and is known for every run. "
            "Within a seed, only runs that train for the same number of steps after it are compared (in a sweep, on "
            "the same batches). Recovery from the pruning is included.",
        ),
        Claim(
            "i.g", "Loss preservation × magnitude converges faster than loss preservation",
            "training_area", "loss_preservation_times_magnitude", ("loss_preservation",), -1, "ratio",
            "The paper's own measure, motivated by (i): the two differ only in the factor of magnitude.",
        ),
        Claim(
            "ii.a", "Loss preservation changes the loss less than measures of other orders",
            "loss_change", "loss_preservation", _NOT_FIRST_ORDER, -1, "ratio",
            "As its name says: its score, the sum |θg|, bounds the first-order change |gᵀδ| of the loss. A change is "
            "|ln(after/before)|, because a loss can grow without limit but fall only to zero. Measures of other orders "
            "are magnitude (0) and gradient norm (2); loss preservation × magnitude is of the same order.",
        ),
        Claim(
            "ii.b", "Loss preservation changes the velocity of the norm less than measures of other orders",
            "norm_rate_change", "loss_preservation", _NOT_FIRST_ORDER, -1, "ratio",
            "First-order dynamics are d‖θ‖²/dt = −2θᵀg; the measure keeps small what the removed parameters "
            "contributed to it. In training mode, θᵀg is 0 on filters that BatchNorm normalises, so they play no part.",
        ),
        Claim(
            "ii.c", "When pruning in one round, loss preservation gives better accuracy than magnitude",
            "accuracy", "loss_preservation", ("magnitude",), 1, "difference",
            '"Minimally trained" means one round: in the paper\'s protocol everything is pruned after the first epoch. '
            '"Appropriate" means better there than the measure that one would use without the paper. For more rounds, '
            "the claim says nothing.", 1,
        ),
        Claim(
            "iii.a", "Gradient-norm increase changes second-order dynamics more than other measures",
            "norm_acceleration_change", "gradient_norm_increase", _NOT_INCREASE, 1, "ratio",
            "Second-order dynamics are d²‖θ‖²/dt² = 2(‖g‖² + θᵀHg); the measure ranks by θᵀHg, with its sign. In "
            "training mode, θᵀHg is −‖g‖² on filters that BatchNorm normalises, so they play no part.",
        ),
        Claim(
            "iii.b", "Gradient-norm increase increases the gradient norm",
            "grad_sqnorm_ratio", "gradient_norm_increase", (), 1, "ratio",
            "‖g‖² of the parameters that stay, divided by ‖g‖² before: whether the measure keeps its first-order "
            "promise. In the paper's protocol, it scores the gradient of a loss at another temperature (200) than the "
            "probe's (5).",
        ),
        Claim(
            "iii.c", "Gradient-norm increase leaves a larger gradient norm than other measures",
            "grad_sqnorm_ratio", "gradient_norm_increase", _NOT_INCREASE, 1, "ratio",
            "Pruning many filters takes away their share of ‖g‖², whatever the measure; what is left is therefore "
            "compared.",
        ),
        Claim(
            "iii.d", "Gradient-norm preservation changes the gradient norm less than increase does",
            "grad_sqnorm_change", "gradient_norm_preservation", ("gradient_norm_increase",), -1, "ratio",
            "Both rank by θ(Hg): preservation without its sign, increase with it (at temperatures 1 and 200 in the "
            "paper's protocol). A change is |ln(after/before)|, because it may span orders of magnitude, up or down.",
        ),
        Claim(
            "iii.e", "Increasing the gradient norm gives worse models than other measures",
            "accuracy", "gradient_norm_increase", _NOT_INCREASE, -1, "difference",
            "The abstract says that this can happen, so one condition where it does is enough.",
        ),
        Claim(
            "iii.f", "Preserving the gradient norm gives better models than increasing it",
            "accuracy", "gradient_norm_preservation", ("gradient_norm_increase",), 1, "difference",
            "No interval can show that preserving does no harm, unless one defines how much counts as none; that it "
            "does less harm, an interval can show.",
        ),
    )
}  # fmt: skip
