"""Tables over seeds say what the runs came to: numbers done by hand, and nothing of runs that did not end."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_runs import record, runs

import analysis
import figures
from analysis.__main__ import main
from analysis.comparison import mean_and_interval, median_and_quartiles
from analysis.conditions import several_seeds
from analysis.intervals import stand
from analysis.overview import SUMMARY, overview
from analysis.seed_tables import VERDICTS, agreement_over_runs, chance, claims_table, verdict_table
from analysis.tables import brief_table
from analysis.typeset import FORMATS, as_latex, as_markdown, page
from dynamics.record.summary import summary
from figures.catalogue import finding


def unpruned(seed: int, *, accuracy: float) -> xr.DataTree:
    nodes = record("none", seed, accuracy=accuracy).to_dict()
    nodes["/steps"] = nodes["/steps"].assign(loss=("step", [3.0] * 4 + [1.0, 2.0, 3.0, 6.0]))
    return xr.DataTree.from_dict({name: node for name, node in nodes.items() if name != "/pruning"})


@pytest.fixture
def some() -> dict[str, xr.DataTree]:
    """Magnitude at 80, 82, 84% and a run without pruning at 90%, all of 1 round; one more of 2 rounds."""
    found = {f"magnitude {seed}": record("magnitude", seed, accuracy=0.8 + 0.02 * seed, area=0.25) for seed in range(3)}
    found |= {"none": unpruned(0, accuracy=0.9), "more": record("magnitude", 0, rounds=2, accuracy=0.5, area=2.0)}
    return found


def test_a_run_that_has_not_ended_is_told_from_others() -> None:
    runs = {"whole": record("magnitude", 0), "half": record("magnitude", 1, ended=False)}
    assert analysis.outcome_table(runs)["epochs completed"].tolist() == ["2 of 2", "1 of 2"]
    assert brief_table(runs)["epochs", "completed"].tolist() == ["2 of 2", "1 of 2"]
    assert "epochs completed" not in analysis.outcome_table({"whole": runs["whole"]})
    whole, half = map(summary, runs.values())
    assert "8 steps, unfinished after 1 of 2 epochs" in half
    assert "unfinished" not in whole


def test_a_median_stays_where_a_mean_is_carried_away() -> None:
    seeds = [[1.0, 2.0], [2.0, np.nan], [3.0, np.nan], [4.0, np.inf], [1e9, 1.0]]
    found = median_and_quartiles(xr.DataArray(seeds, dims=("seed", "step")))
    assert found["median"].values.tolist() == [3.0, 1.5]
    assert found.low.values.tolist() == [2.0, 1.25]
    assert found.high.values.tolist() == [4.0, 1.75]
    assert found.seeds.values.tolist() == [5, 2]
    assert median_and_quartiles(xr.DataArray([[np.inf], [np.nan]], dims=("seed", "step")))["median"].isnull().all()


def test_accuracies_are_means_with_students_interval(some: dict[str, xr.DataTree]) -> None:
    table = analysis.accuracy_table(some)
    assert table.index.names == ["model", "data", "rounds", "measure"]
    accuracies = table["test accuracy, %"].to_dict()
    half = 4.303 * 2 / np.sqrt(3)  # Student's quantile of 2 degrees of freedom, s = 2
    assert accuracies == {
        ("VGG-13", "digits", 1, "not pruned"): "90.0",
        ("VGG-13", "digits", 1, "magnitude"): f"82.0 ± {half:.1f}",
        ("VGG-13", "digits", 2, "not pruned"): "90.0",
        ("VGG-13", "digits", 2, "magnitude"): "50.0",
    }
    assert table.seeds.tolist() == ["1", "3", "1", "1"]
    assert table["parameters pruned, %"].tolist() == ["0.0", "25.0", "0.0", "25.0"]
    assert table["multiply-adds pruned, %"].tolist() == ["0.0", "–", "0.0", "–"]


def test_what_was_not_pruned_converges_from_where_the_others_do(some: dict[str, xr.DataTree]) -> None:
    table = analysis.convergence_table(some).xs(1, level="rounds").droplevel(["model", "data"])
    assert table.loc["not pruned", ["area", "steps to 75%", "steps to 10%"]].tolist() == [
        "3",
        "not reached",
        "not reached",
    ]
    assert table.loc["magnitude", ["area", "steps to 25%", "steps to 10%"]].tolist() == ["0.25 ± 0", "4", "4"]


def test_a_share_that_some_seeds_reach_says_how_many(some: dict[str, xr.DataTree]) -> None:
    slow = some | {"magnitude 1": record("magnitude", 1, area=2.0)}
    table = analysis.convergence_table(slow).xs((1, "magnitude"), level=("rounds", "measure"))
    assert table["steps to 50%"].item() == "4 (2 of 3)"


def test_a_run_that_did_not_end_is_said_not_counted(some: dict[str, xr.DataTree]) -> None:
    broken = some | {
        "magnitude 1": record("magnitude", 1, ended=False),
        "more": record("magnitude", 0, rounds=2, ended=False),
    }
    for table in (analysis.accuracy_table(broken), analysis.convergence_table(broken)):
        assert table.seeds.tolist() == ["1", "2 of 3", "1", "0 of 1"]
        assert set(table.iloc[-1, :-1]) == {"–"}


def test_the_sparsity_stands_where_it_differs(some: dict[str, xr.DataTree]) -> None:
    sparser = record("magnitude", 0)
    sparser.attrs["experiment"] = json.dumps(json.loads(sparser.attrs["experiment"]) | {"sparsity": 0.9})
    table = analysis.accuracy_table(some | {"sparser": sparser})
    assert table.index.names == ["model", "data", "rounds", "sparsity", "measure"]
    assert table.loc[("VGG-13", "digits", 1)].index.tolist() == [
        (0.5, "not pruned"), (0.5, "magnitude"), (0.9, "not pruned"), (0.9, "magnitude"),
    ]  # fmt: skip


def test_where_no_accuracy_was_logged_test_losses_are_the_outcome() -> None:
    def trained(loss: float, **said: object) -> xr.DataTree:
        epochs = xr.Dataset({"test_loss": ("epoch", [9.0, loss])}, {"epoch": [0, 1]})
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs={"model": "m", "data": "d"} | said), "/epochs": epochs})

    runs = {f"{decay} {seed}": trained(2 + decay + seed / 10, seed=seed, decay=decay)
            for decay in (0.0, 0.5) for seed in (0, 1)}  # fmt: skip
    table = analysis.accuracy_table(runs)
    assert table.columns.tolist() == ["test loss", "seeds"]  # nothing was pruned
    assert table.index.names == ["model", "data", "decay", "measure"]
    assert table["test loss"].tolist() == ["2.05 ± 0.635", "2.55 ± 0.635"]  # Student's 12.706 · 0.0707 / √2
    assert next(iter(overview(runs))) == "Test loss: mean ± half of its 95% interval over seeds"
    assert next(iter(overview(runs))) in SUMMARY
    known = runs | {"accurate": unpruned(0, accuracy=0.5)}
    assert "test loss" not in analysis.accuracy_table(known)


@pytest.mark.parametrize(
    ("granularities", "units"),
    [
        (["weight"], "weights"),
        ([""], "filters"),
        (["", "weight"], "weights"),
        (["weight", "filter"], "filters or weights"),
    ],
)
def test_pruned_shares_are_of_the_units_that_events_name_in_per_cent_beside_a_loss(
    granularities: list[str], units: str
) -> None:
    runs = {}
    for seed, granularity in enumerate(granularities):
        nodes = record("magnitude", seed).to_dict()
        nodes["/epochs"] = xr.Dataset({"test_loss": ("epoch", [9.0, 2.0])}, {"epoch": [0, 1]})
        nodes["/pruning"] = nodes["/pruning"].assign(granularity=("event", [granularity]), sparsity=("event", [0.5]))
        runs[granularity] = xr.DataTree.from_dict(nodes)
    columns = analysis.accuracy_table(runs).reset_index(drop=True).iloc[0]
    assert columns[f"{units} pruned, %"] == "50.0"
    assert columns["parameters pruned, %"] == "25.0"
    assert columns["test loss"].startswith("2")


@pytest.mark.parametrize("setting", ["rate", "relation", "order", "slope", "count", "rank correlation", "runs"])
def test_agreement_is_a_median_over_runs_of_one_setting(setting: str) -> None:
    def measured(error: float, **said: object) -> xr.DataTree:
        rows = {name: (("step", "layer"), np.ones((3, 1))) for name in ("grad_sqnorm", "grad_hess_grad")}
        rows |= {"grad_update": (("step", "layer"), -np.ones((3, 1))), "loss_before": ("step", np.full(3, 1 + error))}
        rows |= {"update_hess_update": (("step", "layer"), np.zeros((3, 1))), "loss_after": ("step", np.zeros(3))}
        curvature = xr.Dataset(rows, {"step": range(3), "layer": ["a"]})
        steps = curvature[["grad_sqnorm"]].rename(grad_sqnorm="flow_step")
        said = {"model": "m", "data": "d", "measure": "none"} | said
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=said), "/curvature": curvature, "/steps": steps})

    runs = {f"{rate} {seed}": measured(error + seed / 8, seed=seed, **{setting: rate})
            for rate, error in ((0.1, 0.0), (0.2, 1.0)) for seed in (0, 1, 2)}  # fmt: skip
    table = agreement_over_runs(runs)
    assert table.index.names[:4] == ["relation", "order", "model", "data"]
    assert table.index.names[4].removesuffix(" (setting)") == setting
    found = table.loc[("loss decrease", "first", "m", "d"), "median relative error"]
    assert found.tolist() == pytest.approx([0.125 / 1.125, 1.125 / 2.125])
    assert table.runs.tolist() == [3, 3, 3, 3]


def test_verdicts_are_counted_over_conditions() -> None:
    one = runs(magnitude={"area": 0.5})
    other = {f"{label}, 2": record(label[:-2], int(label[-1]), rounds=2) for label in one}
    found = analysis.claims(one | other)
    counts = verdict_table(found).droplevel("what it says")
    one_each = {"supported": 1, "negligible": 1, "mean as claimed": 1}
    assert counts.loc["i.f"].to_dict() == dict.fromkeys(VERDICTS, 0) | one_each
    assert (counts[[*VERDICTS]].sum(axis=1) == [1 if name == "ii.c" else 2 for name in counts.index]).all()
    printed = claims_table(found)
    assert printed.index.names == ["claim", "model", "data", "rounds"]
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, 0\.\d+\]", printed.effect[("i.f", "VGG-13", "digits", 1)])
    assert re.fullmatch(
        r"[+-]\d\.\d\d \[-\d\.\d\d, \+\d\.\d\d\] points", printed.effect[("ii.c", "VGG-13", "digits", 1)]
    )


def test_runs_that_end_with_a_pruning_say_why_they_have_no_convergence() -> None:
    every = runs(seeds=2)
    assert not any("end with a pruning" in title for title in overview(every))
    late = [label for label in every if label.startswith("magnitude")]
    for label in late:
        events = every[label]["pruning"].to_dataset()
        every[label]["pruning"] = events.assign(step=events.step + 4)
    (said,) = overview(every)["Runs that end with a pruning"]
    assert said.startswith("No step is recorded after the last pruning in 2 of 10 runs.")


def test_a_claim_about_another_number_of_rounds_has_no_conditions() -> None:
    found = analysis.claims({label: record(label[:-2], int(label[-1]), rounds=2) for label in runs()})
    counts = verdict_table(found).droplevel("what it says")
    assert counts[[*VERDICTS]].sum(axis=1).to_dict() == {name: 1 for name in analysis.CLAIMS if name != "ii.c"}


def test_claims_that_need_a_measure_of_no_run_are_one_sentence() -> None:
    every = runs()
    there = {"magnitude", "loss_preservation"}
    some = {label: run for label, run in every.items() if label.split("-")[0] in there}
    for brief in (True, False):
        parts = overview(some, brief=brief)
        judged = [of for name, of in parts.items() if name.startswith("Claims: ")]
        for table in judged:
            of_both = [name for name, of in analysis.CLAIMS.items() if {of.measure, *of.others} <= there]
            assert list(table.index.unique("claim")) == of_both
        (said,) = next(of for name, of in parts.items() if name.startswith("Claims without a verdict"))
        assert "i.d, iii.b need gradient-norm increase; i.e needs gradient-norm preservation; " in said
        assert "i.f, ii.a, ii.b, iii.d, iii.f need gradient-norm increase, gradient-norm preservation; " in said
        assert said.count("need") == 5
    assert not any("without a verdict" in name for name in overview(every))
    alone = overview({label: run for label, run in every.items() if label.startswith("gradient_norm_p")}, brief=True)
    assert len(alone) == 2  # accuracy, and what each claim needs


@pytest.mark.parametrize(("others", "count"), [(0.04, 16), (0.06, 1)])
def test_verdicts_are_corrected_for_their_number(others: float, count: int) -> None:
    """Of sixteen p at 0.04 all stand, at 0.06 the smallest alone, which is 0.001; one that is not known is none."""
    found = analysis.claims(runs())[:16]
    found["stands"] = stand([0.001, *[others] * 15])
    assert stand([np.nan, 0.001, *[others] * 15]).tolist() == [False, *found.stands]
    assert (
        f"about 0.8 of 16 intervals would give a verdict by chance. Corrected for their number (false discovery "
        f"rate 5%, Benjamini and Hochberg 1995), {count} of them stand" in chance(found)
    )
    starred = claims_table(found).verdict.str.endswith(" *")
    assert starred.tolist() == found.stands.tolist()


def test_of_several_tests_one_needs_more_than_if_it_were_alone() -> None:
    """Benjamini and Hochberg: the k smallest of n stand if the k-th is ≤ 5% k/n, 0.0031, 0.00625, ... of sixteen."""
    assert stand([0.04, 0.002, 0.006, *[0.9] * 13]).tolist() == [False, True, True, *[False] * 13]
    assert stand([0.04]).tolist() == [True]


def test_networks_that_were_not_pruned_make_no_claims() -> None:
    parts = overview({str(seed): unpruned(seed, accuracy=0.5) for seed in range(2)}, brief=True)
    (table,) = parts.values()
    assert table["test accuracy, %"].tolist() == ["50.0 ± 0.0"]


def test_runs_of_one_seed_stay_rows_of_their_own(some: dict[str, xr.DataTree]) -> None:
    assert several_seeds(some)
    single = {label: some[label] for label in ("magnitude 0", "none", "more")}
    assert not several_seeds(single)
    # (what theory says of a run needs more than these records hold)
    over_seeds = overview(some, brief=True)
    assert [len(table) for table in over_seeds.values()] == [4, 2, 1]


def test_an_overview_holds_every_definition() -> None:
    parts = overview(runs(seeds=2))
    text = page(parts, "text")
    for name, claim in analysis.CLAIMS.items():
        assert f"{name}: {claim.statistic} of" in text
        assert " ".join(claim.reason.split()) in " ".join(text.split())
    assert all(f"\n{name}: " in text for name in analysis.STATISTICS)
    with pytest.raises(ValueError, match="unknown format 'pdf': choose one of text, markdown, latex"):
        page(parts, "pdf")


@pytest.mark.long
def test_the_command_line_prints_it_in_each_format(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analysis.__main__.open_runs", lambda paths: runs())
    for form, start in (("text", "Accuracy: mean"), ("markdown", "## Accuracy: mean"), ("latex", "% Accuracy: mean")):
        assert main(["runs", "--format", form]) == 0
        said = capsys.readouterr().out
        assert said.startswith(start)
        assert "i.f: training_area of magnitude" in " ".join(said.split())
    assert main(["runs", "--format", "pdf"]) == 2
    assert "error: unknown format 'pdf'" in capsys.readouterr().err


TABLE = pd.DataFrame(
    {"θᵀHg, %": ["1 ± 2", "|a|"], "share": [0.12345, np.nan]},
    index=pd.MultiIndex.from_tuples([("vgg_13", "b"), ("vgg_13", "c")], names=["model", None]),
)


def test_a_page_has_tables_and_sentences_under_their_titles() -> None:
    whole = page({"Numbers": TABLE, "Notes": ["One.", "Two."]}, "markdown")
    assert whole == f"## Numbers\n\n{as_markdown(TABLE)}\n\n## Notes\n\n- One.\n- Two."


def test_markdown_is_a_table() -> None:
    assert as_markdown(TABLE).splitlines() == [
        "| model |  | θᵀHg, % | share |",
        "| --- | --- | --- | --- |",
        "| vgg_13 | b | 1 ± 2 | 0.123 |",
        r"|  | c | \|a\| | – |",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "<lambda>", "<b>bold</b>", "*starred* and **more**", "supported *", "_x_ __init__ a_b_c", "`code`",
        r"\alpha \n |x|", "~~gone~~", "p < 2 > 1", "0.2 [0.1, 0.3]", "100% & #1", "שלום",
    ],
)  # fmt: skip
def test_a_name_in_markdown_is_read_as_it_is(name: str) -> None:
    """By another parser of Markdown."""
    parser = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
    table = as_markdown(pd.DataFrame({"share": [1]}, index=pd.Index([name], name="run")))
    read = parser.render(table)
    cells = re.findall("<td>(.*?)</td>", read)
    assert [html.unescape(cell) for cell in cells] == [name, "1"]


def test_mathematics_in_a_name_is_escaped_in_markdown() -> None:
    assert r"| costs \$5 and \$6 |" in as_markdown(pd.DataFrame({"costs $5 and $6": [1]}))


def test_latex_is_plain_but_for_mathematics() -> None:
    lines = as_latex(TABLE).splitlines()
    assert lines[1].startswith(r"\begin{tabular}{>{\raggedleft\arraybackslash}p{")
    assert lines[5] == r"vgg\_13, b & 1 \ensuremath{\pm} 2 & 0.123 \\"
    assert lines[3] == r" & \ensuremath{\theta}\ensuremath{^\top}Hg, \% & share \\"


def test_what_latex_rows_share_stands_over_them() -> None:
    index = pd.MultiIndex.from_tuples(
        [("a", 1, "magnitude"), ("a", 1, "random"), ("a", 2, "magnitude")], names=["model", "rounds", "measure"]
    )
    lines = as_latex(pd.DataFrame({"a long head of a column": ["1", "2", "3"]}, index=index)).splitlines()
    assert lines[5:10] == [
        r"\multicolumn{2}{l}{\emph{a, rounds 1}} \\*",
        r"magnitude & 1 \\",
        r"random & 2 \\",
        r"\multicolumn{2}{l}{\emph{a, rounds 2}} \\*",
        r"magnitude & 3 \\",
    ]
    widths = [float(width) for width in re.findall(r"p{([\d.]+)em}", lines[1])]
    assert widths[1] < len("a long head") * 0.5  # broken between its words


def test_a_long_latex_table_breaks_between_pages_under_its_head() -> None:
    lines = as_latex(pd.DataFrame({"x": range(50)})).splitlines()
    assert (lines[1].partition("}")[0], lines[-2]) == (r"\begin{longtable", r"\end{longtable}")
    assert lines[5] == r"\endhead"
    assert lines[6:-3] == [rf"{i} & {i} \\" for i in range(50)]


def test_a_wide_latex_table_is_set_in_smaller_print() -> None:
    row = ["0.123 ± 0.0456"] * 8
    for columns, size in ((3, "footnotesize"), (8, "scriptsize")):
        table = pd.DataFrame([row[:columns]], columns=[f"head {place}" for place in range(columns)])
        assert as_latex(table).startswith(rf"{{\{size}\setlength")


def test_latex_tables_need_no_unicode(some: dict[str, xr.DataTree]) -> None:
    many = runs()
    found = analysis.claims(many)
    for table in (
        analysis.accuracy_table(many),
        analysis.convergence_table(some),
        claims_table(found),
        verdict_table(found),
    ):
        assert as_latex(table).isascii()
    assert set(FORMATS) == {"text", "markdown", "latex"}


def with_sparsity(run: xr.DataTree, sparsity: float) -> xr.DataTree:
    settings = json.loads(run.attrs["experiment"]) | {"sparsity": sparsity}
    run.attrs["experiment"] = json.dumps(settings)
    return run


def test_no_sparsity_is_averaged_with_another(some: dict[str, xr.DataTree]) -> None:
    nothing = {f"none of it {seed}": with_sparsity(record("magnitude", seed, accuracy=0.9), 0.0) for seed in range(3)}
    table = analysis.accuracy_table({label: run for label, run in some.items() if label != "more"} | nothing)
    assert table.index.names == ["model", "data", "rounds", "sparsity", "measure"]
    assert table.seeds.xs("magnitude", level="measure").tolist() == ["3", "3"]
    assert table.seeds.xs("not pruned", level="measure").tolist() == ["1", "1"]


def test_a_run_that_came_to_no_number_is_said_not_passed_over(some: dict[str, xr.DataTree]) -> None:
    diverged = some | {"magnitude 1": record("magnitude", 1, accuracy=np.nan, area=np.nan)}
    for table in (analysis.accuracy_table(diverged), analysis.convergence_table(diverged)):
        assert table.seeds.tolist() == ["1", "2 of 3", "1", "1"]
    found = mean_and_interval(xr.DataArray([[1.0, 2.0], [3.0, np.nan]], dims=("seed", "step")))
    assert found["mean"].values.tolist() == pytest.approx([2.0, np.nan], nan_ok=True)


def test_the_same_experiment_twice_is_refused(some: dict[str, xr.DataTree]) -> None:
    for label in ("none", "magnitude 0"):
        with pytest.raises(ValueError, match=rf"give one run of each measure, .* the same: {label}, again"):
            analysis.accuracy_table(some | {"again": some[label].copy()})


def test_equal_accuracies_in_all_seeds_give_no_verdict() -> None:
    same = {"gradient_norm_increase": {"accuracy": 0.7}}
    found = runs(seeds=2, **same)
    for label, run in found.items():
        run["epochs"] = (
            run["epochs"]
            .to_dataset()
            .assign(test_accuracy=("epoch", [0.1, 0.7 if label.startswith("gradient_norm_increase") else 0.75]))
        )
    row = analysis.claims(found).set_index("claim").loc["iii.e"]
    assert row.verdict == "no verdict (seeds do not differ)"
    assert np.isnan([row.low, row.high, row.p]).all()
    assert row.value == pytest.approx(-0.05)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_the_same_number_of_images_in_all_seeds_gives_no_verdict(kind: type) -> None:
    """204 − 201 of 360 images is 133 − 130 of them, but for the rounding of 204/360 − 201/360."""
    right = {"magnitude": (201, 130, 322), "loss_preservation": (204, 133, 325)}
    found = {
        f"{measure} {seed}": record(measure, seed, accuracy=float(kind(count / 360)), area=1 + 0.01 * seed)
        for measure, counts in right.items()
        for seed, count in enumerate(counts)
    }
    row = analysis.claims(found).set_index("claim").loc["ii.c"]
    assert (row.verdict, row.stands) == ("no verdict (seeds do not differ)", False)
    assert row.value == pytest.approx(3 / 360)


def test_latex_sets_what_anyone_may_call_a_model() -> None:
    table = pd.DataFrame({"model": ["net{x} \\ ~ ^2_a\nb"], "x": [1.0]}).set_index("model")
    row = as_latex(table).splitlines()[-4]
    assert row == r"net\{x\} \textbackslash{} \textasciitilde{} \textasciicircum{}2\_a b & 1 \\"


@pytest.mark.parametrize(
    ("null", "low", "printed"),
    [
        (1.0, 1.0032, "1.5 [1.003, 2]"),
        (1.0, 0.99998, "1.5 [0.99998, 2]"),
        (0.0, 1e-5, "+150.00 [+0.001, +200.00] points"),
    ],
)
def test_a_bound_beside_the_null_is_not_printed_as_the_null(null: float, low: float, printed: str) -> None:
    """Else what excludes it and what holds it would read the same."""
    one = analysis.claims(runs(magnitude={"area": 0.5})).iloc[[0]]
    found = one.assign(value=1.5, low=low, high=2.0, null=null)
    assert claims_table(found).effect.item() == printed


def test_of_a_run_that_does_not_say_what_it_is_no_rounds_are_told() -> None:
    """Its prunings are known, but not that they are rounds: 0 would be wrong."""
    run = record("magnitude", 0)
    del run.attrs["experiment"]
    table = analysis.accuracy_table({"mine": run})
    assert table.index.names == ["model", "data", "measure"]
    assert table["parameters pruned, %"].item() == "25.0"


def longer(run: xr.DataTree, steps: int) -> xr.DataTree:
    """The run with so many more steps at the end, at a loss of 0."""
    rows = run["steps"].to_dataset()
    after = xr.Dataset(
        {"loss": ("step", np.zeros(steps)), "epoch": ("step", np.full(steps, 2))}, {"step": 8 + np.arange(steps)}
    )
    return xr.DataTree.from_dict(run.to_dict() | {"/steps": xr.concat([rows, after], "step")})


def test_areas_are_averaged_over_equally_many_steps_alone(some: dict[str, xr.DataTree]) -> None:
    """At a loss of 0.25 for 4 steps, the area is 0.25; 4 steps more at 0 would make it 0.125."""
    found = some | {"magnitude 1": longer(some["magnitude 1"], 4)}
    table = analysis.convergence_table(found).xs((1, "magnitude"), level=("rounds", "measure"))
    assert table.iloc[0][["area", "final loss", "steps to 25%"]].tolist() == ["0.25 ± 0 (2 of 3)"] * 2 + ["4"]
    middle = figures.draw("convergence", found).axes[1]
    drawn = np.concatenate([np.ravel(line.get_xdata()).astype(float) for line in middle.lines])
    assert np.unique(drawn[np.isfinite(drawn)]).tolist() == [0.25, 3.0]
    said = overview(found)["Runs that trained for different numbers of steps"][0]
    assert said.endswith(
        "1 of 5 runs took another number of steps than most of their condition: no mean over seeds holds their areas "
        "and final losses."
    )


def test_the_sentence_on_convergence_says_the_areas_of_the_table(some: dict[str, xr.DataTree]) -> None:
    """A seed that one measure alone has, and that took more steps, is not in its mean."""
    found = {name: run for name, run in some.items() if name.startswith("magnitude")}
    found |= {f"loss {seed}": record("loss_preservation", seed, area=0.5) for seed in range(3)}
    found["magnitude 3"] = longer(record("magnitude", 3, area=0.1), 20)
    assert finding("convergence", found).endswith("lowest first: magnitude 0.25, loss preservation 0.5.")
    table = analysis.convergence_table(found).droplevel(["model", "data", "rounds"])
    assert table.area.to_dict() == {"magnitude": "0.25 ± 0 (3 of 4)", "loss preservation": "0.5 ± 0"}


def test_steps_are_compared_with_those_of_pruned_runs(some: dict[str, xr.DataTree]) -> None:
    """However many were not pruned: the mean losses of these are drawn beside the others'."""
    found = {f"none {seed}": unpruned(seed, accuracy=0.9) for seed in range(3)}
    found |= {of: longer(record(of, 0, area=0.5), 4) for of in ("magnitude", "loss_preservation")}
    areas = analysis.convergence_table(found).droplevel(["model", "data", "rounds"]).area
    assert areas.to_dict() == {"not pruned": "–", "magnitude": "0.25", "loss preservation": "0.25"}
    said = overview(found)["Runs that trained for different numbers of steps"][0]
    assert "3 of 5 runs took another number of steps than most of their condition" in said
    assert "claim" not in said


def test_a_tie_of_a_seed_is_of_claims_alone(some: dict[str, xr.DataTree]) -> None:
    found = {name: run for name, run in some.items() if name.startswith("magnitude")}
    found |= {f"loss {seed}": record("loss_preservation", seed, area=0.2) for seed in range(3)}
    found["loss 2"] = longer(found["loss 2"], 8)
    said = overview(found)["Runs that trained for different numbers of steps"][0]
    assert "1 of 6 runs took another number of steps than most of their condition" in said
    assert said.endswith(
        "2 of 6 runs took another number of steps than most of their seed: no claim compares their areas."
    )
    assert analysis.statistics(found).training_area.isna().sum() == 2


def test_where_no_two_runs_took_the_same_steps_no_areas_are_compared(some: dict[str, xr.DataTree]) -> None:
    found = {"a": some["magnitude 0"], "b": longer(some["magnitude 1"], 4)}
    assert analysis.convergence_table(found).area.item() == "–"
    (text,) = figures.draw("convergence", found).axes[1].texts
    assert text.get_text().startswith("not compared: these runs trained")


def test_a_setting_may_be_called_like_a_column_of_convergence(some: dict[str, xr.DataTree]) -> None:
    runs = {name: some["magnitude 0"].copy() for name in ("a", "b")}
    for number, run in enumerate(runs.values()):
        run.attrs = {"model": "m", "area": number, "steps taken": number, "seed": 0}
    assert {"area (setting)", "steps taken (setting)"} <= set(analysis.convergence_table(runs).index.names)
