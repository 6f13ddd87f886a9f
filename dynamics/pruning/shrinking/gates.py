"""Gates: layers that only multiply channels, as in squeeze and excitation, and whose outputs go with silent channels.

A product is zero if one of its factors is. What a gate makes of a silenced channel is therefore never seen, and nothing
that the gate learns for it has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

_PRODUCT = "MulBackward0"


class Gate:
    """The way from a layer's node in torch-pruning's graph, through operations of one reader each, to a product.

    Attributes:
        passed: the nodes of the operations on the way.
        others: the nodes of the product's other factors; none if the way leads to no product.
    """

    def __init__(self, layer: Any, is_channelwise: Callable[[str], bool]) -> None:
        self.passed: list[Any] = []
        self.others: list[Any] = []
        node = layer
        while len(node.outputs) == 1:
            (reader,) = node.outputs
            if operation(reader) == _PRODUCT:
                self.others = [factor for factor in reader.inputs if factor is not node]
                return
            if len(reader.inputs) > 1 or not is_channelwise(operation(reader)):
                return
            self.passed.append(reader)
            node = reader

    def opens(self, units: Set[int], heard: Mapping[Any, Set[int]]) -> set[int]:
        """Those of the ``units`` that it may pass on to what follows: no other factor is silent.

        ``heard`` holds the units that are not silent where each layer or normalisation puts them out.
        """
        found = set(units)
        for factor in self.others:
            found &= _heard(factor, units, heard)
        return found


def operation(node: Any) -> str:
    """Autograd's name of the operation at a node, or the kind of its module."""
    return getattr(node.module, "_grad_fn", type(node.module).__name__.strip("_"))


def _heard(node: Any, units: Set[int], heard: Mapping[Any, Set[int]]) -> set[int]:
    """Those of the units that are not silent at a node."""
    if node in heard:
        return set(heard[node])
    found = [_heard(one, units, heard) for one in node.inputs] or [set(units)]
    return set.intersection(*found) if operation(node) == _PRODUCT else set.union(*found)
