"""The code of zeros: exact, pinned, empty where there is none, small where they fill blocks; one for each set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lgc.coding import PayloadError, decode_zeros, encode_zeros, zeros_bound

GOLDEN = Path(__file__).parent / "golden" / "zeros.hex"


def with_zeros(*runs: tuple[int, bool]) -> Tensor:
    """Values of which so many after one another are zero, or are not."""
    return torch.cat([torch.full((count,), 0.0 if zero else -1e-45) for count, zero in runs])


def code(values: Tensor) -> bytes:
    data = encode_zeros(values)
    assert data.dtype == torch.uint8
    return data.numpy().tobytes()


@given(
    runs=st.lists(st.tuples(st.sampled_from([0, 1, 2, 7, 255, 256, 257, 700]), st.booleans()), min_size=1, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_zeros_are_found_again_within_the_bound(runs: list[tuple[int, bool]]) -> None:
    values = with_zeros(*runs)
    data = encode_zeros(values)
    assert data.numel() <= zeros_bound(values.numel())
    decoded = decode_zeros(data, values.numel())
    assert decoded.dtype == torch.bool
    assert torch.equal(decoded, values == 0)
    assert torch.equal(decode_zeros(data.numpy().tobytes(), values.numel()), decoded)


@pytest.mark.parametrize("count", [2, 255, 256, 257, 258, 512, 513, 3000])
def test_the_bound_is_reached_by_zeros_among_others_in_every_block(count: int) -> None:
    values = torch.ones(count)
    values[::3] = 0
    values[256::256] = 0
    assert len(code(values)) == zeros_bound(count)


def test_no_values_and_no_zeros_take_no_bytes() -> None:
    assert code(torch.zeros(0)) == b""
    assert code(torch.ones(1000)) == b""
    assert zeros_bound(0) == 0
    assert decode_zeros(b"", 0).shape == (0,)
    assert decode_zeros(b"", 3).tolist() == [False, False, False]


def test_zeros_by_hand() -> None:
    """Blocks of 256: no zero, zeros alone, some zeros, and a last one of four values."""
    zeros = with_zeros((256, False), (256, True), (256, False), (4, True))
    assert code(zeros) == bytes([0b01_00_01_00])
    zeros[[512, 521]] = 0.0
    zeros[769:771] = 1.0
    assert code(zeros) == bytes([0b10_10_01_00, 0b1, 0b10]) + bytes(30) + bytes([0b1001])


def test_negative_zeros_are_zeros_and_subnormal_numbers_are_not() -> None:
    assert decode_zeros(encode_zeros(torch.tensor([0.0, -0.0, 1e-45, -1e-45])), 4).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_the_bytes_are_pinned() -> None:
    values = torch.tensor([float(place * place % 7 > 1 or place < 300) for place in range(800)])
    values[512:768] = 0
    golden = bytes.fromhex(GOLDEN.read_text())
    assert code(values) == golden
    assert torch.equal(decode_zeros(golden, 800), values == 0)


@pytest.mark.parametrize(
    ("data", "count", "field"),
    [
        (b"\x01", 0, "zeros"),
        (b"\x00", 1000, "zeros"),  # no zero has a shorter code
        (b"\x03", 4, "zeros.flags"),
        (b"\x05", 4, "zeros.flags"),  # a flag too many
        (b"\x01\x00", 4, "zeros.masks"),
        (b"\x01", 2000, "zeros.flags"),
        (b"\x02", 4, "zeros.masks"),
        (b"\x02\x00", 4, "zeros.masks"),  # mixed without a zero
        (b"\x02\x0f", 4, "zeros.masks"),  # mixed of zeros alone
        (b"\x02\x11", 4, "zeros.masks"),  # a bit too many
        (b"\x02\x01\x00", 4, "zeros.masks"),
        (b"\x02" + b"\xff" * 32, 256, "zeros.masks"),
    ],
)
def test_bytes_that_no_zeros_have_are_refused(data: bytes, count: int, field: str) -> None:
    with pytest.raises(PayloadError) as caught:
        decode_zeros(data, count)
    assert caught.value.field == field


def test_refuses_what_is_not_float32_of_one_dimension() -> None:
    with pytest.raises(
        TypeError, match=r"encode_zeros\(values=\.\.\.\) must be float32 of one dimension, got .*\(2, 2\)"
    ):
        encode_zeros(torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        encode_zeros(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be of at least 0 values, got -1"):
        zeros_bound(-1)
