"""Lossless codes for ascending positions in consecutive segments. See docs/wire.md for the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lgc.coding.bits import Integers, octet_count, pack_bits, pack_unary, unpack_bits, unpack_unary
from lgc.coding.payload import Octets, PayloadError, octets, tensor

POSITION_LIMIT = 2**48
RAW_LIMIT = 2**31
ESCAPE = 255  # the quotient from which the range coder writes the excess apart


@dataclass(frozen=True, eq=False)
class _Segments:
    """Sizes n_s and numbers of entries k_s of the segments, both int64 of shape (segments,)."""

    sizes: Integers
    counts: Integers

    @property
    def count(self) -> int:
        """Number of entries."""
        return int(self.counts.sum())

    def repeat(self, values: Integers) -> Integers:
        """One value per segment to one per entry."""
        return np.repeat(values, self.counts)

    def starts(self) -> Integers:
        """Position at which every entry's segment begins, per entry."""
        return self.repeat(np.cumsum(self.sizes) - self.sizes)

    def pairs(self) -> list[tuple[int, int]]:
        """(n_s, k_s) as Python integers, which do not overflow."""
        return list(zip(self.sizes.tolist(), self.counts.tolist(), strict=True))

    def gaps(self, local: Integers) -> Integers:
        """Positions within their segments to the numbers of elements passed over before each."""
        firsts, _ = self._firsts()
        gaps = np.diff(local, prepend=-1) - 1
        gaps[firsts] = local[firsts]
        return gaps

    def positions(self, gaps: Integers) -> Integers:
        """Back from `gaps`."""
        firsts, counts = self._firsts()
        sums: Integers = np.cumsum(gaps + 1)
        sums -= np.repeat(sums[firsts] - gaps[firsts], counts)
        return sums

    def _firsts(self) -> tuple[Integers, Integers]:
        """Places of the first entries of the segments that have any, and these segments' k_s."""
        counts = self.counts[self.counts > 0]
        return np.cumsum(counts) - counts, counts


@dataclass(frozen=True)
class IndexCoder(ABC):
    """Codes k ascending positions in segments of sizes n_s as bytes.

    Both sides know the sizes from the layout and the counts k_s per segment from the schedule, so neither is sent. The
    code is computed on the CPU: tensors of other devices are copied there, so the bytes do not depend on the device.
    """

    def encode(self, indices: Tensor, sizes: Sequence[int]) -> Tensor:
        """The code of `indices`, a uint8 tensor of shape (bytes,) on the CPU.

        Args:
            indices: strictly ascending positions in [0, sum(sizes)), int32 or int64, shape (k,), on any device.
            sizes: number of elements of the consecutive segments.

        Raises:
            TypeError: if the indices are not integers of one dimension.
            ValueError: if they are not strictly ascending or not in range.
        """
        total = self._total(sizes)
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
            raise TypeError(
                f"{type(self).__name__}.encode(indices=...) must be int32 or int64 of one dimension, "
                f"got {indices.dtype} {tuple(indices.shape)}."
            )
        flat = indices.detach().cpu().numpy().astype(np.int64, copy=False)
        if flat.size and (flat[0] < 0 or flat[-1] >= total):
            raise ValueError(
                f"{type(self).__name__}.encode(indices=...) must be in [0, {total}), got {flat[0]} to {flat[-1]}."
            )
        if descent := _descent(flat):
            raise ValueError(f"{type(self).__name__}.encode(indices=...) must be strictly ascending, got {descent}.")
        edges = np.cumsum(np.array(sizes, np.int64))
        counts = np.diff(np.searchsorted(flat, edges), prepend=0)
        segments = _Segments(np.array(sizes, np.int64), counts)
        return tensor(self._encode(flat - segments.starts(), segments))

    def decode(self, data: Tensor | bytes, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
        """The positions, an int64 tensor of shape (sum(counts),), strictly ascending, on the CPU.

        Args:
            data: what `encode` returned.
            sizes: number of elements of the consecutive segments.
            counts: number of positions in each of them.

        Raises:
            PayloadError: if no such positions have this code.
            ValueError: if a count does not fit its size.
        """
        segments = self._segments(sizes, counts)
        array = octets(data)
        bound = self._bound(segments)
        if array.size > bound:
            raise PayloadError("indices", f"at most {bound} bytes", array.size)
        local = self._decode(array, segments)
        limits = segments.repeat(segments.sizes)
        wrong = (local < 0) | (local >= limits)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise PayloadError("indices", f"in [0, {limits[place]}) of their segment", local[place])
        flat = local + segments.starts()
        if descent := _descent(flat):
            raise PayloadError("indices", "strictly ascending", descent)
        return torch.from_numpy(flat)

    def bound(self, sizes: Sequence[int], counts: Sequence[int]) -> int:
        """The largest possible length in bytes of the code of so many positions in such segments."""
        return self._bound(self._segments(sizes, counts))

    def _total(self, sizes: Sequence[int]) -> int:
        if any(size < 0 for size in sizes):
            raise ValueError(f"{type(self).__name__}(sizes=...) must not be negative, got {min(sizes)}.")
        total = sum(sizes)
        if total > POSITION_LIMIT:
            raise ValueError(f"{type(self).__name__}(sizes=...) must sum to at most 2^48, got {total}.")
        return total

    def _segments(self, sizes: Sequence[int], counts: Sequence[int]) -> _Segments:
        self._total(sizes)
        if len(sizes) != len(counts):
            raise ValueError(
                f"{type(self).__name__}(counts=...) must be one for each of {len(sizes)} sizes, got {len(counts)}."
            )
        for size, count in zip(sizes, counts, strict=True):
            if not 0 <= count <= size:
                raise ValueError(f"{type(self).__name__}(counts=...) must be in [0, {size}], got {count}.")
        return _Segments(np.array(sizes, np.int64), np.array(counts, np.int64))

    @abstractmethod
    def _encode(self, local: Integers, segments: _Segments) -> Octets:
        """Code the positions within their segments."""

    @abstractmethod
    def _decode(self, data: Octets, segments: _Segments) -> Integers:
        """Positions within their segments, not yet checked."""

    @abstractmethod
    def _bound(self, segments: _Segments) -> int: ...


@final
@dataclass(frozen=True)
class RawIndices(IndexCoder):
    """Flat positions as int32, 32 bits each: what the paper sends. The segments must sum to at most 2^31."""

    def _total(self, sizes: Sequence[int]) -> int:
        total = super()._total(sizes)
        if total > RAW_LIMIT:
            raise ValueError(f"RawIndices(sizes=...) must sum to at most 2^31, got {total}.")
        return total

    def _encode(self, local: Integers, segments: _Segments) -> Octets:
        return (local + segments.starts()).astype("<i4").view(np.uint8)

    def _decode(self, data: Octets, segments: _Segments) -> Integers:
        if data.size != 4 * segments.count:
            raise PayloadError("indices", f"{4 * segments.count} bytes", data.size)
        return np.frombuffer(data.tobytes(), "<i4").astype(np.int64) - segments.starts()

    def _bound(self, segments: _Segments) -> int:
        return 4 * segments.count


class _GapCoder(IndexCoder):
    """The gaps' low bits, of fixed width, in one stream and their quotients in another, so that both vectorise."""

    def _encode(self, local: Integers, segments: _Segments) -> Octets:
        widths = segments.repeat(self._widths(segments))
        gaps = segments.gaps(local)
        low = pack_bits(gaps & ((1 << widths) - 1), widths)
        return np.concatenate([low, self._encode_quotients(gaps >> widths, segments)])

    def _decode(self, data: Octets, segments: _Segments) -> Integers:
        length = self._low_size(segments)
        widths = segments.repeat(self._widths(segments))
        low = unpack_bits(data[:length], widths, "indices.low")
        return segments.positions((self._decode_quotients(data[length:], segments) << widths) + low)

    def _widths(self, segments: _Segments) -> Integers:
        return np.array([self._width(n, k) if k else 0 for n, k in segments.pairs()], np.int64)

    def _low_size(self, segments: _Segments) -> int:
        return octet_count(int((self._widths(segments) * segments.counts).sum()))

    @abstractmethod
    def _width(self, size: int, count: int) -> int:
        """Low bits of the gaps of `count` in `size`, computed in integers: it must not differ between machines."""

    @abstractmethod
    def _encode_quotients(self, quotients: Integers, segments: _Segments) -> Octets: ...

    @abstractmethod
    def _decode_quotients(self, data: Octets, segments: _Segments) -> Integers: ...


@final
@dataclass(frozen=True)
class Rice(_GapCoder):
    """Golomb-Rice code of the gaps: r low bits of every gap, the rest in unary.

    r is the least integer with 2^r >= 0.4812 (n_s / k_s - 1/2), the optimum for geometric gaps. Above a density of 1/2
    a segment costs at most n_s bits. Source: Rice, JPL 79-22, 1979; the parameter: Kiely, IPN Progress Report 42-159,
    2004.
    """

    def _width(self, size: int, count: int) -> int:
        least = -(-2406 * (2 * size - count) // (10_000 * count))
        return (least - 1).bit_length()

    def _encode_quotients(self, quotients: Integers, segments: _Segments) -> Octets:
        return pack_unary(quotients)

    def _decode_quotients(self, data: Octets, segments: _Segments) -> Integers:
        return unpack_unary(data, segments.count, "indices.unary")

    def _bound(self, segments: _Segments) -> int:
        zeros = (segments.sizes - segments.counts) >> self._widths(segments)
        return self._low_size(segments) + octet_count(segments.count + int(zeros[segments.counts > 0].sum()))


@final
@dataclass(frozen=True)
class RangeCoder(_GapCoder):
    """Range code of the gaps as geometric of mean n_s / k_s - 1, near the bound log2 C(n_s, k_s) at any density.

    Only the quotients of the gaps by 2^s are range coded, s such that their mean is below 16; within such a step the
    distribution is flat. Quotients from 255 on are coded as 255 and their excess in 48 bits.

    Raises:
        ModuleNotFoundError: when it is constructed without the package `constriction`.
    """

    def __post_init__(self) -> None:
        _stream()

    def _decode(self, data: Octets, segments: _Segments) -> Integers:
        local = super()._decode(data, segments)
        inside = bool((local < segments.repeat(segments.sizes)).all())
        if inside and not np.array_equal(self._encode(local, segments), data):  # else bytes could follow unseen
            raise PayloadError("indices.range", "the code of what it decodes to", "another code")
        return local

    def _width(self, size: int, count: int) -> int:
        return _flat_bits(size, count)

    def _encode_quotients(self, quotients: Integers, segments: _Segments) -> Octets:
        symbols = np.minimum(quotients, ESCAPE)
        excess = (quotients - symbols)[symbols == ESCAPE]
        encoder = _stream().queue.RangeEncoder()
        place = 0
        for n, k in segments.pairs():
            if k:
                encoder.encode(symbols[place : place + k].astype(np.int32), _geometric(n, k))
            place += k
        chunks = np.stack([excess & 0xFFFF, (excess >> 16) & 0xFFFF, excess >> 32], axis=1).ravel()
        if chunks.size:
            encoder.encode(chunks.astype(np.int32), _stream().model.Uniform(2**16))
        words: Octets = encoder.get_compressed().astype("<u4").view(np.uint8)
        return words

    def _decode_quotients(self, data: Octets, segments: _Segments) -> Integers:
        if data.size % 4:
            raise PayloadError("indices.range", "a multiple of 4 bytes", data.size)
        decoder = _stream().queue.RangeDecoder(np.frombuffer(data.tobytes(), "<u4").astype(np.uint32))
        quotients = np.zeros(segments.count, np.int64)
        place = 0
        try:
            for n, k in segments.pairs():
                if k:
                    quotients[place : place + k] = decoder.decode(_geometric(n, k), k)
                place += k
            escaped = np.flatnonzero(quotients == ESCAPE)
            if escaped.size:
                chunks = decoder.decode(_stream().model.Uniform(2**16), 3 * escaped.size).astype(np.int64)
                quotients[escaped] += chunks[0::3] | (chunks[1::3] << 16) | (chunks[2::3] << 32)
        except (AssertionError, ValueError) as error:
            raise PayloadError("indices.range", "a range code", str(error)) from error
        widths = segments.repeat(self._widths(segments))
        reach = float(np.ldexp(quotients.astype(np.float64), widths.astype(np.int32)).sum())
        if reach >= POSITION_LIMIT:  # their sums would overflow
            raise PayloadError("indices.range", "of gaps that sum to less than 2^48", reach)
        return quotients

    def _bound(self, segments: _Segments) -> int:
        return self._low_size(segments) + 4 * (2 + octet_count(segments.count * (24 + 48)) // 4)


def _stream() -> Any:
    """The package `constriction`, as far as it is used here."""
    try:
        return import_module("constriction").stream
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("RangeCoder needs the package constriction: pip install 'lgc[coding]'.") from error


def _descent(flat: Integers) -> str | None:
    """The first two neighbours that do not ascend."""
    ascends = flat[1:] > flat[:-1]
    if ascends.all():
        return None
    place = int(np.argmin(ascends))
    return f"{flat[place]} before {flat[place + 1]}"


@lru_cache(maxsize=1024)
def _geometric(size: int, count: int) -> object:
    """Model of the quotients of the gaps of `count` in `size`; only exactly rounded operations, equal everywhere."""
    ratio = 1.0 - count / size
    for _ in range(_flat_bits(size, count)):
        ratio *= ratio
    powers = np.multiply.accumulate(np.concatenate([[1.0], np.full(ESCAPE, ratio)]))
    probabilities = powers * (1.0 - ratio)
    probabilities[ESCAPE] = powers[ESCAPE]
    return _stream().model.Categorical(probabilities, perfect=False)


def _flat_bits(size: int, count: int) -> int:
    """Least s with size / count < 16 * 2^s: the bits of a gap that are flat."""
    return (size // (16 * count)).bit_length()
