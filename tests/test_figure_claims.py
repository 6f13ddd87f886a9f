"""The figure of the claims shows their table: right of the line what is as claimed, in its verdict's colour."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from synthetic_runs import MEASURES, record, runs

import analysis
from analysis import CLAIMS, MissingQuantityError
from figures import FIGURES, caption, claim, draw
from figures.style import VERDICTS

mpl.use("agg")

EFFECTS = {
    "magnitude": {"area": 0.5, "accuracy": 0.7},
    "gradient_norm_increase": {"accuracy": 0.9},
    "loss_preservation_times_magnitude": {"area": 0.01},
}


def points(ax: Axes) -> list[tuple[float, float, str, str, bool]]:
    """Each effect: claim, place on the axis, colour, marker, and whether it is filled."""
    names = [label.get_text().split()[0] for label in ax.get_yticklabels()]
    return [
        (names[round(float(y))], float(x), to_hex(line.get_color()), line.get_marker(),
         line.get_markerfacecolor() != "white")
        for line in ax.lines if len(line.get_xdata()) == 1 for x, y in [line.get_xydata()[0]]
    ]  # fmt: skip


def test_an_effect_is_right_of_the_line_where_it_is_as_claimed() -> None:
    some = runs(**EFFECTS)
    found = analysis.claims(some).set_index("claim")
    ratios, differences = draw("claims", some).axes
    seen = {name: rest for ax in (ratios, differences) for name, *rest in points(ax)}
    assert list(seen) == [*(found.index[found.null == 1]), *(found.index[found.null == 0])]
    for name, (place, colour, marker, filled) in seen.items():
        row, expected = found.loc[name], CLAIMS[name].expected
        effect = row.value if expected > 0 else 1 / row.value
        if not row.null:
            effect = 100 * expected * row.value
        elif effect > 30:
            assert (marker, effect) == (">", pytest.approx(100, rel=0.1))
            effect = 30
        assert place == pytest.approx(effect, rel=1e-9)
        assert colour == to_hex(VERDICTS[row.verdict]["color"])
        assert filled == row.stands
        if row.verdict in ("supported", "contradicted"):
            assert (place > row.null) == (row.verdict == "supported")
    assert seen["i.g"][2] == ">"
    assert {found.verdict[name] for name in ("i.f", "ii.c")} == {"supported"}
    assert {found.verdict[name] for name in ("iii.e", "iii.f")} == {"contradicted"}


@pytest.mark.long
def test_a_single_round_has_the_same_marker_whatever_else_is_drawn() -> None:
    of = {rounds: {f"{measure}-{rounds}-{seed}": record(measure, seed, rounds=rounds, area=1 + seed / 10)
                   for measure in MEASURES for seed in range(2)} for rounds in (1, 5)}  # fmt: skip
    one, five, both = ({marker for ax in draw("claims", some).axes for _, _, _, marker, _ in points(ax)} - {"<", ">"}
                       for some in (of[1], of[5], of[1] | of[5]))  # fmt: skip
    assert (len(one), len(five)) == (1, 1)
    assert one != five
    assert both == one | five


def test_its_bars_are_the_intervals() -> None:
    some = runs(**EFFECTS)
    found = analysis.claims(some).set_index("claim")
    _, differences = draw("claims", some).axes
    drawn = [np.sort(bar.get_segments()[0][:, 0]) for bar in differences.collections]
    signs = {"ii.c": 1, "iii.e": -1, "iii.f": 1}
    expected = [np.sort(100 * sign * found.loc[name, ["low", "high"]].astype(float)) for name, sign in signs.items()]
    np.testing.assert_allclose(drawn, expected, rtol=1e-9)


def test_nothing_is_the_middle_of_every_panel() -> None:
    ratios, differences = draw("claims", runs(**EFFECTS)).axes
    low, high = ratios.get_xlim()
    assert low * high == pytest.approx(1)
    assert sum(differences.get_xlim()) == pytest.approx(0)


def test_its_finding_counts_the_verdicts() -> None:
    some = runs(**EFFECTS)
    found = analysis.claims(some)
    said = FIGURES["claims"].finding(some)
    assert said.startswith(f"{len(CLAIMS)} intervals: {(found.verdict == 'supported').sum()} supported, ")
    assert said.endswith(f"; {found.stands.sum()} stand after correction for their number.")
    assert claim("claims").endswith(".")
    assert len(caption("claims")) > 30


def test_one_seed_has_no_intervals() -> None:
    with pytest.raises(MissingQuantityError, match="give runs of at least two seeds"):
        draw("claims", runs(seeds=1))
