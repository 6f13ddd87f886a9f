"""The paper's three networks, narrow, how they train, and what goes with a filter, written down by hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamics.models import VGG, MobileNet, ResNet, build

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg13": lambda: build("vgg13", num_classes=4, in_channels=1, width=0.08),
    "mobilenet_v1": lambda: build("mobilenet_v1", num_classes=4, in_channels=1, width=0.08),
    "resnet": lambda: ResNet(8, (4, 6, 8), num_classes=4, in_channels=1),
}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda theta: torch.optim.SGD(theta, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda theta: torch.optim.SGD(theta, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda theta: torch.optim.Adam(theta, 0.01, weight_decay=1e-2),
    "adamw": lambda theta: torch.optim.AdamW(theta, 0.01),
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 32, 32, generator=generator, dtype=torch.float64), torch.arange(8) % 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        inputs, labels = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def trained(name: str, optimizer: str = "sgd", steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network whose BatchNorms have moved, with an optimizer that has momentum."""
    model = NETWORKS[name]()
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, made, steps)
    return model, made


def goes_with(model: nn.Module) -> dict[str, list[str]]:
    """The modules whose parameters go with a filter of each ranked convolution, by the networks' own naming."""
    if isinstance(model, VGG):
        convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        return {name: [name, f"features.{int(name.removeprefix('features.')) + 2}"] for name in convolutions}
    if isinstance(model, MobileNet):
        depthwise = [[f"blocks.{k}.depthwise", f"blocks.{k}.norm1"] for k in range(len(model.blocks))]
        pointwise = [[f"blocks.{k}.pointwise", f"blocks.{k}.norm2"] for k in range(len(model.blocks))]
        feeding = [["stem", "norm"], *pointwise]
        return {own[0]: own + fed for own, fed in zip(feeding, [*depthwise, []], strict=True)}
    blocks = [f"blocks.{k}" for k in range(len(model.blocks))]
    pairs = [(f"{block}.conv{i}", f"{block}.norm{i}") for block in blocks for i in (1, 2)]
    shortcuts = [
        f"{name}.shortcut" for name, block in zip(blocks, model.blocks, strict=True) if list(block.shortcut.children())
    ]
    pairs += [(f"{shortcut}.0", f"{shortcut}.1") for shortcut in shortcuts]
    return {"stem": ["stem", "norm"]} | {convolution: [convolution, norm] for convolution, norm in pairs}


def parameters_with(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that go with a filter of each ranked convolution."""
    return {
        layer: [f"{module}.{leaf}" for module in modules for leaf, _ in model.get_submodule(module).named_parameters()]
        for layer, modules in goes_with(model).items()
    }
