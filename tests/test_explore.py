"""What is chosen in Jupyter is what is drawn, and what cannot be drawn says why."""

import base64
import re
import sys
from pathlib import Path

import ipywidgets
import matplotlib as mpl
import numpy as np
import pytest
import synthetic_runs
import torch
import torch.nn.functional as F
import xarray as xr
from matplotlib.figure import Figure
from networks import prune_row
from torch import nn

import analysis
from dynamics import Recorder, open_run
from figures import claim, explore, pages

mpl.use("agg")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """Six steps of two layers, curvature at every second, and one pruning before the fourth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    batches = [(torch.randn(5, 3), torch.arange(5) % 2) for _ in range(6)]
    path = tmp_path_factory.mktemp("explored") / "run.zarr"
    with Recorder(path, model, optimizer, curvature_every=2) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            if number == 3:
                with recorder.event("prune", probe=batches[:1]):
                    prune_row(model, "0.weight", 0)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss, temperature=20.0 + number)
    return open_run(path).load()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the pages, in the order in which they were drawn."""
    figures, picture = [], pages._picture
    monkeypatch.setattr(pages, "_picture", lambda figure: figures.append(figure) or picture(figure))
    return figures


def lines(figure: Figure) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}


def test_a_quantity_is_drawn_of_the_layers_and_steps_that_are_chosen(run: xr.DataTree, drawn: list[Figure]) -> None:
    page = pages.quantity_page({"mine": run}, "mine", ("steps", "grad_sqnorm"), ["2", pages.WHOLE], (1, 4))
    found = lines(drawn[0])
    values = run["steps"].grad_sqnorm.values
    np.testing.assert_array_equal(found["layer 2"], np.transpose([range(1, 5), values[1:5, 1]]))
    np.testing.assert_allclose(found[pages.WHOLE], np.transpose([range(1, 5), values[1:5].sum(1)]), rtol=1e-6)
    assert found["pruning"][0, 0] == 2.5
    assert "squared norm of the gradient" in page
    pages.quantity_page({"mine": run}, "mine", ("steps", "grad_sqnorm"), ["2"], (4, 5))
    assert set(lines(drawn[1])) == {"layer 2"}  # the pruning is outside


@pytest.mark.parametrize("name", ["loss", "temperature"])
def test_what_has_no_layers_is_drawn_whatever_layers_are_chosen(
    run: xr.DataTree, drawn: list[Figure], name: str
) -> None:
    pages.quantity_page({"mine": run}, "mine", ("steps", name), [], (0, 5))
    (line, _) = drawn[0].axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), run["steps"][name].values)


def test_learning_rates_of_layers_are_not_added_up(run: xr.DataTree, drawn: list[Figure]) -> None:
    pages.quantity_page({"mine": run}, "mine", ("steps", "learning_rate"), [pages.WHOLE], (0, 5))
    found = lines(drawn[0])
    assert pages.WHOLE not in found
    np.testing.assert_allclose(found["layer 0"][:, 1], 0.1, rtol=1e-6)


def test_no_layer_is_said(run: xr.DataTree) -> None:
    page = pages.quantity_page({"mine": run}, "mine", ("steps", "grad_sqnorm"), ["of another run"], (0, 5))
    assert page == "<p>No layer of the run is chosen.</p>"


def test_the_agreement_is_that_of_the_chosen_steps(run: xr.DataTree, drawn: list[Figure]) -> None:
    page = pages.prediction_page({"mine": run}, "mine", "loss decrease of a step", (2, 5))
    whole = analysis.loss_decrease(run)
    np.testing.assert_array_equal(lines(drawn[0])["measured"], np.transpose([(2, 4), whole.measured.values[1:]]))
    error = np.abs(whole.second_order / whole.measured - 1).values[1:]
    shown = re.search(r"<th>median_relative_error</th>\s*<td>\S+</td>\s*<td>(\S+)</td>", page)
    assert float(shown[1]) == pytest.approx(np.median(error), abs=6e-4)
    assert re.search(r"<th>count</th>\s*<td>2.000</td>", page)


def test_a_figure_is_of_the_chosen_runs(drawn: list[Figure]) -> None:
    runs = synthetic_runs.runs()
    chosen = [label for label in runs if label.startswith("magnitude")]
    page = pages.figure_page(runs, "accuracy", chosen)
    assert [text.get_text() for text in drawn[0].axes[0].get_yticklabels()] == ["magnitude"]
    assert claim("accuracy") in page
    assert pages.figure_page(runs, "accuracy", []) == "<p>No run is chosen.</p>"


def test_what_cannot_be_drawn_says_why(run: xr.DataTree) -> None:
    runs = {"mine": run.filter(lambda node: node.name != "curvature")}
    assert "Not drawn: nothing was recorded in /curve." in pages.figure_page(runs, "removal_curve", ["mine"])
    page = pages.prediction_page(runs, "mine", "loss decrease of a step", (0, 5))
    assert page.startswith("<p>nothing was recorded in /curvature.")
    page = pages.quantity_page(runs, "mine", ("curvature", "grad_hess_grad"), [pages.WHOLE], (0, 5))
    assert page.startswith("<p>nothing was recorded in /curvature.")


def test_its_controls_offer_what_was_recorded_and_show_what_is_chosen(run: xr.DataTree) -> None:
    tabs = explore({"mine": run, "other": synthetic_runs.record("magnitude", 0)})
    assert tabs.titles == ("Figures", "Theory against measurement", "Quantities")
    figures, theory, quantities = tabs.children
    label, quantity, layers, window, _ = quantities.children
    assert label.options == ("mine", "other")
    assert quantity.options[0] == ("/steps param_sqnorm: ‖θ‖²", ("steps", "param_sqnorm"))
    assert ("/steps temperature", ("steps", "temperature")) in quantity.options
    assert ("/curvature grad_hess_grad: gᵀHg", ("curvature", "grad_hess_grad")) in quantity.options
    assert layers.options == (pages.WHOLE, "0", "2")
    assert (window.min, window.max, window.value) == (0, 7, (0, 7))
    assert all(picture(of).startswith(b"\x89PNG") for of in tabs.children)
    before = picture(quantities)
    quantity.value = ("steps", "temperature")
    assert picture(quantities) != before
    label.value = "other"
    assert "/steps needs ['temperature']" in shown(quantities)
    figures.children[1].value = ["mine"]
    figures.children[0].value = "stability"
    assert claim("stability") in shown(figures)
    theory.children[2].value = (4, 5)
    assert re.search(r"<th>count</th>\s*<td>1.000</td>", shown(theory))


def shown(tab: ipywidgets.VBox) -> str:
    return tab.children[-1].value


def picture(tab: ipywidgets.VBox) -> bytes:
    return base64.b64decode(re.search(r'base64,([^"]*)"', shown(tab))[1])


def test_events_alone_are_explored_by_figures(run: xr.DataTree) -> None:
    tabs = explore({"mine": run.filter(lambda node: node.name not in ("steps", "curvature"))})
    assert tabs.titles == ("Figures",)


def test_a_record_that_begins_anew_is_explored_as_the_others_are(run: xr.DataTree) -> None:
    """Recorder(..., resume="rewind") at step 0 leaves groups without a step."""
    empty = run.copy()
    for node in ("steps", "curvature"):
        empty[node] = xr.DataTree(run[node].to_dataset().isel(step=slice(0)))
    assert explore({"empty": empty}).titles == ("Figures",)
    tabs = explore({"empty": empty, "mine": run})
    assert tabs.children[2].children[3].value == (0, 5)
    assert tabs.children[2].children[2].options == (pages.WHOLE, "0", "2")


def test_what_is_no_run_is_said(run: xr.DataTree) -> None:
    with pytest.raises(ValueError, match="give runs by label"):
        explore(run)
    with pytest.raises(ValueError, match="no runs"):
        explore({})


def test_without_ipywidgets_it_says_what_to_install(run: xr.DataTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match=r"explore\(\) needs ipywidgets.*pip install ipywidgets"):
        explore({"mine": run})


def test_figures_are_imported_without_it() -> None:
    text = (Path(__file__).parents[1] / "figures" / "explore.py").read_text(encoding="utf-8")
    assert not re.search(r"^(import|from) ipywidgets", text, re.MULTILINE)
