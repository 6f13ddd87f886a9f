"""Every event of a run is marked over time: prunings dotted, others dash-dotted, and the legend names what there is."""

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from synthetic_runs import record

from figures import FIGURES, caption, draw

mpl.use("agg")

MARKS = {"prune": (":", "pruning"), "perturb": ("-.", "other event")}


def with_events(kinds: list[str]) -> xr.DataTree:
    """A run with an event before each of its steps 2, 3, ..., which removes nothing unless it prunes."""
    run = record("magnitude", 0, rounds=len(kinds))
    pruning = run["pruning"].to_dataset().assign(kind=("event", kinds), step=("event", 2 + np.arange(len(kinds))))
    removes = xr.DataArray([kind == "prune" for kind in kinds], dims="event")
    pruning["removed"] = pruning.removed.where(removes, 0.0)
    steps = run["steps"].to_dataset()
    steps["param_sqnorm"] = (("step", "layer"), np.ones((8, 2)))
    epochs = run["epochs"].to_dataset().assign(step=("epoch", [4, 8]), train_loss=("epoch", [2.0, 1.0]))
    parts = {"/steps": steps.assign_coords(layer=["a", "b"]), "/pruning": pruning, "/epochs": epochs}
    found = xr.DataTree.from_dict(parts)
    found.attrs = {"model": "net", "data": "images", "seed": 0, "measure": "mine"}
    return found


@pytest.mark.parametrize("name", ["norms", "quantities_per_layer", "training_curves"])
@pytest.mark.parametrize("kinds", [["prune"], ["perturb", "prune"], ["perturb", "perturb"], ["prune"] * 3])
def test_events_are_marked_by_their_kind(name: str, kinds: list[str]) -> None:
    figure = draw(name, {"mine": with_events(kinds)})
    places = {kind: [place for place, one in enumerate(kinds) if one == kind] for kind in MARKS}
    over = np.interp(2 + np.arange(len(kinds)), [0, 4, 8], [0, 1, 2])
    at = over if name == "training_curves" else 1.5 + np.arange(len(kinds))
    ax = figure.axes[0]
    for kind, (style, _) in MARKS.items():
        drawn = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == style]
        assert drawn == pytest.approx(at[places[kind]].tolist())
    named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert named & {label for _, label in MARKS.values()} == {MARKS[kind][1] for kind in kinds}


def test_the_line_of_stability_is_within_the_panel() -> None:
    steps = np.arange(6)
    curvature = xr.Dataset(
        {
            name: (("step", "layer"), np.full((6, 1), value))
            for name, value in (("grad_hess_grad", 0.01), ("grad_sqnorm", 1.0))
        },
        {"step": steps, "layer": ["a"]},
    )
    flow = xr.Dataset({"flow_step": (("step", "layer"), np.full((6, 1), 0.1))}, curvature.coords)
    ax = draw("stability", {"mine": xr.DataTree.from_dict({"/curvature": curvature, "/steps": flow})}).axes[0]
    low, high = ax.get_ylim()
    assert low < 1e-3 < 2 < high


@pytest.mark.parametrize("name", FIGURES)
def test_captions_promise_no_dotted_lines(name: str) -> None:
    assert "dotted" not in caption(name)
