"""Theory against measurement: each function takes a record and returns a dataset. Nothing here needs torch."""

from .agreement import agree, agreement, network_norm_rate, residuals
from .effect import filters_left, pruning_effect
from .findings import each
from .loss import loss_decrease, stability
from .norm import norm_balance, norm_rate
from .outcome import outcome, training_curve
from .record import MissingQuantityError, open_runs
from .tables import agreement_table, outcome_table

__all__ = [
    "MissingQuantityError",
    "agree",
    "agreement",
    "agreement_table",
    "each",
    "filters_left",
    "loss_decrease",
    "network_norm_rate",
    "norm_balance",
    "norm_rate",
    "open_runs",
    "outcome",
    "outcome_table",
    "pruning_effect",
    "residuals",
    "stability",
    "training_curve",
]
