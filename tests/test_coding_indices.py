"""Every index coder: exact round trips, pinned bytes, lengths near the bound, refusal of anything else."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lgc.coding import IndexCoder, PayloadError, RangeCoder, RawIndices, Rice
from lgc_lab.bench.codec import log2_choose, resnet50_sizes

CODERS: list[IndexCoder] = [RawIndices(), Rice(), RangeCoder()]
CODED = CODERS[1:]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "indices.json").read_text())

every_coder = pytest.mark.parametrize("coder", CODERS, ids=repr)
every_coded = pytest.mark.parametrize("coder", CODED, ids=repr)


def assert_round_trip(coder: IndexCoder, indices: Tensor, sizes: list[int], counts: list[int]) -> int:
    """The code's length, once it decodes to the same indices and fits the bound."""
    data = coder.encode(indices, sizes)
    assert data.dtype == torch.uint8
    assert data.dim() == 1
    assert data.numel() <= coder.bound(sizes, counts)
    assert torch.equal(coder.decode(data, sizes, counts), indices.to(torch.int64))
    assert torch.equal(coder.decode(data.numpy().tobytes(), sizes, counts), indices.to(torch.int64))
    return data.numel()


def uniform(size: int, count: int, seed: int = 0) -> Tensor:
    """About `count` of `size` positions."""
    drawn = np.random.default_rng(seed).integers(0, size, count)
    return torch.from_numpy(np.unique(drawn))


@st.composite
def segmented(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Sizes, counts and positions of up to eight segments of any density from 0 to 1."""
    sizes = draw(st.lists(st.integers(0, 200), max_size=8))
    counts, positions, start = [], [], 0
    for size in sizes:
        density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
        seed = draw(st.integers(0, 2**32 - 1))
        chosen = np.flatnonzero(np.random.default_rng(seed).random(size) < density)
        counts.append(chosen.size)
        positions += (chosen + start).tolist()
        start += size
    return sizes, counts, positions


@every_coder
@given(case=segmented())
@settings(max_examples=150, deadline=None)
def test_decodes_what_it_encoded_at_any_density(
    coder: IndexCoder, case: tuple[list[int], list[int], list[int]]
) -> None:
    sizes, counts, positions = case
    assert_round_trip(coder, torch.tensor(positions, dtype=torch.int64), sizes, counts)


@every_coded
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_decodes_what_it_encoded_above_two_to_the_31(coder: IndexCoder, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 2**40), min_size=1, max_size=4))
    counts, positions, start = [], [], 0
    for size in sizes:
        chosen = data.draw(st.sets(st.integers(0, size - 1), max_size=5))
        counts.append(len(chosen))
        positions += sorted(start + position for position in chosen)
        start += size
    assert_round_trip(coder, torch.tensor(positions, dtype=torch.int64), sizes, counts)


PATTERNS = {
    "all at the start": torch.arange(5000),
    "all at the end": torch.arange(995_000, 1_000_000),
    "one giant gap": torch.cat([torch.arange(5000), torch.tensor([999_999])]),
    "two clusters": torch.cat([torch.arange(2500), torch.arange(997_500, 1_000_000)]),
    "alternating": torch.arange(0, 1_000_000, 2),
    "everything": torch.arange(1_000_000),
    "everything but one": torch.cat([torch.arange(500_000), torch.arange(500_001, 1_000_000)]),
    "the first": torch.tensor([0]),
    "the last": torch.tensor([999_999]),
    "nothing": torch.zeros(0, dtype=torch.int64),
}


@every_coder
@pytest.mark.parametrize("pattern", PATTERNS)
def test_adversarial_patterns(coder: IndexCoder, pattern: str) -> None:
    indices = PATTERNS[pattern]
    assert_round_trip(coder, indices, [1_000_000], [indices.numel()])


def test_the_bound_is_reached() -> None:
    """All entries before a last one at the end: the unary stream is as long as it can be."""
    indices = torch.cat([torch.arange(99), torch.tensor([99_999])])
    assert Rice().encode(indices, [100_000]).numel() == Rice().bound([100_000], [100])


@every_coder
@pytest.mark.parametrize("count", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.exhaustive)])
def test_millions_of_indices(coder: IndexCoder, count: int) -> None:
    indices = torch.arange(count) * 3 + 1
    data = coder.encode(indices, [3 * count])
    assert torch.equal(coder.decode(data, [3 * count], [count]), indices)


@every_coder
def test_the_bytes_are_the_same_for_int32(coder: IndexCoder) -> None:
    indices = uniform(100_000, 1000)
    assert torch.equal(coder.encode(indices.to(torch.int32), [100_000]), coder.encode(indices, [100_000]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_coder
def test_the_bytes_are_the_same_from_a_gpu(coder: IndexCoder) -> None:
    indices = uniform(100_000, 1000)
    assert torch.equal(coder.encode(indices.cuda(), [100_000]), coder.encode(indices, [100_000]))


@pytest.mark.parametrize("density", [0.1, 0.01, 0.001, 0.0001])
@pytest.mark.parametrize(("coder", "goal"), [(RangeCoder(), 1.02), (Rice(), 1.08)], ids=["range", "rice"])
def test_length_is_near_the_bound(coder: IndexCoder, goal: float, density: float) -> None:
    indices = uniform(int(50_000 / density), 50_000)
    size, count = int(50_000 / density), indices.numel()
    assert 8 * coder.encode(indices, [size]).numel() <= goal * log2_choose(size, count)


@pytest.mark.parametrize(("coder", "goal"), [(RangeCoder(), 1.02), (Rice(), 1.08)], ids=["range", "rice"])
def test_length_is_near_the_bound_over_the_layers_of_a_resnet50(coder: IndexCoder, goal: float) -> None:
    sizes = resnet50_sizes()
    start, bound, counts, positions = 0, 0.0, [], []
    for layer, size in enumerate(sizes):
        chosen = uniform(size, max(1, round(0.001 * size)), seed=layer)
        counts.append(chosen.numel())
        positions.append(chosen + start)
        bound += log2_choose(size, chosen.numel())
        start += size
    assert 8 * assert_round_trip(coder, torch.cat(positions), sizes, counts) <= goal * bound


@pytest.mark.parametrize("case", GOLDEN, ids=["segments", "above 2^31", "escaped gap"])
def test_the_bytes_are_pinned(case: dict[str, object]) -> None:
    sizes, counts, codes = case["sizes"], case["counts"], case["codes"]
    assert isinstance(sizes, list)
    assert isinstance(counts, list)
    assert isinstance(codes, dict)
    indices = torch.tensor(case["indices"])
    pinned = [coder for coder in CODERS if repr(coder) in codes]
    assert len(pinned) == len(codes)
    for coder in pinned:
        golden = bytes.fromhex(codes[repr(coder)])
        assert coder.encode(indices, sizes).numpy().tobytes() == golden
        assert torch.equal(coder.decode(golden, sizes, counts), indices)


def octets_of(bits: str) -> bytes:
    """A bit string, first bit first, in bytes."""
    padded = bits + "0" * (-len(bits) % 8)
    return bytes(int(padded[start : start + 8][::-1], 2) for start in range(0, len(padded), 8))


def low_bits(number: int, width: int) -> str:
    return "".join(str(number >> bit & 1) for bit in range(width))


def plain_rice(positions: list[int], sizes: list[int]) -> bytes:
    """Rice as docs/wire.md defines it, a bit at a time."""
    low, unary, start = "", "", 0
    for size in sizes:
        local = [position - start for position in positions if start <= position < start + size]
        start += size
        if not local:
            continue
        least = math.ceil(2406 * (2 * size - len(local)) / (10_000 * len(local)))
        width = next(r for r in range(64) if 2**r >= least)
        gaps = [position - before - 1 for before, position in zip([-1, *local[:-1]], local, strict=True)]
        low += "".join(low_bits(gap, width) for gap in gaps)
        unary += "".join("0" * (gap >> width) + "1" for gap in gaps)
    return octets_of(low) + octets_of(unary)


@given(case=segmented())
@settings(max_examples=100, deadline=None)
def test_the_bytes_are_those_of_a_plain_second_implementation(case: tuple[list[int], list[int], list[int]]) -> None:
    sizes, _, positions = case
    data = Rice().encode(torch.tensor(positions, dtype=torch.int64), sizes)
    assert data.numpy().tobytes() == plain_rice(positions, sizes)


def test_rice_by_hand() -> None:
    """Positions 1, 5, 14 of 16: r = 2, gaps 1, 3, 8, so low bits 01 11 00 and unary 1, 1, 001, low end first."""
    data = Rice().encode(torch.tensor([1, 5, 14]), [16])
    assert data.tolist() == [0b00_11_01, 0b100_1_1]


def test_coders_compare_and_print_as_values() -> None:
    assert len({Rice(), Rice(), RawIndices()}) == 2
    assert repr(RangeCoder()) == "RangeCoder()"


@every_coder
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 3], "strictly ascending, got 3 before 3"),
        ([5, 4], "strictly ascending, got 5 before 4"),
        ([0, 10], r"in \[0, 10\), got 0 to 10"),
        ([-1, 2], r"in \[0, 10\), got -1 to 2"),
    ],
)
def test_refuses_to_encode_what_is_no_set_of_positions(coder: IndexCoder, indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coder.encode(torch.tensor(indices), [4, 6])


@every_coder
def test_refuses_other_dtypes_and_shapes(coder: IndexCoder) -> None:
    with pytest.raises(TypeError, match="must be int32 or int64 of one dimension"):
        coder.encode(torch.zeros(3), [10])
    with pytest.raises(TypeError, match="must be int32 or int64 of one dimension"):
        coder.encode(torch.zeros((1, 1), dtype=torch.int64), [10])
    with pytest.raises(TypeError, match="uint8"):
        coder.decode(torch.zeros(3), [10], [1])


@every_coder
def test_refuses_impossible_counts(coder: IndexCoder) -> None:
    with pytest.raises(ValueError, match=r"counts=\.\.\.\) must be in \[0, 3\], got 4"):
        coder.decode(b"", [3], [4])
    with pytest.raises(ValueError, match="one for each of 1 sizes, got 2"):
        coder.bound([3], [1, 1])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        coder.bound([-1], [0])


def test_raw_indices_end_at_two_to_the_31() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^31, got 2147483649"):
        RawIndices().encode(torch.tensor([0]), [2**31, 1])


@every_coder
def test_every_truncation_and_extension_is_refused(coder: IndexCoder) -> None:
    indices = uniform(10_000, 60)
    data = coder.encode(indices, [10_000]).numpy().tobytes()
    for length in range(len(data)):
        with pytest.raises(PayloadError):
            coder.decode(data[:length], [10_000], [indices.numel()])
    for tail in (b"\x00", b"\x01", bytes(4), bytes(1000)):
        with pytest.raises(PayloadError):
            coder.decode(data + tail, [10_000], [indices.numel()])


@pytest.mark.parametrize("positions", [[4, 4], [5, 4], [0, 10], [-1, 3]], ids=str)
def test_raw_indices_out_of_order_or_range_are_refused(positions: list[int]) -> None:
    with pytest.raises(PayloadError, match="payload field indices must be"):
        RawIndices().decode(np.array(positions, "<i4").tobytes(), [10], [2])


@every_coder
def test_an_oversized_code_is_refused_before_anything_is_allocated(coder: IndexCoder) -> None:
    data = bytes(50_000_000)
    tracemalloc.start()
    with pytest.raises(PayloadError, match="at most"):
        coder.decode(data, [1000], [10])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_range_code_of_too_long_gaps_is_refused() -> None:
    """Sums of hostile gaps must not wrap around into positions that look right."""
    count = 2**17
    bound = RangeCoder().bound([2**48], [count])
    generator = np.random.default_rng(0)
    low = math.ceil((2**48 // (16 * count)).bit_length() * count / 8)
    data = b"\x00" * low + b"\xff" * 4 * ((bound - low) // 4 // 2) + generator.bytes(64)
    with pytest.raises(PayloadError):
        RangeCoder().decode(data, [2**48], [count])


def test_range_coder_without_constriction_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match=r"lgc\[coding\]"):
        RangeCoder()
