"""What curvature costs, in gradients, measured side by side in one run.

    python benchmarks/curvature.py --models vgg13 resnet56 --batch 128 --device cpu

In each repetition each contender runs once, in a new order; a figure is the median, over the repetitions, of its time
divided by the gradient's of the same repetition, with the quartiles beside it. By gates: θᵀHg and gᵀHg of all layers,
g given, at a floor of 2 + 4K products like those of a convolution for K directions, where a gradient takes 3.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor

from dynamics.curvature.expansion import Expansion
from dynamics.curvature.gates import gated_products
from dynamics.hardware.captured import Captured
from dynamics.models import build
from dynamics.network.layers import Layers

FLOORS = {"gradient": 1, "gates, one direction": 2, "gates, two directions": 10 / 3}


def contenders(name: str, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is compared, on one network and one batch."""
    torch.manual_seed(0)
    model = build(name, num_classes=10).to(device)
    inputs, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layers = Layers(model)
    layer_of = dict(zip(theta, layers.layer_of_parameter, strict=True))

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (inputs,)), labels)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))

    def double_backward() -> None:
        expansion = Expansion([loss_of], [1.0], theta)
        expansion.hessian_product(expansion.grad)

    grad = gradient()
    other = [torch.randn_like(part) for part in grad]
    return {
        "gradient": gradient,
        "gates, one direction": lambda: gated_products(loss_of, theta, [grad], layer_of, len(layers)),
        "gates, two directions": lambda: gated_products(loss_of, theta, [grad, other], layer_of, len(layers)),
        "gradient with graph, one double backward": double_backward,
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, with all that it leaves to the device."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(name: str, batch: int, device: torch.device, repetitions: int, *, capture: bool) -> None:
    """Print a table of one network."""
    works = contenders(name, batch, device)
    if capture:
        for work in works.values():
            work()
        works = {what: Captured(work, device) for what, work in works.items()}
    times: dict[str, list[float]] = {what: [] for what in works}
    for repetition in range(repetitions + 1):  # the first warms up
        for what in random.sample(list(works), len(works)):
            elapsed = seconds(works[what], device)
            if repetition:
                times[what].append(elapsed)
    print(f"\n{name}, batch {batch}: a gradient takes {np.median(times['gradient']):.3g} s")
    for what, measured in times.items():
        ratios = np.divide(measured, times["gradient"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        floor = f"   floor {FLOORS[what]:.2f}" if what in FLOORS else ""
        print(f"  {what:42} {middle:5.2f}  ({low:.2f} to {high:.2f}){floor}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg13", "resnet56"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--capture", action="store_true", help="launch each as a CUDA graph, the gradient, too")
    arguments = parser.parse_args()
    random.seed(0)
    print(describe(arguments.device))
    for name in arguments.models:
        measure(name, arguments.batch, torch.device(arguments.device), arguments.repetitions, capture=arguments.capture)


if __name__ == "__main__":
    main()
