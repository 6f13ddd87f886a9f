"""Tables as text for the terminal, Markdown for a page, or LaTeX for a paper."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from .names import name_of

MISSING = "–"
_A_PAGE = 45  # rows
_FEW, _WORDS, _A_NAME = 11, 28, 54  # letters of a short text, of a long one, of a row's name
_EM = 0.49  # width of a letter
_A_LINE = 42  # em in footnotesize: what a line of 5.5 inches holds between the spaces of eight columns
_LATEX = {
    "‖": r"\|", "θ": r"\theta", "²": "^2", "ᵀ": r"^\top", "Δ": r"\Delta", "±": r"\pm", "×": r"\times", "−": "-",
    "∞": r"\infty", ">": ">", "<": "<", "≥": r"\geq",
}  # fmt: skip

_ESCAPED = {letter: rf"\{letter}" for letter in "%_&#${}"} | {
    "–": "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip

# Stars, underscores, tildes and "<" only where Markdown or HTML would read them as markup: not a star by itself.
_MARKUP = re.compile(r"[\\`|$]|\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|~(?=~)")


def as_text(table: pd.DataFrame) -> str:
    """A table as aligned text."""
    return table.to_string(float_format=_number, na_rep=MISSING)


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; in an index of several levels a value is not repeated in the rows below it."""
    head, *rows = [[_markdown(cell) for cell in row] for row in _cells(table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def as_latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, for ``booktabs`` and ``array``, and for ``longtable`` where it is longer than a page.

    In small print, smaller if it is wide; what rows have in common stands over them, and long texts and heads are
    broken. So our tables fit A4 paper with margins of an inch. Plain text but for symbols, which are set as
    mathematics.
    """
    head, groups = grouped(table)
    head = ["", *head]
    columns = list(zip(*(row for group in groups.values() for row in group), strict=True)) or [()] * len(head)
    widths = [_letters(name, cells) for name, cells in zip(head, columns, strict=True)]
    body, lines = [], 0
    for over, group in groups.items():
        body += [rf"\multicolumn{{{len(head)}}}{{l}}{{\emph{{{_latex(over)}}}}} \\*"] if over else []
        body += [" & ".join(map(_latex, row)) + r" \\" for row in group]
        lines += bool(over) + sum(max(map(_lines, row, widths)) for row in group)
    kind, heading = ("longtable", [r"\midrule", r"\endhead"]) if lines > _A_PAGE else ("tabular", [r"\midrule"])
    top = [r"\toprule", " & ".join(map(_latex, head)) + r" \\", *heading]
    aligned = "".join(_column(most, cells) for most, cells in zip(widths, columns, strict=True))
    whole = [rf"\begin{{{kind}}}{{{aligned}}}", *top, *body, r"\bottomrule", rf"\end{{{kind}}}"]
    size = "footnotesize" if sum(widths) * _EM <= _A_LINE else "scriptsize"
    return "\n".join([rf"{{\{size}\setlength{{\tabcolsep}}{{2pt}}", *whole, "}"])


def grouped(table: pd.DataFrame) -> tuple[list[str], dict[str, list[list[str]]]]:
    """A table for a narrow page: its columns' heads, and its rows, each a name and cells, under what they share.

    That is what the rows of a condition, a claim or a run have in common.
    """
    names = list(table.index.names)
    common = names.index("measure") if "measure" in names else int(len(names) > 2)
    groups: dict[str, list[list[str]]] = {}
    for key, values in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        key = key if isinstance(key, tuple) else (key,)
        over, row = (_said(names[part], key[part]) for part in (slice(common), slice(common, None)))
        groups.setdefault(over, []).append([row, *map(cell, values)])
    return [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns], groups


def _said(names: list[str], values: tuple) -> str:
    """Values as printed, numbers with their names."""
    return ", ".join(map(_one_said, names, values))


def _one_said(name: str | None, value: Any) -> str:
    if name == "run":
        return name_of(value)
    return cell(value) if isinstance(value, str) else f"{name or ''} {cell(value)}".strip()


def _letters(head: str, cells: tuple[str, ...]) -> int:
    """Width of a column in letters: that of its numbers, or of its head and texts when broken between words."""
    texts = [one for one in cells if one.upper() != one.lower()]
    longest = max(map(len, cells), default=0)
    if texts and not head and longest <= _A_NAME:
        return longest
    words = [word for one in (head, *texts) for word in one.split()]
    numbers = [one for one in cells if one not in texts]
    few = min(max(map(len, texts), default=0), _WORDS if longest > _WORDS else _FEW)
    return max(few, *map(len, words), *map(len, numbers), 1)


def _lines(text: str, letters: int) -> int:
    """How many lines a text takes in a column."""
    return -(-len(text) // letters)


def _column(letters: int, cells: tuple[str, ...]) -> str:
    """A column's LaTeX specification: long texts are aligned left, short ones and numbers right."""
    left = "ragged" + ("right" if max(map(len, cells), default=0) >= _WORDS else "left")
    return rf">{{\{left}\arraybackslash}}p{{{letters * _EM:.1f}em}}"


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
    """The printed head and rows, with the index in front."""
    columns = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns]
    rows = [[*(str(name or "") for name in table.index.names), *columns]]
    above: tuple = ()
    for key, values in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        key = key if isinstance(key, tuple) else (key,)
        same = next((i for i, (one, other) in enumerate(zip(key, above, strict=False)) if one != other), len(above))
        rows.append([*("" if i < min(same, len(key) - 1) else cell(name) for i, name in enumerate(key)),
                     *map(cell, values)])  # fmt: skip
        above = key
    return rows


def told_apart(values: pd.Series) -> pd.Series:
    """The printed values of a setting: numbers with three digits, or with as many as distinguish them; NaN stays."""
    numbers = {value for value in values.dropna() if isinstance(value, float)}
    digits = next(count for count in range(3, 18) if len({_short(one, count) for one in numbers}) == len(numbers))
    return values.map(lambda one: _short(one, digits) if isinstance(one, float) else str(one), na_action="ignore")


def percentages(shares: pd.Series) -> pd.Series:
    """Shares in per cent with three digits, or up to six to distinguish them from each other and 100; NaN stays."""
    known = {100.0, *(100 * shares.dropna())}
    apart = [len({f"{share:.{digits}g}" for share in known}) for digits in range(3, 7)]
    digits = 3 + apart.index(apart[-1])
    return shares.map(lambda share: f"{100 * share:.{digits}g}", na_action="ignore")


def _short(value: float, digits: int) -> str:
    short = f"{value:g}"
    return short if float(short) == value else f"{value:.{digits}g}"


def cell(value: object) -> str:
    """A printed value, numbers with three digits."""
    if isinstance(value, float):
        return MISSING if pd.isna(value) else _number(value)
    return " ".join(str(value).splitlines())


def percent(share: float) -> str:
    """A share in whole per cent or, below one, to its first digit; if it is not finite, the sign for a missing one."""
    if 0 < share < 1e-5:
        return "under 0.001%"
    return known(share, ".0%") if share == 0 or not abs(share) < 0.0095 else f"{100 * float(share):.1g}%"


def known(value: float, form: str) -> str:
    """A value in a format such as ``.1%``; if it is not finite, the sign for a missing one."""
    return f"{float(value):{form}}" if math.isfinite(value) else MISSING


def _number(value: float) -> str:
    return f"{value:.3g}"


def _markdown(text: str) -> str:
    """The text with everything escaped that Markdown would take for markup, HTML, mathematics or a cell's end."""
    return _MARKUP.sub(r"\\\g<0>", text)


def _latex(text: str) -> str:
    return "".join(
        _ESCAPED.get(letter) or (rf"\ensuremath{{{_LATEX[letter]}}}" if letter in _LATEX else letter) for letter in text
    )
