"""A figure shows the numbers of its analysis: its artists hold them, and its axes carry the table's symbols."""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from networks import prune_row, smooth_network, vectors
from recorded_runs import recorded

import analysis
from analysis.overview import overview
from analysis.typeset import cell, grouped
from dynamics import Recorder, open_run
from dynamics.schema import label
from figures import (
    FIGURES,
    caption,
    claim,
    draw,
    draw_layers,
    draw_over_layers,
    draw_over_time,
    layout,
    panels,
    scales,
    write_report,
)
from figures.labels import layer_names
from figures.style import run_styles, theme

mpl.use("agg")


OF_ONE_SEED = [name for name in FIGURES if name != "claims"]  # whose intervals are over seeds: test_figure_claims.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    return recorded(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def condensed(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, xr.DataTree]) -> dict[str, xr.DataTree]:
    return analysis.expand(analysis.condense(runs, tmp_path_factory.mktemp("condensed") / "condensed.zarr.zip"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, xr.DataTree]) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report"), records=["a.zarr"])


@pytest.fixture(scope="module")
def report_of_one(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, xr.DataTree]) -> Path:
    return write_report({"magnitude": runs["magnitude"]}, tmp_path_factory.mktemp("report"), records=["a.zarr"])


@pytest.mark.parametrize("backend", ["pdf", "svg"])
def test_a_figure_is_the_same_on_a_backend_that_only_writes_files(runs: dict[str, xr.DataTree], backend: str) -> None:
    """Such a backend, which scripts on a cluster choose, has no pixels in which texts could be measured."""
    on_screen = draw("training_curves", runs)
    plt.switch_backend(backend)
    try:
        written = draw("training_curves", runs)
    finally:
        plt.switch_backend("agg")
    assert written.get_size_inches().tolist() == on_screen.get_size_inches().tolist()
    assert written.dpi == on_screen.dpi
    assert written.legends[0]._ncols == on_screen.legends[0]._ncols
    assert [ax.get_xticks().tolist() for ax in written.axes] == [ax.get_xticks().tolist() for ax in on_screen.axes]


@pytest.mark.parametrize("name", OF_ONE_SEED)
def test_every_figure_draws_and_says_what_it_claims(name: str, runs: dict[str, xr.DataTree]) -> None:
    before = dict(mpl.rcParams)
    figure = draw(name, runs)
    assert dict(mpl.rcParams) == before
    figure.canvas.draw()
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert shown
    assert all(ax.has_data() for ax in shown)
    assert claim(name).endswith(".")
    assert len(caption(name)) > 30
    assert FIGURES[name].finding(runs)


@pytest.mark.parametrize("name", [name for name in OF_ONE_SEED if name != "accuracy"])  # which compares
def test_every_figure_draws_one_run_alone(name: str, runs: dict[str, xr.DataTree]) -> None:
    draw(name, {"magnitude": runs["magnitude"]}).canvas.draw()
    assert FIGURES[name].finding({"magnitude": runs["magnitude"]})


@pytest.mark.parametrize("name", OF_ONE_SEED)
def test_figures_of_condensed_records_are_those_of_the_records(
    name: str, runs: dict[str, xr.DataTree], condensed: dict[str, xr.DataTree]
) -> None:
    whole, ours = (numbers_of(draw(name, those)) for those in (runs, condensed))
    assert len(ours) == len(whole) > 0
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6 * np.nanmax(np.abs(other), initial=0))


def numbers_of(figure: Figure) -> list[np.ndarray]:
    """Those of its lines, and of its cells, which are colours."""
    lines = [line.get_xydata() for ax in figure.axes for line in ax.lines]
    cells = [cells.get_array() for ax in figure.axes for cells in ax.collections if cells.get_array() is not None]
    return lines + [np.ma.filled(values.astype(float), np.nan) for values in cells]


def test_scatter_points_are_the_analysis(runs: dict[str, xr.DataTree]) -> None:
    figure = draw("loss_decrease_scatter", runs)
    for ax, order in zip(figure.axes, ("first_order", "second_order"), strict=True):
        lines = {line.get_label(): line for line in ax.lines}
        for measure, name in (("none", "not pruned"), ("magnitude", "magnitude")):
            decrease = analysis.loss_decrease(runs[measure])
            np.testing.assert_array_equal(lines[name].get_xdata(), decrease[order])
            np.testing.assert_array_equal(lines[name].get_ydata(), decrease.measured)


def test_over_time_measured_is_dots_first_order_dashed_second_solid(runs: dict[str, xr.DataTree]) -> None:
    decrease = analysis.loss_decrease(runs["none"])
    ax = draw_over_time(decrease)
    lines = {line.get_label(): line for line in ax.lines}
    assert (lines["measured"].get_linestyle(), lines["measured"].get_marker()) == ("None", "o")
    assert lines["first order"].is_dashed()
    assert lines["second order"].get_linestyle() == "-"
    for name, line in (("measured", "measured"), ("first_order", "first order"), ("second_order", "second order")):
        np.testing.assert_array_equal(lines[line].get_ydata(), decrease[name])


def test_layers_are_labelled_by_the_table(runs: dict[str, xr.DataTree]) -> None:
    quantity = runs["none"]["steps"].grad_sqnorm
    ax = draw_layers(quantity)
    assert ax.get_ylabel() == label("grad_sqnorm") == "‖g‖²  [L² θ⁻²]"
    assert [line.get_label() for line in ax.lines] == ["layer 0", "layer 2"]
    for line, layer in zip(ax.lines, ("0", "2"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), quantity.sel(layer=layer))


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("count", [1, 4, 10, 57, 400])
@pytest.mark.parametrize("name", ["blocks.{}.conv", "{}", "i.{}M"])
def test_the_names_of_layers_do_not_meet(name: str, count: int, share: int) -> None:
    names = [name.format(number) for number in range(count)]
    figure = plt.figure()
    part = figure.subfigures(1, share, squeeze=False)[0, 0]
    ax = draw_over_layers(xr.DataArray(np.arange(count), {"layer": names}, ["layer"]), ax=part.subplots())
    figure.draw_without_rendering()
    shown = {tick.get_text(): tick.get_window_extent() for tick in ax.get_xticklabels()}
    assert list(shown) == layer_names(names)[:: -(-count // len(shown))]
    assert all(one.x1 < other.x0 for one, other in pairwise(shown.values()))
    assert len(shown) >= min(count, 25 // share)
    upright = any(tick.get_rotation() for tick in ax.get_xticklabels())
    letters = sum(map(len, layer_names(names)))
    assert upright if letters > 60 // share else not upright or letters > 30 // share


def test_shares_of_layers_are_seen_as_colours_of_one_network_or_of_several() -> None:
    """Each cell is as high as a row and as wide as a column: of a single row, too."""
    first = xr.DataArray([0.2, 0.4], {"layer": ["a", "b"]}, ["layer"])
    other = xr.DataArray([0.6, 0.8], {"layer": ["b", "c"]}, ["layer"])
    for rows, expected in (([first], [[0.2, 0.4]]), ([first, other], [[0.2, 0.4, np.nan], [np.nan, 0.6, 0.8]])):
        ax = panels.draw_layer_map({str(place): shares for place, shares in enumerate(rows)}, ax=plt.figure().gca())
        (cells,) = ax.collections
        np.testing.assert_array_equal(cells.get_array().filled(np.nan), expected)
        height, width = np.shape(expected)
        np.testing.assert_allclose(cells.get_datalim(ax.transData).extents, [-0.5, -0.5, width - 0.5, height - 0.5])


def test_a_measure_has_one_colour_whatever_it_is_drawn_with() -> None:
    alone, together = run_styles(["magnitude"]), run_styles(["none", "loss_preservation", "magnitude", "mine"])
    assert alone["magnitude"] == together["magnitude"]
    assert len({str(style["color"]) for style in together.values()}) == 4
    assert len({style["marker"] for style in together.values()}) == 4


def test_a_measure_has_one_style_in_all_panels_and_in_the_legend(runs: dict[str, xr.DataTree]) -> None:
    said = {}
    for data, measures in (("some", ("random", "taylor")), ("others", ("fisher", "random"))):
        for measure in measures:
            run = said[f"{data} {measure}"] = runs["magnitude"].copy()
            run.attrs = {"model": "m", "data": data, "measure": measure}
    for name in ("training_curves", "convergence", "loss_and_gradient_at_pruning"):
        figure = draw(name, said)
        (legend,) = figure.legends
        styles = {
            text.get_text(): {(to_hex(handle.get_color()), handle.get_marker())}
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }
        assert styles.keys() - {"pruning"} == {"random", "Taylor", "Fisher"}
        styles.pop("pruning", None)
        for line in (line for ax in figure.axes for line in ax.lines if line.get_label() in styles):
            styles[line.get_label()].add((to_hex(line.get_color()), line.get_marker()))
        assert all(len(style) == 1 for style in styles.values())
        assert len(set.union(*styles.values())) == 3
    assert [*run_styles(["fisher"]).values()] == [*run_styles(["mine"]).values()]  # the order of a figure ends with it


def test_fifty_measures_can_be_told_apart() -> None:
    styles = run_styles([f"measure {number}" for number in range(50)])
    assert len({(to_hex(style["color"]), style["marker"]) for style in styles.values()}) == 50


def test_what_is_no_figure_or_no_record_is_said() -> None:
    with pytest.raises(ValueError, match=r"unknown figure 'norm': choose one of .*norms"):
        caption("norm")
    with pytest.raises(ValueError, match=r"a run must be a record, open_run\(path\), got 'run.zarr' for 'mine'"):
        draw("norms", {"mine": "run.zarr"})
    with pytest.raises(ValueError, match=r"an analysis needs a record, open_run\(path\), got 'run.zarr'"):
        analysis.loss_decrease("run.zarr")
    with pytest.raises(ValueError, match=r"^give a prediction .* analysis.loss_decrease\(run\), got a DataTree$"):
        analysis.agree(xr.DataTree())
    with pytest.raises(ValueError, match=r"the record holds nothing yet: no optimizer\.step\(\)"):
        analysis.loss_decrease(xr.DataTree())


def test_measures_are_drawn_in_turns() -> None:
    names = [(measure, seed) for measure in ("magnitude", "loss_preservation") for seed in range(2)]
    runs = {f"{name} {seed}": xr.DataTree() for name, seed in names}
    for (measure, seed), run in zip(names, runs.values(), strict=True):
        run.attrs = {"model": "net", "data": "images", "measure": measure, "seed": seed}
    drawn = layout.by_measure(runs, runs)
    assert list(drawn) == ["magnitude 0", "loss_preservation 0", "magnitude 1", "loss_preservation 1"]
    assert [style["label"] is not None for style in drawn.values()] == [True, True, False, False]


def test_a_zero_is_left_out_of_a_logarithmic_axis() -> None:
    ax = draw_over_layers(xr.DataArray([0.1, 0.0, 10.0], {"layer": ["a", "b", "c"]}, ["layer"]))
    scales.scale_axis(ax.yaxis, np.array([0.1, 0.0, 10.0]))
    (line,) = ax.lines
    ax.figure.canvas.draw()
    drawn = ax.transData.transform(line.get_xydata())
    assert np.isfinite(drawn).all(1).tolist() == [True, False, True]


def test_a_band_that_reaches_zero_stays_whole_on_a_logarithmic_axis() -> None:
    values = {"median": [2.0, 1.0, 0.5], "low": [1.0, 0.0, -0.5], "high": [3.0, 2.0, 1.5], "seeds": [2, 2, 2]}
    ax = panels.draw_median(xr.Dataset({name: ("step", value) for name, value in values.items()}, {"step": [0, 1, 2]}))
    scales.scale_axis(ax.yaxis, np.array(values["median"]))
    ax.figure.canvas.draw()
    (band,) = ax.collections
    assert np.isfinite(ax.transData.transform(band.get_paths()[0].vertices)).all()


@pytest.mark.parametrize("scale", [2e-4, 2e-3, 0.7, 4e4])
def test_ticks_of_a_linear_axis_do_not_meet(scale: float) -> None:
    with theme():
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 7.4))
    for ax in axes.flat:
        values = scale * np.array([-0.5, -0.25, 0.15, 1.0])
        ax.plot(values, values)
        layout.symmetric(ax, values)
    figure.canvas.draw()
    for ax in axes.flat:
        inside = [
            tick for tick in ax.get_xticklabels() if ax.get_xlim()[0] <= tick.get_position()[0] <= ax.get_xlim()[1]
        ]
        boxes = [tick.get_window_extent() for tick in inside]
        assert all(one.x1 + 4 < other.x0 for one, other in pairwise(boxes))
        assert len(boxes) >= 3


def test_a_long_condition_does_not_widen_the_figure() -> None:
    figure = plt.figure(figsize=(7.2, 3))
    layout.headed(figure, ", ".join(f"setting {number} 0.{number}" for number in range(20)))
    figure.canvas.draw()
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert figure._suptitle.get_text().count("\n") >= 2


def test_prunings_are_lines_where_they_were_among_the_epochs(runs: dict[str, xr.DataTree]) -> None:
    run = runs["magnitude"]
    assert run["pruning"].step.values.tolist() == [8, 8]
    assert (run["epochs"].step.item(), run["epochs"].epoch.item()) == (12, 1)  # logged after two passes
    expected = 8 / 12 * 2
    ax = draw("training_curves", {"magnitude": run}).axes[0]
    lines = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert all(ax.xaxis.get_zorder() < line.get_zorder() < 2 for line in lines)  # a pruning may stand on a grid line
    dotted = [line.get_xdata()[0] for line in lines]
    assert dotted == pytest.approx([expected] * len(dotted), abs=1e-6)
    assert dotted


@pytest.mark.parametrize("accurate", [False, True])
def test_where_no_accuracy_was_logged_the_test_loss_is_drawn(accurate: bool) -> None:
    logged = {"train_loss": [3.0, 2.0], "test_loss": [4.0, 3.5]} | ({"test_accuracy": [0.25, 0.5]} if accurate else {})
    epochs = xr.Dataset({name: ("epoch", values) for name, values in logged.items()}, {"epoch": [0, 1]})
    ax = draw("training_curves", {"language model": xr.DataTree.from_dict({"/epochs": epochs})}).axes[1]
    assert ax.get_ylabel() == ("test accuracy" if accurate else "test loss  [L]")
    assert ax.lines[0].get_ydata().tolist() == logged["test_accuracy" if accurate else "test_loss"]
    percent = ax.yaxis.get_major_formatter()(0.5, 0) == "50%"
    assert percent == accurate


def test_shares_of_filters_are_in_per_cent_in_points_as_in_colours(runs: dict[str, xr.DataTree]) -> None:
    ax, *_ = draw("filters_left", runs).axes
    low, high = ax.get_ylim()
    assert low < 0 < 1 < high  # a point on a bound is whole
    assert ax.yaxis.get_major_formatter()(0.5, 0) == "50%"


@pytest.mark.long
def test_the_report_stands_alone(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    for name in OF_ONE_SEED:
        assert claim(name).split("‖")[0] in page
        assert report.with_name(f"{name}.pdf").stat().st_size > 1000
        assert report.with_name(f"{name}.png").stat().st_size > 1000
    assert page.count("data:image/webp;base64,") == len(OF_ONE_SEED)
    assert "<script" not in page
    assert not any(link in page for link in ('src="http', "href="))


@pytest.mark.long
def test_figures_of_other_records_do_not_stay(tmp_path: Path, runs: dict[str, xr.DataTree]) -> None:
    names = ["removal_curve.png", "removal_curve.pdf", "notes.txt", "loss_decrease_scatter.png"]
    for name in names:
        (tmp_path / name).write_text("of others")
    alone = {label: run for label, run in runs.items() if "curve" not in run.children or not run["curve"].data_vars}
    assert alone
    write_report(alone, tmp_path, records=[])
    assert not any((tmp_path / name).exists() for name in names[:2])
    assert (tmp_path / "notes.txt").read_text() == "of others"
    assert (tmp_path / "loss_decrease_scatter.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_the_report_says_once_what_its_rows_have_in_common() -> None:
    table = pd.DataFrame(
        {"accuracy": ["77 ± 2", "59"], ("share", "left"): [0.12345, np.nan]},
        index=pd.MultiIndex.from_tuples(
            [("vgg13", "digits", 5, "magnitude"), ("vgg13", "digits", 5, "grasp")],
            names=["model", "data", "rounds", "measure"],
        ),
    )
    head, groups = grouped(table)
    assert head == ["accuracy", "share left"]
    assert groups == {"vgg13, digits, rounds 5": [["magnitude", "77 ± 2", "0.123"], ["grasp", "59", "–"]]}


@pytest.mark.long
def test_the_report_has_every_number_of_the_tables(report_of_one: Path, runs: dict[str, xr.DataTree]) -> None:
    page = report_of_one.read_text(encoding="utf-8")
    parts = overview({"magnitude": runs["magnitude"]})
    for table in (part for part in parts.values() if not isinstance(part, list)):
        assert all(f"<td>{cell(value)}</td>" in page for value in table.to_numpy().ravel())


def test_a_curve_holds_the_predictions_along_both_directions(runs: dict[str, xr.DataTree]) -> None:
    ax = draw("removal_curve", runs).axes[0]
    curve = analysis.removal_curve(runs["magnitude"]).sel(quantity="loss").isel(event=0)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
    assert ax.get_ylabel() == f"Δ{label('loss')}"
    np.testing.assert_array_equal(lines["measured"], curve.measured)
    np.testing.assert_array_equal(lines["first order"], curve.first_order.sel(direction="output"))
    np.testing.assert_array_equal(lines["second order"], curve.second_order.sel(direction="output"))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), curve.first_order.sel(direction="parameters"))
    looks = [(line.get_linestyle(), line.get_marker()) for line in ax.lines]
    assert len(set(looks)) == 5  # told apart without their colours


@pytest.mark.parametrize("factor", [1.0, 0.0, np.nan])
def test_a_curve_of_one_extent_or_without_a_change_is_seen(runs: dict[str, xr.DataTree], factor: float) -> None:
    one = runs["magnitude"].copy(deep=True).load()
    curve = one["curve"].to_dataset().isel(fraction=[0])
    one["curve"] = curve.map(lambda values: factor * values if values.attrs["units"] != "1" else values)
    ax, *_ = draw("removal_curve", {"one": one}).axes
    assert all(line.get_marker() in ("o", "D", "s") for line in ax.lines)
    assert ax.get_ylim()[0] < 0 < ax.get_ylim()[1]
    assert [text.get_text() for text in ax.texts] == (["no finite value"] if np.isnan(factor) else [])


def test_a_layer_in_which_nothing_changed_is_drawn_at_zero(runs: dict[str, xr.DataTree]) -> None:
    figure = draw("pruning_effect_per_layer", runs)
    figure.canvas.draw()
    loss = figure.axes[0]
    (points,) = (line for line in loss.lines if line.get_label() == "first order")
    assert 0 in points.get_ydata()
    assert np.isfinite(loss.transData.transform(points.get_xydata())).all()


def test_what_was_removed_stands_at_its_shares(runs: dict[str, xr.DataTree]) -> None:
    figure = draw("removed_decrease", runs)
    assert "layer" in [ax.get_xlabel() for ax in figure.axes]
    (points, *_), share = figure.axes[0].lines, analysis.removed_decrease(runs["magnitude"])
    np.testing.assert_array_equal(points.get_xdata(), share.parameters.sum("layer"))
    np.testing.assert_array_equal(points.get_ydata(), share.decrease.sum("layer"))


def test_a_dead_network_has_no_share_to_draw(runs: dict[str, xr.DataTree]) -> None:
    """Its ‖g‖² is zero, of which what was removed is no share, and not none."""
    dead = runs["magnitude"].copy(deep=True).load()
    for name in ("grad_sqnorm", "removed_grad_sqnorm"):
        dead["pruning"][name] = 0 * dead["pruning"][name]
    figure = draw("removed_decrease", {"dead": dead})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["no finite value"] * 2
    with pytest.raises(analysis.MissingQuantityError, match="not zero"):
        FIGURES["removed_decrease"].finding({"dead": dead})


def test_bad_calls_are_said(runs: dict[str, xr.DataTree]) -> None:
    with pytest.raises(ValueError, match="unknown figure 'pie': choose one of loss_decrease_scatter"):
        draw("pie", runs)
    with pytest.raises(ValueError, match="no runs: give at least one record"):
        draw("norm_rate", {})
    with pytest.raises(analysis.MissingQuantityError, match="nothing was recorded in /units"):
        draw("filters_left", {"none": runs["none"]})


def test_the_lowest_panel_of_each_column_has_ticks_and_label() -> None:
    values = {name: ("step", [1.0, 2.0]) for name in ("measured", "first_order", "second_order")}
    figure, axes = layout.grid(5)
    for ax in axes:
        ax.plot([0, 1], [1, 2])
        ax.set_xlabel("step")
    layout.shared_axes(figure, axes, {"run": xr.Dataset(values)}, ylabel="loss")
    figure.canvas.draw()
    labelled = [any(label.get_visible() and label.get_text() for label in ax.get_xticklabels()) for ax in axes]
    assert labelled == [False, False, True, True, True]
    assert [ax.get_xlabel() for ax in axes] == ["", "", "step", "step", "step"]


def test_a_record_of_an_event_alone_has_a_report(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(2)
    with Recorder(tmp_path / "event.zarr", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=batches):
            prune_row(model, "0.weight", 1)
    page = write_report({"event": open_run(tmp_path / "event.zarr")}, tmp_path / "drawn", records=["event.zarr"])
    assert (tmp_path / "drawn" / "pruning_effect.png").is_file()
    assert "quantities_per_layer</code>: no quantity per layer" in page.read_text(encoding="utf-8")


@pytest.mark.long
def test_a_report_of_one_measure_claims_no_comparison(
    runs: dict[str, xr.DataTree], report: Path, report_of_one: Path
) -> None:
    one, several = (page.read_text(encoding="utf-8") for page in (report_of_one, report))
    for name in ("accuracy", "convergence"):
        assert claim(name).split("‖")[0] in several
        assert claim(name).split("‖")[0] not in one
    assert ". Convergence<" in one
    assert "accuracy</code>: one run alone has nothing to be compared with" in one
    assert " to " not in FIGURES["accuracy"].finding({"magnitude": runs["magnitude"]})


def test_a_long_condition_is_a_title_of_several_lines(runs: dict[str, xr.DataTree]) -> None:
    of_rates = {}
    for rates in ([0.1, 0.01, 0.001], [0.123456, 1e-20, 0.000123456]):
        for measure in ("magnitude", "loss_preservation"):
            run = runs["magnitude"].copy()
            run.attrs = {"model": "a network", "data": "images", "measure": measure, "learning_rates": rates}
            of_rates[f"{rates} {measure}"] = run
    figure = draw("accuracy", of_rates)
    figure.canvas.draw()
    titles = [text for ax in figure.axes for text in (ax.title, ax._left_title) if text.get_text()]
    assert [text.get_text().count("\n") for text in titles] == [1, 1]
    one, other = (text.get_window_extent() for text in titles)
    assert not one.overlaps(other)


def test_a_report_may_go_to_a_folder_by_its_name(tmp_path: Path) -> None:
    epochs = xr.Dataset({"test_accuracy": ("epoch", [0.25, 0.5])}, {"epoch": [0, 1]})
    page = write_report({"mine": xr.DataTree.from_dict({"/epochs": epochs})}, str(tmp_path / "drawn"), records=[])
    assert page == tmp_path / "drawn" / "report.html"
    assert (tmp_path / "drawn" / "training_curves.png").exists()


@pytest.mark.long
def test_a_report_is_written_whatever_was_recorded(tmp_path: Path) -> None:
    for name, quantities in (("few", ["param_sqnorm", "loss"]), ("still", None)):
        model, batches = smooth_network(), vectors(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Recorder(tmp_path / name, model, optimizer, quantities=quantities, curvature_every=1) as recorder:
            for batch in recorder.watch(batches):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
                (loss * (name != "still")).backward()
                optimizer.step()
                recorder.log(loss=loss)
        run = {name: open_run(tmp_path / name)}
        page = write_report(run, tmp_path / f"drawn {name}", records=[name]).read_text(encoding="utf-8")
        assert "Outcome of the runs" in page
        assert overview(run, brief=True)


def test_the_list_of_figures_says_what_each_shows() -> None:
    assert repr(FIGURES["accuracy"]) == f"<accuracy: {claim('accuracy')}>"
