"""Pruning: importance measures, rounds, and a pruner that keeps what it removed at exactly zero."""

from ..network.masks import apply_masks, parameter_masks
from .cost import Cost, network_cost
from .curve import removal_curve
from .importance import scores, scores_by_measure
from .invariance import scale_invariance
from .latency import latency
from .measures import MEASURES, Measure
from .protocol import PROTOCOLS, Protocol
from .pruner import Pruner, Pruning
from .resampling import resampled_scores
from .schedule import exponential_share_left, share_left
from .shrink import Shrunk, shrink

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
