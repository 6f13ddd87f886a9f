"""Pruning: importance measures, rounds, and a pruner that keeps what it removed at exactly zero."""

from .cost import Cost, network_cost
from .importance import scores, scores_by_measure
from .latency import latency
from .measures import MEASURES, Measure
from .protocol import PROTOCOLS, Protocol
from .pruner import Pruner, Pruning
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
    "exponential_share_left",
    "latency",
    "network_cost",
    "scores",
    "scores_by_measure",
    "share_left",
    "shrink",
]
