"""A verdict is what the seeds bear out: known effects are found, their signs turn it, chance gives one in twenty."""

import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from synthetic_runs import MEASURES, record, runs

import analysis
from analysis import STATISTICS
from analysis.intervals import half_width, p_value
from analysis.overview import overview
from analysis.verdicts import judged
from figures.catalogue import finding


def verdicts(found: pd.DataFrame) -> dict[str, str]:
    return dict(zip(found.claim, found.verdict, strict=True))


def test_statistics_done_by_hand() -> None:
    row = analysis.statistics({"run": record("magnitude", 0, rounds=2)}).loc["run"]
    by_hand = {
        "decrease_per_parameter": (0.5 / 4) / (25 / 100),
        "decrease_within_layers": (0.5 / 4) / (25 / 100),  # both layers lose a quarter
        "loss_change": np.log(2.5 / 2),
        "norm_rate_change": 0.75 / 10,
        "norm_acceleration_change": ((4 + 1) - (3 + 0)) / 4,
        "grad_sqnorm_change": np.log(4 / 3),
        "grad_sqnorm_ratio": 3 / 4,
        "training_area": 1.0,
        "accuracy": 0.9,
    }
    assert by_hand.keys() == analysis.STATISTICS.keys(), "write what each statistic is of this record"
    assert row[list(analysis.STATISTICS)].to_dict() == pytest.approx(by_hand)


def test_what_is_recorded_in_single_precision_is_computed_in_double() -> None:
    """A ratio near 1 in single precision would lose half of what these two losses tell of their change."""
    before, after = np.float32([2.3, 2.3000012])
    run = record("magnitude", 0)
    run["pruning"] = run["pruning"].to_dataset().assign(loss=(("event", "stage"), np.array([[before, after]])))
    expected = np.log1p((float(after) - float(before)) / float(before))
    assert STATISTICS["loss_change"](run) == pytest.approx(expected, rel=1e-9)


def test_what_is_removed_is_compared_within_its_layers() -> None:
    run, by_layer = record("magnitude", 0, rounds=2), {"dims": "layer", "coords": {"layer": ["a", "b"]}}
    events = run["pruning"].to_dataset()
    events["grad_sqnorm"] *= xr.DataArray([1, 5], **by_layer)  # 3 and 5 before
    events["removed"] *= xr.DataArray([0.5, 2], **by_layer)  # 1/8 and 1/2 of the layers
    run["pruning"] = xr.DataTree(events)
    row = analysis.statistics({"run": run}).loc["run"]
    assert row.decrease_within_layers == pytest.approx(0.5 / (3 / 8 + 5 / 2))
    assert row.decrease_per_parameter == pytest.approx((0.5 / 8) / (21.875 / 100))


def test_interval_and_test_are_scipys() -> None:
    values = np.random.default_rng(1).normal(2, 3, 7)
    found = stats.ttest_1samp(values, 0)
    low, high = found.confidence_interval(0.95)
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-12)
    assert p_value(values) == pytest.approx(found.pvalue, rel=1e-12)
    assert (p_value([0.5, 0.5]), p_value([0.0, 0.0])) == (0, 1)
    assert np.isnan(p_value([1.0]))
    assert np.isnan(half_width([1.0, np.inf]))  # of a loss that diverged


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_covers_the_mean_nineteen_times_in_twenty(count: int) -> None:
    """Three standard errors of the share of 20000 intervals; a normal's 1.96 s/√n covers 70 to 87%, far outside."""
    values = np.random.default_rng(2).normal(0.3, 2, (20000, count))
    covered = (np.abs(values.mean(1) - 0.3) <= half_width(values)).mean()
    assert covered == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 20000))


def test_a_known_effect_is_found_with_its_size() -> None:
    found = analysis.claims(runs(magnitude={"area": 0.5, "accuracy": 0.7}, gradient_norm_increase={"accuracy": 0.4}))
    assert found.columns.tolist() == [
        "claim", "says", "model", "data", "rounds", "sparsity", "value", "low", "high", "null", "p", "stands",
        "seeds", "verdict",
    ]  # fmt: skip
    assert found.claim.tolist() == list(analysis.CLAIMS)
    of = found.set_index("claim")
    assert of.loc["i.f", ["null", "seeds", "verdict"]].tolist() == [1, 3, "supported"]
    assert of.low["i.f"] < 0.5 < of.high["i.f"]
    assert of.loc["ii.c", ["null", "verdict"]].tolist() == [0, "supported"]
    assert of.low["ii.c"] < 0.1 < of.high["ii.c"]
    assert verdicts(found)["iii.e"] == verdicts(found)["iii.f"] == "supported"
    assert verdicts(found)["i.g"] == "inconclusive"


def test_the_sign_of_the_effect_turns_the_verdict() -> None:
    found = verdicts(
        analysis.claims(runs(magnitude={"area": 2, "accuracy": 0.9}, gradient_norm_increase={"accuracy": 1}))
    )
    assert {found[name] for name in ("i.f", "ii.c", "iii.e", "iii.f")} == {"contradicted"}


def test_every_claim_turns_with_its_sign() -> None:
    """One measure's statistic far from the others', to both sides, in each claim by its row in the table."""
    for claim in analysis.CLAIMS.values():
        for sign in (-1, 1):
            table = random_statistics(conditions=1, seeds=4, rounds=1)
            own = table.measure == claim.measure
            scaled = table[claim.statistic] * np.exp(20 * sign), table[claim.statistic] + 20 * sign
            table[claim.statistic] = table[claim.statistic].mask(own, scaled[claim.compare == "difference"])
            verdict = verdicts(judged(table))[claim.name]
            assert verdict == ("supported" if sign == claim.expected else "contradicted"), (claim.name, sign)


def random_statistics(*, conditions: int, seeds: int, rounds: int) -> pd.DataFrame:
    """A table of statistics in which the measure has no effect: its label is put at random. Their mean log is 0."""
    index = pd.MultiIndex.from_product([range(conditions), MEASURES, range(seeds)], names=["model", "measure", "seed"])
    rng = np.random.default_rng(3)
    values = {name: np.exp(rng.standard_normal(len(index)) / 2) for name in analysis.STATISTICS}
    table = pd.DataFrame(values, index=index).reset_index()
    return table.assign(data="digits", rounds=rounds, sparsity=0.5)


@pytest.mark.long
def test_permuted_labels_get_a_verdict_one_time_in_twenty() -> None:
    found = judged(random_statistics(conditions=100, seeds=3, rounds=1))
    shares = found.verdict.value_counts(normalize=True)
    # claims of a condition share runs: a dozen of them are worth at least one, so the error is below that of 100 rows
    assert shares["inconclusive"] == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 100))
    assert shares["supported"] + shares["contradicted"] == pytest.approx(1 - shares["inconclusive"])
    assert shares["contradicted"] > 0


def test_a_ratio_is_paired_within_a_seed() -> None:
    """Seeds that differ tenfold do not hide a measure that is a tenth less in each of them."""
    table = random_statistics(conditions=1, seeds=3, rounds=1)
    table["training_area"] = 10.0**table.seed * np.where(table.measure == "magnitude", 0.9, 1.0)
    row = judged(table).set_index("claim").loc["i.f"]
    assert (row.value, row.low, row.high, row.verdict) == pytest.approx((0.9, 0.9, 0.9, "supported"))


@pytest.mark.parametrize(("factor", "verdict"), [(1.002, "negligible"), (0.998, "negligible"), (1.02, "contradicted")])
def test_a_difference_in_the_last_digit_is_no_verdict(factor: float, verdict: str) -> None:
    """Prunings that each take all of the gradient differ by nothing, however often they do so."""
    table = random_statistics(conditions=1, seeds=3, rounds=1)
    table["loss_change"] = np.where(table.measure == "loss_preservation", factor, 1.0) * (1 + 0.001 * table.seed)
    assert verdicts(judged(table))["ii.a"] == verdict


def test_no_verdict_from_one_run_under_several_seeds() -> None:
    """A seed that was said and not set: what is the same to the bit is one run, however often it is there."""
    areas = {measure: 0.1 if measure == "magnitude" else 1.0 for measure in MEASURES}
    same = {f"{name}-{seed}": record(name, seed, area=area) for name, area in areas.items() for seed in range(3)}
    found = analysis.claims(same).set_index("claim")
    assert set(found.verdict[["i.a", "i.f", "iii.b"]]) == {"no verdict (seeds do not differ)"}
    assert found.value["i.f"] == pytest.approx(0.1)
    assert found.loc["i.f", ["low", "high", "p"]].isna().all()
    assert not found.stands.any()


def test_no_verdict_from_one_seed() -> None:
    found = analysis.claims(runs(seeds=1, magnitude={"area": 0.1}))
    assert set(found.verdict) == {"no verdict (1 seed)"}
    assert found.low.isna().all()
    assert found.set_index("claim").value["i.f"] == pytest.approx(0.1, rel=0.05)


def test_what_is_missing_is_said_in_place_of_a_verdict() -> None:
    some = {label: run for label, run in runs().items() if not label.startswith("gradient_norm_increase")}
    found = verdicts(analysis.claims(some))
    assert found["i.f"] == "no verdict (no run of gradient_norm_increase)"
    assert found["i.g"] == "inconclusive"
    unlogged = {label: xr.DataTree.from_dict({k: v for k, v in run.to_dict().items() if k != "/pruning"})
                for label, run in runs().items()}  # fmt: skip
    found = verdicts(analysis.claims(unlogged))
    assert found["ii.a"] == "no verdict (loss_change not known)"
    assert not found["iii.f"].startswith("no verdict")


def test_a_run_that_did_not_end_and_its_seed_do_not_count() -> None:
    some = runs(magnitude={"area": 0.5}) | {"magnitude-1": record("magnitude", 1, ended=False)}
    found = analysis.claims(some).set_index("claim").seeds
    assert (found["i.f"], found["iii.f"]) == (2, 3)


def test_a_change_from_nothing_is_not_known() -> None:
    row = analysis.statistics({"dead": record("magnitude", 0, grad=(0.0, 1.0))}).loc["dead"]
    assert np.isnan(row[["grad_sqnorm_ratio", "grad_sqnorm_change", "decrease_per_parameter"]].astype(float)).all()
    assert row.loss_change == np.log(1.25)
    died = record("magnitude", 0, rounds=2)
    died["pruning"]["grad_sqnorm"].values[1] = 0
    row = analysis.statistics({"died": died}).loc["died"]
    assert np.isnan(row[["grad_sqnorm_ratio", "grad_sqnorm_change"]].astype(float)).all()


def test_one_run_counts_once() -> None:
    again = runs() | {"again": record("magnitude", 0)}
    with pytest.raises(ValueError, match="these have the same: magnitude-0, again"):
        analysis.claims(again)


@pytest.mark.long
def test_a_run_that_trained_longer_does_not_converge_faster_for_it() -> None:
    """All fall by the same curve; those by magnitude were let to go on with it."""
    found = runs()
    for label, run in found.items():
        count = 8 + 8 * label.startswith("magnitude")
        steps, noise = np.arange(count), run["steps"].loss.values[-1]
        run["steps"] = xr.DataTree(
            xr.Dataset({"loss": ("step", noise * np.exp(-steps / 8)), "epoch": ("step", steps // 4)}, {"step": steps})
        )
    judged_so = analysis.claims(found).set_index("claim").verdict
    assert judged_so["i.f"] == "no verdict (training_area not known)"
    assert judged_so["i.g"] == "inconclusive"
    assert not judged_so["iii.e"].startswith("no verdict")
    said = overview(found)["Runs that trained for different numbers of steps"]
    assert said[0].count("3 of 15 runs took another number of steps than most of their") == 2
    even = {label: run for label, run in found.items() if not label.startswith("magnitude")}
    assert "Runs that trained for different numbers of steps" not in overview(even)
    table = analysis.convergence_table(found).droplevel(["model", "data", "rounds"])
    assert table.loc["magnitude", ["area", "final loss", "seeds"]].tolist() == ["–", "–", "3"]
    assert "–" not in table.drop("magnitude").to_numpy()
    said = finding("convergence", found)
    assert said.startswith("Mean training loss after the last pruning")
    assert not re.search(r"[:,] magnitude \d", said)
    two = {label: run for label, run in found.items() if label.startswith(("magnitude", "gradient_norm_increase"))}
    assert analysis.statistics(two).training_area.isna().all()


def test_only_like_is_compared_with_like() -> None:
    one = runs(seeds=2)
    other = {f"{label}, more rounds": record(label[:-2], int(label[-1]), rounds=2, area=7.0) for label in one}
    found = analysis.claims(one | other)
    assert found[found.claim == "i.f"].rounds.tolist() == [1, 2]
    assert found[found.claim == "ii.c"].rounds.tolist() == [1]
    assert set(found.seeds) == {2}
    assert found.value[(found.claim == "i.f") & (found.rounds == 2)].item() == pytest.approx(1)


def test_each_claim_says_why() -> None:
    for name, claim in analysis.CLAIMS.items():
        assert claim.statistic in analysis.STATISTICS
        assert claim.expected in (-1, 1)
        assert claim.compare == "difference" if claim.statistic == "accuracy" else "ratio", name
        assert len(claim.reason) > 40
