"""All figures on disk, and one self-contained page: what was done, what theory says, what was found."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import MissingQuantityError, agreement_table, findings, outcome_table, pruning_findings
from analysis.record import experiment, name_of

from .paper import FIGURES, Runs, caption, claim, draw
from .style import theme

FINDINGS: dict[str, Callable[[Runs], str]] = {
    "loss_decrease_scatter": findings.loss_prediction,
    "loss_decrease_over_time": findings.loss_over_time,
    "norm_rate": findings.norm_prediction,
    "quantities_per_layer": findings.layer_spread,
    "training_curves": findings.final_accuracy,
    "filters_left": findings.layer_choice,
    "pruning_effect": findings.effect_prediction,
    "pruning_effect_per_layer": pruning_findings.layers_moved,
    "removed_decrease": pruning_findings.decrease_removed,
    "removal_curve": pruning_findings.curve_errors,
    "measure_agreement": pruning_findings.measures_agree,
    "scale_invariance": pruning_findings.filters_invariant,
    "stability": findings.time_unstable,
}


@dataclass(frozen=True)
class Drawn:
    """One figure of the report, with its claim, how to read it, and what was found."""

    name: str
    claim: str
    caption: str
    finding: str
    png: str


def write_report(runs: Runs, folder: Path, *, records: list[str], each: Callable[[list[str]], object] = list) -> Path:
    """Draw every figure that the runs allow, as PNG and PDF, and ``report.html``; returns the page's path.

    Args:
        runs: records by label.
        folder: created where it is missing. Files of the same names are replaced, others stay.
        records: where the runs came from, in print.
        each: wraps the list of names, e.g. in a progress bar.

    Raises:
        MissingQuantityError: the runs allow no figure at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, missing = [], {}
    for name in each(list(FIGURES)):
        try:
            figure = draw(name, runs)
        except MissingQuantityError as error:
            missing[name] = str(error)
            continue
        png = _save(figure, folder / name, _origin(runs))
        drawn.append(Drawn(name, claim(name), caption(name), FINDINGS[name](runs), png))
    if not drawn:
        raise MissingQuantityError(next(iter(missing.values())))
    page = folder / "report.html"
    page.write_text(_page(runs, drawn, missing, records), encoding="utf-8")
    return page


def _save(figure: Figure, stem: Path, origin: str) -> str:
    """Write PNG and PDF, and return the PNG in base64."""
    buffer = io.BytesIO()
    with theme():
        figure.savefig(buffer, format="png")
        figure.savefig(stem.with_suffix(".pdf"), metadata={"Subject": origin, "Creator": "thetadot"})
    stem.with_suffix(".png").write_bytes(buffer.getvalue())
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _page(runs: Runs, drawn: list[Drawn], missing: dict[str, str], records: list[str]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title="Training dynamics: theory against measurement",
        done=_done(runs),
        outcomes=_html(outcome_table(runs)),
        figures=drawn,
        agreements=_html(agreement_table(runs)),
        missing=missing,
        records=records,
        origin=_origin(runs),
    )


def _html(table: pd.DataFrame) -> str:
    """A table in print: run names in words, three digits."""
    named = table.rename(index=name_of, level="run") if table.index.nlevels > 1 else table.rename(index=name_of)
    return named.to_html(border=0, na_rep="–", float_format=lambda value: f"{value:.3g}")


def _done(runs: Runs) -> str:
    """What was trained and pruned, in two sentences, from the records' own configuration."""
    settings = [experiment(run) for run in runs.values()]
    steps = sum(run["steps"].sizes.get("step", 0) for run in runs.values())
    extent = f"{len(runs)} run{'s' * (len(runs) > 1)}, {steps} recorded steps"
    if not all(settings):
        return f"{extent} of instrumented training."
    first = settings[0]
    trained = f"{first['model']} at width {first['width']:g} on {first['data']}, {sum(first['epochs'])} epochs of SGD"
    pruned = next((setting for setting in settings if setting["measure"] != "none"), None)
    measures = ", ".join(name_of(label) for label in runs)
    how = f" Pruned to {1 - pruned['sparsity']:.0%} of the filters in {pruned['rounds']} rounds." if pruned else ""
    return f"{extent}: {trained}, from one initialisation and one order of the data per seed.{how} Runs: {measures}."


def _origin(runs: Runs) -> str:
    run = next(iter(runs.values()))
    parts = [
        f"{name} {run.attrs[name]}" for name in ("thetadot", "commit", "torch", "device", "seed") if name in run.attrs
    ]
    return f"Recorded {run.attrs.get('created', '')} with {', '.join(parts)}."
