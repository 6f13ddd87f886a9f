"""The paper's three networks, by name: `build("resnet56", num_classes=10)`."""

import math
from collections.abc import Callable

import torch
from torch import nn

from .mobilenet import MobileNet, mobilenet_v1
from .resnet import ResNet, resnet56
from .vgg import VGG, vgg13

__all__ = ["MODELS", "VGG", "MobileNet", "ResNet", "build"]

# A builder takes the number of classes, the number of input channels and a function that scales channel counts.
MODELS: dict[str, Callable[[int, int, Callable[[int], int]], nn.Module]] = {
    "vgg13": vgg13,
    "mobilenet_v1": mobilenet_v1,
    "resnet56": resnet56,
}


def build(name: str, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """A freshly initialised network for 32 × 32 images, (N, in_channels, 32, 32) → logits (N, num_classes).

    name: a key of `MODELS`. width: factor on every channel count inside, c → max(1, round(width · c)).
    The network's class attribute `protected` names the convolutions that are never pruned. Weights, and so activations,
    are channels-last in memory, which makes convolutions faster on GPUs and CPUs, but BatchNorm on CPUs less exact:
    docs/record.md.

    Raises ValueError for an unknown name, a count below 1 or a width that is not a positive number.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    for argument, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise ValueError(f"{argument} is {count}: it must be 1 or more")
    if not 0 < width < math.inf:
        raise ValueError(f"width is {width}: it must be a positive factor, 1 for the published size")
    network = MODELS[name](num_classes, in_channels, lambda channels: max(1, round(width * channels)))
    return network.to(memory_format=torch.channels_last)
