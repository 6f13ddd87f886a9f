"""Every operation that is said to leave a silent channel silent does so: it is run on a channel of zeros."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dynamics.pruning import Pruner
from dynamics.pruning.candidates import channels
from dynamics.pruning.candidates.paths import _effect

Arguments = dict[str, Any]
SILENT = 1
POOLED: tuple[Arguments, ...] = ({"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1})
RANGES: tuple[Arguments, ...] = (
    {}, {"min_val": 0.5, "max_val": 1.0}, {"min_val": -1.0, "max_val": -0.5}, {"min_val": 0.0, "max_val": 1.0},
)  # fmt: skip
ENDS = [{key.removesuffix("_val"): value for key, value in ends.items()} for ends in RANGES[1:]]
RATES: tuple[Arguments, ...] = ({}, {"alpha": 2.0}, {"alpha": -1.0})
WIDTHS: tuple[Arguments, ...] = ({}, {"lambd": 0.1})
ARGUMENTS: dict[str, tuple[Arguments, ...]] = {  # by the names of layers and functions in small letters
    "hardtanh": RANGES, "elu": RATES, "celu": RATES, "softshrink": WIDTHS, "hardshrink": WIDTHS,
    "leakyrelu": ({}, {"negative_slope": -2.0}), "gelu": ({}, {"approximate": "tanh"}),
    "upsample": ({"scale_factor": 2}, {"scale_factor": 2, "mode": "bilinear"}), "clamp": ENDS, "clip": ENDS,
    "prelu": ({}, {"num_parameters": 4}), "pow": tuple({"exponent": power} for power in (-1, -0.5, 0, 0.5, 1, 3)),
}  # fmt: skip
OPERANDS = {function: ({"other": 2.0}, {"other": -0.5}) for function in (*channels._PRODUCTS, *channels._QUOTIENTS)}
WEIGHT = {"weight": torch.full((4,), 0.5, dtype=torch.float64)}
OF_FUNCTIONS: dict[Any, tuple[Arguments, ...]] = {
    torch.prelu: (WEIGHT,), torch.nn.functional.interpolate: ARGUMENTS["upsample"], "to": ({"dtype": torch.half},),
    **OPERANDS,
}  # fmt: skip


def dimensions(name: str) -> int:
    return int(name[-2]) if name.endswith("d") and name[-2:-1].isdigit() else 2


def channels_of(name: str) -> Tensor:
    """Random channels, of which one is silent."""
    inputs = torch.randn(3, 4, *[4] * dimensions(name))
    inputs[:, SILENT] = 0
    return inputs


def given(name: str) -> tuple[Arguments, ...]:
    if "adaptive" in name:
        return ({"output_size": 2},)
    return POOLED if "pool" in name else ({"padding": 1},) if "pad" in name else ARGUMENTS.get(name, ({},))


def check_if_alone(node: fx.Node, source: fx.Node, run: Callable[[Tensor], Any], name: str, module: Any) -> bool:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions(name) - 1](3, 4, 1)
    if _effect(node, source, module, layer, flattened=False) != "alone":
        return False
    assert (run(channels_of(name)).reshape(3, 4, -1)[:, SILENT] == 0).all()
    return True


@pytest.mark.parametrize("kind", [*channels._ALONE, *channels._OWN_PADS, *channels._CONSTANT_PADS, nn.Threshold])
def test_layers(kind: type[nn.Module]) -> None:
    name, alone = kind.__name__.lower(), 0
    options = given(name)
    if kind in channels._CONSTANT_PADS:
        options = ({"padding": 1, "value": 0.0}, {"padding": 1, "value": 1.0})
    if kind is nn.Threshold:
        options = ({"threshold": -0.5, "value": 0.3}, {"threshold": 0.5, "value": 0.3})
    for arguments in options:
        module = kind(**arguments).eval()
        graph = fx.symbolic_trace(nn.Sequential(module)).graph
        source, node, _ = graph.nodes
        alone += check_if_alone(node, source, module, name, module)
    assert alone >= (kind is not nn.Threshold)  # at least once


def title(function: Callable | str) -> str:
    return function if isinstance(function, str) else f"{function.__module__ or 'torch'}.{function.__name__}"


FUNCTIONS = [
    *sorted(channels._ALONE_FUNCTIONS, key=title), *channels._ALONE_METHODS, *channels._PRODUCTS,
    *channels._QUOTIENTS, *channels._CLAMPS, *channels._POWERS,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=title)
def test_functions(function: Callable | str) -> None:
    name, alone = (function if isinstance(function, str) else function.__name__), 0
    for arguments in OF_FUNCTIONS.get(function, given(name.replace("_", ""))):
        graph = fx.Graph()
        source = graph.placeholder("x")
        if isinstance(function, str):
            node = graph.call_method(function, (source,), arguments)
        elif function.__module__ in ("operator", "_operator"):
            node = graph.call_function(function, (source, *arguments.values()))
        else:
            node = graph.call_function(function, (source,), {**arguments, **_quiet(name)})
        graph.output(node)
        alone += check_if_alone(node, source, fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run, name, None)
    assert alone


def _quiet(name: str) -> Arguments:
    return {"training": False} if name.startswith("dropout") else {}


class Ratio(nn.Module):
    """Two convolutions, of which one divides the other, by an operation."""

    def __init__(self, divide: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.above, self.below, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.divide = divide

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.divide(self.above(inputs), self.below(inputs).square()).mean((2, 3)))


DIVISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by an operator": lambda a, b: a / b,
    "by a function": lambda a, b: torch.div(a, b),
    "by name": lambda a, b: torch.div(input=a, other=b),
    "by a power": lambda a, b: a * b**-0.5,
    "by its inverse": lambda a, b: a * b.reciprocal(),
    "by its root": lambda a, b: a * torch.rsqrt(b),
}


@pytest.mark.parametrize("case", DIVISIONS)
def test_a_filter_that_divides_is_not_silenced(case: str) -> None:
    model, inputs = Ratio(DIVISIONS[case]), torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match=r"'below' feeds into .* through which a silenced filter may still"):
        Pruner(model, None, "magnitude")
    Pruner(model, None, "magnitude", protected=["below"]).prune(0.5)
    assert model(inputs).isfinite().all()
    with torch.no_grad():
        model.below.weight[0], model.below.bias[0] = 0, 0
    assert not model(inputs).isfinite().all()
