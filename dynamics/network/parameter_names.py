"""Plain names of parameters: those they had before torch compiled their module, parametrized or pruned them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Plain name of each parameter of a model; where that is another parameter's own name, both keep their own."""
    own = {name: _uncompiled(name) for name in names}
    taken = set(own.values())
    return {name: next((one for one in _plainer(own[name]) if one not in taken), own[name]) for name in own}


def plain_name(name: str) -> str:
    """A parameter's name before compilation, a parametrization or torch.nn.utils.prune made it ``conv.weight_orig``."""
    return _plainer(_uncompiled(name))[0]


def _plainer(name: str) -> list[str]:
    """The plain name; then, for one that was pruned before it was parametrized, its name with ``_orig``."""
    pruned = name.removesuffix("_orig")
    plain = re.sub(r"parametrizations\.(\w+)\.original(\d*)$", r"\1\2", pruned)
    return [plain if plain == pruned else plain.removesuffix("_orig"), plain]


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")
