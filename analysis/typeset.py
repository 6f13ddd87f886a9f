"""A table as text for the terminal, Markdown for a page, LaTeX for a paper."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

import pandas as pd

MISSING = "–"
_A_PAGE = 45  # rows
_LATEX = {
    "‖": r"\|", "θ": r"\theta", "²": "^2", "ᵀ": r"^\top", "Δ": r"\Delta", "±": r"\pm", "×": r"\times", "−": "-",
    "∞": r"\infty", ">": ">", "<": "<", "≥": r"\geq",
}  # fmt: skip

_ESCAPED = {letter: rf"\{letter}" for letter in "%_&#${}"} | {
    "–": "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def as_text(table: pd.DataFrame) -> str:
    """A table as aligned text."""
    return table.to_string(float_format=_number, na_rep=MISSING)


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown: of an index of several levels a value stands where it begins, and on no row after."""
    head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in _cells(table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def as_latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, for ``booktabs``, and ``longtable`` where it is longer than a page.

    Plain text but for symbols, which are set as mathematics.
    """
    head, *rows = [" & ".join(map(_latex, row)) + r" \\" for row in _cells(table)]
    columns = "l" * (table.index.nlevels + len(table.columns))
    kind, heading = ("longtable", [r"\midrule", r"\endhead"]) if len(rows) > _A_PAGE else ("tabular", [r"\midrule"])
    body = [r"\toprule", head, *heading, *rows, r"\bottomrule"]
    return "\n".join([rf"\begin{{{kind}}}{{{columns}}}", *body, rf"\end{{{kind}}}"])


def page(parts: Mapping[str, pd.DataFrame | list[str]], form: str) -> str:
    """Tables and lists of sentences under their titles, in one of :data:`FORMATS`; in LaTeX all but tables is comment.

    Raises:
        ValueError: no such format.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")
    table, title, sentence = FORMATS[form]
    return "\n\n".join(
        f"{title(name)}\n\n" + (table(part) if isinstance(part, pd.DataFrame) else "\n".join(map(sentence, part)))
        for name, part in parts.items()
    )


FORMATS: dict[str, tuple[Callable[[pd.DataFrame], str], Callable[[str], str], Callable[[str], str]]] = {
    "text": (as_text, str, lambda sentence: textwrap.fill(sentence, 120, subsequent_indent="    ")),
    "markdown": (as_markdown, "## {}".format, "- {}".format),
    "latex": (as_latex, "% {}".format, "% {}".format),
}


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """Head and rows in print, the index in front."""
    columns = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns]
    rows, above = [[*(str(name or "") for name in table.index.names), *columns]], ()
    for key, values in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        key = key if isinstance(key, tuple) else (key,)
        same = next((i for i, (one, other) in enumerate(zip(key, above, strict=False)) if one != other), len(above))
        rows.append([*("" if i < min(same, len(key) - 1) else cell(name) for i, name in enumerate(key)),
                     *map(cell, values)])  # fmt: skip
        above = key
    return rows


def cell(value: object) -> str:
    """A value in print, with three digits."""
    if isinstance(value, float):
        return MISSING if pd.isna(value) else _number(value)
    return " ".join(str(value).splitlines())


def _number(value: float) -> str:
    return f"{value:.3g}"


def _latex(text: str) -> str:
    return "".join(
        _ESCAPED.get(letter) or (rf"\ensuremath{{{_LATEX[letter]}}}" if letter in _LATEX else letter) for letter in text
    )
