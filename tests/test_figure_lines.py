"""Every value that was recorded is seen: lines go on between samples, end where values do, and are no solid blocks."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from figures import comparison, draw_layers, draw_over_layers, draw_over_time, layout, lines, panels, scales
from figures.style import LINES

mpl.use("agg")


def median_of(values: list[float]) -> xr.Dataset:
    return xr.Dataset(
        dict.fromkeys(("median", "low", "high"), ("step", values)), {"step": np.arange(len(values))}
    ).assign(seeds=("step", np.isfinite(values).astype(int)))


def prediction_of(steps: int, measured: np.ndarray | None = None) -> xr.Dataset:
    values = np.sin(np.arange(steps) / 50)
    of = {"first_order": values, "second_order": values, "measured": values if measured is None else measured}
    return xr.Dataset({name: ("step", value) for name, value in of.items()}, {"step": np.arange(steps)})


def test_values_between_gaps_are_joined_and_marked() -> None:
    values = np.full(30, np.nan)
    values[::7] = [1.0, 2.0, 1.5, 3.0, 2.5]
    ax = panels.draw_median(median_of(values), marker="s")
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 7, 14, 21, 28])
    np.testing.assert_array_equal(line.get_ydata(), [1.0, 2.0, 1.5, 3.0, 2.5])
    assert line.get_markevery() is None  # each


def test_a_line_is_broken_where_recording_paused_and_not_where_it_is_sampled_less() -> None:
    steps = np.array([0, 4, 8, 12, 400, 404, 408, 472, 536, 600])
    prediction = prediction_of(601).isel(step=steps)
    line = draw_over_time(prediction).lines[0]
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [4]  # between 12 and 400, not at 408
    drawn = line.get_xydata()[~np.isnan(line.get_ydata())]
    np.testing.assert_array_equal(drawn, np.transpose([steps, np.sin(steps / 50)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_line_ends_at_a_cross_where_values_stop_being_finite(bad: float) -> None:
    ax = panels.draw_median(median_of([1.0, 2.0, 4.0, bad, bad, bad]), marker="o")
    line, cross = ax.lines
    assert np.isfinite(line.get_ydata()).sum() == 3
    assert (cross.get_marker(), cross.get_label()) == ("x", lines.ENDED)
    np.testing.assert_array_equal(cross.get_xydata(), [[2, 4]])


def test_a_line_that_is_sampled_to_its_end_has_no_cross() -> None:
    values = np.full(20, np.nan)
    values[::6] = 1.0
    assert len(panels.draw_median(median_of(values)).lines) == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_of_a_step_or_two_are_seen(steps: int) -> None:
    layers = xr.DataArray(np.ones((steps, 2)), {"step": np.arange(steps), "layer": ["a", "b"]}, ["step", "layer"])
    drawn = [
        *draw_layers(layers.rename("grad_sqnorm")).lines,
        *draw_over_time(prediction_of(steps), ax=plt.figure().gca()).lines,
    ]
    assert all(line.get_marker() not in ("None", "", None) for line in drawn)


def test_many_steps_are_medians_in_a_band_that_holds_them_all() -> None:
    values = np.random.default_rng(0).lognormal(size=(5000, 1))
    layers = xr.DataArray(values, {"step": np.arange(5000), "layer": ["a"]}, ["step", "layer"], "grad_sqnorm")
    ax = draw_layers(layers)
    (line,), (band,) = ax.lines, ax.collections
    assert len(line.get_ydata()) < 300
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (values.min(), values.max())
    assert np.ptp(line.get_ydata()) < np.ptp(values) / 5


def test_measured_dots_leave_the_predictions_seen() -> None:
    ax = draw_over_time(prediction_of(3000))
    of = {line.get_label(): line for line in ax.lines}
    assert 20 < len(of["measured"].get_xdata()) <= 200
    assert set(of["measured"].get_ydata()) <= set(prediction_of(3000).measured.values)
    assert of["measured"].get_xdata()[[0, -1]].tolist() == [0, 2999]
    assert of["first order"].get_zorder() > of["second order"].get_zorder()
    assert [style["linestyle"] for style in LINES.values()] == [(0, (4, 2)), "-"]


@pytest.mark.parametrize("named", ["grad_sqnorm", "measured"])
def test_what_is_drawn_of_layers_is_named_by_the_table_or_by_itself(named: str) -> None:
    attrs = {"long_name": "d‖θ‖²/dt", "units": "L"}
    layers = xr.DataArray(np.ones((3, 1)), {"step": np.arange(3), "layer": ["a"]}, ["step", "layer"], named, attrs)
    expected = {"grad_sqnorm": "‖g‖²  [L² θ⁻²]", "measured": "d‖θ‖²/dt  [L]"}
    assert draw_layers(layers, ax=plt.subplots()[1]).get_ylabel() == expected[named]


def test_layers_are_points_that_no_line_joins() -> None:
    ax = draw_over_layers(xr.DataArray([1.0, 2.0], {"layer": ["a", "b"]}, ["layer"]), **LINES["first_order"])
    assert (ax.lines[0].get_linestyle(), ax.lines[0].get_marker()) == ("None", "o")


@pytest.mark.parametrize(("count", "named"), [(15, 15), (16, 0)])
def test_the_names_of_many_layers_are_no_legend(count: int, named: int) -> None:
    names = [f"net.{number}" for number in range(count)]
    layers = xr.DataArray(np.ones((3, count)), {"step": np.arange(3), "layer": names}, ["step", "layer"], "grad_sqnorm")
    assert draw_layers(layers, ax=plt.subplots()[1]).get_legend_handles_labels()[1] == [
        f"layer {number}"
        for number in range(named)  # a number alone would say nothing
    ]


@pytest.mark.parametrize("steps", [200, 2000])
def test_a_layer_that_is_trained_at_every_second_step_is_seen_beside_another(steps: int) -> None:
    values = np.zeros((steps, 2))
    values[::2, 0], values[1::2, 1] = 10.0, 0.1
    trained = xr.DataArray(values, {"step": np.arange(steps), "layer": ["a", "b"]}, name="grad_sqnorm")
    ax = draw_layers(trained)
    scales.scale_axis(ax.yaxis, values)
    ax.figure.canvas.draw()
    assert ax.get_yscale() == "log"
    for line, value in zip(ax.lines, (10.0, 0.1), strict=True):  # and no cross at an end
        assert np.unique(line.get_ydata()).tolist() == [value]
        assert len(line.get_ydata()) >= min(steps // 2, 150)


def test_zeros_are_drawn_where_they_have_a_place() -> None:
    layers = {"step": np.arange(4), "layer": ["a", "b"]}
    for values in ([[1.0, 2.0], [0.0, -2.0], [1.0, 2.0], [0.0, 0.0]], np.zeros((4, 2))):
        ax = draw_layers(xr.DataArray(values, layers, name="grad_hess_grad"))
        for line, value in zip(ax.lines, np.transpose(values), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), value)
        plt.close()


def test_a_panel_without_finite_values_says_so() -> None:
    for values, said in (([np.nan, np.nan], ["no finite value"]), ([np.nan, 1.0], [])):
        ax = panels.draw_median(median_of(values), ax=plt.figure().gca())
        panels.draw_events([1], [2], ax=ax)  # lines all across are no values
        ax.axhline(2)
        assert [text.get_text() for text in panels.say_where_empty(ax).texts] == said


def test_a_panel_without_values_keeps_the_ticks_that_it_has_for_others() -> None:
    figure, ((_, _), (empty, other)) = plt.subplots(2, 2, sharex=True, sharey=True)
    other.plot([0, 1], [1, 2])
    panels.say_where_empty(empty)
    figure.draw_without_rendering()
    assert empty.xaxis.get_tick_params()["labelbottom"] is not False
    assert any(label.get_visible() and label.get_text() for label in empty.get_yticklabels())
    assert not any(label.get_visible() for label in panels.say_where_empty(plt.figure().gca()).get_yticklabels())


def test_a_scatter_without_a_point_says_so() -> None:
    """A point needs both: what was measured, and a prediction of it."""
    lost = prediction_of(2, measured=np.array([1.0, np.nan])).assign(first_order=("step", [np.nan, 1.0]))
    for order, said in (("first_order", ["no finite value"]), ("second_order", [])):
        ax = panels.draw_predicted_measured(lost, order, ax=plt.figure().gca())
        layout.symmetric(ax, layout.compared(lost))
        assert [text.get_text() for text in ax.texts] == said


def test_steps_to_a_loss_have_a_mean_only_where_all_seeds_reached_it() -> None:
    def took(*steps: float) -> xr.Dataset:
        return xr.Dataset({"steps_to_loss": (("seed", "share"), np.array(steps)[:, None])}, coords={"share": [0.75]})

    share, steps = comparison._reached({"magnitude": took(4, 6, np.inf), "random": took(5, 6, 7)})
    assert share == 0.75
    ax = panels.draw_seeds(steps, {name: {"label": name, "marker": "o", "color": "k"} for name in steps})
    means = [container.lines[0] for container in ax.containers]
    small = [
        line for line in ax.lines if line.get_markersize() < means[0].get_markersize() and len(line.get_xdata()) == 3
    ]
    plt.close(ax.figure)
    assert [np.isfinite(line.get_xdata()).sum() for line in small] == [2, 3]
    assert [float(line.get_xdata()[0]) for line in means] == pytest.approx([np.nan, 6.0], nan_ok=True)


def test_a_legend_names_the_ends_of_runs_once() -> None:
    ax = plt.figure().gca()
    for height in (1.0, 2.0):
        lines.draw_line(np.arange(6), np.array([height] * 3 + [np.nan] * 3), ax=ax, label=f"run {height}")
    assert [text.get_text() for text in ax.legend().get_texts()] == ["run 1.0", lines.ENDED, "run 2.0"]
    assert sum(line.get_marker() == "x" for line in ax.lines) == 2


def test_a_band_between_quartiles_is_still_one_where_steps_are_many() -> None:
    """Single values far outside are no part of it; of a line alone, the band covers all values."""
    steps, far = np.arange(3000), np.zeros(3000)
    far[::20] = 1e6
    for bounds, highest in (({"low": -1 - far, "high": 1 + far}, 1.0), ({}, 1e6)):
        ax = plt.figure().gca()
        lines.draw_line(steps, np.zeros(3000) + (far if not bounds else 0), ax=ax, **bounds)
        (band,) = ax.collections
        assert band.get_datalim(ax.transData).y1 == highest
