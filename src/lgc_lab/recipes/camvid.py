"""CamVid: street scenes of 480 x 360 pixels, 367 to train on and 233 to test, eleven classes."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lgc_lab.recipes.data import (
    Array,
    Data,
    Row,
    Table,
    TensorSplit,
    decode_image,
    decoded,
    find_parquet,
    standardised,
)
from lgc_lab.recipes.imagenet import DEVIATION, MEAN
from lgc_lab.recipes.pspnet import PSPNet, pspnet_loss
from lgc_lab.recipes.recipe import Metric, Recipe, poly_decay
from lgc_lab.recipes.resnet import DEPTHS

CLASSES = 11
VOID = 11
SIZE = (480, 360)
CROP = (240, 240)
SCALES = (0.5, 2.0)


def scale_crop_and_flip(images: Tensor, annotations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops of images scaled by 0.5 to 2, half of them mirrored. Source: Zhao et al. 2017, section 5.1.

    One affine map per sample takes the crop's pixels to the image's, so that annotations move with the image:
    bilinear for the image, nearest for the annotation. Outside are zeros (the mean) and void.

    Args:
        images: (batch, 3, height, width), normalised.
        annotations: (batch, height, width).
    """
    count, _, height, width = images.shape
    draws = torch.rand(4, count, generator=generator).to(images.device)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draws[0]
    mirror = torch.where(draws[1] < 0.5, -1.0, 1.0)
    across, down = CROP[1] / (scale * width), CROP[0] / (scale * height)  # the crop's size as a part of the image's
    maps = torch.zeros(count, 2, 3, device=images.device)
    maps[:, 0, 0], maps[:, 0, 2] = mirror * across, (2 * draws[2] - 1) * (1 - across)
    maps[:, 1, 1], maps[:, 1, 2] = down, (2 * draws[3] - 1) * (1 - down)
    grid = F.affine_grid(maps, [count, 1, *CROP], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    above_void = (annotations - VOID).float().unsqueeze(1)  # outside becomes 0, and then void
    labels = F.grid_sample(above_void, grid, mode="nearest", align_corners=False).squeeze(1)
    return crops, labels.long() + VOID


def to_batch(images: Tensor, annotations: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Normalised inputs and targets from uint8 images and annotations."""
    inputs, targets = standardised(images, MEAN, DEVIATION), annotations.long()
    return (inputs, targets) if generator is None else scale_crop_and_flip(inputs, targets, generator)


def load_split(path: str, split: str, limit: int | None) -> TensorSplit:
    """The split's first `limit` images, or all."""
    table = Table(find_parquet(path, split), images=[("image",), ("annotation", "mask")])
    image_column, annotation_column = table.columns
    width, height = SIZE

    def decode(row: Row) -> tuple[Array, Array]:
        image = decode_image(row.values[image_column], f"{row.where}, column {image_column}", size=SIZE)
        where = f"{row.where}, column {annotation_column}"
        annotation = decode_image(row.values[annotation_column], where, mode="index", size=SIZE)
        if annotation.max() > VOID:
            raise ValueError(f"{where}: classes must be in 0 .. {VOID}, got {annotation.max()}.")
        return image.transpose(2, 0, 1), annotation

    shapes = {"images": (3, height, width), "annotations": (height, width)}
    arrays = decoded(table, limit, f"camvid {split}", shapes, decode, ahead=16)
    return TensorSplit(arrays["images"], arrays["annotations"], to_batch)


def load_camvid(path: str | None, limit_train: int | None) -> Data:
    """Parquet files with columns image and annotation (or mask)."""
    if path is None:
        raise ValueError("CamVid needs data: a folder with train.parquet and test.parquet.")
    return Data(load_split(path, "train", limit_train), load_split(path, "test", None))


def count_confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Pixels by true class (row) and predicted class (column), without the void ones."""
    known = targets != VOID
    pairs = CLASSES * targets[known] + outputs.argmax(dim=1)[known]
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double()


def mean_iou(confusion: Tensor) -> float:
    """Percentage of intersection over union, averaged over the classes that occur."""
    intersection = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return float(100 * (intersection / union)[union > 0].mean())


CAMVID_PSPNET = Recipe(
    name="camvid-pspnet",
    summary="CamVid, PSPNet from scratch, mean IoU over 11 classes",
    model=partial(PSPNet, classes=CLASSES),
    data=load_camvid,
    memory_format=torch.channels_last,
    loss=partial(pspnet_loss, void=VOID),
    metric=Metric(name="mean_iou", sums=count_confusion, value=mean_iou),
    batch_size=4,
    least_batch_size=2,  # a batch norm over one cell of one image has no variance
    evaluation_batch=4,
    epochs=200,
    learning_rate=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    learning_rate_factor=poly_decay(0.9),
    backbones=tuple(DEPTHS),
    scheme_defaults={"rate": 0.001, "dense_steps": 200, "warmup_steps": 200, "train_steps": 300},
)
"""Zhao et al. 2017, section 5.1: 16 images a step (here 4 on each of 4 ranks), "poly" with power 0.9. The paper starts
from ImageNet weights, this from random ones."""
