"""Codes of less than two bits a value: most values are near zero, and are left out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from lgc.coding.bits import Integers, check_bits, octet_count, pack_bits, unpack_bits
from lgc.coding.indices import Rice
from lgc.coding.payload import Octets, PayloadError, octets
from lgc.coding.values import BFloat16, Floats, ValueCodec, counts_at, require_scales

LENGTH_BYTES = 4
SAMPLED = 17  # of so many values one, to find the largest among fewer
WIDEST = 1.7  # of dead zones; below the square root of 3


@dataclass(frozen=True)
class Zoned(ValueCodec):
    """Multiples of a step, with a zone around zero that is twice as wide; zeros stay zeros.

        x -> sign(x) (k + 3/8) f,  k = floor(|x| / s) from 1 to 15;  x -> 0 where |x| < s
        f = sum |x| (k + 3/8) / sum (k + 3/8)^2 over what is not left out, a bfloat16

    f is the best factor, and the largest value of a segment is always sent; so a segment loses less than it holds,
    unless f is too small for a bfloat16. The step s of a segment is chosen by the encoder alone, and is not in the
    code. Which values reach k = 1, which of these k = 2, and so on, are positions in `Rice` code, so the length
    depends on the values.

    Source: Sullivan, Efficient Scalar Quantization of Exponential and Laplacian Random Variables, IEEE Trans.
    Information Theory, 1996, for the zone and the offset of the levels.
    """

    _has_fixed_size = False
    _levels: ClassVar[int] = 15
    _offset: ClassVar[np.float32] = np.float32(0.375)
    _factor: ClassVar[BFloat16] = BFloat16()
    _largest: ClassVar[float] = 2.0**123  # of a factor: no product with 15.375 overflows

    @abstractmethod
    def _steps(self, magnitudes: Floats, counts: Integers) -> Floats:
        """The step of every segment, none of which is empty: at most its largest magnitude; 0 if all are zeros."""

    def decode_places(self, data: Tensor | bytes, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The places of the values that are sent, ascending, int64 of shape (n,), and these, float32; on the CPU.

        All others are zeros. Where few are sent, this is much less than what `decode` gives.

        Raises:
            PayloadError: if no values have this code.
        """
        numbers, array = self._check_counts(counts), octets(data)
        self._check_size(array, numbers)
        places, values = self._decode_places(array, numbers)
        return torch.from_numpy(places), torch.from_numpy(values)

    def _places(self, magnitudes: Floats, steps: Floats, counts: Integers) -> Integers:
        """The places of what is sent; each step is that of a segment, of so many values."""
        least = np.where(steps > 0, steps, np.inf).astype(np.float32)
        return np.flatnonzero(magnitudes >= np.repeat(least, counts))

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        if not values.size:
            return np.zeros(0, np.uint8)
        filled = counts[counts > 0]
        magnitudes = np.abs(values)
        steps = self._steps(magnitudes, filled)
        places = self._places(magnitudes, steps, filled)  # what follows is of these few alone
        segments = np.repeat(np.arange(filled.size), counts_at(places, filled))
        with np.errstate(over="ignore"):
            multiples = magnitudes[places] / steps[segments]
        levels = np.minimum(multiples, self._levels).astype(np.uint8)
        sent = (levels + self._offset).astype(np.float64)
        products = np.bincount(segments, sent * magnitudes[places], filled.size)
        norms = np.bincount(segments, sent * sent, filled.size)
        factors = np.minimum(products / np.where(norms > 0, norms, 1), self._largest).astype(np.float32)
        negative = np.packbits(values[places] < 0, bitorder="little")
        levels_code = self._encode_levels(places, levels, counts)
        return np.concatenate([self._factor._encode(factors, filled), levels_code, negative])

    def _encode_levels(self, places: Integers, levels: Octets, counts: Integers) -> Octets:
        """The code of which values reach level 1, at `places`, and which of them reach more."""
        parts = [np.zeros(0, np.uint8)]
        level, size = 0, int(counts.sum())
        while size and level < self._levels:
            level += 1
            positions = Rice().encode(torch.from_numpy(places), counts.tolist()).numpy()
            fewer = counts_at(places, counts)
            length = np.array([positions.size], f"<u{LENGTH_BYTES}").view(np.uint8)
            parts += [pack_bits(fewer, _widths(counts)), length, positions]
            size, counts = places.size, fewer
            places = np.flatnonzero(levels > level)
            levels = levels[places]
        return np.concatenate(parts)

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        decoded = np.zeros(int(counts.sum()), np.float32)
        places, values = self._decode_places(data, counts)
        decoded[places] = values
        return decoded

    def _decode_places(self, data: Octets, counts: Integers) -> tuple[Integers, Floats]:
        filled = counts[counts > 0]
        if data.size < 2 * filled.size:
            raise PayloadError("values.factors", f"{2 * filled.size} bytes", data.size)
        factors = require_scales(self._factor._decode(data[: 2 * filled.size], filled), "values.factors")
        if factors.max(initial=0) > self._largest:
            raise PayloadError("values.factors", f"at most {self._largest}", factors.max())
        places, levels, negative = self._decode_levels(data[2 * filled.size :], counts)
        check_bits(negative, places.size, "values.signs")
        values = (levels + self._offset) * np.repeat(factors, counts_at(places, filled))
        signs = np.unpackbits(negative, count=values.size, bitorder="little").view(np.bool_)
        return places, np.where(signs, -values, values)

    def _decode_levels(self, data: Octets, counts: Integers) -> tuple[Integers, Octets, Octets]:
        """The places of the values that reach level 1, how far they reach, and the bytes that follow."""
        places: Integers = np.zeros(0, np.int64)
        levels = np.zeros(0, np.uint8)
        reached: Integers = places  # of the values that reach level 1, those that reach this one
        level, size = 0, int(counts.sum())
        while size and level < self._levels:
            level += 1
            widths = _widths(counts)
            end = octet_count(int(widths.sum()))
            fewer = unpack_bits(data[:end], widths, "values.counts")
            if (fewer > counts).any():
                raise PayloadError("values.counts", "of values that are there", int(fewer.max()))
            start = end + LENGTH_BYTES
            length = data[end:start]
            if length.size != LENGTH_BYTES:
                raise PayloadError("values.levels", f"a length of {LENGTH_BYTES} bytes", length.size)
            end = start + int(length.view(f"<u{LENGTH_BYTES}")[0])
            if end > data.size:
                raise PayloadError("values.levels", f"at most {data.size - start} bytes", end - start)
            code = data[start:end].tobytes()
            positions = Rice().decode(code, counts.tolist(), fewer.tolist()).numpy()
            if level == 1:
                places, levels, reached = positions, np.ones(positions.size, np.uint8), np.arange(positions.size)
            else:
                reached = reached[positions]
                levels[reached] = level
            size, counts, data = reached.size, fewer, data[end:]
        return places, levels, data

    def _size(self, counts: Integers) -> int:
        """The largest possible length: a position takes at most 9/8 bits of every value that might be at one."""
        header = octet_count(64 * counts.size) + LENGTH_BYTES + 8
        total = int(counts.sum())
        return 2 * counts.size + self._levels * (header + octet_count(9 * total // 8)) + octet_count(total)


@final
@dataclass(frozen=True)
class DeadZone(Zoned):
    """Multiples of a step, with a zone around zero that is twice as wide; zeros stay zeros.

    The step is so many root mean squares of a segment, or its largest magnitude if that is less. The larger it is, the
    fewer bits: for Gaussian values 1.4 a value at a step of 1, 0.6 at 1.6. See `Zoned` for the code.

    With error feedback what is left out fills the zone. Where it does so evenly, up to z, its root mean square is
    z / sqrt(3): a step above 1.7 would then send one value at a time, and the zone would stay as wide as it is, however
    little comes in later. `Largest` sends as much in every round.

    Args:
        step: in root mean squares, above 0 and at most 1.7.

    Raises:
        ValueError: if it is out of its range.
    """

    step: float = 1.6

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int | float) or not 0 < self.step <= WIDEST:
            raise ValueError(
                f"DeadZone(step=...) must be a number above 0 and at most {WIDEST}, got {self.step!r}; for fewer bits "
                "use Largest."
            )

    def finer(self) -> DeadZone:
        return DeadZone(5 * self.step / 6)

    def _steps(self, magnitudes: Floats, counts: Integers) -> Floats:
        starts = np.cumsum(counts) - counts
        squares = np.add.reduceat(np.square(magnitudes, dtype=np.float64), starts)
        greatest = np.maximum.reduceat(magnitudes, starts)
        steps: Floats = np.minimum(self.step * np.sqrt(squares / counts), greatest).astype(np.float32)
        return steps


@final
@dataclass(frozen=True)
class Largest(Zoned):
    """The largest values of every segment, as multiples of the least of them; all others are zeros.

    Of n values in a segment `share` n, rounded up, are sent, of equal ones the first; but no zeros, and nothing below a
    sixteenth of the largest, as there are 15 levels. See `Zoned` for the code.

    Args:
        share: of a segment's values, above 0 and at most 1.

    Raises:
        ValueError: if it is out of its range.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"Largest(share=...) must be a number above 0 and at most 1, got {self.share!r}.")

    def finer(self) -> Largest:
        return Largest(min(9 * self.share / 5, 1.0))

    def _steps(self, magnitudes: Floats, counts: Integers) -> Floats:
        return np.array([self._least(part) for part in np.split(magnitudes, np.cumsum(counts)[:-1])], np.float32)

    def _number(self, size: int) -> int:
        """How many of so many values are sent, at most."""
        return math.ceil(self.share * size)

    def _least(self, magnitudes: Floats) -> np.float32:
        """The least that is sent."""
        number = self._number(magnitudes.size)
        some = magnitudes[::SAMPLED]
        place = some.size - 2 * self._number(some.size)
        few = magnitudes[magnitudes >= np.partition(some, place)[place]] if place >= 0 else magnitudes
        if few.size < number:  # the sample says too much
            few = magnitudes
        parted = np.partition(few, few.size - number)[few.size - number :]
        least: np.float32 = parted[0] if parted[0] > 0 else magnitudes.min(where=magnitudes > 0, initial=parted.max())
        return max(least, parted.max() / np.float32(self._levels + 1))

    def _places(self, magnitudes: Floats, steps: Floats, counts: Integers) -> Integers:
        places = super()._places(magnitudes, steps, counts)
        sent, numbers = counts_at(places, counts), [self._number(count) for count in counts.tolist()]
        ends, kept = np.cumsum(sent), np.ones(places.size, np.bool_)
        for segment in np.flatnonzero(sent > numbers):  # some are equal to the step
            of_segment = slice(ends[segment] - sent[segment], ends[segment])
            equal = np.flatnonzero(magnitudes[places[of_segment]] == steps[segment])
            kept[of_segment][equal[numbers[segment] - sent[segment] :]] = False
        return places[kept]


def _widths(counts: Integers) -> Integers:
    """Bits of a number of up to so many values."""
    return np.array([int(count).bit_length() for count in counts], np.int64)
