"""Lossless codes for ascending positions in consecutive segments. See docs/wire.md for the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from lgc.coding.bits import Integers, bit_lengths, octet_count, pack_bits, pack_unary, unpack_bits, unpack_unary
from lgc.coding.payload import Octets, PayloadError, octets, tensor

POSITION_BITS = 48
ESCAPE = 255  # the quotient from which the range coder writes the excess apart


class Segments:
    """The segments that have entries: their first positions, sizes n_s and counts k_s, int64 of shape (segments,)."""

    def __init__(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        every, counted = np.array(sizes, np.int64), np.array(counts, np.int64)
        filled = counted > 0
        self.starts: Integers = (np.cumsum(every) - every)[filled]
        self.sizes: Integers = every[filled]
        self.counts: Integers = counted[filled]
        self.count = int(self.counts.sum())

    def repeat(self, values: Integers) -> Integers:
        """One value per segment to one per entry."""
        return np.repeat(values, self.counts)

    def each(self) -> Iterator[tuple[int, int, slice]]:
        """n_s and k_s as Python integers, which do not overflow, and which of all entries are the segment's."""
        stop = 0
        for size, count in zip(self.sizes.tolist(), self.counts.tolist(), strict=True):
            stop += count
            yield size, count, slice(stop - count, stop)

    def gaps(self, positions: Integers) -> Integers:
        """How many elements of the segment are passed over before each entry."""
        before = np.concatenate([[-1], positions[:-1]])  # of a segment's first entry it is in another segment
        gaps: Integers = positions - np.maximum(before, self.repeat(self.starts) - 1) - 1
        return gaps

    def positions(self, gaps: Integers) -> Integers:
        """Back from `gaps`."""
        ends = np.concatenate([[-1], np.cumsum(gaps + 1) - 1])
        firsts = np.cumsum(self.counts) - self.counts
        positions: Integers = ends[1:] + self.repeat(self.starts - ends[firsts] - 1)
        return positions


@dataclass(frozen=True)
class IndexCoder(ABC):
    """Codes k ascending positions in segments of sizes n_s as bytes.

    Both sides know the sizes from the layout and the counts k_s per segment from the schedule, so neither is sent. The
    code is computed on the CPU: tensors of other devices are copied there, so the bytes do not depend on the device.
    """

    remembers: ClassVar[bool] = False  # whether `after` makes a difference
    _total_bits: ClassVar[int] = POSITION_BITS  # of the largest sum of the sizes

    def encode(self, indices: Tensor, sizes: Sequence[int]) -> Tensor:
        """The code of `indices`, a uint8 tensor of shape (bytes,) on the CPU.

        Args:
            indices: strictly ascending positions in [0, sum(sizes)), int32 or int64, shape (k,), on any device.
            sizes: number of elements of the consecutive segments.

        Raises:
            TypeError: if the indices are not integers of one dimension.
            ValueError: if they are not strictly ascending or not in range.
        """
        name, total = type(self).__name__, sum(sizes)
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
            form = f"{indices.dtype} {tuple(indices.shape)}"
            raise TypeError(f"{name}.encode(indices=...) must be int32 or int64 of one dimension, got {form}.")
        flat = indices.detach().cpu().numpy().astype(np.int64, copy=False)
        if flat.size and (flat[0] < 0 or flat[-1] >= total):
            raise ValueError(f"{name}.encode(indices=...) must be in [0, {total}), got {flat[0]} to {flat[-1]}.")
        if descent := _descent(flat):
            raise ValueError(f"{name}.encode(indices=...) must be strictly ascending, got {descent}.")
        counts = np.diff(np.searchsorted(flat, np.cumsum(np.array(sizes, np.int64))), prepend=0)
        return tensor(self._encode(flat, self._segments(sizes, counts.tolist())))

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
        flat = self._decode(array, segments)
        starts, ends = segments.repeat(segments.starts), segments.repeat(segments.starts + segments.sizes)
        wrong = (flat < starts) | (flat >= ends)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise PayloadError("indices", f"in [{starts[place]}, {ends[place]}), their segment", flat[place])
        if descent := _descent(flat):
            raise PayloadError("indices", "strictly ascending", descent)
        return torch.from_numpy(flat)

    def after(self, positions: Tensor) -> IndexCoder:
        """The coder for what a sender selects next, once both sides know that it has selected these."""
        return self

    def digest(self) -> int:
        """A number of 32 bits that tells coders apart which know different things."""
        return 0

    def known(self, size: int) -> bytes:
        """What this coder knows of earlier selections from `size` positions, for `knowing`."""
        return b""

    def knowing(self, known: bytes, size: int) -> IndexCoder:
        """A coder that knows what another one did; parsed as hostile.

        Raises:
            ValueError: if no coder knows that.
        """
        if known:
            raise PayloadError("known", "0 bytes", len(known))
        return self

    def bound(self, sizes: Sequence[int], counts: Sequence[int]) -> int:
        """The largest possible length in bytes of the code of so many positions in such segments."""
        return self._bound(self._segments(sizes, counts))

    def _segments(self, sizes: Sequence[int], counts: Sequence[int]) -> Segments:
        name, total = type(self).__name__, sum(sizes)
        if any(size < 0 for size in sizes):
            raise ValueError(f"{name}(sizes=...) must not be negative, got {min(sizes)}.")
        if total > 2**self._total_bits:
            raise ValueError(f"{name}(sizes=...) must sum to at most 2^{self._total_bits}, got {total}.")
        if len(sizes) != len(counts):
            raise ValueError(f"{name}(counts=...) must be one for each of {len(sizes)} sizes, got {len(counts)}.")
        for size, count in zip(sizes, counts, strict=True):
            if not 0 <= count <= size:
                raise ValueError(f"{name}(counts=...) must be in [0, {size}], got {count}.")
        return Segments(sizes, counts)

    @abstractmethod
    def _encode(self, positions: Integers, segments: Segments) -> Octets: ...

    @abstractmethod
    def _decode(self, data: Octets, segments: Segments) -> Integers:
        """The positions, not yet checked."""

    @abstractmethod
    def _bound(self, segments: Segments) -> int: ...


@final
@dataclass(frozen=True)
class RawIndices(IndexCoder):
    """Flat positions as int32, 32 bits each: what the paper sends. The segments must sum to at most 2^31."""

    _total_bits: ClassVar[int] = 31

    def _encode(self, positions: Integers, segments: Segments) -> Octets:
        return positions.astype("<i4").view(np.uint8)

    def _decode(self, data: Octets, segments: Segments) -> Integers:
        if data.size != 4 * segments.count:
            raise PayloadError("indices", f"{4 * segments.count} bytes", data.size)
        return np.frombuffer(data.tobytes(), "<i4").astype(np.int64)

    def _bound(self, segments: Segments) -> int:
        return 4 * segments.count


class _GapCoder(IndexCoder):
    """The gaps' low bits, of fixed width, in one stream and their quotients in another, so that both vectorise."""

    def _encode(self, positions: Integers, segments: Segments) -> Octets:
        widths = segments.repeat(self._widths(segments))
        gaps = segments.gaps(positions)
        low = pack_bits(gaps & ((1 << widths) - 1), widths)
        return np.concatenate([low, self._encode_quotients(gaps >> widths, segments)])

    def _decode(self, data: Octets, segments: Segments) -> Integers:
        length = self._low_size(segments)
        of_segments = self._widths(segments)
        widths = segments.repeat(of_segments)
        low = unpack_bits(data[:length], widths, "indices.low")
        quotients = self._decode_quotients(data[length:], segments)
        firsts = np.cumsum(segments.counts) - segments.counts
        total = float((np.add.reduceat(quotients, firsts, dtype=np.float64) * 2.0**of_segments).sum())
        if total >= 2**POSITION_BITS:  # positions could overflow
            raise PayloadError("indices", "of gaps that sum to less than 2^48", total)
        return segments.positions((quotients << widths) + low)

    def _low_size(self, segments: Segments) -> int:
        return octet_count(int((self._widths(segments) * segments.counts).sum()))

    @abstractmethod
    def _widths(self, segments: Segments) -> Integers:
        """Low bits of the gaps of each segment, computed exactly: they must not differ between machines."""

    @abstractmethod
    def _encode_quotients(self, quotients: Integers, segments: Segments) -> Octets: ...

    @abstractmethod
    def _decode_quotients(self, data: Octets, segments: Segments) -> Integers: ...


@final
@dataclass(frozen=True)
class Rice(_GapCoder):
    """Golomb-Rice code of the gaps: r low bits of every gap, the rest in unary.

    r is the least integer with 2^r >= 0.4812 (n_s / k_s - 1/2), the optimum for geometric gaps. Above a density of 1/2
    a segment costs at most n_s bits. Source: Rice, JPL 79-22, 1979; the parameter: Kiely, IPN Progress Report 42-159,
    2004.
    """

    def _widths(self, segments: Segments) -> Integers:
        least = -(-2406 * (2 * segments.sizes - segments.counts) // (10_000 * segments.counts))  # below 2^61
        return bit_lengths(least - 1)

    def exceeds(self, size: int, positions: Integers, segments: Segments) -> bool:
        """Whether the code of these positions takes more than `size` bytes."""
        low = self._low_size(segments)
        if low + octet_count(segments.count) > size:  # whatever the quotients are
            return True
        quotients = segments.gaps(positions) >> segments.repeat(self._widths(segments))
        return low + octet_count(segments.count + int(quotients.sum())) > size

    def _encode_quotients(self, quotients: Integers, segments: Segments) -> Octets:
        return pack_unary(quotients)

    def _decode_quotients(self, data: Octets, segments: Segments) -> Integers:
        return unpack_unary(data, segments.count, "indices.unary")

    def _bound(self, segments: Segments) -> int:
        zeros = (segments.sizes - segments.counts) >> self._widths(segments)
        return self._low_size(segments) + octet_count(segments.count + int(zeros.sum()))


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

    def decode(self, data: Tensor | bytes, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
        """As `IndexCoder.decode`. Coded again it must be `data`: else bytes could follow unseen."""
        positions = super().decode(data, sizes, counts)
        if not np.array_equal(octets(self.encode(positions, sizes)), octets(data)):
            raise PayloadError("indices.range", "the code of what it decodes to", "another code")
        return positions

    def _widths(self, segments: Segments) -> Integers:
        return bit_lengths(segments.sizes // (16 * segments.counts))  # least s with size / count < 16 * 2^s

    def _encode_quotients(self, quotients: Integers, segments: Segments) -> Octets:
        symbols = np.minimum(quotients, ESCAPE)
        excess = (quotients - symbols)[symbols == ESCAPE]
        encoder = _stream().queue.RangeEncoder()
        for (n, k, part), width in zip(segments.each(), self._widths(segments).tolist(), strict=True):
            encoder.encode(symbols[part].astype(np.int32), _geometric(n, k, width))
        chunks = np.stack([excess & 0xFFFF, (excess >> 16) & 0xFFFF, excess >> 32], axis=1).ravel()
        encoder.encode(chunks.astype(np.int32), _stream().model.Uniform(2**16))
        words: Octets = encoder.get_compressed().astype("<u4").view(np.uint8)
        return words

    def _decode_quotients(self, data: Octets, segments: Segments) -> Integers:
        if data.size % 4:
            raise PayloadError("indices.range", "a multiple of 4 bytes", data.size)
        decoder = _stream().queue.RangeDecoder(np.frombuffer(data.tobytes(), "<u4").astype(np.uint32))
        quotients = np.zeros(segments.count, np.int64)
        try:
            for (n, k, part), width in zip(segments.each(), self._widths(segments).tolist(), strict=True):
                quotients[part] = decoder.decode(_geometric(n, k, width), k)
            escaped = np.flatnonzero(quotients == ESCAPE)
            chunks = decoder.decode(_stream().model.Uniform(2**16), 3 * escaped.size).astype(np.int64)
        except (AssertionError, ValueError) as error:
            raise PayloadError("indices.range", "a range code", str(error)) from error
        quotients[escaped] += chunks[0::3] | (chunks[1::3] << 16) | (chunks[2::3] << 32)
        return quotients

    def _bound(self, segments: Segments) -> int:
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
def _geometric(size: int, count: int, width: int) -> object:
    """Model of the gaps of `count` in `size` by 2^width; only exactly rounded operations, equal everywhere."""
    ratio = 1.0 - count / size
    for _ in range(width):
        ratio *= ratio
    powers = np.multiply.accumulate(np.concatenate([[1.0], np.full(ESCAPE, ratio)]))
    probabilities = powers * (1.0 - ratio)
    probabilities[ESCAPE] = powers[ESCAPE]
    return _stream().model.Categorical(probabilities, perfect=False)
