"""Pyramid scene parsing network. Source: Zhao et al., CVPR 2017, arXiv 1612.01105."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgc_lab.recipes.resnet import initialise, normalised, resnet

BINS = (1, 2, 3, 6)
AUXILIARY_WEIGHT = 0.4


class PyramidPooling(nn.Module):
    """The features beside their averages over grids of 1, 2, 3 and 6 cells a side: `channels` + 4 `width` channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), normalised(channels, width, 1)) for bins in BINS
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(resized(level(x), x.shape[-2:]) for level in self.levels)], dim=1)


def resized(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear interpolation to this height and width."""
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


class PSPNet(nn.Module):
    """Dilated ResNet at an eighth of the resolution, pyramid pooling, and an auxiliary head on the third stage.

    (batch, 3, height, width) -> (batch, classes, height, width); in training a pair, with the auxiliary head's second.

    Layers and widths are those of MMSegmentation's pspnet_r50-d8, 48.98 million parameters at 19 classes: a stem of
    three 3x3 convolutions, a head of a quarter of the features' width, an auxiliary one of an eighth. Without the
    dropout of 0.1 before the two classifiers.

    Args:
        backbone: resnet18, resnet50 or resnet101.
        classes: of the pixels.
    """

    def __init__(self, backbone: str, *, classes: int) -> None:
        super().__init__()
        self.backbone = resnet(backbone, stem="deep", dilations=(1, 1, 2, 4))
        del self.backbone.head
        channels = self.backbone.channels
        width = channels // 4
        self.pooling = PyramidPooling(channels, width)
        self.head = nn.Sequential(normalised(channels + len(BINS) * width, width, 3), nn.Conv2d(width, classes, 1))
        self.auxiliary = nn.Sequential(normalised(channels // 2, width // 2, 3), nn.Conv2d(width // 2, classes, 1))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.backbone.features(x)
        outputs = resized(self.head(self.pooling(features[-1])), x.shape[-2:])
        if not self.training:
            return outputs
        return outputs, resized(self.auxiliary(features[-2]), x.shape[-2:])


def pspnet_loss(outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, *, void: int) -> Tensor:
    """Cross entropy of the head and 0.4 times that of the auxiliary head, over the pixels that are not void."""
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets, ignore_index=void)
    head, auxiliary = (F.cross_entropy(part, targets, ignore_index=void) for part in outputs)
    return head + AUXILIARY_WEIGHT * auxiliary
