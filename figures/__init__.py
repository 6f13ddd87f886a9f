"""Figures: they draw what analysis computes, and compute nothing themselves."""

from .catalogue import FIGURES, caption, claim, draw
from .explore import explore
from .panels import (
    draw_events,
    draw_identity,
    draw_layers,
    draw_over_layers,
    draw_over_time,
    draw_predicted_measured,
)
from .report import write_report

__all__ = [
    "FIGURES",
    "caption",
    "claim",
    "draw",
    "draw_events",
    "draw_identity",
    "draw_layers",
    "draw_over_layers",
    "draw_over_time",
    "draw_predicted_measured",
    "explore",
    "write_report",
]
