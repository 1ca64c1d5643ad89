"""CIFAR-10: 50,000 images of 32 x 32 pixels to train on and 10,000 to test, ten classes."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lgc_lab.recipes.data import Cell, Column, Data, decode_image, decoded_splits, standardised
from lgc_lab.recipes.recipe import Recipe, step_decay, warmup_and_cosine
from lgc_lab.recipes.resnet import RESNETS, resnet20

CLASSES = 10
SIZE = 32
PADDING = 4
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2470, 0.2435, 0.2616)
COLUMNS = (
    Column(("img", "image"), (3, SIZE, SIZE), partial(decode_image, size=(SIZE, SIZE))),
    Column(("label",), (), partial(Cell.label, classes=CLASSES)),
)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop the images, padded by 4 pixels, at random, and mirror half of them. Source: He et al. 2016, section 4.2."""
    count, _, height, width = images.shape
    down, right = torch.randint(2 * PADDING + 1, (2, count), generator=generator).to(images.device)
    mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
    windows = F.pad(images, (PADDING,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(count, device=images.device), :, down, right]
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)


def to_batch(images: Tensor, labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Make normalised inputs and targets from uint8 images and labels."""
    if generator is not None:
        images = crop_and_flip(images, generator)
    return standardised(images, MEAN, DEVIATION), labels.long()


def load_cifar10(path: str | None, limit_train: int | None) -> Data:
    """Load parquet files with columns img (or image) and label."""
    if path is None:
        raise ValueError("CIFAR-10 needs data: a folder with train.parquet and test.parquet, or uoft-cs/cifar10.")
    return decoded_splits("cifar10", path, limit_train, COLUMNS, to_batch)


CIFAR10_RESNET20 = Recipe(
    name="cifar10-resnet20",
    summary="CIFAR-10, ResNet-20 of 0.27 million parameters, 91.25 % after 164 epochs",
    model=resnet20,
    data=load_cifar10,
    memory_format=torch.channels_last,
    batch_size=32,
    epochs=164,
    learning_rate=0.1,
    weight_decay=1e-4,
    learning_rate_factor=step_decay(0.5, 0.75),
    scheme_defaults={"rate": 0.001, "dense_steps": 200, "warmup_steps": 400, "train_steps": 300},
)
"""He et al. 2016, section 4.2 and table 6: 128 images a step (here 32 on each of 4 ranks), 64,000 steps, a tenth of
the learning rate at half and at three quarters of them; the same fractions of a shorter run."""


def _bottleneck_recipe(name: str, millions: str) -> Recipe:
    return replace(
        CIFAR10_RESNET20,
        name=f"cifar10-{name}",
        summary=f"CIFAR-10, {name} with the CIFAR stem, {millions} million parameters",
        model=partial(RESNETS[name], classes=CLASSES, stem="cifar"),
        epochs=200,
        weight_decay=5e-4,
        learning_rate_factor=warmup_and_cosine,
    )


CIFAR10_RESNET50 = _bottleneck_recipe("resnet50", "23.5")
CIFAR10_RESNET101 = _bottleneck_recipe("resnet101", "42.5")
