"""Room for the text around a figure's panels: the figure grows with long names, and colliding ticks are removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator
from matplotlib.transforms import Bbox

from .scales import Axis

_KEPT = 0.6  # of a figure's size, for the data
_APART = {"x": 3, "y": 2}  # pixels between labels


def settle(figure: Figure) -> None:
    """Grow a finished figure until its data have most of its original size, and remove ticks whose labels collide."""
    figure.set_size_inches(*_grown(figure))
    with in_pixels(figure):
        figure.draw_without_rendering()
        for ax in _shown(figure):
            _thin(ax.xaxis)
            _thin(ax.yaxis)


@contextmanager
def in_pixels(figure: Figure) -> Iterator[RendererBase]:
    """Inside, the figure's texts have a size in pixels, whatever shows it: a backend of PDF or SVG has none."""
    own = figure.canvas
    try:
        yield FigureCanvasAgg(figure).get_renderer()
    finally:
        figure.set_canvas(own)


def _shown(figure: Figure) -> Iterator[Axes]:
    return (ax for ax in figure.axes if ax.get_visible())


def _grown(figure: Figure) -> tuple[float, float]:
    """The size in inches at which the data have most of the present size."""
    size = np.array(figure.bbox.size)
    columns: dict[int, float] = {}
    rows: dict[int, float] = {}
    with in_pixels(figure) as renderer:
        for ax in _shown(figure):
            if spec := ax.get_subplotspec():
                outer, inner = ax.get_tightbbox(renderer, for_layout_only=True), ax.get_window_extent(renderer)
                wide, high = _KEPT * size / (spec.get_gridspec().ncols, spec.get_gridspec().nrows)
                high = max(high, _names(ax, renderer))
                column, row = spec.colspan.start, spec.rowspan.start
                columns[column] = max(columns.get(column, 0), outer.width - inner.width + wide)
                rows[row] = max(rows.get(row, 0), outer.height - inner.height + high)
        beside = [text for text in figure.texts if text.get_rotation()]
        over = [artist for artist in (*figure.texts, *figure.legends) if artist not in beside]
        wide = sum(columns.values()) + sum(text.get_window_extent(renderer).width for text in beside)
        high = sum(rows.values()) + sum(artist.get_window_extent(renderer).height for artist in over)
    wide, high = np.maximum(size, (wide, high)) / figure.dpi
    return wide, high


def _names(ax: Axes, renderer: RendererBase) -> float:
    """Total height of the names of a panel's rows, with a margin."""
    return 1.2 * sum(tick.label1.get_window_extent(renderer).height for tick in _in_view(ax.yaxis))


def _in_view(axis: Axis) -> list[Tick]:
    """The visible ticks that have a label."""
    low, high = sorted(axis.get_view_interval())
    ticks = axis.get_major_ticks() if axis.get_majorticklabels() else []  # asking for labels updates the ticks
    return [tick for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]


def _thin(axis: Axis) -> None:
    """Remove ticks until no labels collide, but not zero: single ones on a symmetric scale, else every second or so."""
    ticks = _in_view(axis)
    names = isinstance(
        axis.get_major_formatter(), FixedFormatter
    )  # which no reader can guess, as numbers between others
    if names or not ticks or not ticks[0].label1.get_visible():
        return
    places = np.array([tick.get_loc() for tick in ticks])
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    kept = (_outward if axis.get_scale() == "symlog" else _every)(places, boxes, axis.axis_name)
    if len(kept) < len(places):
        axis.set_major_locator(FixedLocator(places[kept].tolist()))


def _every(places: np.ndarray, boxes: list[Bbox], along: str) -> list[int]:
    """Indices of all ticks, or every second, or third, and so on, zero among them."""
    zero = int(np.abs(places).argmin()) if 0 in places else 0
    for every in range(1, len(places) + 1):
        kept = list(range(zero % every, len(places), every))
        if not _meet([boxes[place] for place in kept], along):
            break
    return kept


def _outward(places: np.ndarray, boxes: list[Bbox], along: str) -> list[int]:
    """Indices of the ticks that, from zero outwards, collide with none of those chosen before."""
    kept: list[int] = []
    for place in np.argsort(np.abs(places), kind="stable").tolist():
        if not _meet([boxes[one] for one in (*kept, place)], along):
            kept.append(place)
    return sorted(kept)


def _meet(boxes: list[Bbox], along: str) -> bool:
    ends = sorted((getattr(box, f"{along}0"), getattr(box, f"{along}1")) for box in boxes)
    return any(one[1] + _APART[along] > other[0] for one, other in pairwise(ends))
