"""The printed names of models, data sets and measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_PROPER = {
    "none": "not pruned",
    "gradient_norm_increase": "gradient-norm increase",
    "gradient_norm_preservation": "gradient-norm preservation",
    "vgg13": "VGG-13", "mobilenet_v1": "MobileNet-V1", "resnet56": "ResNet-56",
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion-mnist": "Fashion-MNIST",
    "bn_scale": "BatchNorm scale", "magnitude_l1": "L1 magnitude", "taylor": "Taylor", "fisher": "Fisher",
    "snip": "SNIP", "grasp": "GraSP", "synflow": "synaptic flow",
}  # fmt: skip


def name_of(name: str) -> str:
    """The printed name of a model, data set, measure or label, such as ``loss preservation × magnitude``."""
    return _PROPER.get(name, str(name).replace("_times_", " × ").replace("_", " "))


def names_of(names: Iterable[str]) -> dict[str, str]:
    """The printed name of each; those that would share one, such as ``net_a`` and ``net a``, stay as they are."""
    printed = {name: name_of(name) for name in names}
    counts = Counter(printed.values())
    return {name: text if counts[text] == 1 else str(name) for name, text in printed.items()}
