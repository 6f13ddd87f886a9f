"""Runs what a page shows."""

from __future__ import annotations

import re


def run_snippets(page: str) -> None:
    """Run a page's Python examples as printed, one after the other, in one namespace."""
    namespace: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, namespace)
