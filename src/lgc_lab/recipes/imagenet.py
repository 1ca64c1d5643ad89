"""ImageNet (ILSVRC 2012): 1,281,167 images to train on and 50,000 to test, a thousand classes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgc_lab.recipes.data import Array, Cell, Data, Split, Table, cached, decode_image, standardised
from lgc_lab.recipes.recipe import Recipe, step_decay
from lgc_lab.recipes.resnet import RESNETS

CLASSES = 1000
SIZE = 224
SHORT_SIDE = 256  # of the image whose central 224 x 224 pixels are tested on
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]  # left, upper, right and lower edge in pixels


def central_box(width: int, height: int, part: float = 1.0) -> Box:
    """Take the square in the middle whose side is this part of the image's shorter one."""
    side = part * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, draws: Tensor) -> Box:
    """Draw a box of 8 to 100 % of the area with an aspect of 3/4 to 4/3. Source: Szegedy et al., arXiv 1409.4842.

    Of `draws`, (attempts, 4) from [0, 1), the first that lies within the image counts, else the middle.
    """
    for area, aspect, across, down in draws.tolist():
        ratio = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
        pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * width * height
        box_width, box_height = (pixels * ratio) ** 0.5, (pixels / ratio) ** 0.5
        if box_width <= width and box_height <= height:
            left, upper = across * (width - box_width), down * (height - box_height)
            return left, upper, left + box_width, upper + box_height
    return central_box(width, height)


class EncodedSplit(Split):
    """Images that are decoded when they are asked for, in threads; `encoded` gives that of an index."""

    def __init__(self, encoded: Callable[[int], Cell], labels: Tensor) -> None:
        self.encoded = encoded
        self.labels = labels
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if generator is None:
            images = self.pool.map(self.decode, indices.tolist())
        else:
            draws = torch.rand(len(indices), ATTEMPTS, 4, generator=generator)
            mirrored = torch.rand(len(indices), generator=generator) < 0.5
            images = self.pool.map(self.decode, indices.tolist(), draws, mirrored.tolist())
        pixels = torch.from_numpy(np.stack(list(images)))
        return standardised(pixels, MEAN, DEVIATION), self.labels[indices].long()

    def decode(self, index: int, draws: Tensor | None = None, mirrored: bool = False) -> Array:
        """Decode part of an image, (3, 224, 224): random if there are draws, else the middle."""
        middle = partial(central_box, part=SIZE / SHORT_SIDE)
        box = middle if draws is None else partial(random_box, draws=draws)
        pixels = decode_image(self.encoded(index), size=(SIZE, SIZE), part=box)
        return pixels[:, :, ::-1] if mirrored else pixels


def load_parquet(path: str, split: str, limit: int | None) -> EncodedSplit:
    """Load the split's first `limit` images. Their encoded bytes are copied to the cache, to be read in any order."""
    table = Table(path, split, [("image", "img"), ("label",)], limit)

    def fill_index(index: Array) -> None:
        for number, (image, label) in enumerate(table.read()):
            index[number] = len(image.image()), label.label(CLASSES)
        index["end"] = np.cumsum(index["end"])

    def fill(content: Array) -> None:
        for (image, _), end in zip(table.read(), index["end"], strict=True):
            encoded = np.frombuffer(image.image(), np.uint8)
            content[end - encoded.size : end] = encoded

    index = cached(table.files, "imagenet-index", (table.rows,), [("end", np.int64), ("label", np.int64)], fill_index)
    content = cached(table.files, "imagenet", (int(index["end"][-1]),), np.uint8, fill)

    def encoded(number: int) -> Cell:
        start = index["end"][number - 1] if number else 0
        return Cell(content[start : index["end"][number]].tobytes(), f"{path}, {split}, image {number}")

    return EncodedSplit(encoded, torch.from_numpy(index["label"]))


def load_folder(folder: Path, classes: list[str], limit: int | None) -> EncodedSplit:
    """Load images in one folder for each class; a limit takes them evenly spaced, so that all classes are there."""
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / name).glob("*.JPEG"))]
    if not files:
        raise FileNotFoundError(f"{folder} has no images {classes[0]}/*.JPEG and so on.")
    count = len(files) if limit is None else min(limit, len(files))
    files = [files[position * len(files) // count] for position in range(count)]

    def encoded(index: int) -> Cell:
        return Cell(files[index][0].read_bytes(), str(files[index][0]))

    return EncodedSplit(encoded, torch.tensor([label for _, label in files]))


def load_imagenet(path: str | None, limit_train: int | None) -> Data:
    """Load folders train/<class>/*.JPEG and val/<class>/*.JPEG, or parquet files with columns image and label."""
    if path is None:
        raise ValueError("ImageNet needs data: a folder with train/ and val/, or ILSVRC/imagenet-1k.")
    train, test = Path(path, "train"), Path(path, "val")
    if not train.is_dir():
        return Data(load_parquet(path, "train", limit_train), load_parquet(path, "validation", None))
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    if not 1 <= len(classes) <= CLASSES:
        raise ValueError(f"{train} must have 1 .. {CLASSES} folders, one for each class, got {len(classes)}.")
    unknown = {entry.name for entry in test.iterdir() if entry.is_dir()} - set(classes)
    if unknown:
        raise ValueError(f"{test} has a class that {train} has not: {min(unknown)}.")
    return Data(load_folder(train, classes, limit_train), load_folder(test, classes, None))


IMAGENET_RESNET50 = Recipe(
    name="imagenet-resnet50",
    summary="ImageNet, ResNet-50 of 25.6 million parameters, 76.4 % after 90 epochs",
    model=partial(RESNETS["resnet50"], zero_init=True),
    data=load_imagenet,
    memory_format=torch.channels_last,
    batch_size=64,
    evaluation_batch=128,
    epochs=90,
    learning_rate=0.1,
    weight_decay=1e-4,
    learning_rate_factor=step_decay(30 / 90, 60 / 90, 80 / 90, warmup=5 / 90),
    scheme_defaults={"rate": 0.001, "dense_steps": 200, "warmup_steps": 20_000, "train_steps": 300},
)
"""Goyal et al., arXiv 1706.02677, sections 5.1 and 5.3: 256 images a step at 0.1 (here 64 on each of 4 ranks), a tenth
after 30, 60 and 80 of 90 epochs. Warm-up of the rate over four epochs: Lin et al., DGC, section 3.3."""
