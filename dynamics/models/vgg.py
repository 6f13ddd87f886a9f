"""VGG for 32 × 32 images: 3 × 3 convolutions, each followed by ReLU and then batch normalisation."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

POOL: Final = "M"
VGG13: tuple[int | Literal["M"], ...] = (
    64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL,
)  # fmt: skip


class VGG(nn.Module):
    """A chain of (convolution without bias → ReLU → batch normalisation), max-pooled by 2 at each `POOL`.

    widths: output channels of each convolution, with "M" for a pooling. Five poolings bring 32 × 32 down to 1 × 1,
    which `classifier` reads, so it has as many inputs as the last width.
    Modules: `features` (numbered in order) and `classifier`.
    Source: Simonyan & Zisserman, ICLR 2015, with the order conv → ReLU → BN of Lubana & Dick, ICLR 2021.
    """

    protected: ClassVar[tuple[str, ...]] = ()

    def __init__(self, widths: Sequence[int | Literal["M"]] = VGG13, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            if width == POOL:
                layers += [nn.MaxPool2d(2)]
            else:
                convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
                layers += [convolution, nn.ReLU(), nn.BatchNorm2d(width)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        return self.classifier(torch.flatten(self.features(inputs), start_dim=1))


def vgg13(num_classes: int, in_channels: int, scale: Callable[[int], int]) -> VGG:
    """VGG-13: ten convolutions and one linear layer; `scale` maps a published channel count to the one built."""
    widths = [width if width == POOL else scale(width) for width in VGG13]
    return VGG(widths, num_classes=num_classes, in_channels=in_channels)
