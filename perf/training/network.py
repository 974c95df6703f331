"""The network that is trained: a small U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDED = 16  # dimensions of a pixel's embedding


class Block(nn.Sequential):
    """Two 3x3 convolutions, each normalized and rectified.

    The rectifier leaks, so that a unit that is negative wherever a rare class is still learns.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels_out),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels_out),
            nn.LeakyReLU(0.1, inplace=True),
        )


class Network(nn.Module):
    """A U-Net of three levels, or one that stops at half the resolution.

    The head is drawn last, so that the body starts the same however many classes there are, and
    what both networks have starts the same. Embeddings of the pixels have a head of their own.
    """

    def __init__(self, channels: int, width: int, half: bool = False, embeds: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [Block(1, width), Block(width, 2 * width), Block(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([Block(6 * width, 2 * width)])
        if not half:
            self.up.append(Block(3 * width, width))
        self.head = nn.Conv2d(2 * width if half else width, channels, 1)
        self.embed = nn.Conv2d(self.head.in_channels, EMBEDDED, 1) if embeds else None

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image))
        return logits

    def features(self, image: Tensor) -> Tensor:
        fine = self.down[0](image)
        middle = self.down[1](functional.max_pool2d(fine, 2))
        coarse = self.down[2](functional.max_pool2d(middle, 2))
        middle = self.up[0](_join(coarse, middle))
        return middle if len(self.up) == 1 else self.up[1](_join(middle, fine))


def _join(coarse: Tensor, fine: Tensor) -> Tensor:
    return torch.cat([functional.interpolate(coarse, size=fine.shape[-2:]), fine], dim=1)
