"""Theory against measurement: each function takes a record and returns a dataset. Nothing here needs torch."""

from .agreement import agree, agreement, residuals
from .claims import CLAIMS
from .comparison import compare, compare_convergence, mean_and_interval, median_and_quartiles, side_by_side
from .condensed import condense, expand
from .conditions import comparisons, conditions
from .convergence import convergence
from .effect import (
    effect_of_prunings,
    filters_left,
    pruning_effect,
    pruning_effect_per_layer,
    removal_curve,
    removed_decrease,
)
from .invariance import grasp_and_gradient, scale_invariance
from .loss import loss_decrease, stability
from .measures import rank_agreement, removed_overlap, score_noise
from .norm import layer_norm_rate, network_norm_rate, norm_balance, norm_rate
from .opening import open_runs
from .outcome import outcome, training_curve
from .protocol import protocol_diff, protocol_table
from .record import MissingQuantityError
from .run_statistics import statistics
from .runs import each
from .seed_tables import accuracy_table, claims_table, convergence_table, verdict_table
from .statistics import STATISTICS
from .tables import agreement_table, outcome_table
from .verdicts import claims

__all__ = [
    "CLAIMS",
    "STATISTICS",
    "MissingQuantityError",
    "accuracy_table",
    "agree",
    "agreement",
    "agreement_table",
    "claims",
    "claims_table",
    "compare",
    "compare_convergence",
    "comparisons",
    "condense",
    "conditions",
    "convergence",
    "convergence_table",
    "each",
    "effect_of_prunings",
    "expand",
    "filters_left",
    "grasp_and_gradient",
    "layer_norm_rate",
    "loss_decrease",
    "mean_and_interval",
    "median_and_quartiles",
    "network_norm_rate",
    "norm_balance",
    "norm_rate",
    "open_runs",
    "outcome",
    "outcome_table",
    "protocol_diff",
    "protocol_table",
    "pruning_effect",
    "pruning_effect_per_layer",
    "rank_agreement",
    "removal_curve",
    "removed_decrease",
    "removed_overlap",
    "residuals",
    "scale_invariance",
    "score_noise",
    "side_by_side",
    "stability",
    "statistics",
    "training_curve",
    "verdict_table",
]
