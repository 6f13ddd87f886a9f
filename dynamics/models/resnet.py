"""Residual networks for 32 × 32 images, of any depth 6n + 2, with projection shortcuts."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """inputs ↦ ReLU(F(inputs) + shortcut(inputs)) with F = conv → BN → ReLU → conv → BN, 3 × 3 without bias.

    The shortcut is the identity where the shape stays, else a 1 × 1 convolution without bias → batch normalisation, of
    every `stride`-th row and column. Modules in order: `conv1`, `norm1`, `conv2`, `norm2`, `shortcut`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            # Without a stride of its own: on CPUs with AVX2 and no AVX-512 such a convolution of fewer than 8 channels
            # that lie last has a wrong gradient, hangs or crashes (oneDNN, issue 6035).
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in_channels, S, S) → (N, out_channels, ⌈S / stride⌉, ⌈S / stride⌉)."""
        residual = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(inputs)))))
        kept = functional.avg_pool2d(inputs, 1, self.stride) if self.stride > 1 else inputs
        return functional.relu(residual + self.shortcut(kept))


class ResNet(nn.Module):
    """A 3 × 3 stem, three stages of n basic blocks, the global average and a linear head: depth = 6n + 2.

    widths: channels of the three stages; the second and the third halve the resolution in their first block.
    The stem is protected: every block of the first stage adds to its output.
    Modules in order: `stem`, `norm`, `blocks` (numbered through all stages), `classifier`.
    Raises ValueError for a depth that is not 8, 14, 20, …
    Source: He et al., CVPR 2016, section 4.2, with projections as in Lubana & Dick, ICLR 2021.
    """

    protected: ClassVar[tuple[str, ...]] = ("stem",)

    def __init__(
        self, depth: int = 56, widths: tuple[int, int, int] = WIDTHS, *, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}: a residual network has 6n + 2 layers, such as 8, 20 or 56")
        self.stem = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential()
        channels = widths[0]
        for width, stage_stride in zip(widths, (1, 2, 2), strict=True):
            for stride in (stage_stride, *(1,) * ((depth - 2) // 6 - 1)):
                self.blocks.append(BasicBlock(channels, width, stride))
                channels = width
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        features = self.blocks(functional.relu(self.norm(self.stem(inputs))))
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(features, 1), start_dim=1))


def resnet56(num_classes: int, in_channels: int, scale: Callable[[int], int]) -> ResNet:
    """ResNet-56: three stages of nine blocks; `scale` maps a published channel count to the one built."""
    first, second, third = map(scale, WIDTHS)
    return ResNet(56, (first, second, third), num_classes=num_classes, in_channels=in_channels)
