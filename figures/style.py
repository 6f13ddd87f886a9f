"""The meaning of colours, lines and markers, which is the same in every figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap

from analysis.conditions import MEASURES
from analysis.names import names_of

from .labels import wrapped

Style = dict[str, Any]  # arguments of matplotlib's artists

_THEME = Path(__file__).with_name("thetadot.mplstyle")

# measured = dots, first order = dashed, second order = solid
MEASURED: Style = {"linestyle": "none", "marker": "o", "color": "0.25", "markersize": 3, "label": "measured"}
LINES: dict[str, Style] = {
    "first_order": {"linestyle": (0, (4, 2)), "color": "#0173b2", "label": "first order", "zorder": 2.2},
    "second_order": {"linestyle": "-", "color": "#d55e00", "label": "second order"},  # below the first
}

# the same at each layer, where a line would join what has no order
POINTS: dict[str, Style] = {
    "first_order": {"linestyle": "none", "marker": "D", "color": "#0173b2", "markerfacecolor": "none", "markersize": 4,
                    "label": "first order"},
    "second_order": {"linestyle": "none", "marker": "s", "color": "#d55e00", "markersize": 3.5,
                     "label": "second order"},
    "measured": MEASURED,
}  # fmt: skip

# the depth of a layer, from the first to the last
DEPTH = LinearSegmentedColormap.from_list("depth", plt.get_cmap("viridis")(np.linspace(0, 0.92, 64)))

# where something was done to the network
PRUNING: Style = {"linestyle": ":", "color": "0.45", "label": "pruning"}
OTHER_EVENT: Style = {"linestyle": "-.", "color": "0.6", "label": "other event"}

# the mode of a normalisation
MODES: dict[str, Style] = {
    "train": {"linestyle": "none", "marker": "o", "color": "#029e73", "markersize": 3, "label": "training mode"},
    "eval": {"linestyle": "none", "marker": "x", "color": "#cc78bc", "markersize": 3, "label": "eval mode"},
}

# what seeds say of a claim
VERDICTS: dict[str, Style] = {
    "supported": {"color": "#0173b2"},
    "contradicted": {"color": "#d55e00"},
    "negligible": {"color": "0.1"},
    "inconclusive": {"color": "0.6"},
}

_MARKERS = "osD^vPX*<>"
_PALETTE = sns.color_palette("colorblind", 10).as_hex()
_PALETTE[6], _PALETTE[8] = "#882255", "#999933"  # instead of a pink and a yellow that are hardly seen on white
_LIGHTEST = 0.88  # part of viridis that is visible on white

_drawn: ContextVar[tuple[str, ...]] = ContextVar("the measures of a figure", default=())


@contextmanager
def theme(measures: Iterable[str] = ()) -> Iterator[None]:
    """Inside, figures are drawn in thetadot's style alone, on white paper; afterwards the user's own is restored.

    Args:
        measures: all that are drawn, in order: each has one colour and marker in all panels.
    """
    plt.draw_if_interactive()  # wakes the backend: what it sets to show later figures must not end with the style
    before = _drawn.set(tuple(measures))
    try:
        with plt.style.context(_THEME, after_reset=True):
            yield
    finally:
        _drawn.reset(before)


def run_styles(labels: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each label: a measure has the same in every figure; other labels get what is left, or all.

    These get theirs in the order of all labels that :func:`theme` was given; more than ten run from dark to light.
    """
    labels = list(labels)
    known = dict.fromkeys([*_drawn.get(), *labels])
    taken = MEASURES if known.keys() & set(MEASURES) else MEASURES[:1]
    order = [*taken, *(label for label in known if label not in taken)]
    colours: list[Any] = ["0.35", *islice(cycle(_PALETTE), len(order) - 1)]
    if len(order) > 1 + len(_PALETTE):
        many = len(order) - len(taken)
        colours[len(taken) :] = [
            tuple(colour[:3]) for colour in plt.get_cmap("viridis")(np.linspace(0, _LIGHTEST, many))
        ]
    return {label: {"color": colours[i], "marker": marker(i)} for i, label in enumerate(order) if label in labels}


def marker(number: int) -> str:
    """The marker of a number; each time the colours repeat, a colour gets another marker."""
    return _MARKERS[(number + max(number - 1, 0) // len(_PALETTE)) % len(_MARKERS)]


def named_styles(measures: Iterable[str]) -> dict[str, Style]:
    """:func:`run_styles` of the measures, each once, with its printed name as the legend's label."""
    styles = run_styles(dict.fromkeys(measures))
    names = names_of(styles)
    return {measure: style | {"label": wrapped(names[measure])} for measure, style in styles.items()}
