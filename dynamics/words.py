"""How many of something there are, in words."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """The count and the noun, which takes an s unless there is one: "1 run", "3 runs"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
