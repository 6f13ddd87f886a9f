"""Ticks say where values are: none meet, zeros and negative values have theirs, and shares end at their bounds."""

from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from figures import layout, room, scales
from figures.style import theme

mpl.use("agg")


def panel(values: np.ndarray, *, width: float = 2.5, height: float = 2.1) -> Axes:
    with theme():
        _, ax = plt.subplots(figsize=(width, height))
        ax.plot(values, values, "o")
    return ax


def ticks(axis: Axis) -> dict[float, str]:
    """What is written at the ticks that are seen."""
    axis.axes.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    return {tick.get_loc(): tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high}


def apart(axis: Axis, pixels: float = 0) -> bool:
    axis.axes.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
    boxes = [tick.label1.get_window_extent() for tick in shown]
    name = axis.axis_name
    return all(getattr(one, f"{name}1") + pixels < getattr(other, f"{name}0") for one, other in pairwise(boxes))


@pytest.mark.parametrize("largest", [0.012, 0.042, 0.046, 0.05, 0.053, 0.3, 1.9])
def test_a_logarithmic_scale_has_a_tick_at_each_leading_digit(largest: float) -> None:
    """A gap in the ticks would be taken for another scale."""
    values = np.geomspace(0.0068, largest, 5)
    ax = panel(values)
    scales.scale_axis(ax.yaxis, values)
    low, high = ax.get_ylim()
    places = [digit * 10.0**power for power in range(-4, 2) for digit in range(1, 10)]
    expected = [place for place in places if low <= place <= high]
    found = np.r_[ax.yaxis.get_majorticklocs(), ax.yaxis.get_minorticklocs()]
    assert all(np.isclose(found, place).any() for place in expected)


@pytest.mark.parametrize("least", [0.051, 0.21, 0.28, 0.55, 0.9, 3.3])
@pytest.mark.parametrize("ratio", [1.3, 3.0, 5.0, 7.9, 8.2, 30.0])
def test_no_half_of_a_logarithmic_scale_is_without_a_tick(least: float, ratio: float) -> None:
    values = np.geomspace(least, least * ratio, 5)
    ax = panel(values)
    scales.scale_axis(ax.yaxis, values)
    low, high = ax.get_ylim()
    shares = np.log([low, *sorted(ticks(ax.yaxis)), high]) / np.log(high / low)
    assert np.diff(shares).max() < 0.55


@pytest.mark.parametrize("least", [-5e-5, -0.3, -40.0])
@pytest.mark.parametrize("largest", [0.5, 800.0])
def test_a_symmetric_scale_has_ticks_on_each_side_that_has_values(least: float, largest: float) -> None:
    values = np.r_[least, np.geomspace(1e-3, largest, 40)]
    ax = panel(values, width=3.6, height=3.6)
    scales.scale_axis(ax.yaxis, values)
    threshold = ax.yaxis.get_transform().linthresh
    found = ticks(ax.yaxis)
    assert {-threshold, 0.0, threshold} <= found.keys()
    assert 4 <= len(found) <= 7
    assert apart(ax.yaxis)


def test_a_symmetric_scale_has_margins_of_its_own() -> None:
    """Not those of the linear scale, which may be decades of it, or less than a line is thick."""
    values = np.r_[-2e-3, np.geomspace(1e-4, 6, 40)]
    ax = panel(values)
    ax.get_ylim()  # the margins of the linear scale are taken, as where a pruning was marked
    scales.scale_axis(ax.yaxis, values)
    low, high = ax.yaxis.get_transform().transform(np.array(ax.get_ylim()))
    drawn = ax.yaxis.get_transform().transform(values[np.isfinite(values)])
    margins = np.array([drawn.min() - low, high - drawn.max()]) / (high - low)
    assert ((margins > 0.02) & (margins < 0.08)).all()


def test_zeros_are_seen_where_they_are_part_of_the_data() -> None:
    values = np.array([0.0, 0.0, 1e-4, 0.01, 0.3, 20.0])
    ax = panel(values)
    scales.scale_axis(ax.yaxis, values, zeros=True)
    scales.fit_axis(ax.yaxis, values)
    ax.figure.canvas.draw()
    drawn = ax.transData.transform(np.c_[values, values])[:, 1]
    assert np.isfinite(drawn).all()
    assert (drawn > ax.bbox.y0).all()
    assert 0.0 in ticks(ax.yaxis)


def test_points_of_a_scatter_lie_whole_within_its_frame() -> None:
    for values in (np.array([-2.2e12, -0.52e12, -2.1e12]), np.array([4e5, 6.5e5, 1.75e6]), np.array([0.0, 1e-3, 5.0])):
        ax = panel(np.empty(0), width=3.6, height=3.6)
        points = np.array([[values.min(), values.max()]])  # alone, on each axis it has limits that hold it only
        ax.plot(*points.T, "o")
        layout.symmetric(ax, values)
        ax.figure.draw_without_rendering()
        drawn = ax.transData.transform(points)
        assert (drawn.min(0) - 8 > ax.bbox.min).all()
        assert (drawn.max(0) + 8 < ax.bbox.max).all()


@pytest.mark.parametrize("last", [0, 1, 3, 20, 17500, 20000, 1_500_000])
def test_steps_are_whole_numbers_that_do_not_meet(last: int) -> None:
    ax = panel(np.array([0, last]))
    scales.count_axis(ax.xaxis)
    room.settle(ax.figure)
    found = ticks(ax.xaxis)
    assert len(found) >= min(last, 1) + 1
    assert all(place == int(place) for place in found)
    assert apart(ax.xaxis)


@pytest.mark.parametrize("values", [[4e5, 1.75e6], [2e-7, 9e-7], [3e6, 4e8], [1e6, 1.5e6]])
def test_large_and_small_numbers_are_powers_that_do_not_meet(values: list[float]) -> None:
    ax = panel(np.array(values), width=3.6, height=3.6)
    scales.scale_axis(ax.xaxis, np.array(values))
    room.settle(ax.figure)
    texts = ticks(ax.xaxis).values()
    assert any(texts)
    assert not any("e+" in text or "e-" in text for text in texts)
    assert apart(ax.xaxis)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_a_training_that_diverged_have_a_scale(sign: int) -> None:
    """They span more than a number holds."""
    _, ax = plt.subplots()
    values = np.array([1e-20, 1.0, sign * 1e300])
    scales.scale_axis(ax.yaxis, values)
    assert ax.get_yscale() == ("log" if sign > 0 else "symlog")


def test_shares_end_at_nothing_and_at_all() -> None:
    for values in ([0.9, 1.0], [0.0, 0.0], [0.0, 0.02], [0.2, 1.0]):
        ax = panel(np.array(values))
        scales.fit_axis(ax.yaxis, np.array(values))
        scales.percent(ax.yaxis)
        low, high = ax.get_ylim()
        assert -0.04 < low < high < 1.04
        shown = [text for text in ticks(ax.yaxis).values() if text]
        assert all(0 <= float(text.removesuffix("%")) <= 100 for text in shown)
        assert shown


def test_a_figure_grows_by_what_is_written_around_its_panels() -> None:
    ax = panel(np.array([0.0, 1.0]), width=3, height=2)
    ax.set_title("a line\n" * 9)
    ax.set_yticks([0, 1], ["a name of some length, as runs have", "another"])
    room.settle(ax.figure)
    box = ax.get_window_extent()
    assert box.width > 0.5 * 3 * ax.figure.dpi
    assert box.height > 0.5 * 2 * ax.figure.dpi


def test_linear_ticks_are_left_out_until_none_meet() -> None:
    ax = panel(np.array([0.0, 1.0]))
    ax.set_xticks(np.linspace(0, 1, 21))
    room.settle(ax.figure)
    assert 0 in ticks(ax.xaxis)
    assert 2 <= len(ticks(ax.xaxis)) < 21
    assert apart(ax.xaxis)


def test_a_symmetric_panel_has_the_same_ticks_on_both_axes() -> None:
    values = np.concatenate([-np.logspace(-4, 2, 30), np.logspace(-4, 2, 30)])
    ax = panel(values, width=7, height=7)
    layout.symmetric(ax, values)
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist()
    assert min(ax.get_xticks()) < 0 < max(ax.get_xticks())


def test_of_a_symmetric_scale_no_tick_is_left_out_that_would_meet_no_other() -> None:
    values = np.concatenate([-np.logspace(-4, 2, 30), np.logspace(-4, 2, 30)])
    ax = panel(values, width=2.6)
    layout.symmetric(ax, values)
    every = ax.get_xticks().tolist()
    room.settle(ax.figure)
    kept = ax.get_xticks().tolist()
    assert 0 in kept
    assert len(kept) < len(every)
    assert apart(ax.xaxis)
    for left_out in set(every) - set(kept):
        ax.set_xticks(sorted([*kept, left_out]))
        assert not apart(ax.xaxis, pixels=2)
