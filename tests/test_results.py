"""docs/results.md says what the records in docs/records say: its tables, and its pictures' names."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
from torch import nn

import analysis
from analysis.overview import overview
from analysis.remembered import remembering
from analysis.seed_tables import chance, claims_table
from analysis.typeset import as_markdown
from analysis.verdicts import judged
from dynamics.models import build
from figures import FIGURES, caption, claim

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
FLAT = " ".join(PAGE.split())  # whatever its line breaks


Runs = dict[str, xr.DataTree]


@pytest.fixture(scope="module", autouse=True)
def each_run_is_looked_at_once() -> Iterator[None]:
    with remembering():
        yield


@cache
def records(name: str) -> Runs:
    return analysis.open_runs(map(str, sorted((DOCS / "records").glob(f"{name}.zarr.zip"))))


@pytest.fixture(scope="module")
def laptop() -> Runs:
    return records("laptop")


@pytest.fixture(scope="module")
def training_mode() -> Runs:
    return records("training_mode/prunings")


@pytest.fixture(scope="module")
def wide() -> Runs:
    return records("full_width/*")


@cache
def statistics(name: str) -> pd.DataFrame:
    return analysis.statistics(records(name))


def claims(name: str) -> pd.DataFrame:
    return judged(statistics(name))


@pytest.fixture(scope="module")
def parts(laptop: Runs) -> dict[str, pd.DataFrame | list[str]]:
    return overview(laptop)


def test_its_tables_are_those_of_the_records(parts: dict[str, pd.DataFrame | list[str]]) -> None:
    tables = [part for part in parts.values() if isinstance(part, pd.DataFrame)]
    assert len(tables) == 5
    lacking = [text for text in map(as_markdown, tables) if text not in PAGE]
    assert not lacking, "docs/results.md is to have these tables:\n" + "\n\n".join(lacking)
    assert len(re.findall(r"^\| --- ", PAGE, re.MULTILINE)) == len(tables)


def test_at_a_glance_it_counts_the_verdicts() -> None:
    sets = [["laptop"], ["training_mode/prunings", "training_mode/prunings_1r"], ["full_width/*"]]
    found = [pd.concat(map(claims, several)) for several in sets]
    for name, told in analysis.CLAIMS.items():
        verdicts = [of.verdict[of.claim == name] for of in found]
        assert {of.size for of in verdicts} == {3 if name == "ii.c" else 6}
        cells = " | ".join(for_and_against(of) for of in verdicts)
        assert f"| {name} | {told.says} | {cells} |" in PAGE
    about = pd.concat([of.verdict[of.claim.str.startswith("ii.")] for of in found])
    counts = about.value_counts()
    twice = (found[0].claim == "ii.c").sum()  # of the same trainings in both modes, and without a verdict
    assert f"Of {about.size - twice} intervals, {counts['supported']} support the claim that loss preservation" in FLAT
    assert f"hardly trained; {counts['contradicted']} contradict it." in FLAT


def for_and_against(verdicts: pd.Series) -> str:
    counts = {"for": (verdicts == "supported").sum(), "against": (verdicts == "contradicted").sum()}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "–"


def test_its_pictures_are_figures_with_their_claims() -> None:
    shown = re.findall(r"!\[(.*)\]\((results/(?:training_mode/|full_width/)?(\w+)\.png)\)", PAGE)
    assert shown
    for text, path, name in shown:
        assert text == claim(name)
        assert f"*{caption(name)}*" in FLAT
        assert (DOCS / path).is_file()
        assert name in FIGURES


def test_make_figures_draws_all_of_its_pictures() -> None:
    commands = subprocess.run(
        ["make", "-n", "figures", "RECORDS="], cwd=DOCS.parent, capture_output=True, text=True, check=True
    )
    drawn = dict(re.findall(r"-m figures (\S+) -o out/figures/?(\S*)", commands.stdout))
    assert all(list(DOCS.parent.glob(record)) for record in drawn)
    folders = re.findall(r"\(results/(?:(\w+)/)?\w+\.png\)", PAGE)
    assert set(drawn.values()) == set(folders)


def test_the_two_modes_are_compared_on_the_same_prunings(laptop: Runs, training_mode: Runs) -> None:
    """Median relative error of what was predicted, in eval and in training mode, of the same measures and seeds."""
    both = [{label: laptop[label] for label in training_mode}, training_mode]
    errors = [median_errors(runs) for runs in both]
    for (relation, order), of in errors[0].iterrows():
        cells = [f"{of[model]:.2g}, {errors[1].loc[(relation, order), model]:.2g}" for model in of.index]
        quantity = relation.removeprefix("effect of pruning on ").removeprefix("the ")
        assert f"| {quantity} | {order} | {' | '.join(cells)} |" in PAGE


def median_errors(runs: Runs) -> pd.DataFrame:
    """By relation and order, of each network."""
    table = analysis.agreement_table(runs).reset_index()
    table["model"] = [label.partition("-")[0] for label in table.run]
    effects = table[table.relation.str.startswith("effect")]
    by = effects.groupby(["relation", "order", "model"], sort=False, observed=True)["median relative error"].median()
    return by.unstack("model").dropna().sort_index(axis=1)


def test_the_prunings_in_one_round_are_summed_up_as_they_are(laptop: Runs) -> None:
    runs = records("training_mode/prunings_1r")
    found = claims("training_mode/prunings_1r")
    verdicts = found.verdict.value_counts()
    assert f"of {verdicts.sum()} intervals {verdicts['supported']} support a claim" in FLAT
    assert "contradicted" not in verdicts
    assert "8 of them stand" in chance(found)
    assert "and 8 stand when corrected" in PAGE
    errors = median_errors(runs).loc["effect of pruning on the loss"]
    for order, text in (
        ("second", "22% (MobileNet-V1), 33% (ResNet-56) and 66% (VGG-13)"),
        ("first", "68, 69 and 97%"),
    ):
        found = [f"{100 * errors.loc[order, model]:.0f}" for model in ("mobilenet_v1", "resnet56", "vgg13")]
        assert text in FLAT
        assert re.findall(r"(\d+)(?:%|,| and)", text) == found
    same = [run["epochs"].test_loss.identical(laptop[label]["epochs"].test_loss) for label, run in runs.items()]
    assert f"of the {len(same)} trainings in one round {sum(same)} are those of eval mode" in FLAT


NETWORKS = ("mobilenet_v1", "resnet56", "vgg13")


def test_the_wide_networks_have_the_effects_that_it_says() -> None:
    found = claims("full_width/*")
    verdicts = found.verdict.value_counts()
    supported, contradicted = verdicts["supported"], verdicts["contradicted"]
    said = f"Of {verdicts.sum()} intervals {supported} support a claim, {contradicted} contradict one, and "
    in_support = found.stands[found.verdict == "supported"].sum()
    assert f"{said}{found.stands.sum()} stand when corrected, {in_support} of them in support" in PAGE
    found = found.assign(printed=claims_table(found).effect.values)
    found["cell"] = list(map(effect, found.itertuples()))
    for rounds, text in zip((5, 1), PAGE.split("and with one round:"), strict=True):
        cells = found[found.rounds == rounds].pivot(index="claim", columns="model", values="cell")
        for claim_name, of in cells.iterrows():
            assert f"| {claim_name} | {' | '.join(of[list(NETWORKS)])} |" in text
    seeds = found.groupby("rounds").seeds.unique()
    assert (list(seeds[1]), list(seeds[5])) == ([4], [5])


def test_how_the_wide_networks_end_is_what_it_says(wide: Runs) -> None:
    table = analysis.accuracy_table(wide).reset_index()
    pruned = table[table.measure != "not pruned"].assign(kept=100 - table["multiply-adds pruned, %"].astype(float))
    kept = pruned[pruned.rounds == 5].pivot(index="measure", columns="model", values="kept").round(1)
    cheapest, others = kept.loc["gradient-norm increase"], kept.drop("gradient-norm increase")
    assert cheapest.to_dict() == {"MobileNet-V1": 9.9, "ResNet-56": 30.6, "VGG-13": 10.3}
    assert (int(others.min()["MobileNet-V1"]), int(others.max()["VGG-13"])) == (27, 49)
    assert (int(others["ResNet-56"].min()), int(others["ResNet-56"].max())) == (46, 55)
    assert others[["MobileNet-V1", "VGG-13"]].stack().between(27, 50).all()
    at_once = pruned[(pruned.rounds == 1) & (pruned.model == "MobileNet-V1")].set_index("measure")["test accuracy, %"]
    assert [round(float(cell.split(" ")[0])) for cell in at_once] == [81, 66, 63, 82, 71]


def test_measures_of_a_seed_begin_apart_on_a_gpu(wide: Runs) -> None:
    table = analysis.conditions(wide)[["model", "seed", "measure"]]
    table["accuracy"] = [float(run["epochs"].test_accuracy[0]) for run in wide.values()]
    table["loss"] = [
        float(run["pruning"].loss[0, 0]) if run["pruning"].data_vars else float("nan") for run in wide.values()
    ]
    table["commit"] = [run.attrs["commit"] for run in wide.values()]
    on_gpu = table[["H100" in run.attrs["device"] for run in wide.values()]]
    reproducible = on_gpu.commit == "fa9a5c861635"
    same = on_gpu[reproducible].groupby(["model", "seed"])
    assert len(same) == 9
    assert same.loss.nunique().eq(1).all()
    assert same.accuracy.nunique().eq(1).all()
    others = on_gpu[~reproducible].groupby(["model", "seed"])
    losses, accuracies = others.loss.max() / others.loss.min() - 1, others.accuracy.max() - others.accuracy.min()
    said = f"differs among them by {100 * losses.min():.0f} to {100 * losses.max():.0f}%, the test accuracy then"
    points = f"by {100 * accuracies.min():.0f} to {100 * accuracies.max():.0f} points"
    assert said in FLAT
    assert points in FLAT


def effect(row: tuple) -> str:
    """An effect with its interval: bold if supported, in italics if contradicted, with a star if that stands."""
    if row.null:
        text = row.printed
    else:
        value, low, high = (f"{100 * number:+.1f}" for number in (row.value, row.low, row.high))
        text = f"{value} [{low}, {high}] points"
    mark = {"supported": "**", "contradicted": "_", "inconclusive": ""}[row.verdict]
    return f"{mark}{text}{mark}" + (r"\*" if row.stands else "")


def test_the_wide_networks_are_predicted_as_it_says(wide: Runs) -> None:
    devices = pd.Series({label: run.attrs["device"] for label, run in wide.items()})
    assert devices.str.contains("H100").sum() == 144
    assert (devices == "cpu").sum() == 6
    table = analysis.agreement_table(wide).reset_index()
    table["model"] = [label.partition("-")[0] for label in table.run]
    errors = table.groupby(["relation", "order", "model"], observed=True)["median relative error"].median()
    for name, relation in (
        ("the loss decrease of a step", "loss decrease"),
        ("the loss change of a pruning", "effect of pruning on the loss"),
    ):
        for order in ("first", "second"):
            row = " | ".join(f"{errors[relation, order, model]:.2g}" for model in NETWORKS)
            assert f"| {name} | {order} | {row} |" in PAGE
    prunings = pd.concat([loss_changes(label, run) for label, run in wide.items() if run["pruning"].data_vars])
    told = prunings.second / prunings.measured
    assert f"In {(told > 0).sum()} of the {len(prunings)} prunings the second order has the right sign" in FLAT
    assert f"in all but {(told > 1).sum()} of these it says too little" in FLAT
    lacking = [label for label, run in wide.items() if not run["curvature"].data_vars]
    assert lacking == ["vgg13-fashion-mnist-gradient_norm_preservation-0.7-1r-seed3"]
    cosines = {label: alignment(run) for label, run in wide.items() if label not in lacking}
    devices = devices.drop(lacking)
    first = pd.Series({label: float(cosine[0]) for label, cosine in cosines.items()})
    ranges = {model: first[(devices != "cpu") & first.index.str.startswith(model)] for model in NETWORKS}
    assert [(f"{of.min():.3f}", f"{of.max():.3f}") for of in ranges.values()] == [
        ("0.948", "0.957"), ("0.957", "0.968"), ("0.995", "0.995"),
    ]  # fmt: skip
    assert min(float(cosine[1:].min()) for cosine in cosines.values()) >= 0.996
    assert min(float(cosines[label].min()) for label in devices.index[devices == "cpu"]) > 0.9995


def alignment(run: xr.DataTree) -> xr.DataArray:
    """Cosine of the gradient that was applied with the loss's own, (step,)."""
    whole = run["curvature"].to_dataset().sum("layer")
    return whole.grad_applied_grad / (whole.grad_sqnorm * whole.applied_grad_sqnorm) ** 0.5


def loss_changes(label: str, run: xr.DataTree) -> pd.DataFrame:
    """Of each pruning of a run: as measured, and as the first and the second order predict it."""
    pruning = run["pruning"].to_dataset()
    first = pruning.grad_removal.sum("layer")
    second = first + pruning.removal_hess_removal.sum("layer") / 2
    measured = pruning.loss.sel(stage="after", drop=True) - pruning.loss.sel(stage="before", drop=True)
    return (
        xr.Dataset({"measured": measured, "first": first, "second": second})
        .to_dataframe()[["measured", "first", "second"]]
        .assign(model=label.partition("-")[0])
    )


def test_one_training_diverged_and_what_it_decides_is_said() -> None:
    table = statistics("laptop")
    last = table.accuracy
    (diverged,) = last.index[last < 0.2]
    assert diverged == "mobilenet_v1-fashion-mnist-gradient_norm_increase-0.7-5r-seed3"
    found = judged(table.drop(index=diverged))
    values = found[(found.model == "mobilenet_v1") & (found.rounds == 5)].set_index("claim").value
    assert f"{100 * (1 - values['i.f']):.0f}% without the training that diverged" in FLAT
    worse, better = (f"{100 * values[name]:+.1f}".replace("-", "−") for name in ("iii.e", "iii.f"))
    assert f"the −10.9 points of iii.e become {worse}, and the +12.2 of iii.f {better}." in FLAT
    for name, against in (("iii.e", 1), ("iii.f", -1)):
        assert (found[found.claim == name].value * against > 0).sum() == 4


def test_what_the_diverged_training_decides_in_training_mode_is_said() -> None:
    diverged = "mobilenet_v1-fashion-mnist-gradient_norm_increase-0.7-5r-seed3"
    found = judged(statistics("training_mode/prunings").drop(index=diverged))
    of = found[found.model == "mobilenet_v1"].set_index("claim")
    values = {name: f"{of.value[name]:.2g}" for name in ("iii.a", "iii.b", "iii.c")}
    assert (
        f"without it iii.b is {values['iii.b']}, iii.a {values['iii.a']}, iii.c {values['iii.c']} and inconclusive"
        in FLAT
    )
    assert of.verdict["iii.c"] == "inconclusive"
    assert not of.stands["iii.d"]
    supported = (found.verdict == "supported").sum()
    assert f"{supported} of the 45 intervals support a claim then, and {found.stands.sum()} stand" in FLAT
    found = judged(statistics("laptop").drop(index=diverged))
    of = found[(found.model == "mobilenet_v1") & (found["rounds"] == 5)].set_index("claim")
    assert f"ii.b is {of.value['ii.b']:.2f}\\* in MobileNet-V1 with 5 rounds, supported" in FLAT
    assert of.stands["ii.b"]
    assert f"({of.value['iii.a']:.1f} times, without the star" in FLAT
    assert not of.stands["iii.a"]
    assert not of.stands["i.d"]


def test_the_two_modes_have_the_verdicts_that_it_says() -> None:
    same = statistics("laptop").loc[statistics("training_mode/prunings").index]
    outside, verdicts = (of.verdict.value_counts() for of in (judged(same), claims("training_mode/prunings")))
    assert f"Of {verdicts.sum()} intervals {verdicts['supported']} support a claim, none" in FLAT
    assert f"eval mode {outside['supported']} support one and {outside['contradicted']} contradict one" in FLAT
    assert "contradicted" not in verdicts


def test_in_training_mode_the_motion_of_the_norm_is_not_that_of_the_filters(wide: Runs, training_mode: Runs) -> None:
    assert (
        "make up less than 0.1% of the changes in the median over prunings, the classifier's by themselves half" in FLAT
    )
    once = records("training_mode/prunings_1r")
    for runs in (training_mode, once, wide):
        parts = pd.concat([parts_of_motion(label, run) for label, run in runs.items() if run["pruning"].data_vars])
        medians = parts.groupby("model").median()
        assert (medians[["rate_filters", "acceleration_filters"]] < 0.001).all(axis=None)
        assert medians[["rate_classifier", "acceleration_classifier"]].round(2).eq(0.5).all(axis=None)


def test_in_eval_mode_the_filters_have_their_part_in_it(laptop: Runs) -> None:
    assert "In eval mode the filters' weights make up a half to two thirds." in FLAT
    parts = pd.concat([parts_of_motion(label, run) for label, run in laptop.items() if run["pruning"].data_vars])
    medians = parts.groupby("model")[["rate_filters", "acceleration_filters"]].median()
    assert medians.stack().between(0.48, 0.68).all()


def parts_of_motion(label: str, run: xr.DataTree) -> pd.DataFrame:
    """Of each pruning's change of the norm's velocity and acceleration, how much is the filters', the classifier's."""
    model = label.partition("-")[0]
    filters = [name for name, layer in build(model, num_classes=10).named_modules() if isinstance(layer, nn.Conv2d)]
    pruning = run["pruning"].to_dataset()
    acceleration = pruning.grad_sqnorm + pruning.param_hess_grad
    found = {}
    for name, of in (("rate", pruning.param_sqnorm_rate), ("acceleration", acceleration)):
        change = of.sel(stage="after", drop=True) - of.sel(stage="before", drop=True)
        for part, layers in (("filters", filters), ("classifier", ["classifier"])):
            found[f"{name}_{part}"] = abs(change.sel(layer=layers).sum("layer") / change.sum("layer"))
    return xr.Dataset(found).to_dataframe().assign(model=model)


def test_what_weights_that_nothing_reaches_change_is_said(laptop: Runs, training_mode: Runs, wide: Runs) -> None:
    cells = []
    for name, runs in (("laptop", laptop), ("training_mode/prunings", training_mode), ("full_width/*", wide)):
        table = statistics(name)
        reached = table.assign(
            decrease_per_parameter=[
                per_parameter_reached(runs[label]) if (model, rounds) == ("vgg13", 5) else before
                for label, model, rounds, before in zip(
                    table.index, table.model, table.rounds, table.decrease_per_parameter, strict=True
                )
            ]
        )
        before, after = judged(table), judged(reached)
        changed = after[before.verdict != after.verdict]
        assert set(changed.model) == {"vgg13"}
        assert set(changed["rounds"]) == {5}
        cells += zip(changed.claim, changed.verdict, claims_table(changed).effect, strict=True)
    assert [cell[:2] for cell in cells] == [
        ("i.c", "contradicted"), ("i.e", "contradicted"), ("i.c", "contradicted"), ("i.e", "inconclusive"),
        ("i.e", "inconclusive"),
    ]  # fmt: skip
    assert all(f"({cell})" in FLAT for *_, cell in cells)


def per_parameter_reached(run: xr.DataTree) -> float:
    """Of a VGG, the removed parameters' part in ‖g‖² over their part of those that read what is left."""
    pruning, units = run["pruning"].to_dataset(), run["units"].to_dataset()
    filters = list(dict.fromkeys(units.layer.values.tolist()))
    left = pd.DataFrame({name: units.alive[:, units.layer.values == name].mean("unit") for name in filters})
    reads = left.shift(fill_value=1).rename(columns=dict(zip(filters, [*filters[1:], "classifier"], strict=True)))
    reached = xr.DataArray(reads.reindex(columns=pruning.layer.values, fill_value=1), dims=("event", "layer"))
    before = pruning.sel(stage="before", drop=True)
    share = before.removed_grad_sqnorm.sum("layer") / before.grad_sqnorm.sum("layer")
    parameters = (before.removed * reached.values).sum("layer") / (before.remaining * reached.values).sum("layer")
    return float(share.mean() / parameters.mean())
