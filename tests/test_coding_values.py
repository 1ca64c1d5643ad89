"""Every value codec: promised length, zeros, pinned bytes, bounded loss, refusals; and sums in lanes."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lgc.coding import (
    BFloat16,
    DeadZone,
    Float16,
    Float32,
    Largest,
    LloydMax,
    PayloadError,
    Sign,
    Uniform,
    ValueCodec,
    Zoned,
    lane_width,
    lane_words,
    pack_lanes,
    unpack_lanes,
)
from lgc.coding.bits import WORDS_AT_ONCE, pack_fixed, unpack_fixed
from lgc.coding.values import VALUES_AT_ONCE
from lgc.schemes.arguments import from_text, to_text
from lgc_lab.cli import main

FloatArray = npt.NDArray[np.float32]

CODECS: list[ValueCodec] = [
    Float32(),
    Float16(),
    BFloat16(),
    Sign(),
    Uniform(bits=2),
    Uniform(bits=4, block=2),
    Uniform(bits=7),
    Uniform(bits=8),
    Uniform(bits=16),
    LloydMax(bits=1),
    LloydMax(),
    LloydMax(bits=4, block=2),
    DeadZone(),
    DeadZone(step=0.25),
    Largest(),
    Largest(share=0.5),
]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "values.json").read_text())

every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@every_codec
@given(segments=st.lists(st.lists(finite, max_size=20), max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_finite_values_have_a_code_of_the_promised_length(codec: ValueCodec, segments: list[list[float]]) -> None:
    counts = [len(segment) for segment in segments]
    values = torch.tensor([value for segment in segments for value in segment], dtype=torch.float32)
    data = codec.encode(values, counts)
    assert data.dtype == torch.uint8
    assert data.numel() <= codec.bound(counts)
    if bool(values.all()) and not isinstance(codec, Zoned):
        assert data.numel() == codec.size(counts)
    decoded = codec.decode(data, counts)
    assert not bool(decoded[values == 0].any())
    assert decoded.dtype == torch.float32
    assert decoded.shape == values.shape
    assert bool(decoded.isfinite().all())
    assert torch.equal(codec.decode(data.numpy().tobytes(), counts), decoded)
    if isinstance(codec, Zoned):
        places, sent = codec.decode_places(data, counts)
        assert torch.equal(torch.zeros_like(decoded).index_put((places,), sent), decoded)


@pytest.mark.parametrize("codec", [each for each in CODECS if not isinstance(each, Zoned)], ids=repr)
def test_what_is_decoded_is_coded_without_further_loss(codec: ValueCodec) -> None:
    """Every rank may code again what it decoded: the representable values are kept.

    Lloyd and Max's codec promises it for Gaussian values alone.
    """
    values = normal(1000)
    decoded = codec.decode(codec.encode(values, [400, 600]), [400, 600])
    assert torch.allclose(codec.decode(codec.encode(decoded, [400, 600]), [400, 600]), decoded, rtol=1e-6, atol=0)


@every_codec
def test_the_bytes_are_pinned(codec: ValueCodec) -> None:
    golden = GOLDEN["codes"][repr(codec)]
    values = torch.tensor(GOLDEN["values"], dtype=torch.float32)
    assert codec.encode(values, GOLDEN["counts"]).numpy().tobytes().hex() == golden["bytes"]
    decoded = codec.decode(bytes.fromhex(golden["bytes"]), GOLDEN["counts"])
    assert torch.equal(decoded, torch.tensor(golden["decoded"], dtype=torch.float32))


def test_float32_loses_nothing() -> None:
    values = normal(100)
    assert torch.equal(Float32().decode(Float32().encode(values, [100]), [100]), values)


@pytest.mark.parametrize(("codec", "dtype"), [(Float16(), torch.float16), (BFloat16(), torch.bfloat16)], ids=repr)
def test_half_precision_rounds_as_torch_does_and_saturates(codec: ValueCodec, dtype: torch.dtype) -> None:
    values = torch.cat([normal(10_000), normal(10_000) * 1e-6, torch.tensor([1e-38, 0.0, -0.0])])
    assert torch.equal(codec.decode(codec.encode(values, [20_003]), [20_003]), values.to(dtype).float())
    largest = torch.finfo(dtype).max
    huge = torch.tensor([3.4028234663852886e38, -3.4028234663852886e38])
    assert codec.decode(codec.encode(huge, [2]), [2]).tolist() == [largest, -largest]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-3, 1.0, 1e37])
def test_uniform_errs_by_at_most_half_a_step(bits: int, magnitude: float) -> None:
    codec = Uniform(bits=bits)
    values = normal(1000) * magnitude
    lost = values - codec.decode(codec.encode(values, [1000]), [1000])
    step = values.abs().max().double() / codec.levels
    assert float(lost.abs().max()) <= float(step) * 0.5001 + 1.5e-45  # the least subnormal


def test_uniform_has_a_scale_for_every_block_of_a_segment() -> None:
    """Blocks of two never reach across a segment's end, so each of these pairs is exact."""
    codec = Uniform(bits=3, block=2)
    values = torch.tensor([1.0, -1.0, 5.0, 7.0, 0.0, 1e-30])
    assert torch.equal(codec.decode(codec.encode(values, [3, 3]), [3, 3])[:4], torch.tensor([1.0, -1.0, 5.0, 7.0]))
    assert codec.size([3, 3]) == 4 * 4 + 3


def gaussian_mean(low: float, high: float) -> float:
    """The mean of a standard Gaussian's values between two numbers, 0 <= low < high."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    tails = [math.erfc(x / math.sqrt(2)) / 2 for x in (low, high)]
    return (density(low) - density(high)) / (tails[0] - tails[1])


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_of_lloyd_and_max_is_the_mean_of_the_gaussian_values_next_to_it(bits: int) -> None:
    """Read from a code with a scale of one that lists all levels in ascending order."""
    string = sum(number << (bits * number) for number in range(2**bits))
    data = b"\0\x80\x3f" + string.to_bytes(-(-bits * 2**bits // 8), "little")
    levels = LloydMax(bits=bits).decode(data, [2**bits]).double().tolist()
    assert levels == sorted(levels) == [-level for level in reversed(levels)]
    positive = levels[2 ** (bits - 1) :]
    inner = [(low + high) / 2 for low, high in pairwise(positive)]
    means = [gaussian_mean(*ends) for ends in zip([0.0, *inner], [*inner, math.inf], strict=True)]
    assert positive == pytest.approx(means, rel=0, abs=2**-13)  # they are multiples of it


def test_the_levels_of_two_bits_are_those_of_the_paper() -> None:
    data = b"\0\x80\x3f" + bytes([0b11100100])
    assert LloydMax().decode(data, [4]).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=5e-4)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
@pytest.mark.parametrize("magnitude", [1e-10, 1.0, 1e10])
def test_gaussian_values_lose_what_max_has_computed(bits: int, error: float, magnitude: float) -> None:
    """Root mean squares of few values flatter them by a little, so the blocks are long."""
    values = normal(1 << 18)
    codec, counts = LloydMax(bits=bits, block=4096), [values.numel()]
    decoded = codec.decode(codec.encode(values * magnitude, counts), counts).double() / magnitude
    assert float((values - decoded).square().mean()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e36])
@pytest.mark.parametrize("kind", ["Gaussian", "Laplace", "Student's t", "one in 50", "one in 256", "constant"])
def test_every_block_of_lloyd_and_max_loses_less_than_it_holds(kind: str, magnitude: float, bits: int) -> None:
    """So that error feedback cannot grow, also where few values carry a block."""
    shape = (64, 256)
    gaussian = normal(64 * 256).view(shape)
    exponential = -torch.rand(shape, generator=torch.Generator().manual_seed(1)).clamp(1e-9).log()
    values = {
        "Gaussian": gaussian,
        "Laplace": gaussian.sign() * exponential,
        "Student's t": gaussian / exponential.sqrt(),  # of two degrees of freedom
        "one in 50": gaussian * torch.where(torch.arange(256) % 50 == 0, 1.0, 1e-5),
        "one in 256": gaussian * torch.where(torch.arange(256) == 100, 1.0, 1e-5),
        "constant": torch.full(shape, -0.3),
    }[kind] * magnitude
    codec, counts = LloydMax(bits=bits), [values.numel()]
    decoded = codec.decode(codec.encode(values.flatten(), counts), counts).view(shape)
    lost = (values - decoded).double().square().sum(dim=1)
    assert bool((lost < values.double().square().sum(dim=1)).all())


@pytest.mark.parametrize("codec", [LloydMax(bits=1), LloydMax(bits=2), LloydMax(bits=4)], ids=repr)
def test_a_scale_of_lloyd_and_max_may_be_as_small_or_large_as_any_value(codec: LloydMax) -> None:
    """From where a bfloat16 is zero to where it has to be cut down so that no product overflows."""
    for magnitude in (1e-45, 1e-40, 1e-38, 1e-9, 1e9, 1e37, 3.4e38):
        values = magnitude * torch.tensor([1.0, -1.0, 1.0, -1.0])
        decoded = codec.decode(codec.encode(values, [4]), [4])
        assert bool(decoded.isfinite().all())
        assert bool((decoded * values.sign() >= 0).all())
        assert float(decoded.abs().max()) <= 1.6 * magnitude
        if 1e-38 <= magnitude <= 1e37:
            assert float((values - decoded).double().norm() / values.double().norm()) < 0.6


def test_blocks_of_lloyd_and_max_end_with_their_segment() -> None:
    """So another segment's magnitude does not matter to a block, and neither does the order of segments."""
    codec, counts = LloydMax(block=8), [11, 0, 1, 8, 29]
    parts = [10.0**power * normal(count, power) for power, count in enumerate(counts)]
    together = codec.decode(codec.encode(torch.cat(parts), counts), counts)
    alone = [codec.decode(codec.encode(part, [part.numel()]), [part.numel()]) for part in parts]
    assert torch.equal(together, torch.cat(alone))
    assert codec.size(counts) == 1 + 2 * (2 + 0 + 1 + 1 + 4) + 13  # 49 values of two bits


def nearest_plainly(x: FloatArray, scale: Any, levels: FloatArray) -> npt.NDArray[np.int64]:
    """The numbers of the positive levels that are nearest to the magnitudes of one block by this scale."""
    scaled = np.abs(x) / (scale if scale > 0 else np.float32(1))
    above: npt.NDArray[np.int64] = np.sum([scaled >= (low + high) / 2 for low, high in pairwise(levels)], axis=0)
    return above


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_many_values_have_the_code_that_they_have_block_by_block(bits: int) -> None:
    """Also where they are more than are coded at once, and segments end within a byte."""
    counts = [3, 2 * VALUES_AT_ONCE + 301, 0, 70]
    x = (normal(sum(counts), 5) * normal(sum(counts), 6).exp()).numpy()
    levels = LloydMax(bits)._levels()
    scales, chosen = [], []
    for segment in np.split(x, np.cumsum(counts)[:-1]):
        for start in range(0, segment.size, 256):
            block = segment[start : start + 256]
            exact = np.abs(block).astype(np.float64)
            z = levels[nearest_plainly(block, np.sqrt((exact * exact).mean()).astype(np.float32), levels)]
            scale = torch.tensor((exact * z).sum() / (z.astype(np.float64) ** 2).sum()).float().bfloat16()
            number = levels.size + nearest_plainly(block, scale.float().numpy(), levels)
            scales.append(scale)
            chosen.append(np.where(block < 0, 2**bits - 1 - number, number))
    numbers = np.concatenate(chosen)
    in_bits = (numbers[:, None] >> np.arange(bits)) & 1
    code = torch.stack(scales).view(torch.int16).numpy().tobytes() + np.packbits(in_bits, bitorder="little").tobytes()
    data = LloydMax(bits).encode(torch.from_numpy(x), counts)
    assert data.numpy().tobytes() == b"\0" + code
    sizes = [256 if start + 256 <= count else count - start for count in counts for start in range(0, count, 256)]
    decoded = np.concatenate([-levels[::-1], levels])[numbers] * np.repeat(torch.stack(scales).float().numpy(), sizes)
    assert np.array_equal(LloydMax(bits).decode(data, counts).numpy(), decoded)


@pytest.mark.parametrize("width", [*range(1, 9), 16])
def test_numbers_of_a_fixed_width_stand_side_by_side_low_bit_first(width: int) -> None:
    numbers = np.random.default_rng(width).integers(0, 2**width, 8 * WORDS_AT_ONCE + 13)
    plainly = np.packbits((numbers[:, None] >> np.arange(width)) & 1, bitorder="little")
    assert np.array_equal(pack_fixed(numbers, width), plainly)
    assert np.array_equal(unpack_fixed(plainly, numbers.size, width, "numbers"), numbers)


def test_lloyd_and_max_by_hand() -> None:
    """By the root mean square, sqrt(14 / 4), 3 takes the high level and the others the low one, so the scale is
    (3 high + 5 low) / (high^2 + 3 low^2) = 2.3478, as bfloat16 2.34375, by which 2 stays low."""
    data = LloydMax().encode(torch.tensor([3.0, -1.0, 2.0, -2.0]), [4])
    scale, low, high = 2.34375, 3709 / 2**13, 12373 / 2**13
    assert data.numpy().tobytes() == b"\0" + b"\x16\x40" + bytes([0b01100111])
    assert LloydMax().decode(data, [4]).tolist() == [scale * high, -scale * low, scale * low, -scale * low]


def test_sign_by_hand() -> None:
    data = Sign().encode(torch.tensor([1.0, -3.0, -8.0]), [2, 0, 1])
    assert data.numpy().tobytes() == b"\0" + struct.pack("<ff", 2.0, 8.0) + bytes([0b110])
    assert Sign().decode(data, [2, 0, 1]).tolist() == [2, -2, -8]


def test_zeros_come_before_the_code_of_all_others_and_the_mean_of_signs_is_over_these() -> None:
    data = Sign().encode(torch.tensor([1.0, 0.0, -3.0, -0.0, 0.0, -8.0, 0.0]), [3, 1, 3])
    zeros = b"\1" + bytes([0b10, 0b1011010])
    assert data.numpy().tobytes() == zeros + struct.pack("<ff", 2.0, 8.0) + bytes([0b110])
    assert Sign().decode(data, [3, 1, 3]).tolist() == [2, 0, -2, 0, 0, -8, 0]


@every_codec
def test_zeros_stay_zeros(codec: ValueCodec) -> None:
    """None, some, many, or all of a segment; a few and several blocks of them."""
    for counts in ([2, 3], [300, 1, 700]):
        for place in range(sum(counts)):
            values = normal(sum(counts), place)
            values[place:] *= torch.arange(sum(counts) - place) % 2
            decoded = codec.decode(codec.encode(values, counts), counts)
            assert not bool(decoded[values == 0].any())
            if place > 3:
                break
        assert not bool(codec.decode(codec.encode(torch.zeros(sum(counts)), counts), counts).any())


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_values_that_are_not_finite(codec: ValueCodec, bad: float) -> None:
    with pytest.raises(ValueError, match=r"must be finite, got .* at 1"):
        codec.encode(torch.tensor([1.0, bad]), [2])


@every_codec
def test_refuses_values_that_do_not_fit_their_counts(codec: ValueCodec) -> None:
    with pytest.raises(ValueError, match="must be 3 as counted, got 2"):
        codec.encode(torch.zeros(2), [3])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        codec.size([-1])
    with pytest.raises(TypeError, match="must be float32"):
        codec.encode(torch.zeros(2, dtype=torch.float64), [2])


@every_codec
def test_another_length_is_refused(codec: ValueCodec) -> None:
    data = codec.encode(normal(20), [20]).numpy().tobytes()
    for broken in (data[:-1], data + b"\x00", b""):
        with pytest.raises(PayloadError, match=r"payload field values(\.\w+)? must be"):
            codec.decode(broken, [20])


@pytest.mark.parametrize(
    ("codec", "data", "field"),
    [
        (Float32(), struct.pack("<f", float("inf")), "values"),
        (Float16(), struct.pack("<e", float("nan")), "values"),
        (BFloat16(), b"\x80\x7f", "values"),
        (Sign(), b"\0" + struct.pack("<f", -1.0) + b"\x00", "values.magnitudes"),
        (Sign(), b"\0" + struct.pack("<f", 1.0) + b"\x02", "values.signs"),
        (Sign(), b"\2" + struct.pack("<f", 1.0) + b"\x00", "values.zeros"),
        (Sign(), b"", "values.zeros"),
        (Sign(), b"\1\x00", "zeros"),
        (Sign(), b"\1\x03", "zeros.flags"),
        (Sign(), b"\1\x02\x01", "zeros.masks"),
        (Uniform(bits=4), struct.pack("<f", float("nan")) + b"\x00", "values.scales"),
        (Uniform(bits=4), struct.pack("<f", 1.0) + b"\x0f", "values.integers"),
        (Uniform(bits=4), struct.pack("<f", 1.0) + b"\x10", "values.integers"),
        (LloydMax(), b"\0\x80\xbf\x00", "values.scales"),  # -1
        (LloydMax(), b"\0\x00\x80\x00", "values.scales"),  # -0
        (LloydMax(), b"\0\x80\x7f\x00", "values.scales"),  # infinite
        (LloydMax(), b"\0\xc0\x7f\x00", "values.scales"),  # not a number
        (LloydMax(), b"\0\x01\x7e\x00", "values.scales"),  # above 2^125
        (LloydMax(), b"\0\x80\x3f\x04", "values.levels"),
        (DeadZone(), b"\x80\xbf\x00\0\0\0\0", "values.factors"),  # -1
        (DeadZone(), b"\x80\x7d\x00\0\0\0\0", "values.factors"),  # 2^124
        (DeadZone(), b"\x80\x3f\x02\0\0\0\0", "values.counts"),  # a number of up to 1 has one bit
        (DeadZone(), b"\x80\x3f\x00\0\0\0", "values.levels"),
        (DeadZone(), b"\x80\x3f\x00\1\0\0\0", "values.levels"),
        (DeadZone(), b"\x80\x3f\x00\0\0\0\0\0", "values.signs"),
    ],
)
def test_bytes_that_no_value_has_are_refused(codec: ValueCodec, data: bytes, field: str) -> None:
    with pytest.raises(PayloadError) as caught:
        codec.decode(data, [1])
    assert caught.value.field == field


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_uniform_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"Uniform\(bits=\.\.\.\) must be 2 to 8, or 16, got {bits}"):
        Uniform(bits=bits)


@pytest.mark.parametrize("codec", [Uniform, LloydMax])
def test_an_empty_block_is_refused(codec: type[Uniform | LloydMax]) -> None:
    with pytest.raises(ValueError, match=rf"{codec.__name__}\(block=\.\.\.\) must be an integer of at least 1, got 0"):
        codec(bits=4, block=0)


@pytest.mark.parametrize("bits", [-1, 0, 9, True, 2.0])
def test_lloyd_and_max_have_levels_of_one_to_eight_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"LloydMax\(bits=\.\.\.\) must be 1 to 8, got {bits}"):
        LloydMax(bits=bits)


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (LloydMax(), "lloyd2"),
        (LloydMax(bits=4, block=64), "lloyd4x64"),
        (Uniform(bits=4), "uniform4"),
        (Uniform(bits=4, block=256), "uniform4x256"),
        (DeadZone(), "deadzone1.6"),
        (DeadZone(0.5), "deadzone0.5"),
        (Largest(), "largest0.01"),
        (Largest(0.00001), "largest0.00001"),
        (Largest(1), "largest1"),
    ],
)
def test_a_codec_with_levels_has_a_text_form(codec: ValueCodec, text: str) -> None:
    assert to_text(codec) == text
    assert from_text("values", text, ValueCodec) == codec


@pytest.mark.parametrize(
    "text", ["lloyd", "lloyd2x", "lloydx64", "max2", "deadzone", "deadzone.5", "largest", "largest1e-2"]
)
def test_another_text_is_refused_with_what_it_may_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"lloydBITS, lloydBITSxBLOCK, deadzoneSTEP, largestSHARE, got"):
        from_text("values", text, ValueCodec)


@pytest.mark.parametrize(("step", "bits", "error"), [(0.5, 2.73, 0.0438), (1.0, 1.43, 0.221), (1.6, 0.63, 0.548)])
@pytest.mark.parametrize("magnitude", [1e-10, 1.0, 1e10])
def test_a_wider_dead_zone_takes_fewer_bits(step: float, bits: float, error: float, magnitude: float) -> None:
    """Within 2 % of the entropy of the levels of Gaussian values."""
    values, count = normal(1 << 17), 1 << 17
    data = DeadZone(step).encode(values * magnitude, [count])
    assert 8 * data.numel() / count == pytest.approx(bits, rel=0.02)
    decoded = DeadZone(step).decode(data, [count]).double() / magnitude
    assert float((values - decoded).square().mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("step", [0.25, 1.6, 1.7])
@pytest.mark.parametrize(
    "values", [[0.5], [1.0, 1.0, 1.0], [-3e-30, 2e-30], [1.0, *[1e-6] * 30], [1e30, *[-1e29] * 12]], ids=str
)
def test_the_largest_value_is_sent_however_wide_the_dead_zone(values: list[float], step: float) -> None:
    """So what is owed leaves in the end, also where all values are the same, or there is just one."""
    given = torch.tensor(values)
    decoded = DeadZone(step).decode(DeadZone(step).encode(given, [len(values)]), [len(values)])
    place = int(given.abs().argmax())
    assert float(decoded[place] / given[place]) > 0.5
    assert float((given - decoded).double().square().sum()) < float(given.double().square().sum())


def test_a_dead_zone_by_hand() -> None:
    """The step is 1.6 sqrt(21 / 4) = 3.67, of which 4 is one multiple; the factor is 4 / 1.375 = 2.909, as a bfloat16
    2.90625. One of four values is at one multiple: its count and the
    length and the bytes of its position in Rice code. It is not at two; and its sign."""
    data = DeadZone().encode(torch.tensor([1.0, -4.0, 0.0, 2.0]), [4])
    assert data.numpy().tobytes().hex(" ") == "3a 40 01 02 00 00 00 01 01 00 00 00 00 00 01"
    assert DeadZone().decode(data, [4]).tolist() == [0, -2.90625 * 1.375, 0, 0]


@pytest.mark.parametrize("step", [0, -1.0, 1.8, float("nan"), True, "1"])
def test_a_dead_zone_has_a_width(step: float) -> None:
    with pytest.raises(ValueError, match=r"DeadZone\(step=\.\.\.\) must be a number above 0 and at most 1.7, got"):
        DeadZone(step)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_the_largest_are_sent_in_every_segment_and_nothing_else(share: float) -> None:
    values = normal(3000) * torch.tensor([1e-10, 1.0, 1e10]).repeat_interleave(1000)
    decoded = Largest(share).decode(Largest(share).encode(values, [1000] * 3), [1000] * 3)
    for sent, whole in zip(decoded.split(1000), values.split(1000), strict=True):
        places = sent.nonzero().flatten()
        assert places.numel() == 1000 * share
        assert set(places.tolist()) == set(whole.abs().topk(places.numel()).indices.tolist())


@pytest.mark.parametrize(("every", "share"), [(1, 0.001), (1, 0.02), (1, 0.5), (17, 0.001), (17, 0.02)])
def test_the_largest_are_found_wherever_they_are(every: int, share: float) -> None:
    """Also where a sample of every 17th value has all of them, or would have."""
    values = normal(5000)
    values[::every] *= 100
    decoded = Largest(share).decode(Largest(share).encode(values, [5000]), [5000])
    assert set(decoded.nonzero().flatten().tolist()) == set(values.abs().topk(int(5000 * share)).indices.tolist())


def test_of_few_values_all_may_be_among_the_largest() -> None:
    """A share of the segment's size is rounded up, of equal ones the first are sent, and zeros are not."""
    values = torch.tensor([3.0, 0.0, -1e-38, 1.0, 1.0, 0.0, 0.0, 0.5, -0.5])
    counts = [1, 2, 2, 2, 2]
    codec = Largest(0.5)
    decoded = codec.decode(codec.encode(values, counts), counts)
    assert decoded.ne(0).tolist() == [True, False, True, True, False, False, False, True, False]


def test_of_many_equal_values_as_many_are_sent_as_of_others() -> None:
    """As where parameters in bfloat16 have moved by a step of that format or not at all."""
    values = normal(5000).sign()
    decoded = Largest(0.02).decode(Largest(0.02).encode(values, [2000, 3000]), [2000, 3000])
    assert [int(part.count_nonzero()) for part in decoded.split([2000, 3000])] == [40, 60]
    assert torch.allclose(decoded[decoded != 0], values[decoded != 0], rtol=0.01)


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_what_is_sent_beside_an_outlier_is_not_decoded_as_a_part_of_it(share: float) -> None:
    """It would be decoded as many times itself; so it waits, and the outlier is sent alone."""
    values = normal(1000).clamp(min=0.1)
    values[500] = 1000
    decoded = Largest(share).decode(Largest(share).encode(values, [1000]), [1000])
    assert decoded.nonzero().flatten().tolist() == [500]
    without = values.clone()
    without[500] = 0
    decoded = Largest(share).decode(Largest(share).encode(without, [1000]), [1000])
    assert bool((decoded <= 1.5 * without).all())


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), True, "1"])
def test_the_largest_have_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"Largest\(share=\.\.\.\) must be a number above 0 and at most 1, got"):
        Largest(share)


@pytest.mark.parametrize("codec", [DeadZone(1.7), Largest(0.01)], ids=repr)
def test_what_error_feedback_has_left_in_the_zone_is_sent_once_nothing_more_comes(codec: ValueCodec) -> None:
    owed = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = float(owed.norm())
    for _ in range(300):
        owed -= codec.decode(codec.encode(owed, [4096]), [4096])
    assert float(owed.norm()) < 0.1 * before


def test_the_benchmark_shows_what_a_codec_costs_and_loses() -> None:
    lines = CliRunner().invoke(main, ["bench", "codec", "--entries", "1000"]).output.splitlines()
    (header,) = [place for place, line in enumerate(lines) if line.startswith("values ")]
    rows = {line[:28].strip(): [float(figure) for figure in line[28:].split()] for line in lines[header + 1 :]}
    assert rows["Float32()"][:2] == [32, 0]
    one, two, four = (rows[name] for name in ("Sign()", repr(LloydMax(2)), repr(LloydMax(4))))
    assert 1 < one[0] < 2 < two[0] < 2.1 < 4 < four[0] < 4.1
    assert one[1] > two[1] > four[1] > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantise_is_what_the_others_decode_and_passes_gradients_within_the_scale(bits: int) -> None:
    codec = Uniform(bits=bits)
    latent = torch.tensor([0.1, -0.9, 1.0, 1.5, -2.0, 0.0], requires_grad=True)
    quantised = codec.fake_quantise(latent, 1.0)
    assert torch.equal(quantised, codec.dequantise(codec.quantise(latent.detach(), 1.0), 1.0))
    (gradient,) = torch.autograd.grad(quantised.sum(), latent)
    assert gradient[[0, 1, 5]].tolist() == [1.0, 1.0, 1.0]
    assert gradient[[3, 4]].tolist() == [0.0, 0.0]


def test_a_scale_of_zero_quantises_to_zero() -> None:
    codec = Uniform(bits=4)
    assert torch.equal(codec.quantise(torch.zeros(3), 0.0), torch.zeros(3, dtype=torch.int32))
    assert torch.equal(codec.fake_quantise(torch.zeros(3), 0.0), torch.zeros(3))


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    ranks=st.integers(1, 64),
    count=st.integers(0, 70),
    extreme=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_sum_of_words_is_the_sum_of_the_lanes(bits: int, ranks: int, count: int, extreme: bool) -> None:
    largest = 2 * Uniform(bits=bits).levels
    width = lane_width(largest, ranks)
    generator = torch.Generator().manual_seed(count)
    low = largest if extreme else 0
    each = torch.randint(low, largest + 1, (ranks, count), generator=generator)
    words = torch.stack([pack_lanes(row, width) for row in each])
    assert words.shape == (ranks, lane_words(count, width))
    summed = words.sum(dim=0, dtype=torch.int32)
    assert bool((words.sum(dim=0) == summed).all())  # no int32 overflow
    assert torch.equal(unpack_lanes(summed, width, count).long(), each.sum(dim=0))


def test_the_mean_of_quantised_latents() -> None:
    codec, ranks = Uniform(bits=8), 4
    latents = torch.stack([normal(100, seed) for seed in range(ranks)])
    scale = latents.abs().max()
    width = lane_width(2 * codec.levels, ranks)
    words = torch.stack([pack_lanes(codec.quantise(row, scale) + codec.levels, width) for row in latents])
    sums = unpack_lanes(words.sum(dim=0, dtype=torch.int32), width, 100) - ranks * codec.levels
    mean = codec.dequantise(sums, scale, terms=ranks)
    assert torch.allclose(mean, latents.mean(dim=0), atol=float(scale) / codec.levels / 2)


def test_lanes_refuse_what_would_carry() -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 15\], got 0 to 16"):
        pack_lanes(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match=r"must be in \[0, 15\], got -1 to 3"):
        pack_lanes(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match="1 to 31 bits wide, got 32"):
        lane_words(1, 32)
    with pytest.raises(ValueError, match="must be 1 int32, got 2"):
        unpack_lanes(torch.zeros(2, dtype=torch.int32), 4, 5)
