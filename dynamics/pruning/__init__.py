"""Pruning: importance measures, rounds, and a pruner that keeps what it removed at exactly zero."""

from .importance import scores
from .measures import MEASURES, Measure
from .pruner import Pruned, Pruner
from .schedule import share_left
from .shrink import Shrunk, shrink

__all__ = ["MEASURES", "Measure", "Pruned", "Pruner", "Shrunk", "scores", "share_left", "shrink"]
