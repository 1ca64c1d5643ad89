"""Data sets: from the hub's parquet files to batches of tensors, decoded once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger("lgc")

Array = NDArray[Any]

IMAGE_FORMATS = ("JPEG", "PNG")
READ_ROWS = 256
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
        """The same samples, on the device where that makes batches faster."""
        return self


class Data(NamedTuple):
    """A split to train on and one to test on."""

    train: Split
    test: Split


class TensorSplit(Split):
    """Samples in memory.

    Args:
        inputs, targets: one row per sample.
        transform: makes a batch of both out of the rows, with a generator for augmentation or without.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        transform: Callable[[Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]],
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.inputs.device)
        return self.transform(self.inputs[indices], self.targets[indices], generator)

    def to(self, device: torch.device) -> TensorSplit:
        return TensorSplit(self.inputs.to(device), self.targets.to(device), self.transform)


def find_parquet(path: str, split: str) -> list[Path]:
    """The files of a split in a folder in the hub's layout, or in a data set of the hub by name.

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
        if files:
            _require_all_shards(files)
            return files
    raise FileNotFoundError(f"{folder} has no {split}.parquet and no {split}-*.parquet, nor has a folder in it.")


def _require_all_shards(files: list[Path]) -> None:
    numbers = [match.groups() for file in files if (match := SHARD.fullmatch(file.name))]
    for _, total in numbers:
        missing = set(range(int(total))) - {int(number) for number, of in numbers if of == total}
        if missing:
            raise FileNotFoundError(f"{files[0].parent}: shard {min(missing):05} of {total} is missing.")


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


class Row(NamedTuple):
    """One row of a parquet file; `where` names file and row for messages."""

    where: str
    values: Mapping[str, Any]


class Table:
    """The rows of parquet files with the same columns, in order.

    Args:
        files: at least one.
        images: columns of encoded images, by the names that they may have; the first there is counts.
        labels: the same for columns of integers.

    Raises:
        ValueError: if a file is not parquet or empty, or a column is missing or of another type.
    """

    def __init__(
        self, files: Sequence[Path], *, images: Sequence[Sequence[str]], labels: Sequence[Sequence[str]] = ()
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = list(files)
        self.columns: list[str] = []
        self._rows: list[int] = []
        for file in files:
            try:
                metadata = pq.read_metadata(file)
                schema = pq.read_schema(file)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # missing, forbidden, unreadable
                    raise
                raise ValueError(f"{file} is not a parquet file: {error}") from None
            if metadata.num_rows == 0:
                raise ValueError(f"{file} has no rows.")
            self._rows.append(metadata.num_rows)
            columns = [
                *(_column(file, schema, names, "struct with binary bytes", _is_image) for names in images),
                *(_column(file, schema, names, "integer", pa.types.is_integer) for names in labels),
            ]
            if self.columns not in ([], columns):
                raise ValueError(f"{file} has {', '.join(columns)} where {files[0]} has {', '.join(self.columns)}.")
            self.columns = columns

    @property
    def rows(self) -> int:
        """Number of rows in all files."""
        return sum(self._rows)

    def read(self, limit: int | None = None) -> Iterator[Row]:
        """The first `limit` rows, with images as encoded bytes.

        Raises:
            ValueError: for a damaged file, or an empty value.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        left = self.rows if limit is None else min(limit, self.rows)
        for file, rows in zip(self.files, self._rows, strict=True):
            if left == 0:
                return
            number = 0
            try:
                for batch in pq.ParquetFile(file).iter_batches(min(READ_ROWS, left), columns=self.columns):
                    for values in batch.slice(0, left).to_pylist():
                        yield Row(f"{file}, row {number}", _checked(f"{file}, row {number}", values))
                        number += 1
                        left -= 1
                    if left == 0:
                        return
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file} cannot be read after row {number}: {error}") from None
            if number != rows:
                raise ValueError(f"{file} must have {rows} rows by its footer, got {number}.")


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _column(file: Path, schema: Any, names: Sequence[str], kind: str, accepts: Callable[[Any], bool]) -> str:
    for name in names:
        if name in schema.names:
            found = schema.field(name).type
            if not accepts(found):
                raise ValueError(f"{file}: column {name} must be {kind}, got {found}.")
            return name
    raise ValueError(f"{file} has no column {' or '.join(names)}; it has {', '.join(schema.names)}.")


def _checked(where: str, values: dict[str, Any]) -> dict[str, Any]:
    row = {name: value["bytes"] if isinstance(value, dict) else value for name, value in values.items()}
    for name, value in row.items():
        if value is None:
            raise ValueError(f"{where}, column {name}: empty.")
    return row


def decode_image(
    encoded: bytes,
    where: str,
    *,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
    part: Callable[[int, int], tuple[float, float, float, float]] | None = None,
    resize: tuple[int, int] | None = None,
) -> Array:
    """Pixels of an encoded image, uint8.

    Args:
        encoded: JPEG or PNG.
        where: file, row and column, for messages.
        mode: "RGB" converts to (height, width, 3); "index" takes (height, width) as it is.
        size: width and height that it must have.
        part: box to cut out, of width and height.
        resize: width and height to scale to, bilinear with antialiasing.

    Raises:
        ValueError: if it cannot be decoded or has another size.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            if size is not None and image.size != size:
                raise ValueError(f"must be {size[0]} x {size[1]} pixels, got {image.size[0]} x {image.size[1]}.")
            if mode == "index" and image.mode not in ("L", "P"):
                raise ValueError(f"must have one channel of class indices, got mode {image.mode}.")
            pixels = image.convert("RGB") if mode == "RGB" else image
            if resize is not None:
                box = part(*image.size) if part is not None else None
                pixels = pixels.resize(resize, Image.Resampling.BILINEAR, box)
            return np.array(pixels, dtype=np.uint8)
    except UnidentifiedImageError:
        raise ValueError(f"{where}: neither {' nor '.join(IMAGE_FORMATS)}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {error}") from None


def standardised(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Images (batch, channels, height, width) of uint8 as floats, by the channels' mean and deviation in [0, 1]."""
    centre, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, deviation))
    return (images / 255 - centre) / scale


def check_label(label: int, classes: int, where: str) -> int:
    """Check that a label is one of `classes`, and return it.

    Raises:
        ValueError: if it is not.
    """
    if not 0 <= label < classes:
        raise ValueError(f"{where}: label must be in 0 .. {classes - 1}, got {label}.")
    return label


def map_in_threads(function: Callable[[Any], Any], items: Iterator[Any], ahead: int = 256) -> Iterator[Any]:
    """`map` in order, by as many threads as there are cores, without reading more than `ahead` items ahead."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = []
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == ahead:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def cache_folder() -> Path:
    """Find where decoded data is kept: $LGC_CACHE, or lgc in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LGC_CACHE") or Path(base, "lgc"))


def cached(
    files: Sequence[Path], version: str, names: Sequence[str], make: Callable[[Path], None]
) -> dict[str, Tensor]:
    """Arrays that were made from files, by name, mapped into memory; made only if the cache does not have them yet.

    The key is path, size and time of change of every file, and `version`. A folder of the cache is there whole or
    not at all, and nothing else is read from it than numbers. Others that want the same wait until it is there.

    Args:
        files: what the arrays are made from.
        version: names everything else that decides the result; its first word names the folder.
        names: of the arrays.
        make: writes `name.npy` files into a folder.

    Raises:
        OSError: if the disk is full.
    """
    described = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((version, described)).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{version.partition(' ')[0]}-{key}"

    def is_there() -> bool:
        return all((folder / f"{name}.npy").is_file() for name in names)

    if not is_there():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not is_there():
                _make(folder, make)
    return {name: _mapped(folder / f"{name}.npy") for name in names}


def _making(folder: Path) -> str:
    """Name the start of all folders in which this machine makes this one; other machines may not see its locks."""
    return f"making-{folder.name}-{socket.gethostname()}-"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for others that make this folder, and remove what a killed one has left."""
    with Path(f"{folder}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: each makes its own, and the first one counts
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process, which makes %s", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.parent.glob(f"{_making(folder)}*"):
                shutil.rmtree(left)
        yield


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_making(folder)) as temporary:
        if folder.is_dir():
            os.replace(folder, Path(temporary, "damaged"))
        made = Path(temporary, "made")
        made.mkdir()
        make(made)
        for file in made.iterdir():  # else a power failure leaves files of the right size without the content
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _move(made, folder)


def decoded(
    table: Table,
    limit: int | None,
    version: str,
    shapes: Mapping[str, tuple[int, ...]],
    decode: Callable[[Row], tuple[Array | int, ...]],
    *,
    ahead: int = 256,
) -> dict[str, Tensor]:
    """The first `limit` rows of a table as arrays of uint8, by name, of shape (rows, *shape); cached.

    Args:
        table: of the rows.
        limit: None is all.
        version: see `cached`; the number of rows is added.
        shapes: of what `decode` gives of a row, by name.
        decode: called in threads.
        ahead: how many rows are read ahead.
    """
    count = table.rows if limit is None else min(limit, table.rows)

    def make(folder: Path) -> None:
        arrays = [new_array(folder, name, np.uint8, count, *shape) for name, shape in shapes.items()]
        for number, values in enumerate(map_in_threads(decode, table.read(limit), ahead)):
            for array, value in zip(arrays, values, strict=True):
                array[number] = value

    return cached(table.files, f"{version} {count}", list(shapes), make)


def new_array(folder: Path, name: str, kind: type[np.generic], *shape: int) -> Array:
    """A file for `cached` to fill, mapped into memory.

    Raises:
        OSError: if the disk has no room for it.
    """
    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))  # else a full disk is a SIGBUS amid the writing
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot promise room
                raise OSError(error.errno, error.strerror, str(path)) from None
    return array


def _mapped(file: Path) -> Tensor:
    # copy-on-write, because torch warns of arrays that cannot be written to
    return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))


def _move(made: Path, folder: Path) -> None:
    try:
        os.replace(made, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise
