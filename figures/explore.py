"""Interactive exploration of records in Jupyter: pictures and numbers that follow the user's choices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from analysis.conditions import conditions
from analysis.record import has, layers
from analysis.runs import Runs
from dynamics.schema import quantities

from .catalogue import FIGURES
from .pages import PREDICTIONS, WHOLE, figure_page, prediction_page, quantity_page

if TYPE_CHECKING:
    from types import ModuleType

    from ipywidgets import Tab, ValueWidget, VBox

_OVER_STEPS = ("steps", "curvature")
_WIDE = {"width": "36em"}


def explore(runs: Runs) -> Tab:
    """Explore records, as the last line of a cell: ``figures.explore(analysis.open_runs("out/*.zarr"))``.

    Three tabs: the figures, each with the claim it shows, how to read it and what was found; theory against measurement
    over a range of steps, with the agreement in numbers; and any quantity over the steps, of the whole network (the sum
    over layers) or of single layers. Where a choice needs something that was not recorded, the reason is shown instead
    of a picture.

    Args:
        runs: records by label.

    Raises:
        ValueError: no runs were given, or they are not records.
        ModuleNotFoundError: ipywidgets is not installed.
    """
    conditions(runs)
    widgets, recorded = _ipywidgets(), _quantities(runs)
    tabs = {
        "Figures": _shown(
            widgets,
            partial(figure_page, runs),
            name=widgets.Dropdown(options=[(name.replace("_", " "), name) for name in FIGURES], description="figure"),
            labels=_several(widgets, list(runs), list(runs), "runs"),
        )
    }
    if recorded:
        one, window = partial(widgets.Dropdown, options=list(runs), description="run"), partial(_window, widgets, runs)
        tabs["Theory against measurement"] = _shown(
            widgets,
            partial(prediction_page, runs),
            label=one(),
            prediction=widgets.Dropdown(options=list(PREDICTIONS), description="prediction"),
            window=window(),
        )
        tabs["Quantities"] = _shown(
            widgets,
            partial(quantity_page, runs),
            label=one(),
            quantity=widgets.Dropdown(options=recorded, description="quantity", layout=_WIDE),
            layers=_several(widgets, [WHOLE, *dict.fromkeys(chain(*map(layers, runs.values())))], [WHOLE], "layers"),
            window=window(),
        )
    return widgets.Tab(children=list(tabs.values()), titles=list(tabs))


def _quantities(runs: Runs) -> list[tuple[str, tuple[str, str]]]:
    """The quantities that runs recorded over their steps: printed name → group and name."""
    found = dict.fromkeys((of.name, str(name)) for of in _over_steps(runs) for name in of.data_vars)
    known = {(node, row.name): f": {row.symbol}" for node in _OVER_STEPS for row in quantities(node)}
    order = [*(of for of in known if of in found), *(of for of in found if of not in known)]
    return [(f"/{node} {name}{known.get((node, name), '')}", (node, name)) for node, name in order]


def _over_steps(runs: Runs) -> list[xr.DataTree]:
    """The runs' groups that have any steps."""
    return [run.children[name] for name in _OVER_STEPS for run in runs.values() if has(run, name)]


def _window(widgets: ModuleType, runs: Runs) -> ValueWidget:
    ends = [node.step.values[[0, -1]] for node in _over_steps(runs)]
    first, last = int(np.min(ends)), int(np.max(ends))
    return widgets.IntRangeSlider(
        value=(first, last), min=first, max=last, description="steps", continuous_update=False, layout=_WIDE
    )


def _several(widgets: ModuleType, options: list[str], chosen: list[str], description: str) -> ValueWidget:
    return widgets.SelectMultiple(
        options=options, value=chosen, description=description, rows=min(len(options), 6), layout=_WIDE
    )


def _shown(widgets: ModuleType, page: Callable[..., str], **controls: ValueWidget) -> VBox:
    """The controls, and below them the page that ``page`` makes of their values."""
    shown = widgets.HTML()

    def follow(_: object = None) -> None:
        shown.value = page(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(follow, names="value")
    follow()
    return widgets.VBox([*controls.values(), shown])


def _ipywidgets() -> ModuleType:
    try:
        import ipywidgets
    except ModuleNotFoundError as error:
        text = "explore() needs ipywidgets, which is not installed: pip install ipywidgets"
        raise ModuleNotFoundError(text, name="ipywidgets") from error
    return ipywidgets
