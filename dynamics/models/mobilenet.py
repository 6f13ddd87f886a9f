"""MobileNet-V1 for 32 × 32 images: depthwise-separable convolutions behind a stem of stride 1."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

STEM = 32
BLOCKS: tuple[tuple[int, int], ...] = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1),
)  # fmt: skip


class SeparableBlock(nn.Module):
    """Depthwise 3 × 3, then pointwise 1 × 1; each convolution without bias → batch normalisation → ReLU.

    The depthwise convolution has one filter per input channel, which is pruned with the filter that feeds it.
    Modules in order: `depthwise`, `norm1`, `pointwise`, `norm2`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size=3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in_channels, S, S) → (N, out_channels, ⌈S / stride⌉, ⌈S / stride⌉)."""
        filtered = functional.relu(self.norm1(self.depthwise(inputs)))
        return functional.relu(self.norm2(self.pointwise(filtered)))


class MobileNet(nn.Module):
    """A 3 × 3 stem and a chain of separable blocks, average-pooled by 2 before the linear head.

    stem: output channels of the first convolution. blocks: (output channels, stride) of each separable block; their
    strides must multiply to 16, so that 32 × 32 arrives as 2 × 2 at the pooling.
    Modules in order: `stem`, `norm`, `blocks`, `classifier`.
    Source: Howard et al., arXiv:1704.04861, with the strides for CIFAR of Lubana & Dick, ICLR 2021.
    """

    protected: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, stem: int = STEM, blocks: Sequence[tuple[int, int]] = BLOCKS, *, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        widths = [stem, *(width for width, _ in blocks)]
        strides = [stride for _, stride in blocks]
        self.stem = nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        self.blocks = nn.Sequential(*map(SeparableBlock, widths[:-1], widths[1:], strides))
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        features = self.blocks(functional.relu(self.norm(self.stem(inputs))))
        return self.classifier(torch.flatten(functional.avg_pool2d(features, kernel_size=2), start_dim=1))


def mobilenet_v1(num_classes: int, in_channels: int, scale: Callable[[int], int]) -> MobileNet:
    """MobileNet-V1: 27 convolutions; `scale` maps a published channel count to the one built."""
    blocks = [(scale(width), stride) for width, stride in BLOCKS]
    return MobileNet(scale(STEM), blocks, num_classes=num_classes, in_channels=in_channels)
