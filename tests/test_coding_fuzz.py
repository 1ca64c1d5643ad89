"""Broken bytes are refused with PayloadError, or are a code; see docs/wire.md for how to try more of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lgc.coding import (
    BFloat16,
    DeadZone,
    Float16,
    Float32,
    IndexCoder,
    Kind,
    Largest,
    LloydMax,
    PayloadError,
    RangeCoder,
    RawIndices,
    Recent,
    RecentSign,
    Rice,
    Sign,
    Uniform,
    ValueCodec,
    decode_zeros,
    encode_zeros,
    pack,
    unpack,
)

SIZES, COUNTS = [1000, 0, 7, 50_000, 3], [20, 0, 7, 40, 0]
ZEROS_COUNT = 1503


TARGETS = 20  # four coders, what one of them knows, thirteen codecs, zeros, the payload


class Target(NamedTuple):
    """A decoder, bytes that it accepts, and what has to hold for whatever else it accepts."""

    name: str
    valid: bytes
    check: Callable[[bytes], None]


def targets(generator: np.random.Generator) -> Iterator[Target]:
    """All decoders of `lgc.coding`."""
    starts = np.cumsum([0, *SIZES[:-1]])
    chosen = [np.sort(generator.choice(n, k, replace=False)) for n, k in zip(SIZES, COUNTS, strict=True)]
    indices = torch.from_numpy(np.concatenate([part + start for part, start in zip(chosen, starts, strict=True)]))
    for coder in (RawIndices(), Rice(), RangeCoder()):
        yield Target(repr(coder), coder.encode(indices, SIZES).numpy().tobytes(), partial(check_indices, coder))
    before = torch.from_numpy(
        np.unique(np.concatenate([indices[::2], indices[1::3] + 2, generator.integers(0, 51_000, 9)]))
    )
    recent = Recent().after(before)
    yield Target(repr(recent), recent.encode(indices, SIZES).numpy().tobytes(), partial(check_positions, recent))
    yield Target("known", recent.after(indices).known(sum(SIZES)), check_known)
    values = torch.from_numpy(generator.standard_t(3, sum(COUNTS)).astype(np.float32))
    quantisers = (Uniform(3), Uniform(8), Uniform(4, block=16), LloydMax(1), LloydMax(), LloydMax(3, block=16))
    for codec in (Float32(), Float16(), BFloat16(), Sign(), DeadZone(0.5), Largest(), *quantisers):
        yield Target(repr(codec), codec.encode(values, COUNTS).numpy().tobytes(), partial(check_values, codec))
    known = torch.from_numpy(generator.random(sum(COUNTS)) < 0.9)
    signs = RecentSign().given(values.sign().to(torch.int8) * known)
    yield Target(repr(signs), signs.encode(values, COUNTS).numpy().tobytes(), partial(check_values, signs))
    mostly = torch.from_numpy((generator.random(ZEROS_COUNT) < np.linspace(-1, 2, ZEROS_COUNT)).astype(np.float32))
    yield Target("zeros", encode_zeros(mostly).numpy().tobytes(), check_zeros)
    parts = [Rice().encode(indices, SIZES), Sign().encode(values, COUNTS)]
    bounds = [Rice().bound(SIZES, COUNTS), Sign().size(COUNTS)]
    valid = pack(parts, kind=Kind.ENTRIES, step=7).numpy().tobytes()
    yield Target("payload", valid, partial(check_payload, bounds))


def check_indices(coder: IndexCoder, data: bytes) -> None:
    decoded = coder.decode(data, SIZES, COUNTS)
    assert coder.encode(decoded, SIZES).numpy().tobytes() == data, decoded


def check_positions(coder: IndexCoder, data: bytes) -> None:
    decoded = coder.decode(data, SIZES, COUNTS)
    assert torch.equal(coder.decode(coder.encode(decoded, SIZES), SIZES, COUNTS), decoded)


def check_known(data: bytes) -> None:
    assert Recent().knowing(data, sum(SIZES)).known(sum(SIZES)) == data


def check_values(codec: ValueCodec, data: bytes) -> None:
    assert codec.decode(data, COUNTS).isfinite().all()


def check_zeros(data: bytes) -> None:
    zero = decode_zeros(data, ZEROS_COUNT)
    assert encode_zeros((~zero).float()).numpy().tobytes() == data, zero


def check_payload(bounds: Sequence[int], data: bytes) -> None:
    parts = unpack(data, kind=Kind.ENTRIES, step=7, bounds=bounds)
    assert pack(parts, kind=Kind.ENTRIES, step=7).numpy().tobytes() == data


def mutate(generator: np.random.Generator, valid: bytes) -> bytes:
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


def fuzz(count: int, seed: int) -> Counter[str]:
    """Give `count` broken byte strings to the decoders; how many each has refused."""
    generator = np.random.default_rng(seed)
    decoders = list(targets(generator))
    refused: Counter[str] = Counter()
    for choice in generator.integers(0, len(decoders), count).tolist():
        decoder = decoders[choice]
        data = mutate(generator, decoder.valid)
        try:
            decoder.check(data)
        except PayloadError:
            refused[decoder.name] += 1
        except Exception as error:
            raise AssertionError(f"{decoder.name} takes {data.hex()} amiss (seed {seed}).") from error
    return refused


def test_broken_bytes_are_refused_or_are_a_code() -> None:
    assert len(fuzz(5_000, seed=0)) == TARGETS


@pytest.mark.exhaustive
def test_many_broken_bytes_are_refused_or_are_a_code() -> None:
    count, seed = int(os.environ.get("FUZZ_COUNT", "1000000")), int(os.environ.get("FUZZ_SEED", "1"))
    assert len(fuzz(count, seed)) == TARGETS
