"""The figure of the paper's claims: every effect with its interval, beside the line of no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

import analysis
from analysis import CLAIMS, MissingQuantityError
from analysis.condition_names import names_of_conditions
from analysis.names import names_of
from analysis.runs import Runs
from analysis.typeset import percentages
from analysis.verdicts import JUDGED, as_claimed
from dynamics.words import counted

from .labels import plain, wrapped
from .layout import legend_below
from .room import in_pixels
from .style import VERDICTS, Style, marker

_BOUNDS = ["value", "low", "high"]
_COLUMNS = 3
_LETTERS = 44  # in a line of a claim
_TITLE = 30  # letters in a line of a panel's title
_LINE = 0.135  # inches, height of a line
_FARTHEST = 30.0  # a ratio beyond it is an arrow
_TICKS = (0.03, 0.1, 0.3, 1, 3, 10, 30)  # of ratios


def claims(runs: Runs) -> Figure:
    """The abstract's claims hold for some networks and fail for others; for many, these seeds cannot tell.

    Each claim's effect with its 95% interval over seeds (Student's), which may extend beyond the panel; one marker per
    number of rounds. Effects right of the line are as claimed, those left of it the opposite. Top: ratios, inverted
    where the claim says less; arrows are ratios beyond a factor of 30. Bottom: points of accuracy. Filled markers: the
    verdict stands after correction for the number of intervals.
    """
    found = as_claimed(analysis.claims(runs))
    found = found[np.isfinite(found.low.astype(float))]
    if found.empty:
        raise MissingQuantityError("claims are judged by intervals over seeds: give runs of at least two seeds")
    points = found[_BOUNDS].mul(100).where(found.null == 0, found[_BOUNDS], axis=0)
    found = found.assign(**points, network=_networks(found), pruned=_prunings(found))
    networks, markers = list(found.network.unique()), _markers(found)
    kinds = [found[found.null == null] for null in (1, 0) if (found.null == null).any()]
    heights = [sum(_height(name, len(markers)) for name in kind.claim.unique()) for kind in kinds]
    across = min(len(networks), _COLUMNS)
    down = -(-len(networks) // across)
    size = (2.8 + 2 * across, down * (sum(heights) + 1))
    ratios = heights * down
    figure, axes = plt.subplots(down * len(kinds), across, figsize=size, height_ratios=ratios, squeeze=False)
    for place, network in enumerate([*networks, *[None] * (across * down - len(networks))]):
        row, column = divmod(place, across)
        panels = axes[row * len(kinds) :, column]
        for ax, kind in zip(panels, kinds, strict=False):
            ax.set_visible(network is not None)
            _draw(ax, kind[kind.network == network], list(kind.claim.unique()), markers)
            ax.tick_params(axis="y", length=0, labelleft=column == 0)
            _scale(ax, kind)
        panels[0].set_title(network, fontsize=8)
    _flush_left(figure, axes[:, 0])
    legend_below(figure, *_legend(found, markers))
    return figure


def _networks(found: pd.DataFrame) -> list[str]:
    """Model, data and sparsity of each row, as lines of a title."""
    names = zip(*(found[name].map(names_of(found[name].unique())) for name in ("model", "data")), strict=True)
    pruned = ["" if pd.isna(share) else f"{share}% pruned" for share in percentages(found.sparsity)]
    titles = (wrapped(", ".join(filter(None, name)), _TITLE) for name in names)
    return ["\n".join(filter(None, lines)) for lines in zip(titles, pruned, strict=True)]


def _prunings(found: pd.DataFrame) -> list[str]:
    """Rounds and further settings of each row, as printed."""
    settings = found.drop(columns=["claim", "says", *JUDGED])
    others = names_of_conditions(settings.assign(model="", data="", rounds=0, sparsity=float("nan")))
    rounds = [counted(count, "round") for count in found.rounds]
    return [plain(", ".join(filter(None, said))) for said in zip(rounds, others, strict=True)]


def _markers(found: pd.DataFrame) -> dict[str, str]:
    """A marker for each pruning; the first marker always means a single round, so it is the same in every figure."""
    first = 0 if (found.rounds == 1).any() else 1
    return {pruning: marker(place) for place, pruning in enumerate(found.pruned.unique(), first)}


def _text(name: str) -> str:
    return wrapped(f"{name}  {CLAIMS[name].says}", _LETTERS)


def _height(name: str, intervals: int) -> float:
    """Inches of a claim's row: the height of its text, or of its stacked intervals if that is larger."""
    return 0.07 + max(_LINE * (1 + _text(name).count("\n")), 0.1 * intervals)


def _draw(ax: Axes, found: pd.DataFrame, names: Sequence[str], markers: Mapping[str, str]) -> None:
    """One row per claim: its effects in one network, stacked by pruning, in the colours of their verdicts."""
    places = (np.arange(len(markers)) - (len(markers) - 1) / 2) * min(0.25, 0.7 / len(markers))
    apart = dict(zip(markers, places, strict=True))
    for row in found.itertuples():
        height, style = names.index(row.claim) + apart[row.pruned], VERDICTS[row.verdict]
        beyond = row.null and not 1 / _FARTHEST <= row.value <= _FARTHEST
        shown = np.clip(row.value, 1 / _FARTHEST, _FARTHEST) if beyond else row.value
        shape = ("<" if row.value < 1 else ">") if beyond else markers[row.pruned]
        ax.hlines(height, row.low, row.high, linewidth=1.2, **style)
        ax.plot(shown, height, shape, markersize=4, **style | ({} if row.stands else {"markerfacecolor": "white"}))
    for place in range(1, len(names)):
        new = names[place].split(".")[0] != names[place - 1].split(".")[0]
        ax.axhline(place - 0.5, color="0.75" if new else "0.92", linewidth=0.6, zorder=0)
    ax.set_yticks(range(len(names)), [_text(name) for name in names], fontsize=7, multialignment="left")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")


def _scale(ax: Axes, kind: pd.DataFrame) -> None:
    """The same scale for all networks, with no effect in the middle."""
    if kind.null.iloc[0]:
        farthest = np.abs(np.log(kind.value)).max().clip(np.log(4), np.log(_FARTHEST))
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(_TICKS))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.set(xlabel="ratio, as claimed", xlim=np.exp([-1.12 * farthest, 1.12 * farthest]))
        ax.axvline(1, color="0.3", linewidth=0.9, zorder=1)
    else:
        farthest = 1.12 * max(np.abs(kind.value).max(), 0.1)
        ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        ax.set(xlabel="points of accuracy, as claimed", xlim=(-farthest, farthest))
        ax.axvline(0, color="0.3", linewidth=0.9, zorder=1)


def _flush_left(figure: Figure, axes: np.ndarray) -> None:
    """Align the claims beside the panels to the left."""
    labels = [label for ax in axes for label in ax.get_yticklabels()]
    with in_pixels(figure) as renderer:
        widest = max(label.get_window_extent(renderer).width for label in labels)
    for ax in axes:
        ax.tick_params(axis="y", pad=72 * widest / figure.dpi + 4)
    for label in labels:
        label.set_horizontalalignment("left")


def _legend(found: pd.DataFrame, markers: Mapping[str, str]) -> list[Line2D]:
    verdicts = [
        Line2D([], [], linewidth=1.3, label=name, **style)
        for name, style in VERDICTS.items()
        if (found.verdict == name).any()
    ]
    grey: Style = {"color": "0.3", "linestyle": "none"}
    shapes = [
        Line2D([], [], marker=shape, markerfacecolor="none", label=pruning, **grey)
        for pruning, shape in markers.items()
    ]
    stand = [Line2D([], [], marker="o", label="stands when corrected", **grey)] if found.stands.any() else []
    return [*verdicts, *shapes, *stand]
