"""Convergence is the area under the curve and the first time below a level: closed forms of an exponential decay."""

import numpy as np
import pytest
import xarray as xr

import analysis

RATE, EPOCH, STEPS = 0.01, 8, 400


def record(loss: np.ndarray, *, pruned_at: int | None = None, step: np.ndarray | None = None) -> xr.DataTree:
    step = np.arange(len(loss)) if step is None else step
    steps = xr.Dataset({"loss": ("step", loss), "epoch": ("step", step // EPOCH)}, coords={"step": step})
    tree = {"/steps": steps}
    if pruned_at is not None:
        tree["/pruning"] = xr.Dataset({"step": ("event", [0, pruned_at])})
    return xr.DataTree.from_dict(tree)


def decay(start: int = 0) -> np.ndarray:
    return 2 * np.exp(-RATE * np.arange(start, STEPS))


@pytest.mark.parametrize("pruned_at", [None, 40])
def test_the_area_is_the_geometric_series(pruned_at: int | None) -> None:
    first = pruned_at or 0
    found = analysis.convergence(record(decay(), pruned_at=pruned_at))
    count, q = STEPS - first, np.exp(-RATE)
    assert float(found.area) == pytest.approx(2 * q**first * (1 - q**count) / (1 - q) / count, rel=1e-12)
    assert found.attrs["since"] == first
    assert (found.area.attrs["units"], found.steps_to_loss.attrs["units"]) == ("L", "1")


@pytest.mark.parametrize("pruned_at", [None, 16])
def test_the_steps_to_a_loss_solve_the_decay(pruned_at: int | None) -> None:
    """Mean of an epoch that ends with step s: 2 qˢ (q⁻ᴱ − 1)/(q⁻¹ − 1)/E = 2 share."""
    first, q = pruned_at or 0, np.exp(-RATE)
    found = analysis.convergence(record(decay(), pruned_at=pruned_at)).steps_to_loss
    factor = (q**-EPOCH - 1) / (q**-1 - 1) / EPOCH
    for share in found.share.values:
        last = np.log(share / factor) / np.log(q)
        assert float(found.sel(share=share)) == np.ceil(last) - first + 1


def test_what_is_not_reached_is_censored_and_what_is_there_at_once_takes_an_epoch() -> None:
    steps = analysis.convergence(record(np.r_[2.0, np.full(39, 1.2)])).steps_to_loss
    assert steps.sel(share=0.75) == EPOCH  # (2 + 7 · 1.2)/8 = 1.3
    assert np.isinf(steps.sel(share=[0.5, 0.25, 0.1])).all()


def test_a_loss_that_is_negative_has_no_shares() -> None:
    found = analysis.convergence(record(-1 - decay()))
    assert found.steps_to_loss.isnull().all()
    assert float(found.area) == pytest.approx(float((-1 - decay()).mean()))


def test_a_network_that_was_not_pruned_is_compared_from_a_given_step() -> None:
    whole, pruned = record(decay()), record(decay(), pruned_at=48)
    assert analysis.convergence(whole, since=48).identical(analysis.convergence(pruned))
    assert float(analysis.convergence(whole).area) > float(analysis.convergence(pruned).area)


def test_steps_are_counted_by_their_number_where_not_all_were_recorded() -> None:
    loss, step = np.array([4.0, 4.0, 4.0, 1.0, 1.0, 1.0]), 4 * np.arange(6)  # two rows an epoch
    found = analysis.convergence(record(loss, step=step)).steps_to_loss
    assert found.sel(share=0.75) == 3 * 4 + 1  # (4 + 1)/2 at step 12
    assert found.sel(share=0.25) == 4 * 4 + 1


def test_a_training_that_diverged_has_no_area() -> None:
    loss = decay()
    loss[200:] = np.nan
    found = analysis.convergence(record(loss))
    assert np.isnan(found.area)
    assert np.isnan(found.final_loss)
    assert found.steps_to_loss.sel(share=0.5) < 100
    assert np.isinf(found.steps_to_loss.sel(share=0.1))


def test_where_the_loss_is_logged_now_and_then_it_stands_for_the_steps_until_the_next() -> None:
    """Every fifth step from the second one on, through epochs of eight: one or two an epoch."""
    at = np.arange(1, STEPS, 5)
    sparse = np.full(STEPS, np.nan)
    sparse[at] = decay()[at]
    found = analysis.convergence(record(sparse, pruned_at=40))
    after = at[at >= 40]
    stands_for = np.diff([*after, STEPS])
    assert float(found.area) == pytest.approx((decay()[after] * stands_for).sum() / stands_for.sum(), rel=1e-12)
    means = [np.nanmean(sparse[last - EPOCH + 1 : last + 1]) for last in range(40 + EPOCH - 1, STEPS)]
    assert float(found.final_loss) == pytest.approx(means[-1], rel=1e-12)
    assert found.attrs["steps"] == STEPS - 40
    below = np.flatnonzero(np.array(means) <= 0.25 * decay()[1])
    assert float(found.steps_to_loss.sel(share=0.25)) == below[0] + EPOCH


def test_a_loop_may_log_its_loss_less_often_later() -> None:
    sparse = decay()
    sparse[(np.arange(STEPS) >= 20) & (np.arange(STEPS) % 20 != 0)] = np.nan
    found = analysis.convergence(record(sparse))
    weights = np.r_[np.ones(20), np.full(STEPS // 20 - 1, 20)]
    logged = sparse[np.isfinite(sparse)]
    assert float(found.area) == pytest.approx((logged * weights).sum() / STEPS, rel=1e-12)


@pytest.mark.parametrize("gap", [(5, 35), (50, 95), (100, 101), (300, STEPS)])
def test_a_stretch_without_a_loss_amid_others_had_one_that_is_no_number(gap: tuple[int, int]) -> None:
    loss = decay()
    loss[slice(*gap)] = np.nan
    found = analysis.convergence(record(loss))
    assert np.isnan(found.area)
    assert np.isnan(found.final_loss) == (gap[1] == STEPS)
    assert np.isfinite(analysis.convergence(record(loss), since=gap[1] if gap[1] < STEPS else 0).area) == (
        gap[1] < STEPS
    )


@pytest.mark.parametrize("every", [1, 5])
def test_a_training_that_diverged_between_two_logged_losses_has_no_area(every: int) -> None:
    loss = decay()
    loss[np.arange(STEPS) % every != 0] = np.nan
    loss[200:] = np.nan
    assert np.isnan(analysis.convergence(record(loss)).area)
    missing = analysis.convergence(record(loss[:200]))  # the next one was not due yet
    assert np.isfinite(missing.area)
    assert missing.attrs["steps"] == 200


def test_a_curve_over_epochs_is_of_the_losses_logged_in_each() -> None:
    loss = decay()
    loss[np.arange(STEPS) % 3 != 0] = np.nan
    loss[200:] = np.nan
    run = record(loss)
    run["/epochs"] = xr.Dataset({"test_loss": ("epoch", np.ones(50))}, coords={"epoch": np.arange(50)})
    found = analysis.training_curve(run).train_loss
    np.testing.assert_allclose(found[0], decay()[[0, 3, 6]].mean(), rtol=1e-12)
    np.testing.assert_allclose(found[1], decay()[[9, 12, 15]].mean(), rtol=1e-12)
    assert found[24:].size == 26
    assert found[25:].isnull().all()


def test_what_is_missing_is_said() -> None:
    with pytest.raises(analysis.MissingQuantityError, match=r"^no loss was logged\. Call recorder\.log\(loss="):
        analysis.convergence(xr.DataTree.from_dict({"/steps": record(decay())["steps"].to_dataset().drop_vars("loss")}))
    with pytest.raises(analysis.MissingQuantityError, match="/steps needs rows from step 400 on"):
        analysis.convergence(record(decay(), pruned_at=STEPS))
