"""How far measures agree is what scipy says of their scores; their noise is that of batches drawn again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import convolutional_network, images, smooth_network, vectors
from scipy import stats

import analysis
import figures
from analysis import MissingQuantityError, pruning_findings
from analysis.measures import WHOLE
from dynamics import Recorder, open_run
from dynamics.network.masks import apply_masks
from dynamics.pruning import resampled_scores, scores

MEASURES = ["magnitude", "loss_preservation", "gradient_norm_increase"]


def recorded(path: Path, *studies: xr.Dataset) -> xr.DataTree:
    model = smooth_network()
    with Recorder(path, model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        for study in studies:
            with recorder.event("look", probe=vectors(1)) as event:
                event.add("scores", study)
    return open_run(path)


def invented(seed: int) -> xr.Dataset:
    """Scores of 12 filters in two layers by three measures, with ties, one filter pruned; four draws."""
    generator = np.random.default_rng(seed)
    score, draws = generator.integers(0, 6, (3, 12)).astype(float), generator.random((4, 3, 12))
    score[:, 7] = draws[..., 7] = np.nan
    return xr.Dataset(
        {"score": (["measure", "unit"], score), "resampled_score": (["draw", "measure", "unit"], draws)},
        coords={
            "measure": MEASURES,
            "layer": ("unit", ["a"] * 7 + ["b"] * 5),
            "index": ("unit", [*range(7), *range(5)]),
        },
    )


def test_rank_correlations_are_scipys(tmp_path: Path) -> None:
    studies = [invented(1), invented(2)]
    found = analysis.rank_agreement(recorded(tmp_path / "run", *studies))
    assert found.layer.values.tolist() == [WHOLE, "a", "b"]
    for event, study in enumerate(studies):
        for layer, chosen in ((WHOLE, slice(None)), ("a", slice(0, 7)), ("b", slice(7, 12))):
            there = found.sel(event=event, layer=layer)
            part = study.isel(unit=chosen).dropna("unit")
            for one in MEASURES:
                for other in MEASURES:
                    expected = stats.spearmanr(part.score.sel(measure=one), part.score.sel(measure=other)).statistic
                    pair = there.sel(measure=one, other=other)
                    np.testing.assert_allclose(pair.rank_correlation, expected, rtol=1e-12, atol=1e-12)
                    draws = [
                        stats.spearmanr(draw.sel(measure=one), draw.sel(measure=other)).statistic
                        for draw in part.resampled_score
                    ]
                    np.testing.assert_allclose(pair.standard_error, np.std(draws, ddof=1), rtol=1e-10, atol=1e-12)


def test_a_measure_that_prunes_its_highest_scores_agrees_with_one_that_prunes_their_opposites(tmp_path: Path) -> None:
    study = invented(4).isel(measure=[0, 1]).assign_coords(measure=["grasp", "gradient_norm_increase"])
    for name in ("score", "resampled_score"):
        study[name].values[..., 1, :] = -study[name].values[..., 0, :]
    run = recorded(tmp_path / "run", study)
    pair = {"measure": "grasp", "other": "gradient_norm_increase"}
    found = analysis.rank_agreement(run).sel(layer=WHOLE, **pair)
    np.testing.assert_allclose(found.rank_correlation, 1)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-12)
    np.testing.assert_array_equal(analysis.score_noise(run).reliability.sel(measure="grasp").shape, (1,))
    distinct = study.assign(score=study.score + np.outer([1, -1], np.linspace(0, 0.1, 12)))  # no ties
    overlap = analysis.removed_overlap(recorded(tmp_path / "distinct", distinct), share=0.4).overlap.sel(**pair)
    np.testing.assert_array_equal(overlap, 1)


def test_overlap_is_what_the_removed_sets_have_in_common(tmp_path: Path) -> None:
    study = invented(3)
    found = analysis.removed_overlap(recorded(tmp_path / "run", study), share=0.4).isel(event=0)  # 4 of 11
    units = np.delete(np.arange(12), 7)
    gone = {
        name: set(sorted(units, key=lambda unit: float(study.score.sel(measure=name)[unit]))[:4]) for name in MEASURES
    }
    for one in MEASURES:
        for other in MEASURES:
            assert float(found.overlap.sel(measure=one, other=other)) == len(gone[one] & gone[other]) / 4
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\), got 1.5"):
        analysis.removed_overlap(recorded(tmp_path / "other", study), share=1.5)


def test_too_few_filters_and_equal_scores_have_no_correlation(tmp_path: Path) -> None:
    study = invented(4)
    study.score[0] = 1.0
    study = study.where(~study.unit.isin(range(2, 7)) if "unit" in study.coords else xr.DataArray(
        [index not in range(2, 7) for index in range(12)], dims="unit"))  # fmt: skip
    found = analysis.rank_agreement(recorded(tmp_path / "run", study)).isel(event=0).rank_correlation
    assert found.sel(layer="a").isnull().all()  # two filters are left
    assert found.sel(layer=WHOLE, measure=MEASURES[0]).isnull().all()  # the same score for all
    assert found.sel(layer=WHOLE, measure=MEASURES[1], other=MEASURES[2]).notnull()


def test_one_measure_agrees_with_itself_and_is_compared_with_none(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", invented(5).isel(measure=[1]))
    assert analysis.rank_agreement(run).rank_correlation.sel(layer=WHOLE).values.ravel() == pytest.approx([1.0])
    assert analysis.score_noise(run).sizes["measure"] == 1
    with pytest.raises(MissingQuantityError, match="two measures"):
        figures.draw("measure_agreement", {"alone": run})
    runs = {"alone": run, "compared": recorded(tmp_path / "other", invented(6))}
    assert figures.draw("measure_agreement", runs).axes
    assert "Magnitude" not in pruning_findings.measures_agree(runs)


def test_measures_without_a_rank_correlation_are_not_said_to_agree(tmp_path: Path) -> None:
    study = invented(7)
    study.score[0] = 1.0  # the same for all filters
    said = pruning_findings.measures_agree({"run": recorded(tmp_path / "run", study)})
    assert "nan" not in said
    assert said.startswith("Most alike are gradient-norm increase and loss preservation")
    few = recorded(tmp_path / "few", study.isel(unit=[0, 1]))
    with pytest.raises(MissingQuantityError, match="three filters"):
        pruning_findings.measures_agree({"few": few})
    assert len([text for ax in figures.draw("measure_agreement", {"few": few}).axes for text in ax.texts]) == 4


def test_each_draw_is_a_scoring_of_batches_drawn_with_replacement(tmp_path: Path) -> None:
    model, batches = convolutional_network(), [*images(3), *images(2, seed=2, size=5)]
    names = [*MEASURES, "gradient_norm_preservation", "fisher", "snip", "synflow", "taylor"]
    study = resampled_scores(model, batches, names, draws=6, seed=3)
    chosen = np.random.default_rng(3).integers(5, size=(6, 5))
    temperatures = {"loss_preservation": 5.0, "gradient_norm_increase": 200.0}
    for name in study.measure.values:
        temperature = temperatures.get(name, 1.0)
        expected = scores(model, batches, name, temperature=temperature)["0"]
        np.testing.assert_allclose(study.score.sel(measure=name), expected, rtol=1e-12)
        for draw, indices in enumerate(chosen):
            drawn = [batches[index] for index in indices]
            expected = scores(model, drawn, name, temperature=temperature)["0"]
            np.testing.assert_allclose(study.resampled_score.sel(measure=name)[draw], expected, rtol=1e-12)
    noise = analysis.score_noise(recorded(tmp_path / "run", study)).isel(event=0)
    assert float(noise.standard_error.sel(measure="magnitude").max()) < 1e-15  # of equal numbers, to rounding
    assert float(noise.reliability.sel(measure="magnitude")) == 1
    assert float(noise.standard_error.drop_sel(measure=["magnitude", "synflow"]).min()) > 0
    reliability = [stats.spearmanr(study.score[1], draw).statistic for draw in study.resampled_score.isel(measure=1)]
    np.testing.assert_allclose(noise.reliability[1], np.mean(reliability), rtol=1e-12)


def test_the_standard_error_is_that_of_a_mean_over_batches(tmp_path: Path) -> None:
    model = convolutional_network().eval()
    batches = [(inputs, torch.zeros_like(labels)) for inputs, labels in images(8)]
    each = []
    for inputs, labels in batches:
        (grad,) = torch.autograd.grad(F.cross_entropy(model(inputs), labels), [model[0].weight])
        each.append((model[0].weight * grad).flatten(1).sum(1).detach())
    each = torch.stack(each)  # θ_fᵀg_f on each batch: taylor is the absolute value of its mean
    study = resampled_scores(model, batches, ["taylor"], draws=1000)
    noise = analysis.score_noise(recorded(tmp_path / "run", study)).standard_error.isel(event=0, measure=0)
    exact = each.std(0, correction=0) / np.sqrt(len(batches))  # of a bootstrap mean (Efron 1979)
    clear = each.mean(0).abs() > 4 * exact  # so that no draw changes the sign
    assert int(clear.sum()) >= 1
    np.testing.assert_allclose(noise.values[clear.numpy()], exact[clear], rtol=0.08)


def test_a_pruned_filter_has_no_score() -> None:
    model, batches = convolutional_network(), images(2)
    apply_masks(model, {"0.weight": (torch.arange(4) > 0).view(4, 1, 1, 1).expand(4, 1, 3, 3)})
    study = resampled_scores(model, batches, MEASURES, draws=2)
    for values in (study.score, study.resampled_score):
        assert values.isel(unit=0).isnull().all()
        assert values.isel(unit=slice(1, None)).notnull().all()


def test_what_cannot_be_resampled_is_refused() -> None:
    model = convolutional_network()
    for batches, measures, draws in ((images(1), MEASURES, 5), (images(2), [], 5), (images(2), MEASURES, 1)):
        with pytest.raises(ValueError, match="needs at least two batches, two draws and one measure, got"):
            resampled_scores(model, batches, measures, draws=draws)
    with pytest.raises(ValueError, match="unknown measure 'size'"):
        resampled_scores(model, images(2), ["size"])
