"""Pruning: importance measures, rounds, and a pruner that keeps what it removed at exactly zero."""

from ..network.masks import apply_masks, parameter_masks
from .cost import Cost, network_cost
from .curve import removal_curve
from .importance.measures import MEASURES, Measure
from .importance.resampling import resampled_scores
from .importance.scores import scores, scores_by_measure
from .invariance import scale_invariance
from .latency import latency
from .plan import Pruning
from .protocol import PROTOCOLS, Protocol
from .pruner import Pruner
from .schedule import exponential_share_left, share_left
from .shrinking.shrink import Shrunk, shrink

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Cost",
    "Measure",
    "Protocol",
    "Pruner",
    "Pruning",
    "Shrunk",
    "apply_masks",
    "exponential_share_left",
    "latency",
    "network_cost",
    "parameter_masks",
    "removal_curve",
    "resampled_scores",
    "scale_invariance",
    "scores",
    "scores_by_measure",
    "share_left",
    "shrink",
]
