"""Data sets: from the hub's parquet files to batches of tensors, decoded once."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

logger = logging.getLogger("lgc")

Array = NDArray[Any]
Transform = Callable[[Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]]

READ_ROWS = 64  # that are in memory at once, decoded or not
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.parquet")


class Split(ABC):
    """Samples, read in batches."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples; augmented from the generator if there is one."""

    def to(self, device: torch.device) -> Split:
        """Move the samples to the device where that makes batches faster."""
        return self


class Data(NamedTuple):
    """Split to train on, and one to test on."""

    train: Split
    test: Split


@dataclass(frozen=True, eq=False)
class TensorSplit(Split):
    """Samples in memory, one row of inputs and targets each.

    `transform` makes a batch of both out of the rows, with a generator for augmentation or without.
    """

    inputs: Tensor
    targets: Tensor
    transform: Transform = lambda inputs, targets, generator: (inputs, targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.inputs.device)
        return self.transform(self.inputs[indices], self.targets[indices], generator)

    def to(self, device: torch.device) -> TensorSplit:
        return TensorSplit(self.inputs.to(device), self.targets.to(device), self.transform)


def find_parquet(path: str, split: str) -> list[Path]:
    """Find the files of a split in a folder in the hub's layout, or in a data set of the hub by name.

    The layouts are `train.parquet`, `train-00000-of-00002.parquet` and so on, in the folder or one below it.

    Raises:
        FileNotFoundError: if there is no such folder, split or shard.
        ValueError: if there are several candidates.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(path, split)
    for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"*/{split}.parquet", f"*/{split}-*.parquet"):
        files = sorted(folder.glob(pattern))
        parents = sorted({str(file.parent) for file in files})
        if len(parents) > 1:
            raise ValueError(f"{folder} has split {split} in {', '.join(parents)}: name one of them.")
        shards = [match.groups() for file in files if (match := SHARD.fullmatch(file.name))]
        for _, total in shards:
            if missing := set(range(int(total))) - {int(number) for number, of in shards if of == total}:
                raise FileNotFoundError(f"{files[0].parent}: shard {min(missing):05} of {total} is missing.")
        if files:
            return files
    raise FileNotFoundError(f"{folder} has no {split}.parquet and no {split}-*.parquet, nor has a folder in it.")


def _download(name: str, split: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a data set on the hub (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [f"{split}*.parquet", f"*/{split}*.parquet"]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{name} is not a folder, and the hub does not give it: {reason}") from error


class Cell(NamedTuple):
    """Value of a data set, of a struct its bytes; `where` names file, row and column for messages."""

    value: Any
    where: str

    def image(self) -> bytes:
        """Take it for an encoded image; ValueError if it is no struct with binary bytes."""
        if not isinstance(self.value, bytes):
            raise ValueError(f"{self.where}: must be a struct with binary bytes, got {self.value!r:.80}.")
        return self.value

    def label(self, classes: int) -> int:
        """Take it for a label; ValueError if it is no integer in 0 .. classes - 1."""
        if type(self.value) is not int or not 0 <= self.value < classes:
            raise ValueError(f"{self.where}: label must be in 0 .. {classes - 1}, got {self.value!r}.")
        return self.value


class Table:
    """Table of the first `rows` rows, at most `limit`, of a split's parquet `files`, in order; see `find_parquet`.

    `columns` has the names that each column may have; the first that is there counts, the same in all files.

    Raises:
        FileNotFoundError: see `find_parquet`.
        ValueError: if a file is not parquet or empty, or a column is missing.
    """

    def __init__(self, path: str, split: str, columns: Sequence[Sequence[str]], limit: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = find_parquet(path, split)
        self._names: list[str] = []
        self._lengths: list[int] = []
        for file in self.files:
            try:
                with pq.ParquetFile(file) as parquet:
                    rows, found = parquet.metadata.num_rows, parquet.schema_arrow.names
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # missing, forbidden, unreadable
                    raise
                raise ValueError(f"{file} is not a parquet file: {error}") from None
            if rows == 0:
                raise ValueError(f"{file} has no rows.")
            self._lengths.append(rows)
            if missing := [names for names in columns if not set(names) & set(found)]:
                raise ValueError(f"{file} has no column {' or '.join(missing[0])}; it has {', '.join(found)}.")
            names = [next(name for name in names if name in found) for names in columns]
            if self._names not in ([], names):
                raise ValueError(f"{file} has {', '.join(names)} where {self.files[0]} has {', '.join(self._names)}.")
            self._names = names
        self.rows = min(sum(self._lengths), sum(self._lengths) if limit is None else limit)

    def read(self) -> Iterator[tuple[Cell, ...]]:
        """Yield the rows, with images encoded. Raises ValueError for a damaged file."""
        return islice(chain.from_iterable(map(self._read, self.files, self._lengths)), self.rows)

    def _read(self, file: Path, length: int) -> Iterator[tuple[Cell, ...]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, columns=self._names):
                for row in batch.to_pylist():
                    values = {name: v.get("bytes") if isinstance(v, dict) else v for name, v in row.items()}
                    yield tuple(Cell(values[name], f"{file}, row {number}, column {name}") for name in self._names)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read after row {number}: {error}") from None
        if number != length:
            raise ValueError(f"{file} must have {length} rows by its footer, got {number}.")


def decode_image(
    encoded: Cell,
    *,
    size: tuple[int, int],
    indices: bool = False,
    part: Callable[[int, int], tuple[float, float, float, float]] | None = None,
) -> Array:
    """Decode a JPEG or PNG of this width and height to pixels, uint8 of shape (3, height, width).

    With `indices`, take one channel of class indices as it is, (height, width). `part` gives a box to cut out, of the
    image's width and height, and to scale to `size`, bilinear with antialiasing. Raises ValueError if the image cannot
    be decoded or has another size.
    """
    from PIL import Image, UnidentifiedImageError

    content = encoded.image()
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if part is None and image.size != size:
                raise ValueError(f"must be {size[0]} x {size[1]} pixels, got {image.size[0]} x {image.size[1]}.")
            if indices:
                if image.mode not in ("L", "P"):
                    raise ValueError(f"must have one channel of class indices, got mode {image.mode}.")
                return np.array(image)
            pixels = image.convert("RGB")
            if part is not None:
                pixels = pixels.resize(size, Image.Resampling.BILINEAR, part(*image.size))
            return np.array(pixels).transpose(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError(f"{encoded.where}: neither JPEG nor PNG.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{encoded.where}: {error}") from None


def standardised(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Images (batch, channels, height, width) of uint8 as floats, by the channels' mean and deviation in [0, 1]."""
    centre, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, deviation))
    return (images / 255 - centre) / scale


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any], ahead: int = READ_ROWS) -> Iterator[Any]:
    """`map` in order, by as many threads as there are cores, with at most `ahead` items and results in memory."""
    items = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while part := list(islice(items, ahead)):
            yield from pool.map(function, part)


def cache_folder() -> Path:
    """Find where decoded data is kept: $LGC_CACHE, or lgc in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LGC_CACHE") or Path(base, "lgc"))


def cached(
    files: Sequence[Path], name: str, shape: tuple[int, ...], kind: DTypeLike, fill: Callable[[Array], None]
) -> Array:
    """Map an array that is made from files into memory; it is made only if the cache does not have it yet.

    The key is path, size and time of change of every file, and the other arguments; `name` is of what else decides the
    content, which `fill` writes. An array is in the cache whole or not at all, and nothing else is read from it than
    numbers. Others that want the same wait until it is there. Raises OSError if the disk is full, or the cache's file
    system has no locks.
    """
    described = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((name, shape, np.dtype(kind), described)).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.warning("making %s, or waiting for another process that makes it", path)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _make(path, shape, kind, fill)
    # copy-on-write, because torch warns of arrays that cannot be written to
    mapped: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    return mapped


def _make(path: Path, shape: tuple[int, ...], kind: DTypeLike, fill: Callable[[Array], None]) -> None:
    # a killed process leaves this file, and the next one begins it anew; other machines may not see the lock
    making = path.with_name(f"making-{socket.gethostname()}-{path.name}")
    try:
        array = np.lib.format.open_memmap(making, mode="w+", dtype=kind, shape=shape)
        with making.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, making.stat().st_size)  # else a full disk is a SIGBUS in `fill`
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot promise room
                    raise OSError(error.errno, error.strerror, str(making)) from None
            fill(array)
            array.flush()
            os.fsync(file.fileno())  # else a power failure leaves a file of the right size without the content
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)


class Column(NamedTuple):
    """Column of a table that is to be decoded."""

    names: tuple[str, ...]  # that it may have, see `Table`
    shape: tuple[int, ...]  # of what `decode` gives of a cell, numbers in 0 .. 255
    decode: Callable[[Cell], Array | int]  # called in threads


def decoded_splits(
    name: str, path: str, limit_train: int | None, columns: tuple[Column, Column], transform: Transform
) -> Data:
    """Load splits train and test of parquet files, inputs and targets as uint8; decoded once, cached by this name."""
    kind = np.dtype([(column.names[0], np.uint8, column.shape) for column in columns])

    def decode(row: tuple[Cell, ...]) -> tuple[Array | int, ...]:
        return tuple(column.decode(cell) for column, cell in zip(columns, row, strict=True))

    def load(split: str, limit: int | None) -> TensorSplit:
        table = Table(path, split, [column.names for column in columns], limit)

        def fill(array: Array) -> None:
            for number, values in enumerate(map_in_threads(decode, table.read())):
                array[number] = values

        array = cached(table.files, name, (table.rows,), kind, fill)
        inputs, targets = (torch.from_numpy(array[column.names[0]]) for column in columns)
        return TensorSplit(inputs, targets, transform)

    return Data(load("train", limit_train), load("test", None))
