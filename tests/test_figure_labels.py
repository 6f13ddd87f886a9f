"""Whatever things are called, and however many they are: labels do not meet, and the data keep most of the picture."""

from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import cbook
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_runs import record

from analysis import MissingQuantityError, comparisons
from analysis.comparison import side_by_side, title
from analysis.condition_names import by_condition
from analysis.conditions import by_setting
from analysis.typeset import percentages, told_apart
from figures import caption, draw
from figures.labels import layer_names, wrapped
from figures.style import run_styles

mpl.use("agg")

LONG = "augmentation by RandAugment with magnitude 9 and probability one half, mixup 0.8, label smoothing 0.1"


def named(names: list[str], **what: object) -> dict[str, xr.DataTree]:
    """Runs of instrumented loops, each of a measure of its own."""
    found = {}
    for name in names:
        run = record("magnitude", 0)
        run.attrs = {
            "model": "net",
            "data": "images",
            "seed": 0,
            "measure": name,
        } | what
        found[name] = run
    return found


def measured(names: list[str], *, steps: list[int], scale: list[float]) -> dict[str, xr.DataTree]:
    """Runs that measured their steps."""
    found = {}
    for name, count, size in zip(names, steps, scale, strict=True):
        values = size * np.geomspace(1, 0.1, count)
        per_layer = (("step", "layer"), values[:, None] * [0.6, 0.4])
        names_of = ("grad_update", "update_hess_update", "grad_sqnorm", "grad_hess_grad")
        curvature = xr.Dataset(
            dict.fromkeys(names_of, per_layer)
            | {"loss_before": ("step", 1 + values), "loss_after": ("step", np.ones(count))},
            {"step": np.arange(count), "layer": ["a", "b"]},
        )
        flow = xr.Dataset({"flow_step": (("step", "layer"), np.full((count, 2), 0.1))}, curvature.coords)
        found[name] = xr.DataTree.from_dict({"/curvature": curvature, "/steps": flow})
    return found


def meets(figure: Figure) -> bool:
    """Whether a title, an entry of the legend or a row's name lies over another."""
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in (ax for ax in figure.axes if ax.get_visible()):
        texts += [ax._left_title, *ax.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    return any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("name", ["accuracy", "convergence", "training_curves", "loss_decrease_over_time", "stability"])
def test_long_names_do_not_meet_and_leave_the_data_their_room(name: str) -> None:
    names = [f"{LONG} {number}" for number in range(8)]
    of_steps = name in ("loss_decrease_over_time", "stability")
    runs = measured(names, steps=[20] * 8, scale=[1.0] * 8) if of_steps else named(names)
    figure = draw(name, runs)
    assert not meets(figure)
    assert all(legend.get_window_extent().width <= figure.bbox.width for legend in figure.legends)
    for ax in (ax for ax in figure.axes if ax.get_visible()):
        assert ax.get_window_extent().width > figure.dpi
        assert ax.get_window_extent().height > figure.dpi


@pytest.mark.parametrize("name", ["accuracy", "convergence", "norms", "loss_decrease_over_time", "stability"])
def test_dollars_in_names_are_no_formulas(name: str) -> None:
    """Of two matplotlib makes a formula, or an error where there is none."""
    names = ["5 $ of 10 $ %", "a^$x\\y$", "$"]
    runs = named(names, model="my $net %, $ 1") | measured(["over $ steps $"], steps=[20], scale=[1.0])
    for run in runs.values():
        sqnorm = xr.DataArray(np.ones((20, 2)), {"step": np.arange(20), "layer": ["a$", "b$"]}, name="param_sqnorm")
        run["steps"] = run["steps"].to_dataset() if name != "norms" else sqnorm.to_dataset()
    texts = [text.get_text() for text in draw(name, runs).findobj(Text)]
    assert any("$" in text for text in texts)
    assert not any(cbook.is_math_text(text) for text in texts if r"\math" not in text)


def test_the_height_of_rows_grows_with_their_number() -> None:
    for count in (2, 24):
        figure = draw("accuracy", named([f"learning rate {number / 7}" for number in range(count)]))
        assert not meets(figure)
        assert len(figure.axes[0].get_yticklabels()) == count


@pytest.mark.parametrize("name", ["loss_decrease_over_time", "norm_rate"])
def test_a_caption_says_that_one_condition_and_seed_is_drawn_over_time(name: str) -> None:
    which = "with several conditions, those of the first that was pruned."
    assert caption(name).endswith(f"One panel per measure and one seed each; {which}")


def test_of_many_runs_some_are_drawn_and_it_is_said() -> None:
    names = [f"run {number:02d}" for number in range(24)]
    figure = draw("loss_decrease_over_time", measured(names, steps=[9] * 24, scale=[1.0] * 24))
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert len(titles) == 12
    assert (titles[0], titles[-1]) == ("run 00", "run 23")
    assert "12 of 24 runs" in figure.get_suptitle()
    assert figure.get_figheight() <= 10


def test_many_runs_have_colours_of_their_own() -> None:
    styles = run_styles([f"run {number}" for number in range(24)])
    assert len({to_hex(style["color"]) for style in styles.values()}) == 24
    assert all(np.mean(mpl.colors.to_rgb(style["color"])) < 0.75 for style in styles.values())


@pytest.mark.parametrize(("steps", "scale", "shared"), [
    ([20, 50], [1.0, 2.0], (True, True)),
    ([20, 2000], [1.0, 2.0], (False, True)),
    ([20, 50], [1.0, 1e4], (True, False)),
])  # fmt: skip
def test_axes_are_shared_by_what_one_scale_shows(
    steps: list[int], scale: list[float], shared: tuple[bool, bool]
) -> None:
    figure = draw("loss_decrease_over_time", measured(["one", "other"], steps=steps, scale=scale))
    one, other = figure.axes
    assert (one.get_shared_x_axes().joined(one, other), one.get_shared_y_axes().joined(one, other)) == shared
    for ax, last in zip(figure.axes, steps, strict=True):
        assert shared[0] or ax.get_xlim()[1] < 1.2 * last


def test_layers_are_called_by_what_tells_them_apart() -> None:
    assert layer_names(["0", "2"]) == ["0", "2"]
    assert layer_names(["model.body.0.conv", "model.body.1.conv"]) == ["0.conv", "1.conv"]
    assert layer_names(["only.one"]) == ["only.one"]
    long = [f"transformer_decoder_layers.{number}.self_attention_{which}_projection"
            for number in range(3) for which in ("query", "key", "value")]  # fmt: skip
    short = layer_names(["token_embedding", *long])
    assert len(set(short)) == len(short)
    assert max(map(len, short)) <= 36
    assert all(f".{number}." in name for number, name in zip(np.repeat(range(3), 3), short[1:], strict=True))


def test_many_layers_have_a_bar_of_depth_with_the_first_and_the_last() -> None:
    layers = [f"net.{number}.weight" for number in range(40)]
    steps = xr.Dataset({"param_sqnorm": (("step", "layer"), np.ones((5, 40)))}, {"step": np.arange(5), "layer": layers})
    figure = draw("quantities_per_layer", {"mine": xr.DataTree.from_dict({"/steps": steps})})
    panel, bar = figure.axes
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0.weight", "39.weight"]
    assert bar.get_xlabel() == "40 layers"
    assert not figure.legends
    assert panel.get_window_extent().width > 0.6 * figure.bbox.width


def test_one_run_alone_has_no_accuracy_to_compare() -> None:
    with pytest.raises(MissingQuantityError, match="one run alone has nothing to be compared with"):
        draw("accuracy", named(["mine"]))
    assert len(draw("convergence", named(["mine"])).axes) == 1


def test_one_of_several_runs_is_told_with_every_setting_in_which_they_differ() -> None:
    runs = {f"{rate} {decay}": named(["mine"], learning_rate=rate, weight_decay=decay)["mine"]
            for rate in (0.1, 0.2) for decay in (0.0, 0.5)}  # fmt: skip
    said = title("0.2 0.5", runs)
    assert "learning rate 0.2" in said
    assert "weight decay 0.5" in said
    assert title("events_many", {"events_many": xr.DataTree(), "other": xr.DataTree()}) == "events many"


def test_settings_have_the_digits_that_tell_them_apart() -> None:
    rates = [1e-4, 10**-3.5, 0.001, 1024.0, float("nan")]
    assert told_apart(pd.Series(rates)).fillna("-").tolist() == ["0.0001", "0.000316", "0.001", "1024", "-"]
    assert told_apart(pd.Series([1 / 3, 1 / 3 + 1e-5, 0.5])).tolist() == ["0.33333", "0.33334", "0.5"]
    assert told_apart(pd.Series([0.1 + 0.2, 0.3])).tolist() == ["0.30000000000000004", "0.3"]
    assert told_apart(pd.Series(["cosine", (1, 2)])).tolist() == ["cosine", "(1, 2)"]


def test_sparsities_have_three_digits_or_as_many_as_tell_them_apart() -> None:
    assert percentages(pd.Series([0.781935, 0.29, 1 - 0.3, np.nan])).fillna("-").tolist() == ["78.2", "29", "70", "-"]
    assert percentages(pd.Series([0.781935, 0.78212, 0.5])).tolist() == ["78.19", "78.21", "50"]
    assert percentages(pd.Series([0.9996, 1.0])).tolist() == ["99.96", "100"]
    assert percentages(pd.Series([0.7, 1 - 0.3, 0.7 + 1e-12])).tolist() == ["70", "70", "70"]


def test_a_title_tells_its_sparsity_from_that_of_other_runs() -> None:
    runs = {
        name: xr.DataTree(xr.Dataset(attrs={"model": "m", "measure": "taylor", "rounds": 50, "sparsity": sparsity}))
        for name, sparsity in (("one", 0.781935), ("other", 0.78212))
    }
    assert side_by_side({"one": runs["one"]})[0] == "m, 78.2% pruned in 50 rounds"
    assert side_by_side(runs)[0] == "m, 78.19% pruned in 50 rounds"
    assert [*by_condition(comparisons(runs))] == [f"m, {share}% pruned in 50 rounds" for share in ("78.19", "78.21")]


def test_conditions_are_told_by_short_numbers() -> None:
    runs = {str(rate): named(["mine"], learning_rate=rate)["mine"] for rate in np.logspace(-3, -1, 5)}
    assert [name.rpartition("rate ")[2] for name in by_condition(comparisons(runs))] == [
        "0.001", "0.00316", "0.01", "0.0316", "0.1",
    ]  # fmt: skip
    assert {run.attrs["measure"] for run in by_setting(runs).values()} >= {"learning rate 0.0316", "learning rate 0.1"}


def test_lines_of_a_label_are_short() -> None:
    assert max(map(len, wrapped(LONG).splitlines())) <= 30


def test_a_seed_does_not_stand_alone_in_a_line() -> None:
    assert wrapped("70% pruned in 1 round, seed 0", 28) == "70% pruned in 1 round,\nseed 0"
    assert wrapped("short 0", 28) == "short 0"
