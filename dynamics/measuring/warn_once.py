"""Warnings that are given only once, because what holds at one step usually holds at all later ones."""

from __future__ import annotations

from ..warning import warn


class WarnOnce:
    """Gives one warning of each kind, however often it is called."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str, kind: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if kind not in self._said:
            self._said.add(kind)
            warn(text)

    def gave(self, *kinds: str) -> bool:
        """Whether a warning of one of these kinds was given."""
        return not self._said.isdisjoint(kinds)
