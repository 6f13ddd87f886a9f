"""What a record holds, in a few lines."""

from __future__ import annotations

import xarray as xr

from .reading import experiment


def summary(run: xr.DataTree) -> str:
    """Experiment, extent and origin of a record as text."""
    lines = []
    said = experiment(run) or run.attrs
    if known := [f"{name} {said[name]}" for name in ("model", "data", "measure", "seed") if name in said]:
        lines.append("experiment  " + ", ".join(known))
    for name, node in run.children.items():
        sizes = " × ".join(f"{size} {dim}" + "s" * (size != 1) for dim, size in node.sizes.items()) or "empty"
        lines.append(f"/{name:<10} {sizes}" + (f": {', '.join(node.data_vars)}" if node.data_vars else ""))
    origin = ", ".join(
        f"{name} {run.attrs[name]}" for name in ("thetadot", "commit", "torch", "device") if run.attrs.get(name)
    )
    return "\n".join([*lines, f"recorded    {run.attrs.get('created', '')} with {origin}"])
