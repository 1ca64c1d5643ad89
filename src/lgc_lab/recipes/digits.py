"""Handwritten digits, 8 x 8 pixels, that come with scikit-learn: a run of half a minute that needs no download."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lgc_lab.recipes.data import Data, TensorSplit
from lgc_lab.recipes.recipe import Recipe, warmup_and_cosine
from lgc_lab.recipes.resnet import Block, basic, conv, normalised

TEST_FRACTION = 1 / 3


def block(inputs: int, outputs: int, stride: int) -> Block:
    """Make a residual block whose shortcut has a convolution also where the shape stays."""
    return Block(basic(inputs, outputs, stride), project=True)


def small_resnet() -> nn.Module:
    """Three residual blocks at 8, 4 and 2 pixels: (batch, 1, 8, 8) -> (batch, 10), 1.0 million parameters."""
    stem = normalised(conv(1, 32, 3))
    blocks = block(32, 32, 1), block(32, 96, 2), block(96, 256, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def wide_mlp() -> nn.Module:
    """Two hidden layers of 3,200: (batch, 1, 8, 8) -> (batch, 10), 10.5 million parameters."""
    width = 3200
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def to_batch(pixels: Tensor, labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return them as they are: digits are not augmented."""
    return pixels, labels


def load_digits(path: str | None, limit_train: int | None) -> Data:
    """Two thirds of the 1,797 images to train on and one third to test, each class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise ValueError(f"digits come with scikit-learn: data must not be set, got {path!r}.")
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=TEST_FRACTION, random_state=0, stratify=labels)
    train_inputs, test_inputs = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_targets, test_targets = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Data(
        TensorSplit(train_inputs[:limit_train], train_targets[:limit_train], to_batch),
        TensorSplit(test_inputs, test_targets, to_batch),
    )


DIGITS = Recipe(
    name="digits",
    summary="scikit-learn's digits, a ResNet of 1.0 million parameters, half a minute",
    model=small_resnet,
    data=load_digits,
    memory_format=torch.channels_last,
    batch_size=16,
    epochs=24,
    learning_rate=0.05,
    weight_decay=5e-4,
    learning_rate_factor=warmup_and_cosine,
    scheme_defaults={
        "rate": 0.003,
        "dense_steps": 15,
        "warmup_steps": 25,
        "train_steps": 80,
        "autoencoder_updates": 2,
        "refresh_steps": 30,
    },
)

DIGITS_MLP = replace(
    DIGITS,
    name="digits-mlp",
    summary="scikit-learn's digits, a wide MLP of 10.5 million parameters that computes little for their number",
    model=wide_mlp,
    memory_format=torch.contiguous_format,
)
"""A step computes for a few ten milliseconds and has 42 MB of gradients: for the time on links."""
