"""Size and speed of the codes for indices and values, and a fuzzer of their decoders."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
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
    EliasFano,
    Float16,
    Float32,
    IndexCoder,
    Kind,
    PayloadError,
    RangeCoder,
    RawIndices,
    Rice,
    Sign,
    Uniform,
    ValueCodec,
    header_size,
    pack,
    unpack,
)
from lgc_lab.folder import write_json

Positions = npt.NDArray[np.int64]
Result = TypeVar("Result")

DENSITIES = (0.1, 0.01, 0.001, 0.0001)
INT32_POSITIONS = 2**31
REPEATS = 5
RAW_ENTRY_BITS = 64  # int32 and float32


class IndexCost(NamedTuple):
    """Cost of one code on one set of positions; milliseconds of one core per million indices."""

    code: str
    case: str
    entries: int
    bits: float
    bound_bits: float
    encode_ms: float
    decode_ms: float

    @property
    def ratio(self) -> float:
        """Bits over the bound log2 C(N, k) / k."""
        return self.bits / self.bound_bits


class ValueCost(NamedTuple):
    """Cost and loss of one value codec; `entry_bits` and `entry_gain` count a value and its Rice-coded index."""

    codec: str
    bits: float
    squared_error: float
    entry_bits: float
    entry_gain: float


@dataclass(frozen=True)
class CodecReport:
    """What one run measured."""

    seed: int
    indices: list[IndexCost]
    values: list[ValueCost]

    def text(self) -> str:
        """The report as two tables."""
        return "\n".join([*_index_table(self.indices), "", *_value_table(self.values)])


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
    if size <= 64 * count:
        return np.flatnonzero(generator.permutation(size) < count) if size <= 2**24 else _reject(generator, size, count)
    return _reject(generator, size, count)


def _reject(generator: np.random.Generator, size: int, count: int) -> Positions:
    drawn = np.zeros(0, np.int64)
    while drawn.size < count:
        drawn = np.union1d(drawn, generator.integers(0, size, count - drawn.size + 64))
    return np.delete(drawn, generator.choice(drawn.size, drawn.size - count, replace=False))


def _uneven_counts(generator: np.random.Generator, sizes: Sequence[int], rate: float) -> list[int]:
    """Entries per layer whose densities spread by a factor of about ten, as those of a global threshold do."""
    weights = np.array(sizes) * generator.lognormal(0.0, 1.0, len(sizes))
    counts = rate * sum(sizes) * weights / weights.sum()
    return [min(size, max(1, round(count))) for size, count in zip(sizes, counts.tolist(), strict=True)]


def _index_coders() -> list[IndexCoder]:
    """Those that are installed."""
    ranged: list[IndexCoder] = [RangeCoder()] if find_spec("constriction") else []
    return [RawIndices(), EliasFano(), Rice(), *ranged]


def _codes(sizes: Sequence[int], counts: Sequence[int]) -> Iterator[_Code]:
    for coder in _index_coders():
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
    costs = []
    for code in _codes(sizes, counts):
        data, encode_ms = _timed(partial(code.encode, positions))
        decoded, decode_ms = _timed(partial(code.decode, data))
        if not np.array_equal(decoded, positions):
            raise AssertionError(f"{code.name} does not decode what it encoded.")
        millions = positions.size / 1e6
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


def _index_table(costs: Sequence[IndexCost]) -> list[str]:
    lines = [
        f"{'code':<20}{'case':>8}{'entries':>10}{'bits/index':>12}{'/ bound':>10}{'encode':>9}{'decode':>9}  ms/million"
    ]
    for cost in costs:
        lines.append(
            f"{cost.code:<20}{cost.case:>8}{cost.entries:>10}{cost.bits:>12.3f}{cost.ratio:>10.4f}"
            f"{cost.encode_ms:>9.1f}{cost.decode_ms:>9.1f}"
        )
    return lines


def _value_table(costs: Sequence[ValueCost]) -> list[str]:
    lines = [f"{'values':<30}{'bits/value':>11}{'squared error':>15}{'bits/entry':>12}{'int32+fp32 /':>14}"]
    for cost in costs:
        lines.append(
            f"{cost.codec:<30}{cost.bits:>11.3f}{cost.squared_error:>15.2e}{cost.entry_bits:>12.3f}{cost.entry_gain:>14.2f}"
        )
    return lines


class _Target(NamedTuple):
    """A decoder, bytes that it accepts, and what has to hold for whatever else it accepts."""

    name: str
    valid: bytes
    check: Callable[[bytes], None]


def fuzz(count: int, *, seed: int = 0) -> Counter[str]:
    """Decode `count` mutated or random byte strings; numbers of those accepted and refused, by decoder.

    A decoder may refuse with `PayloadError` only. Indices that it accepts must have exactly these bytes as
    their code, values must be finite.

    Raises:
        AssertionError: if what was accepted breaks that.
    """
    generator = np.random.default_rng(seed)
    targets = list(_targets(generator))
    outcomes: Counter[str] = Counter()
    choices = generator.integers(0, len(targets), count)
    for choice in choices.tolist():
        target = targets[choice]
        try:
            target.check(_mutate(generator, target.valid))
            outcomes[f"{target.name} accepted"] += 1
        except PayloadError:
            outcomes[f"{target.name} refused"] += 1
    return outcomes


def _targets(generator: np.random.Generator) -> Iterator[_Target]:
    sizes, counts = [1000, 0, 7, 50_000, 3], [20, 0, 7, 40, 0]
    starts = np.cumsum([0, *sizes[:-1]])
    positions = np.concatenate([_sample(generator, n, k) + s for n, k, s in zip(sizes, counts, starts, strict=True)])
    indices = torch.from_numpy(positions)
    for coder in _index_coders():
        yield _Target(
            type(coder).__name__,
            _raw(coder.encode(indices, sizes)),
            partial(_check_indices, coder, sizes, counts),
        )
    values = torch.from_numpy(generator.standard_t(3, sum(counts)).astype(np.float32))
    codecs = (Float32(), Float16(), BFloat16(), Sign(), Uniform(bits=3), Uniform(bits=8), Uniform(bits=4, block=16))
    for codec in codecs:
        yield _Target(
            type(codec).__name__,
            _raw(codec.encode(values, counts)),
            partial(_check_values, codec, counts),
        )
    parts = [Rice().encode(indices, sizes), Sign().encode(values, counts)]
    bounds = [Rice().bound(sizes, counts), Sign().size(counts)]
    yield _Target("payload", _raw(pack(parts, kind=Kind.ENTRIES, step=7)), partial(_check_payload, bounds))


def _check_indices(coder: IndexCoder, sizes: Sequence[int], counts: Sequence[int], data: bytes) -> None:
    decoded = coder.decode(data, sizes, counts)
    if _raw(coder.encode(decoded, sizes)) != data:
        raise AssertionError(f"{coder} accepts {data.hex()}, which is not the code of {decoded.tolist()}.")


def _check_values(codec: ValueCodec, counts: Sequence[int], data: bytes) -> None:
    if not bool(codec.decode(data, counts).isfinite().all()):
        raise AssertionError(f"{codec} decodes {data.hex()} to values that are not finite.")


def _check_payload(bounds: Sequence[int], data: bytes) -> None:
    parts = unpack(data, kind=Kind.ENTRIES, step=7, bounds=bounds)
    if _raw(pack(parts, kind=Kind.ENTRIES, step=7)) != data:
        raise AssertionError(f"unpack accepts {data.hex()}, which pack does not write.")


def _mutate(generator: np.random.Generator, valid: bytes) -> bytes:
    """Bytes changed at up to three places, cut, lengthened, or drawn afresh."""
    data = np.frombuffer(valid, np.uint8).copy()
    kind = int(generator.integers(0, 8))
    if kind == 0:
        return data[: generator.integers(0, data.size)].tobytes()
    if kind == 1:
        return valid + generator.bytes(int(generator.integers(1, 9)))
    if kind == 2:
        return generator.bytes(int(generator.integers(0, 2 * data.size)))
    if kind == 3:
        return generator.bytes(data.size)
    places = generator.integers(0, data.size, int(generator.integers(1, 4)))
    data[places] ^= generator.integers(0, 256, places.size, np.uint8)
    return data.tobytes()


@click.command()
@click.option(
    "--entries", default=1_000_000, show_default=True, type=click.IntRange(min=1000), help="Number of positions."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of positions, values and mutations."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the numbers to this JSON file."
)
@click.option("--fuzz", "payloads", type=click.IntRange(min=1), help="Instead, decode this many broken payloads.")
def codec(entries: int, seed: int, out: Path | None, payloads: int | None) -> None:
    """Measure what an index and a value cost on the wire.

    An index costs at least log2 C(N, k) / k bits: 4.7 at a density of 10 %, 8.1 at 1 %, 11.4 at 0.1 %, 14.7 at 0.01 %.
    "/ bound" is how far a code is from that. "layers" is a ResNet50 whose layers' densities differ, 0.1 % over all;
    codes that know the layers' sizes gain from that. Times are processor time of one core. An entry is a value with its
    Rice-coded index; the last column is how many times smaller it is than int32 and float32.

    With --fuzz nothing is measured: the decoders get mutated and random bytes and must refuse them with PayloadError
    unless they are a valid code.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if payloads is not None:
            outcomes = fuzz(payloads, seed=seed)
            click.echo("\n".join(f"{name:<20}{number:>10}" for name, number in sorted(outcomes.items())))
            return
        report = run(entries=entries, seed=seed)
    finally:
        torch.set_num_threads(threads)
    click.echo(report.text())
    if out is not None:
        indices = [cost._asdict() for cost in report.indices]
        values = [cost._asdict() for cost in report.values]
        write_json(out, asdict(report) | {"indices": indices, "values": values})


if __name__ == "__main__":
    codec()
