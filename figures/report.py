"""All figures on disk, and a self-contained page: what was done, what theory says, what was found."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import MissingQuantityError
from analysis.condensed import SUFFIX
from analysis.condition_names import probe_mode
from analysis.conditions import by_setting, conditions
from analysis.names import name_of
from analysis.overview import SUMMARY, overview
from analysis.progress import with_progress
from analysis.prunings import prunings
from analysis.record import length
from analysis.remembered import remembering
from analysis.runs import Runs
from analysis.typeset import grouped, percentages, told_apart
from dynamics.places import check_folder
from dynamics.record.reading import experiment
from dynamics.schema import COMPARED_BY
from dynamics.words import counted

from .catalogue import FIGURES, caption, claim, compares, draw, finding
from .style import theme

# The settings of an experiment that the report's first lines give.
_SAID = {"model", "data", "width", "epochs", "measure", "sparsity", "rounds", "seed"}

_DOTS, _PIXELS = 200, 130  # per inch of a figure: of the picture, and on the page


@remembering()
def write_report(runs: Runs, folder: str | Path, *, records: list[str]) -> Path:
    """Draw every figure that the runs allow, as PNG and PDF, and ``report.html``; returns the page's path.

    Args:
        runs: records by label.
        folder: created if it is missing. Figures already in it are replaced, or removed if the runs do not allow them;
            other files stay.
        records: where the runs came from, as the page prints it.

    Raises:
        MissingQuantityError: the runs allow no figure at all.
        NotADirectoryError: there is a file in the place of the folder. PermissionError: the folder may not be written.
    """
    folder = Path(folder)
    check_folder(folder, "figures and report", "out/figures")
    folder.mkdir(parents=True, exist_ok=True)
    drawn, missing, shown = [], {}, by_setting(runs)
    alone = conditions(shown).measure.nunique() < 2 or not any(len(prunings(run)) for run in runs.values())
    for name in with_progress(FIGURES, "figures", "figure"):
        try:
            figure = draw(name, runs)
        except MissingQuantityError as error:
            missing[name] = str(error)
            for suffix in (".png", ".pdf"):  # from other records
                (folder / name).with_suffix(suffix).unlink(missing_ok=True)
            continue
        webp, width = _save(figure, folder / name, _origin(runs))
        heading = name.replace("_", " ").capitalize() if alone and compares(name) else claim(name)
        said = {"claim": heading, "caption": caption(name), "finding": finding(name, shown)}
        drawn.append({"name": name, "webp": webp, "width": width} | said)
    if not drawn:
        raise MissingQuantityError(next(iter(missing.values())))
    page = folder / "report.html"
    page.write_text(_page(runs, drawn, missing, records), encoding="utf-8")
    return page


def _save(figure: Figure, stem: Path, origin: str) -> tuple[str, int]:
    """Write PNG and PDF; returns the picture in base64 and its width on the page in pixels, the same scale for all.

    On the page it is lossless WebP, which takes half the size of PNG; its "quality" is then an effort alone.
    """
    png = stem.with_suffix(".png")
    with theme():
        figure.savefig(png, dpi=_DOTS)
        figure.set_layout_engine("none")  # it is laid out, which takes a third of the time
        figure.savefig(stem.with_suffix(".pdf"), metadata={"Subject": origin, "Creator": "thetadot"})
    plt.close(figure)
    pixels, webp = plt.imread(png), io.BytesIO()
    plt.imsave(webp, pixels, format="webp", pil_kwargs={"lossless": True, "quality": 0, "method": 1})
    return base64.b64encode(webp.getvalue()).decode(), round(_PIXELS / _DOTS * pixels.shape[1])


def _page(runs: Runs, drawn: list[dict[str, object]], missing: dict[str, str], records: list[str]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    condensed = any(path.endswith(SUFFIX) for path in records)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    parts = _parts(overview(runs))
    return template.render(
        title="Training dynamics: theory against measurement",
        done=_done(runs),
        first={title: part for title, part in parts.items() if title in SUMMARY},
        figures=drawn,
        rest={title: part for title, part in parts.items() if title not in SUMMARY},
        missing=missing,
        records=records,
        opening='analysis.open_runs(["…"])' if condensed else 'xarray.open_datatree("…")',
        origin=_origin(runs),
    )


def _parts(parts: Mapping[str, pd.DataFrame | list[str]]) -> dict[str, dict[str, object] | list[str]]:
    """Tables as the heads of their columns and the groups of their rows; sentences unchanged."""
    return {
        title: dict(zip(("head", "groups"), grouped(part), strict=True)) if isinstance(part, pd.DataFrame) else part
        for title, part in parts.items()
    }


def _done(runs: Runs) -> str:
    """What was trained and pruned, in a few sentences, from the records' own configuration."""
    settings = [experiment(run) for run in runs.values()]
    steps = sum(length(run, "steps") for run in runs.values())
    extent = f"{counted(len(runs), 'run')}, {counted(steps, 'recorded step')}"
    if not all(one.keys() >= _SAID for one in settings):
        return f"{extent} of instrumented training{_told(runs)}. {probe_mode(runs)}".strip()
    trained = _listed(
        f"{name_of(one['model'])} at width {one['width']:g} on {name_of(one['data'])}, "
        f"{sum(one['epochs'])} epochs of SGD"
        for one in settings
    )
    pruned = [one for one in settings if one["measure"] != "none"]
    shares = percentages(pd.Series([1 - one["sparsity"] for one in pruned], dtype=float))
    left = _listed((f"{share}%" for share in shares), " or ")
    rounds = _listed((str(one["rounds"]) for one in pruned), " or ")
    units = _listed((f"{one.get('granularity', 'filter')}s" for one in pruned), " or ")
    how = f" Pruned to {left} of the {units}, in {rounds} round{'s' * (rounds != '1')}." if pruned else ""
    seeds = len({one["seed"] for one in settings})
    measures = _listed((name_of(one["measure"]) for one in settings), ", ")
    return (
        f"{extent}: {trained}. {counted(seeds, 'seed')}, each one initialisation and one order of the data."
        f"{how} Measures: {measures}. {probe_mode(runs)}".strip()
    )


def _told(runs: Runs) -> str:
    """What instrumented loops trained, according to their attributes, their measures, and the number of seeds."""
    table = conditions(runs)
    trained = _listed(
        " on ".join(filter(None, map(name_of, one))) for one in table[["model", "data"]].itertuples(index=False)
    )
    if not trained:
        return ""
    seeds = table.seed.nunique()
    settings = [
        f" {name.replace('_', ' ').capitalize()}: {_listed(told_apart(table[name].dropna().sort_values()), ', ')}."
        for name in table if name not in (*COMPARED_BY, "record")
    ]  # fmt: skip
    measures = _listed(map(name_of, table.measure), ", ")
    return f": {trained}. {counted(seeds, 'seed')}. Measures: {measures}.{''.join(settings)}".removesuffix(".")


def _listed(values: Iterable[str], between: str = "; ") -> str:
    return between.join(filter(None, dict.fromkeys(values)))


def _origin(runs: Runs) -> str:
    said = {
        name: _listed((str(run.attrs[name]) for run in runs.values() if name in run.attrs), " and ")
        for name in ("thetadot", "commit", "torch", "device", "seed")
    }
    when = sorted(str(run.attrs["created"]) for run in runs.values() if "created" in run.attrs)
    between = " to ".join(dict.fromkeys([*when[:1], *when[-1:]]))
    return f"Recorded {between} with {', '.join(f'{name} {values}' for name, values in said.items() if values)}."
