"""Of networks with too many layers for points and names, figures show each layer as a colour."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import plain_step
from torch import nn

import analysis
from dynamics import Recorder, open_run
from dynamics.pruning import Pruner
from figures import draw, pages, panels

mpl.use("agg")

LAYERS = panels.MANY_LAYERS + 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    """Two measures, two seeds each, every one pruned once."""
    torch.set_default_dtype(torch.float64)  # a module's fixture is made before conftest sets it
    folder, found = tmp_path_factory.mktemp("deep"), {}
    for measure in ("magnitude", "loss_preservation"):
        for seed in range(2):
            torch.manual_seed(seed)
            layers = [part for _ in range(LAYERS - 1) for part in (nn.Linear(4, 4), nn.Tanh())]
            model = nn.Sequential(*layers, nn.Linear(4, 3))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            batches = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(3)]
            attributes = {"model": "deep", "data": "made", "measure": measure, "rounds": 1, "seed": seed}
            path = folder / f"{measure}-{seed}.zarr"
            with Recorder(path, model, optimizer, curvature_every=2, attributes=attributes) as recorder:
                for batch in recorder.watch(batches):
                    recorder.log(loss=plain_step(model, optimizer, batch))
                pruner = Pruner(model, optimizer, measure)
                pruning = pruner.plan(0.3, batches)
                with recorder.event("prune", probe=batches[:1], mode="train", **pruning.attributes) as event:
                    pruner.apply(pruning)
                    event.units(alive=pruning.alive, scores=pruning.scores)
                recorder.log_epoch(test_accuracy=0.5)
            found[path.stem] = open_run(path).load()
    return found


def colours(ax: Axes) -> dict[str, np.ndarray]:
    """The values behind a map's colours, by the name of the row."""
    (cells,) = ax.collections
    rows = [label.get_text() for label in ax.get_yticklabels()]
    return dict(zip(rows, np.ma.filled(cells.get_array(), np.nan), strict=True))


def bar(figure: Figure) -> Axes:
    (found,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    return found


def test_filters_left_are_the_mean_over_seeds(runs: dict[str, xr.DataTree]) -> None:
    figure = draw("filters_left", runs)
    shown = colours(figure.axes[0])
    assert list(shown) == ["magnitude", "loss preservation"]
    for name, values in shown.items():
        of_seeds = [runs[f"{name.replace(' ', '_')}-{seed}"]["units"] for seed in range(2)]
        alive = np.mean([[units.alive.values[0][units.layer == one].mean() for one in np.unique(units.layer)]
                         for units in of_seeds], 0)  # fmt: skip
        order = np.argsort(np.unique(of_seeds[0].layer).astype(int))
        np.testing.assert_allclose(values, alive[order])
    assert bar(figure).get_ylabel() == "share of filters left"
    assert bar(figure).get_yticklabels()[-1].get_text() == "100%"


def test_the_share_of_each_layers_gradient_that_was_removed(runs: dict[str, xr.DataTree]) -> None:
    figure = draw("removed_decrease", runs)
    (ax,) = [ax for ax in figure.axes if len(ax.collections) == 1 and ax.get_label() != "<colorbar>"]
    for name, values in colours(ax).items():
        pruning = runs[f"{name.replace(' ', '_')}-0"]["pruning"]
        before = pruning.grad_sqnorm.sel(stage="before").values[0]
        np.testing.assert_allclose(values, pruning.removed_grad_sqnorm.values[0] / before, rtol=1e-6)
    assert bar(figure).get_ylabel() == "removed share of ‖g‖²"


def test_lines_of_many_layers_are_told_apart_by_depth(
    runs: dict[str, xr.DataTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, picture = [], pages._picture
    monkeypatch.setattr(pages, "_picture", lambda figure: drawn.append(figure) or picture(figure))
    run = runs["magnitude-0"]
    layers = run["steps"].layer.values.tolist()
    pages.quantity_page({"mine": run}, "mine", ("steps", "grad_sqnorm"), layers, (0, 3))
    (figure,) = drawn
    lines = [line for line in figure.axes[0].lines if line.get_transform() is figure.axes[0].transData]
    assert len(lines) == LAYERS
    assert [label.get_text() for label in bar(figure).get_xticklabels()] == [layers[0], layers[-1]]


def test_what_is_not_recorded_per_layer_is_said(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, quantities=["flow_time"]) as recorder:
        for _ in recorder.watch(range(2)):
            plain_step(model, optimizer, (torch.randn(6, 4), torch.arange(6) % 3))
    with pytest.raises(analysis.MissingQuantityError, match="no quantity per layer in the record"):
        draw("quantities_per_layer", {"mine": open_run(tmp_path / "run.zarr")})
