"""What the codes for indices and values cost: bits and time."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding import (
    BFloat16,
    Float16,
    Float32,
    IndexCoder,
    RangeCoder,
    RawIndices,
    Rice,
    Sign,
    Uniform,
    ValueCodec,
    header_size,
)
from lgc_lab.folder import write_json

Positions = npt.NDArray[np.int64]
Result = TypeVar("Result")

DENSITIES = (0.1, 0.01, 0.001, 0.0001)
INT32_POSITIONS = 2**31
REPEATS = 5
RAW_ENTRY_BITS = 64  # int32 and float32


@dataclass(frozen=True)
class IndexCost:
    """Cost of one code on one set of positions; milliseconds of one core per million indices."""

    code: str
    case: str
    entries: int
    bits: float
    bound_bits: float  # log2 C(N, k) / k
    encode_ms: float
    decode_ms: float

    def __str__(self) -> str:
        return (
            f"{self.code:<20}{self.case:>8}{self.entries:>10}{self.bits:>12.3f}{self.bits / self.bound_bits:>10.4f}"
            f"{self.encode_ms:>9.1f}{self.decode_ms:>9.1f}"
        )


@dataclass(frozen=True)
class ValueCost:
    """Cost and loss of one value codec; `entry_bits` and `entry_gain` count a value and its Rice-coded index."""

    codec: str
    bits: float
    squared_error: float
    entry_bits: float
    entry_gain: float

    def __str__(self) -> str:
        return (
            f"{self.codec:<30}{self.bits:>11.3f}{self.squared_error:>15.2e}{self.entry_bits:>12.3f}"
            f"{self.entry_gain:>14.2f}"
        )


@dataclass(frozen=True)
class CodecReport:
    """What one run measured."""

    seed: int
    indices: list[IndexCost]
    values: list[ValueCost]

    def text(self) -> str:
        """The report as two tables."""
        columns = f"{'entries':>10}{'bits/index':>12}{'/ bound':>10}{'encode':>9}{'decode':>9}  ms/million"
        indices = [f"{'code':<20}{'case':>8}{columns}", *map(str, self.indices)]
        columns = f"{'bits/value':>11}{'squared error':>15}{'bits/entry':>12}{'int32+fp32 /':>14}"
        return "\n".join([*indices, "", f"{'values':<30}{columns}", *map(str, self.values)])


class _Code(NamedTuple):
    name: str
    encode: Callable[[Positions], Tensor | bytes]
    decode: Callable[[Tensor | bytes], Positions]


def run(*, entries: int = 1_000_000, seed: int = 0) -> CodecReport:
    """Measure every coder on uniform positions at four densities, and on the layers of a ResNet50 at 0.1 %.

    Args:
        entries: number of positions, fewer where int32 could not hold them.
        seed: of the positions and values.
    """
    generator = np.random.default_rng(seed)
    indices: list[IndexCost] = []
    for density in DENSITIES:
        count = min(entries, int(density * INT32_POSITIONS))
        size = round(count / density)
        positions = _sample(generator, size, count)
        indices += _index_costs(f"{density:.2%}", positions, [size], [count])
    sizes = resnet50_sizes()
    counts = _uneven_counts(generator, sizes, 0.001)
    starts = np.cumsum([0, *sizes[:-1]])
    layers = [_sample(generator, size, count) + start for size, count, start in zip(sizes, counts, starts, strict=True)]
    layered = _index_costs("layers", np.concatenate(layers), sizes, counts)
    index_bits = next(cost.bits for cost in layered if cost.code == repr(Rice()))
    return CodecReport(seed, indices + layered, _value_costs(generator, counts, index_bits))


def resnet50_sizes() -> list[int]:
    """Sizes of the 54 weights of a ResNet50 with 10 classes, 23.5M elements."""
    sizes, width_in = [64 * 3 * 49], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [width_in * width, 9 * width * width, 4 * width * width]
            if block == 0:
                sizes.append(4 * width_in * width)
            width_in = 4 * width
    return [*sizes, 10 * width_in]


def log2_choose(size: int, count: int) -> float:
    """Bits of the best code for `count` of `size` positions, log2 C(size, count)."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def _sample(generator: np.random.Generator, size: int, count: int) -> Positions:
    """`count` of `size` positions, ascending, uniformly distributed."""
    if size <= min(64 * count, 2**24):
        return np.flatnonzero(generator.permutation(size) < count)
    drawn = np.zeros(0, np.int64)
    while drawn.size < count:
        drawn = np.union1d(drawn, generator.integers(0, size, count - drawn.size + 64))
    return np.delete(drawn, generator.choice(drawn.size, drawn.size - count, replace=False))


def _uneven_counts(generator: np.random.Generator, sizes: Sequence[int], rate: float) -> list[int]:
    """Entries per layer whose densities spread by a factor of about ten, as those of a global threshold do."""
    weights = np.array(sizes) * generator.lognormal(0.0, 1.0, len(sizes))
    counts = rate * sum(sizes) * weights / weights.sum()
    return [min(size, max(1, round(count))) for size, count in zip(sizes, counts.tolist(), strict=True)]


def _codes(sizes: Sequence[int], counts: Sequence[int]) -> Iterator[_Code]:
    """Those that are installed."""
    coders: list[IndexCoder] = [RawIndices(), Rice()]
    if find_spec("constriction"):
        coders.append(RangeCoder())
    for coder in coders:
        yield _coder_code(coder, sizes, counts)
    yield _Code("int64", lambda positions: positions.tobytes(), lambda data: np.frombuffer(_raw(data), np.int64).copy())
    yield _Code(
        "zlib of int32 gaps", lambda p: zlib.compress(_gaps(p)), lambda data: _sums(zlib.decompress(_raw(data)))
    )
    if find_spec("zstandard"):
        zstandard = import_module("zstandard")
        yield _Code(
            "zstd of int32 gaps",
            lambda positions: zstandard.ZstdCompressor().compress(_gaps(positions)),
            lambda data: _sums(zstandard.ZstdDecompressor().decompress(_raw(data))),
        )
    if find_spec("pyroaring"):
        bitmap = import_module("pyroaring").BitMap
        yield _Code(
            "roaring",
            lambda positions: bitmap(positions.astype(np.uint32)).serialize(),
            lambda data: np.array(bitmap.deserialize(_raw(data)).to_array(), np.int64),
        )


def _coder_code(coder: IndexCoder, sizes: Sequence[int], counts: Sequence[int]) -> _Code:
    return _Code(
        repr(coder),
        lambda positions: coder.encode(torch.from_numpy(positions), sizes),
        lambda data: coder.decode(data, sizes, counts).numpy(),
    )


def _raw(data: Tensor | bytes) -> bytes:
    return data.numpy().tobytes() if isinstance(data, Tensor) else data


def _gaps(positions: Positions) -> bytes:
    return np.diff(positions, prepend=0).astype(np.int32).tobytes()


def _sums(data: bytes) -> Positions:
    return np.cumsum(np.frombuffer(data, np.int32), dtype=np.int64)


def _index_costs(case: str, positions: Positions, sizes: Sequence[int], counts: Sequence[int]) -> list[IndexCost]:
    bound = sum(map(log2_choose, sizes, counts)) / positions.size
    millions = positions.size / 1e6
    costs = []
    for code in _codes(sizes, counts):
        data, encode_ms = _timed(partial(code.encode, positions))
        decoded, decode_ms = _timed(partial(code.decode, data))
        if not np.array_equal(decoded, positions):
            raise AssertionError(f"{code.name} does not decode what it encoded.")
        bits = 8 * len(_raw(data)) / positions.size
        costs.append(
            IndexCost(code.name, case, positions.size, bits, bound, encode_ms / millions, decode_ms / millions)
        )
    return costs


def _timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """The result and the least processor time of a few calls in milliseconds."""
    best = math.inf
    for _ in range(REPEATS):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return result, 1000 * best


def _value_costs(generator: np.random.Generator, counts: Sequence[int], index_bits: float) -> list[ValueCost]:
    """Values like the tail of a Student t of 3 degrees of freedom: what top-k leaves of a heavy-tailed gradient."""
    total = sum(counts)
    scales = np.repeat(generator.lognormal(-7.0, 1.0, len(counts)), counts)
    tail = scales * generator.uniform(size=total) ** (-1 / 3) * generator.choice([-1.0, 1.0], total)
    values = torch.from_numpy(tail.astype(np.float32))
    codecs: list[ValueCodec] = [Float32(), Float16(), BFloat16(), Uniform(bits=16), Uniform(bits=8), Uniform(bits=4)]
    codecs += [Uniform(bits=4, block=64), Uniform(bits=2, block=64), Sign()]
    costs = []
    for codec in codecs:
        data = codec.encode(values, counts)
        lost = (values - codec.decode(data, counts)).double().square().sum() / values.double().square().sum()
        bits = 8 * data.numel() / total
        entry = index_bits + bits + 8 * header_size(2) / total
        costs.append(ValueCost(repr(codec), bits, float(lost), entry, RAW_ENTRY_BITS / entry))
    return costs


@click.command()
@click.option(
    "--entries", default=1_000_000, show_default=True, type=click.IntRange(min=1000), help="Number of positions."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of positions and values.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the numbers to this JSON file."
)
def codec(entries: int, seed: int, out: Path | None) -> None:
    """Measure what an index and a value cost on the wire.

    An index costs at least log2 C(N, k) / k bits: 4.7 at a density of 10 %, 8.1 at 1 %, 11.4 at 0.1 %, 14.7 at 0.01 %.
    "/ bound" is how far a code is from that. "layers" is a ResNet50 whose layers' densities differ, 0.1 % over all;
    codes that know the layers' sizes gain from that. Times are processor time of one core. An entry is a value with its
    Rice-coded index; the last column is how many times smaller it is than int32 and float32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = run(entries=entries, seed=seed)
    finally:
        torch.set_num_threads(threads)
    click.echo(report.text())
    if out is not None:
        write_json(out, asdict(report))
