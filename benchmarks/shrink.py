"""What shrinking saves: a dense network, the same with silenced filters, and that one shrunk, side by side in one run.

    python benchmarks/shrink.py --models vgg13 mobilenet_v1 resnet56 resnet18 --sparsity 0.5 0.75

Filters are silenced at random, so that all layers lose the same share of theirs. Parameters and FLOPs (torch's own
counter) are those of the network as it is in memory. Latencies are forward passes of a batch, taken in turns: a figure
is the median, over the turns, of the ratio to the dense network's of the same turn, with the quartiles beside it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
import torchvision
from machine import describe
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynamics.models import MODELS, build
from dynamics.pruning import Pruner, latency, shrink


def builder(name: str) -> Callable[[], nn.Module]:
    """One of the paper's networks, or torchvision's."""
    if name in MODELS:
        return lambda: build(name, num_classes=10)
    return lambda: getattr(torchvision.models, name)(num_classes=10)


def flops(model: nn.Module, inputs: Tensor) -> int:
    """FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


def parameters(model: nn.Module) -> int:
    """How many numbers the network's parameters are."""
    return sum(parameter.numel() for parameter in model.parameters())


def versions(name: str, sparsity: float, inputs: Tensor) -> dict[str, nn.Module]:
    """The dense network, the masked one, and the shrunk one."""
    torch.manual_seed(0)
    dense = builder(name)().to(inputs.device)
    masked = copy.deepcopy(dense)
    Pruner(masked, torch.optim.SGD(masked.parameters(), 0.1), "random", seed=0).prune(sparsity)
    shrunk = copy.deepcopy(masked)
    shrink(shrunk, None, inputs)
    return {"dense": dense.eval(), "masked": masked.eval(), "shrunk": shrunk.eval()}


def compare(name: str, sparsity: float, inputs: Tensor, turns: int) -> None:
    """Print the rows of one network."""
    models = versions(name, sparsity, inputs)
    times = {key: [] for key in models}
    for _ in range(turns):
        for key, model in models.items():
            times[key].append(latency(model, inputs, repeats=3, warm_up=1))
    with torch.no_grad():
        logits, expected = models["shrunk"](inputs), models["masked"](inputs)
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    dense = models["dense"]
    for key, model in models.items():
        low, middle, high = np.quantile(np.array(times[key]) / times["dense"], [0.25, 0.5, 0.75])
        print(
            f"{name:<14}{sparsity:>5.0%}  {key:<8}{parameters(model) / parameters(dense):>11.3f}"
            f"{flops(model, inputs) / flops(dense, inputs):>9.3f}{middle:>9.3f} [{low:.3f}, {high:.3f}]"
            f"{1e3 * np.median(times[key]):>10.2f} ms" + (f"  {error:.0e}" if key == "shrunk" else ""),
            flush=True,
        )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg13", "mobilenet_v1", "resnet56", "resnet18"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    print(f"{describe(options.device)}, torch-pruning {version('torch-pruning')}; batch {options.batch}, 3 × 32 × 32")
    print(
        f"{'ratios to dense':<29}{'parameters':>11}{'FLOPs':>9}{'latency':>9} [quartiles]  latency      logits off by"
    )
    inputs = torch.randn(options.batch, 3, 32, 32, device=options.device)
    for name in options.models:
        for sparsity in options.sparsity:
            compare(name, sparsity, inputs, options.turns)


if __name__ == "__main__":
    main()
