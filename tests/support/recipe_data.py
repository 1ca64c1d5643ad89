"""Small data sets in the hub's layout, made of random images, and the real ones where they are."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def real_data(name: str) -> str:
    """Folder of a real data set; skips the test where it is absent."""
    root = Path(os.environ.get("LGC_DATA") or Path(__file__).parents[3] / "shared" / "data")
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in {root}; set LGC_DATA to the folder that has it")
    return str(folder)


def encode(pixels: Any, form: str = "PNG") -> bytes:
    """An encoded image of uint8 pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


def random_pixels(height: int, width: int, *channels: int, top: int = 256, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(top, size=(height, width, *channels), dtype=np.uint8)


def write_parquet(file: Path, columns: Mapping[str, list[Any]]) -> None:
    """A file of images (lists of bytes) and integers."""
    arrays = {
        name: pa.array([{"bytes": value, "path": None} for value in values], IMAGE)
        if any(isinstance(value, bytes) for value in values)
        else pa.array(values)
        for name, values in columns.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), file)


def cifar10_columns(rows: int, image: str = "img") -> dict[str, list[Any]]:
    images = [encode(random_pixels(32, 32, 3, seed=row)) for row in range(rows)]
    return {image: images, "label": [row % 10 for row in range(rows)]}


def cifar10_folder(folder: Path) -> str:
    """20 images to train on and 10 to test."""
    write_parquet(folder / "train.parquet", cifar10_columns(20))
    write_parquet(folder / "test.parquet", cifar10_columns(10))
    return str(folder)


def camvid_columns(rows: int) -> dict[str, list[Any]]:
    blocks = [random_pixels(6, 8, top=12, seed=row).repeat(60, 0).repeat(60, 1) for row in range(rows)]
    images = [encode(np.stack([21 * annotation] * 3, axis=2), "JPEG") for annotation in blocks]
    return {"image": images, "annotation": [encode(annotation) for annotation in blocks]}


def camvid_folder(folder: Path) -> str:
    """Three images to train on and two to test, whose colour tells the class."""
    write_parquet(folder / "train.parquet", camvid_columns(3))
    write_parquet(folder / "test.parquet", camvid_columns(2))
    return str(folder)


def imagenet_folder(folder: Path) -> str:
    """Eight images to train on and two to test, of two classes and many shapes."""
    for split, rows in (("train", 8), ("val", 2)):
        for row in range(rows):
            file = folder / split / f"n0{row % 2}" / f"{row}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(random_pixels(200 + 20 * row, 300, 3, seed=row), "JPEG"))
    return str(folder)


def imagenet_parquet_folder(folder: Path) -> str:
    """The same rows in the hub's parquet layout, in two shards."""
    source = Path(imagenet_folder(folder / "source"))
    for split, name, shards in (("train", "train", 2), ("val", "validation", 1)):
        files = sorted(source.glob(f"{split}/*/*.JPEG"))
        for shard in range(shards):
            part = files[shard * len(files) // shards : (shard + 1) * len(files) // shards]
            write_parquet(
                folder / "hub" / "data" / f"{name}-{shard:05}-of-{shards:05}.parquet",
                {"image": [file.read_bytes() for file in part], "label": [int(file.parent.name[1:]) for file in part]},
            )
    return str(folder / "hub")
