"""What colours, lines and markers mean, in every figure the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns

from analysis.conditions import MEASURES
from analysis.names import name_of

_THEME = Path(__file__).with_name("thetadot.mplstyle")

# measured = dots, first order = dashed, second order = solid
MEASURED = {"linestyle": "none", "marker": "o", "color": "0.25", "markersize": 3, "label": "measured"}
FIRST = {"linestyle": (0, (4, 2)), "color": "#0173b2", "label": "first order"}
SECOND = {"linestyle": "-", "color": "#d55e00", "label": "second order"}

# the mode of a normalisation
MODES = {
    "train": {"linestyle": "none", "marker": "o", "color": "#029e73", "markersize": 3, "label": "training mode"},
    "eval": {"linestyle": "none", "marker": "x", "color": "#cc78bc", "markersize": 3, "label": "eval mode"},
}

_MARKERS = "osD^vPX*<>"


@contextmanager
def theme() -> Iterator[None]:
    """Draw inside in thetadot's style; afterwards the user's own is as it was."""
    plt.draw_if_interactive()  # wakes the backend: what it sets to show later figures must not end with the style
    with plt.style.context(_THEME):
        yield


def run_styles(labels: Iterable[str]) -> dict[str, dict[str, object]]:
    """Colour and marker of each run: one a measure, the same in every figure; others take what is left, or all."""
    labels = list(labels)
    taken = MEASURES if set(labels) & set(MEASURES) else MEASURES[:1]
    order = [*taken, *(label for label in labels if label not in taken)]
    colours = ["0.35", *sns.color_palette("colorblind", len(order) - 1)]
    return {
        label: {"color": colours[i], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(order)
        if label in labels
    }


def named_styles(measures: Iterable[str]) -> dict[str, dict[str, object]]:
    """:func:`run_styles` of the measures, each once, with its name for the legend."""
    styles = run_styles(dict.fromkeys(measures))
    return {measure: style | {"label": name_of(measure)} for measure, style in styles.items()}
