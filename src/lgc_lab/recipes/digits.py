"""Handwritten digits, 8 x 8 pixels, that come with scikit-learn: a run of half a minute that needs no download."""

from dataclasses import replace

import torch
from torch import nn

from lgc_lab.recipes.data import Data, TensorSplit
from lgc_lab.recipes.recipe import Recipe, warmup_and_cosine
from lgc_lab.recipes.resnet import Block, basic, conv, normalised

TEST_FRACTION = 1 / 3


def small_resnet() -> nn.Module:
    """Make three residual blocks at 8, 4 and 2 pixels: (batch, 1, 8, 8) -> (batch, 10), 1.0 million parameters."""
    stem = normalised(conv(1, 32, 3))
    blocks = [Block(basic(*sizes), project=True) for sizes in ((32, 32, 1), (32, 96, 2), (96, 256, 2))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def wide_mlp() -> nn.Module:
    """Make two hidden layers of 3,200: (batch, 1, 8, 8) -> (batch, 10), 10.5 million parameters."""
    width = 3200
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def load_digits(path: str | None, limit_train: int | None) -> Data:
    """Load two thirds of the 1,797 images to train on and one third to test, each class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise ValueError(f"digits come with scikit-learn: data must not be set, got {path!r}.")
    pixels, labels = load_digits(return_X_y=True)
    rows = train_test_split(range(len(labels)), test_size=TEST_FRACTION, random_state=0, stratify=labels)
    inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    train, test = rows[0][:limit_train], rows[1]
    return Data(TensorSplit(inputs[train], targets[train]), TensorSplit(inputs[test], targets[test]))


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
        "start_steps": 15,
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
