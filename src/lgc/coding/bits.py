"""Bit strings of fixed-width and unary integers; bit i of a string is bit i mod 8, from the low end, of byte i // 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lgc.coding.payload import Octets, PayloadError

Integers = npt.NDArray[np.int64]


def octet_count(bits: int) -> int:
    """Bytes that hold this number of bits."""
    return (bits + 7) // 8


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
    if data.size != octet_count(total):
        raise PayloadError(field, f"{octet_count(total)} bytes", data.size)
    if total % 8 and data[-1] >> (total % 8):
        raise PayloadError(field, "zero after its last bit", f"byte {data[-1]:#04x}")
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
