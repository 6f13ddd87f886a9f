"""Long names in figures: broken into lines of a panel's width, or shortened where the full name is not needed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_WIDTH = 30  # characters of a label
_LONG = 24  # characters of a layer's name
_WHOLE = 8  # longest part of a dotted name that is not shortened, in characters
_LONGEST = 36


def wrapped(text: str, width: int = _WIDTH) -> str:
    """The text in lines of at most ``width`` characters; a short last word, such as a seed, gets no line of its own."""
    head, _, last = text.rpartition(" ")
    whole = f"{head}\0{last}" if head and len(last) < 3 else text
    return plain(textwrap.fill(whole, width).replace("\0", " "))


def plain(text: str) -> str:
    """The text with dollar signs escaped, so that none begins a formula."""
    return text.replace("$", r"\$")


def layer_names(names: Sequence[str]) -> list[str]:
    """Names of layers without their common beginning, and with the middle of long ones left out.

    As much of the middle stays as is needed to distinguish them, up to a length.
    """
    names = [str(name) for name in names]
    paths = [name.split(".") for name in names]
    apart = (number for number, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    common = next(apart, min(map(len, paths), default=1) - 1) if len(names) > 1 else 0
    bare = [".".join(path[common:]) for path in paths]
    for length in range(_LONG, _LONGEST + 1, 4):
        short = [_shortened(name, length) for name in bare]
        if len(set(short)) == len(set(bare)):
            break
    return [*map(plain, short)]


def _shortened(name: str, length: int) -> str:
    """``transformer_layers.3.attention_projection`` as ``tran….3.attention_…jection``."""
    if len(name) <= length:
        return name
    *path, last = name.split(".")
    path = [part if len(part) <= _WHOLE else f"{part[:4]}…" for part in path]
    room = max(length - len(".".join([*path, ""])), _WHOLE)
    if len(last) > room:
        tail = room // 3
        last = f"{last[: room - tail - 1]}…{last[-tail:]}"
    return ".".join([*path, last])
