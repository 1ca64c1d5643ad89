"""Small integers side by side: in strings of bits, and in lanes of int32 words, which can be summed. See docs/wire.md.

Bit i of a string is bit i mod 8, from the low end, of byte i // 8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.payload import Octets, PayloadError

Integers = npt.NDArray[np.int64]

WORDS_AT_ONCE = 2**13  # of 8 bytes, which with what is computed from them stay in the cache
WORD_BITS = 31  # of an int32 that lanes use: the sign bit stays clear, so no sum overflows


def octet_count(bits: int) -> int:
    """Bytes that hold this number of bits."""
    return (bits + 7) // 8


def bit_lengths(values: Integers) -> Integers:
    """Binary digits of each value, which is in [0, 2^53); 0 has none."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def check_bits(data: Octets, count: int, field: str) -> None:
    """Raise PayloadError unless these are as many bytes as `count` bits need, with no bit set after the last."""
    if data.size != octet_count(count):
        raise PayloadError(field, f"{octet_count(count)} bytes", data.size)
    if count % 8 and data[-1] >> (count % 8):
        raise PayloadError(field, "zero after its last bit", f"byte {data[-1]:#04x}")


def pack_fixed(values: npt.NDArray[np.integer], width: int) -> Octets:
    """Write values < 2^width one after another, each low bit first; the width is 1 to 8, or 16."""
    if width == 16:
        return values.astype("<u2").view(np.uint8)
    words = np.zeros(-(-values.size // 8), "<u8")  # of eight values, in a byte each
    words.view(np.uint8)[: values.size] = values
    packed = np.empty((words.size, width), np.uint8)
    for start in range(0, words.size, WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        for lane, used, second in _pairs(width):
            moved = part & second
            part ^= moved
            part |= moved >> np.uint64(lane - used)
        if width in (1, 2, 4):
            packed[start : start + WORDS_AT_ONCE] = part.astype(f"<u{width}").view(np.uint8).reshape(-1, width)
        else:
            packed[start : start + WORDS_AT_ONCE] = part.view(np.uint8).reshape(-1, 8)[:, :width]
    return packed.reshape(-1)[: octet_count(values.size * width)]


def unpack_fixed(data: Octets, count: int, width: int, field: str) -> npt.NDArray[np.unsignedinteger]:
    """The values that `pack_fixed` wrote, uint8, or uint16 if they have 16 bits.

    Raises:
        PayloadError: if the length is another one, or a bit after the last value is set.
    """
    check_bits(data, count * width, field)
    if width == 16:
        return np.frombuffer(data.tobytes(), "<u2").astype(np.uint16)
    packed = np.zeros((-(-count // 8), width), np.uint8)
    packed.reshape(-1)[: data.size] = data
    words = np.zeros(len(packed), "<u8")
    for start in range(0, words.size, WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        if width in (1, 2, 4):
            part[...] = packed[start : start + WORDS_AT_ONCE].reshape(-1).view(f"<u{width}")
        else:
            part.view(np.uint8).reshape(-1, 8)[:, :width] = packed[start : start + WORDS_AT_ONCE]
        for lane, used, second in reversed(_pairs(width)):
            moved = part & (second >> np.uint64(lane - used))
            part ^= moved
            part |= moved << np.uint64(lane - used)
    return words.view(np.uint8)[:count]


def _pairs(width: int) -> list[tuple[int, int, np.uint64]]:
    """How pairs of lanes of a word close up, until eight values of this width stand side by side.

    Each step has the bits of a lane, how many of them are used, and where those of every second lane are.
    """
    steps = []
    for lane in (8, 16, 32):
        used = lane * width // 8
        starts = range(lane, 64, 2 * lane)
        steps.append((lane, used, np.uint64(sum((2**used - 1) << start for start in starts))))
    return steps


def pack_bits(values: Integers, widths: Integers) -> Octets:
    """Write `values[i] < 2^widths[i]` one after another, each low bit first; widths are at most 62."""
    ends = np.cumsum(widths)
    total = int(ends[-1]) if ends.size else 0
    if not total:
        return np.zeros(0, np.uint8)
    offsets = ends - widths
    words = np.zeros(total // 64 + 2, dtype="<u8")  # a value of width 0 may stand after the last bit
    places = offsets >> 6
    shifts = (offsets & 63).astype(np.uint64)
    raw = values.astype(np.uint64)
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    words[places[firsts]] = np.bitwise_or.reduceat(raw << shifts, firsts)
    crossing = np.flatnonzero((offsets & 63) + widths > 64)
    words[places[crossing] + 1] |= raw[crossing] >> (np.uint64(64) - shifts[crossing])
    return words.view(np.uint8)[: octet_count(total)]


def unpack_bits(data: Octets, widths: Integers, field: str) -> Integers:
    """The values that `pack_bits` wrote, from exactly as many bytes.

    Raises:
        PayloadError: if the length is another one, or a bit after the last value is set.
    """
    ends = np.cumsum(widths)
    total = int(ends[-1]) if ends.size else 0
    check_bits(data, total, field)
    words = np.zeros(total // 64 + 2, dtype="<u8")
    words.view(np.uint8)[: data.size] = data
    offsets = ends - widths
    places = offsets >> 6
    shifts = (offsets & 63).astype(np.uint64)
    values: npt.NDArray[np.uint64] = words[places] >> shifts
    values |= (words[places + 1] << np.uint64(1)) << (np.uint64(63) - shifts)  # a shift by 64 is undefined
    values &= (np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1)
    return values.astype(np.int64)


def pack_unary(values: Integers) -> Octets:
    """Write every value as so many zeros and a one."""
    ones = np.cumsum(values + 1) - 1
    bits = np.zeros(int(ones[-1]) + 1 if ones.size else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little")


def unpack_unary(data: Octets, count: int, field: str) -> Integers:
    """The `count` values that `pack_unary` wrote, from exactly as many bytes.

    Raises:
        PayloadError: if the ones are not `count`, or bytes follow the last.
    """
    ones = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))
    if ones.size != count:
        raise PayloadError(field, f"of {count} ones", ones.size)
    length = octet_count(int(ones[-1]) + 1) if count else 0
    if data.size != length:
        raise PayloadError(field, f"{length} bytes", data.size)
    return np.diff(ones, prepend=-1) - 1


def lane_width(largest: int, terms: int) -> int:
    """Bits of a lane that holds the sum of `terms` integers in [0, largest]."""
    return max(1, (largest * terms).bit_length())


def lane_words(count: int, width: int) -> int:
    """Number of int32 words that hold `count` lanes."""
    return -(-count // _lanes(width))


def pack_lanes(values: Tensor, width: int) -> Tensor:
    """Integers as lanes of int32 words, floor(31 / width) in each, so that a sum of words is the sum of the lanes.

    No lane carries into the next as long as no sum exceeds 2^width - 1: see `lane_width`. Lane j of a word holds
    value j * words + word, so that packing and unpacking are sums of contiguous slices.

    Args:
        values: integers in [0, 2^width), one dimension, on any device.
        width: bits of a lane, 1 to 31.

    Returns:
        int32 of shape (lane_words(count, width),) on the same device.

    Raises:
        ValueError: if a value or the width is out of range.
    """
    lanes = _lanes(width)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >> width):
        found = f"{int(values.min())} to {int(values.max())}"
        raise ValueError(f"pack_lanes(values=...) must be in [0, {2**width - 1}], got {found}.")
    words = lane_words(values.numel(), width)
    packed = torch.zeros(words, dtype=torch.int32, device=values.device)
    for lane in range(lanes):
        part = values[lane * words : (lane + 1) * words].to(torch.int32)
        packed[: part.numel()] |= part << (lane * width)
    return packed


def unpack_lanes(words: Tensor, width: int, count: int) -> Tensor:
    """The `count` integers, int32, that lie in the lanes of int32 words.

    Raises:
        ValueError: if the words are not those of `count` lanes.
    """
    expected = lane_words(count, width)
    if words.dtype != torch.int32 or words.numel() != expected:
        raise ValueError(f"unpack_lanes(words=...) must be {expected} int32, got {words.numel()} {words.dtype}.")
    return torch.cat([(words >> (lane * width)) & (2**width - 1) for lane in range(_lanes(width))])[:count]


def _lanes(width: int) -> int:
    if not 1 <= width <= WORD_BITS:
        raise ValueError(f"lanes must be 1 to {WORD_BITS} bits wide, got {width}.")
    return WORD_BITS // width
