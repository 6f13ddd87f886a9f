"""Findings about the prunings: a sentence each, computed from the given runs."""

from __future__ import annotations

import numpy as np

from .agreement import ORDERS, agree, residuals
from .conditions import mean_by_measure
from .effect import first_pruning_per_layer, removal_curve, removed_decrease
from .invariance import grasp_and_gradient, scale_invariance
from .measures import WHOLE, rank_agreement, score_noise
from .names import name_of
from .record import MissingQuantityError
from .runs import Runs, each
from .typeset import known, percent


def layers_moved(runs: Runs) -> str:
    """How well the first pruning's effect on each layer is predicted, in the first run that was pruned."""
    effect = next(iter(each(runs, first_pruning_per_layer).values()))
    parts = []
    for quantity, symbol in (("grad_sqnorm", "‖g‖²"), ("param_sqnorm_rate", "d‖θ‖²/dt")):
        first = agree(effect.sel(quantity=quantity)).sel(order="first_order")
        parts.append(f"{symbol} {known(first.rank_correlation, '.2f')} ({percent(first.median_relative_error)})")
    return (
        "Rank correlation of predicted and measured change over layers (and median relative error), in first order: "
        f"{', '.join(parts)}."
    )


def decrease_removed(runs: Runs) -> str:
    """The share of ‖g‖² that each measure removed, against its share of the parameters, over all its prunings."""
    found = {
        label: shares[["decrease", "parameters"]].sum("layer", skipna=False).mean("event", skipna=False)
        for label, shares in each(runs, removed_decrease).items()
    }
    decrease, parameters = (
        mean_by_measure(runs, {label: float(of[name].where(of.decrease.notnull())) for label, of in found.items()})
        for name in ("decrease", "parameters")
    )
    parts = [f"{name_of(name)} {decrease[name]:.1%} ({parameters[name]:.1%})" for name in decrease.index]
    if not parts:
        raise MissingQuantityError("no pruning started from a ‖g‖² that is finite and not zero")
    return f"Mean share of ‖g‖² (and of the parameters) removed by a pruning: {', '.join(parts)}."


def curve_errors(runs: Runs) -> str:
    """Error of the predicted change of the loss along both directions, for the fewest and the most filters pruned."""
    curve = next(iter(each(runs, removal_curve).values())).isel(event=0).sel(quantity="loss")
    error = np.abs(residuals(curve) / curve.measured)
    few, many = (
        [percent(error[order].sel(direction=direction)[index]) for direction in ("output", "parameters")
         for order in ORDERS]
        for index in (0, -1)
    )  # fmt: skip
    fewest, most = (f"{float(value):.2g}" for value in (curve.fraction[0] * 100, curve.fraction[-1] * 100))
    return (
        f"Relative error of ΔL in first and second order, with {fewest}% of the filters removed: {few[0]} and "
        f"{few[1]} from the output, {few[2]} and {few[3]} from all parameters; with {most}% removed: {many[0]} and "
        f"{many[1]}, {many[2]} and {many[3]}."
    )


def comparing(runs: Runs) -> str:
    """Label of the first run whose events have scores by at least two measures.

    Raises:
        MissingQuantityError: there is none.
    """
    for label, noise in each(runs, score_noise).items():
        if noise.sizes["measure"] > 1:
            return label
    raise MissingQuantityError("only one measure has scores: give resampled_scores(...) at least two measures")


def measures_agree(runs: Runs) -> str:
    """The most and least alike measures of the first run that compared them, and how reliable the noisiest is."""
    label = comparing(runs)
    agreement = rank_agreement(runs[label]).sel(layer=WHOLE).rank_correlation.mean("event")
    reliability = score_noise(runs[label]).reliability.mean("event").dropna("measure")
    names = agreement.measure.values
    pairs = {(names[i], names[j]): float(agreement[i, j]) for i in range(len(names)) for j in range(i)}
    pairs = {pair: value for pair, value in pairs.items() if np.isfinite(value)}
    if not pairs or not reliability.size:
        raise MissingQuantityError("no two measures rank at least three filters")
    most, least = max(pairs, key=pairs.get), min(pairs, key=pairs.get)
    said = [f"{name_of(one)} and {name_of(other)} ({pairs[one, other]:.2f})" for one, other in (most, least)]
    noisiest = name_of(reliability.idxmin("measure").item())
    return (
        f"Most alike are {said[0]}, least alike {said[1]}. The noisiest, {noisiest}, "
        f"has a rank correlation of {float(reliability.min()):.2f} with itself on batches drawn again."
    )


def filters_invariant(runs: Runs) -> str:
    """How many filters are scale-invariant in each mode, and how nearly GraSP's score is minus their ‖g‖² there."""
    label = next(iter(each(runs, scale_invariance)))
    share = scale_invariance(runs[label]).invariant.mean(("event", "unit"))
    rank = grasp_and_gradient(runs[label]).rank_correlation.mean("event")
    said = [
        f"for {percent(share.sel(mode=mode))} of the filters in {name}, where the rank correlation of Σθ(Hg) and "
        f"−‖g‖² is {known(rank.sel(mode=mode), '.2f')}"
        for mode, name in (("train", "training mode"), ("eval", "eval mode"))
    ]
    return f"Both identities hold to 1% {said[0]}, and {said[1]}."
