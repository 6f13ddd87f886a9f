"""Room for what is written around the panels of a figure: it grows by what long names take, and ticks make way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox

_KEPT = 0.6  # of a figure's size, for the data
_APART = 2  # pixels between labels


def settle(figure: Figure) -> None:
    """Give the data of a finished figure most of the size it was made with, and leave out ticks whose labels meet."""
    _grow(figure)
    figure.draw_without_rendering()
    for ax in _shown(figure):
        _thin(ax.xaxis)
        _thin(ax.yaxis)


def _shown(figure: Figure) -> Iterator[Axes]:
    return (ax for ax in figure.axes if ax.get_visible())


def _grow(figure: Figure) -> None:
    renderer = figure.canvas.get_renderer()
    aside: dict[int, float] = {}
    above: dict[int, float] = {}
    for ax in _shown(figure):
        outer, inner = ax.get_tightbbox(renderer, for_layout_only=True), ax.get_window_extent(renderer)
        column, row = _place(ax)
        aside[column] = max(aside.get(column, 0), outer.width - inner.width)
        above[row] = max(above.get(row, 0), outer.height - inner.height)
    beside = [text for text in figure.texts if text.get_rotation()]
    over = [artist for artist in (*figure.texts, *figure.legends) if artist not in beside]
    wide = sum(aside.values()) + sum(text.get_window_extent(renderer).width for text in beside)
    high = sum(above.values()) + sum(artist.get_window_extent(renderer).height for artist in over)
    width, height = figure.get_size_inches()
    figure.set_size_inches(
        max(width, _KEPT * width + wide / figure.dpi), max(height, _KEPT * height + high / figure.dpi)
    )


def _place(ax: Axes) -> tuple[int, int]:
    """Column and row of a panel; of a colour bar, which stands between them, a column of its own."""
    spec = ax.get_subplotspec()
    return (spec.colspan.start, spec.rowspan.start) if spec else (-1, 0)


def _thin(axis: Axis) -> None:
    """Every second tick, or third, and so on, until no labels meet; zero is among them."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
    if not ticks or not ticks[0].label1.get_visible():
        return
    places = [tick.get_loc() for tick in ticks]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    zero = places.index(0) if 0 in places else 0
    for every in range(1, len(places) + 1):
        kept = slice(zero % every, None, every)
        if not _meet(boxes[kept], axis.axis_name):
            break
    if every > 1:
        axis.set_major_locator(FixedLocator(places[kept]))


def _meet(boxes: list[Bbox], along: str) -> bool:
    ends = sorted((getattr(box, f"{along}0"), getattr(box, f"{along}1")) for box in boxes)
    return any(one[1] + _APART > other[0] for one, other in pairwise(ends))
