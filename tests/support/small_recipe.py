"""Recipes for tests of what happens around the steps of a run: they start at once, and a step computes little."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from lgc_lab.recipes.data import Data, TensorSplit
from lgc_lab.recipes.digits import DIGITS
from lgc_lab.recipes.resnet import Block, basic, conv, normalised

CLASSES, TRAIN, TEST = 10, 1200, 120
PACE_S = 0.04


def tiny_resnet() -> nn.Module:
    """Make one residual block: (batch, 1, 8, 8) -> (batch, 10), 9,594 parameters."""
    stem = normalised(conv(1, 16, 3))
    block = Block(basic(16, 24, 2), project=True)
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


class Paced(nn.Module):
    """The same, but a step of training takes its time, so that a kill hits the phase for which it is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = tiny_resnet()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(PACE_S)
        logits: Tensor = self.resnet(x)
        return logits


def draw_patterns(path: str | None, limit_train: int | None) -> Data:
    """Draw images of 8 x 8 pixels, each the pattern of its class with as much noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(TRAIN + TEST) % CLASSES
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=generator)[labels]
    images = patterns + torch.randn(patterns.shape, generator=generator)
    train, test = slice(min(limit_train or TRAIN, TRAIN)), slice(TRAIN, None)
    return Data(TensorSplit(images[train], labels[train]), TensorSplit(images[test], labels[test]))


SMALL = replace(
    DIGITS,
    name="small",
    summary="drawn patterns, a ResNet of one block, without imports that take long",
    model=tiny_resnet,
    data=draw_patterns,
    scheme_defaults={**DIGITS.scheme_defaults, "rate": 0.05},
)
PACED = replace(SMALL, name="paced", model=Paced)
