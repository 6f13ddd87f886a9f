"""Pruning: importance measures, rounds, and a pruner that keeps what it removed at exactly zero."""

from .importance import scores
from .measures import MEASURES, Measure
from .pruner import Pruned, Pruner
from .schedule import share_left

__all__ = ["MEASURES", "Measure", "Pruned", "Pruner", "scores", "share_left"]
