"""`lgc bench codec`: what the codes for indices and values cost, in bits and time."""

from __future__ import annotations

import math
import time
import timeit
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import lgc
from lgc.coding import IndexCoder, ValueCodec, header_size
from lgc_lab.recipes.resnet import RESNETS

Positions = npt.NDArray[np.int64]
Encode = Callable[[Tensor], Any]  # ascending positions to bytes
Decode = Callable[[Any], Tensor]

DENSITIES = (0.1, 0.01, 0.001, 0.0001)
INT32_POSITIONS = 2**31
REPEATS = 5
RAW_ENTRY_BITS = 64  # int32 and float32
INDEX_ROW = "{:<20}{:>8}{:>10}{:>12}{:>10}{:>9}{:>9}"
VALUE_ROW = "{:<30}{:>11}{:>15}{:>12}{:>14}"
UNIFORMS = [lgc.Uniform(bits, block) for bits, block in ((16, None), (8, None), (4, None), (4, 64), (2, 64))]
LLOYD_MAXES = [lgc.LloydMax(bits) for bits in (4, 2)]
VALUE_CODECS: list[ValueCodec] = [lgc.Float32(), lgc.Float16(), lgc.BFloat16(), *UNIFORMS, *LLOYD_MAXES]
VALUE_CODECS += [lgc.DeadZone(), lgc.Largest(), lgc.Sign()]


@click.command()
@click.option("--entries", default=1_000_000, type=click.IntRange(1000), help="Number of positions.")
def codec(entries: int) -> None:
    """Measure what an index and a value cost on the wire.

    An index costs at least log2 C(N, k) / k bits: 4.7 at a density of 10 %, 8.1 at 1 %, 11.4 at 0.1 %, 14.7 at 0.01 %.
    "/ bound" is how far a code is from that. "layers" is a ResNet50 whose layers' densities differ, 0.1 % overall;
    codes that know the layers' sizes gain from that. Recent() knows an earlier selection with half of these positions
    and as many others, RecentSign() the signs of half of the values. Times are processor time of one core. An entry is
    a value with its Rice-coded index; the last column is how many times smaller it is than int32 and float32.
    """
    torch.set_num_threads(1)
    for line in measure(entries, np.random.default_rng(0)):
        click.echo(line)


def measure(entries: int, generator: np.random.Generator) -> Iterator[str]:
    """Yield the lines of both tables: uniform positions, fewer where int32 cannot hold them, and ResNet50's layers."""
    yield INDEX_ROW.format("code", "case", "entries", "bits/index", "/ bound", "encode", "decode") + "  ms/million"
    for density in DENSITIES:
        count = min(entries, int(density * INT32_POSITIONS))
        size = round(count / density)
        yield from _index_rows(f"{density:.2%}", _sample(generator, size, count), [size], [count])
    sizes = resnet50_sizes()
    weights = np.array(sizes) * generator.lognormal(0.0, 1.0, len(sizes))  # densities as of a global threshold
    shares = 0.001 * sum(sizes) * weights / weights.sum()
    counts = [min(size, max(1, round(share))) for size, share in zip(sizes, shares.tolist(), strict=True)]
    starts = np.cumsum([0, *sizes[:-1]])
    layers = [_sample(generator, size, count) + start for size, count, start in zip(sizes, counts, starts, strict=True)]
    positions = np.concatenate(layers)
    yield from _index_rows("layers", positions, sizes, counts)
    yield "\n" + VALUE_ROW.format("values", "bits/value", "squared error", "bits/entry", "int32+fp32 /")
    index_bits = 8 * len(lgc.Rice().encode(torch.from_numpy(positions), sizes)) / positions.size
    yield from _value_rows(generator, counts, index_bits)


def resnet50_sizes() -> list[int]:
    """List the sizes of the 54 weights of a ResNet50 with 10 classes, 23.5M elements."""
    with torch.device("meta"):
        model = RESNETS["resnet50"](classes=10)
    return [weight.numel() for weight in model.parameters() if weight.ndim >= 2]


def log2_choose(size: int, count: int) -> float:
    """Count the bits of the best code for `count` of `size` positions, log2 C(size, count)."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def _sample(generator: np.random.Generator, size: int, count: int) -> Positions:
    """Draw `count` of `size` positions, ascending, uniformly distributed."""
    if size <= min(64 * count, 2**24):
        return np.flatnonzero(generator.permutation(size) < count)
    drawn = np.zeros(0, np.int64)
    while drawn.size < count:
        drawn = np.union1d(drawn, generator.integers(0, size, count - drawn.size + 64))
    return np.delete(drawn, generator.choice(drawn.size, drawn.size - count, replace=False))


def _codes(sizes: Sequence[int], counts: Sequence[int], last: Tensor) -> dict[str, tuple[Encode, Decode]]:
    """List the codes that are installed, by name; `last` is what one of them knows to have been selected before."""
    coders: list[IndexCoder] = [lgc.RawIndices(), lgc.Rice(), lgc.Recent().after(last)]
    if find_spec("constriction"):
        coders.append(lgc.RangeCoder())
    codes: dict[str, tuple[Encode, Decode]] = {
        repr(coder): (partial(coder.encode, sizes=sizes), partial(coder.decode, sizes=sizes, counts=counts))
        for coder in coders
    }
    codes["int64"] = lambda p: p.numpy().tobytes(), lambda data: torch.frombuffer(bytearray(data), dtype=torch.int64)
    codes["zlib of int32 gaps"] = lambda p: zlib.compress(_gaps(p)), lambda data: _sums(zlib.decompress(data))
    if find_spec("zstandard"):
        zstd = import_module("zstandard")
        codes["zstd of int32 gaps"] = (
            lambda p: zstd.ZstdCompressor().compress(_gaps(p)),
            lambda data: _sums(zstd.ZstdDecompressor().decompress(data)),
        )
    if find_spec("pyroaring"):
        bitmap = import_module("pyroaring").BitMap
        codes["roaring"] = (
            lambda p: bitmap(p.numpy().astype(np.uint32)).serialize(),
            lambda data: torch.from_numpy(np.array(bitmap.deserialize(data).to_array(), np.int64)),
        )
    return codes


def _gaps(positions: Tensor) -> bytes:
    return np.diff(positions.numpy(), prepend=0).astype(np.int32).tobytes()


def _sums(gaps: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(gaps, np.int32).cumsum(dtype=np.int64))


def _index_rows(case: str, drawn: Positions, sizes: Sequence[int], counts: Sequence[int]) -> Iterator[str]:
    positions = torch.from_numpy(drawn)
    bound = sum(map(log2_choose, sizes, counts)) / len(positions)
    others = np.random.default_rng(1).integers(0, sum(sizes), drawn.size // 2)
    last = torch.from_numpy(np.union1d(drawn[::2], others))
    for name, (encode, decode) in _codes(sizes, counts, last).items():
        data = encode(positions)
        if not torch.equal(decode(data), positions):
            raise AssertionError(f"{name} does not decode what it encoded.")
        bits = 8 * len(data) / len(positions)
        seconds = [
            min(timeit.repeat(call, timer=time.process_time, number=1, repeat=REPEATS))
            for call in (partial(encode, positions), partial(decode, data))
        ]
        times = [f"{1e9 * best / len(positions):.1f}" for best in seconds]
        yield INDEX_ROW.format(name, case, len(positions), f"{bits:.3f}", f"{bits / bound:.4f}", *times)


def _value_rows(generator: np.random.Generator, counts: Sequence[int], index_bits: float) -> Iterator[str]:
    """Measure values like the tail of a Student t of 3 degrees of freedom: what top-k leaves of a heavy-tailed one."""
    total = sum(counts)
    scales = np.repeat(generator.lognormal(-7.0, 1.0, len(counts)), counts)
    tail = scales * generator.uniform(size=total) ** (-1 / 3) * generator.choice([-1.0, 1.0], total)
    values = torch.from_numpy(tail.astype(np.float32))
    expected = values.sign().to(torch.int8) * (torch.arange(total) % 2).to(torch.int8)
    for codec in (*VALUE_CODECS, lgc.RecentSign().given(expected)):
        data = codec.encode(values, counts)
        lost = (values - codec.decode(data, counts)).double().square().sum() / values.double().square().sum()
        bits = 8 * len(data) / total
        entry = index_bits + bits + 8 * header_size(2) / total
        figures = f"{bits:.3f}", f"{lost:.2e}", f"{entry:.3f}", f"{RAW_ENTRY_BITS / entry:.2f}"
        yield VALUE_ROW.format(repr(codec), *figures)
