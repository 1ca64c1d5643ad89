"""A payload is what `pack` wrote for this kind, step and these bounds, or a PayloadError that names the field."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgc.coding import Kind, PayloadError, header_size, pack, unpack

PARTS = [b"abc", b"", b"\x00\xff"]
BOUNDS = [3, 0, 2]
STEP = 2**40 + 7
GOLDEN = bytes.fromhex((Path(__file__).parent / "golden" / "payload.hex").read_text())


def payload_of(*, magic: bytes = b"LGCP", fields: tuple[int, int, int, int] = (1, 3, 3, 0), step: int = STEP) -> bytes:
    """The golden payload written out plainly with other fields and the right checksum."""
    head = magic + struct.pack("<BBBBQ", *fields, step)
    tail = struct.pack("<III", 3, 0, 2) + b"".join(PARTS)
    return head + struct.pack("<I", zlib.crc32(head + tail)) + tail


def refused(data: bytes, *, bounds: list[int] = BOUNDS) -> PayloadError:
    """The error with which this is refused."""
    with pytest.raises(PayloadError) as caught:
        unpack(data, kind=Kind.ENTRIES, step=STEP, bounds=bounds)
    return caught.value


def test_the_bytes_are_pinned() -> None:
    assert pack(PARTS, kind=Kind.ENTRIES, step=STEP).numpy().tobytes() == GOLDEN
    assert payload_of() == GOLDEN
    parts = unpack(GOLDEN, kind=Kind.ENTRIES, step=STEP, bounds=BOUNDS)
    assert [part.numpy().tobytes() for part in parts] == PARTS


@given(parts=st.lists(st.binary(max_size=40), max_size=6), step=st.integers(0, 2**64 - 1), kind=st.integers(0, 255))
def test_unpack_gives_what_was_packed(parts: list[bytes], step: int, kind: int) -> None:
    data = pack(parts, kind=kind, step=step)
    assert data.numel() == header_size(len(parts)) + sum(map(len, parts))
    received = unpack(data, kind=kind, step=step, bounds=[len(part) for part in parts])
    assert [part.numpy().tobytes() for part in received] == parts


def test_strided_tensors_are_packed_and_unpacked() -> None:
    strided = torch.tensor([97, 0, 98, 0, 99, 0], dtype=torch.uint8)[::2]
    data = pack([strided], kind=1, step=0).repeat_interleave(2)[::2]
    (part,) = unpack(data, kind=1, step=0, bounds=[3])
    assert part.numpy().tobytes() == b"abc"


def test_the_header_of_three_parts_has_32_bytes() -> None:
    assert header_size(3) == 32


def test_parts_do_not_share_memory_with_what_was_received() -> None:
    data = pack([b"abc"], kind=1, step=0)
    (part,) = unpack(data, kind=1, step=0, bounds=[3])
    data.zero_()
    assert part.numpy().tobytes() == b"abc"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (payload_of(magic=b"LGCQ"), "magic"),
        (payload_of(fields=(2, 3, 3, 0)), "version"),
        (payload_of(fields=(1, 2, 3, 0)), "kind"),
        (payload_of(fields=(1, 3, 2, 0)), "parts"),
        (payload_of(fields=(1, 3, 255, 0)), "parts"),
        (payload_of(fields=(1, 3, 3, 1)), "reserved"),
        (payload_of(step=STEP - 1), "step"),
        (GOLDEN[:20] + struct.pack("<I", 4) + GOLDEN[24:], "lengths[0]"),
        (GOLDEN[:20] + struct.pack("<I", 2**32 - 1) + GOLDEN[24:], "lengths[0]"),
        (GOLDEN[:20] + struct.pack("<I", 2) + GOLDEN[24:], "length"),
        (GOLDEN[:-1] + b"\xfe", "checksum"),
        (GOLDEN[:-1], "length"),
        (GOLDEN + b"\x00", "length"),
        (b"", "length"),
    ],
)
def test_the_error_names_the_field(data: bytes, field: str) -> None:
    assert refused(data).field == field


def test_the_message_names_the_field_the_bound_and_the_value() -> None:
    assert str(refused(payload_of(fields=(2, 3, 3, 0)))) == "payload field version must be 1, got 2."
    assert str(refused(GOLDEN[:9])) == "payload field length must be at least 32 bytes, got 9."


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    for length in range(len(GOLDEN)):
        refused(GOLDEN[:length])
    for place in range(8 * len(GOLDEN)):
        broken = bytearray(GOLDEN)
        broken[place // 8] ^= 1 << place % 8
        refused(bytes(broken))


def test_declared_lengths_allocate_nothing() -> None:
    data = GOLDEN[:20] + struct.pack("<III", 2**32 - 1, 2**32 - 1, 2**32 - 1) + GOLDEN[32:]
    tracemalloc.start()
    assert refused(data, bounds=[2**40, 2**40, 2**40]).field == "length"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_pack_refuses_what_the_header_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"kind=\.\.\.\) must be in \[0, 255\], got 256"):
        pack([], kind=256, step=0)
    with pytest.raises(ValueError, match=r"step=\.\.\.\) must be in \[0, 2\^64\), got -1"):
        pack([], kind=0, step=-1)
    with pytest.raises(ValueError, match="at most 255, got 256"):
        pack([b""] * 256, kind=0, step=0)
    with pytest.raises(TypeError, match="uint8"):
        pack([torch.zeros(3)], kind=0, step=0)
