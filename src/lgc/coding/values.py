"""Codes for float32 values. See docs/wire.md for the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.bits import Integers, check_bits, octet_count, pack_fixed, unpack_fixed
from lgc.coding.payload import Octets, PayloadError, octets, tensor
from lgc.coding.zeros import encode_zeros, split_zeros, zeros_bound

Floats = npt.NDArray[np.float32]

_ALL_BYTES = np.arange(256, dtype=np.uint8)

FINER_BITS = 4  # of a mean: two bits up and four down lose hardly more than two gathered, one in both much
VALUES_AT_ONCE = 2**16  # that are coded before the next ones: with what is computed from them they stay in the cache


@dataclass(frozen=True)
class ValueCodec(ABC):
    """Codes float32 values, `counts[s]` of segment s. Zeros, also negative ones, are decoded as zeros.

    The number of bytes follows from the counts alone, but for `Zoned`, and unless a codec has no number for zero and
    there is one: then the places of the zeros come first, and the code of all others after them.

    The code is computed on the CPU, so the bytes do not depend on the device, and decoding uses only exactly rounded
    operations, so every rank decodes the same bits. What a codec loses is `values - decode(encode(values))`.
    """

    remembers: ClassVar[bool] = False  # whether `given` makes a difference
    _has_zero: ClassVar[bool] = True  # whether `_decode` gives zero for what was zero
    _has_fixed_size: ClassVar[bool] = True  # whether `_size` is the length of every code, and not of the longest

    def encode(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """The code of `values`, a uint8 tensor of shape (bytes,) on the CPU.

        Args:
            values: finite float32 values of shape (sum(counts),), on any device.
            counts: number of values per segment.

        Raises:
            TypeError: if the values are not float32 of one dimension.
            ValueError: if one is not finite, or the counts do not sum to their number.
        """
        numbers = self._check_counts(counts)
        name = type(self).__name__
        if values.dtype != torch.float32 or values.dim() != 1:
            form = f"{values.dtype} {tuple(values.shape)}"
            raise TypeError(f"{name}.encode(values=...) must be float32 of one dimension, got {form}.")
        if values.numel() != numbers.sum():
            raise ValueError(f"{name}.encode(values=...) must be {numbers.sum()} as counted, got {values.numel()}.")
        array: Floats = values.detach().cpu().numpy()
        finite = np.isfinite(array)
        if not finite.all():
            place = int(np.argmin(finite))
            raise ValueError(f"{name}.encode(values=...) must be finite, got {array[place]} at {place}.")
        if self._has_zero or not array.size:
            return tensor(self._encode(array, numbers))
        zeros = encode_zeros(values).numpy()
        if zeros.size:
            nonzero = array != 0
            array, numbers = array[nonzero], counts_of(nonzero, numbers)
        return tensor(np.concatenate([np.array([zeros.size > 0], np.uint8), zeros, self._encode(array, numbers)]))

    def decode(self, data: Tensor | bytes, counts: Sequence[int]) -> Tensor:
        """The values as the others decode them, a float32 tensor of shape (sum(counts),) on the CPU.

        Raises:
            PayloadError: if no values have this code.
        """
        numbers = self._check_counts(counts)
        array = octets(data)
        nonzero = None
        if not self._has_zero and numbers.sum() > 0:
            zero, array = split_zeros(array, int(numbers.sum()))
            if zero.any():
                nonzero = ~zero
                numbers = counts_of(nonzero, numbers)
        self._check_size(array, numbers)
        values = self._decode(array, numbers)
        if not np.isfinite(values).all():
            raise PayloadError("values", "finite", values[int(np.argmin(np.isfinite(values)))])
        if nonzero is not None:
            others, values = values, np.zeros(nonzero.size, np.float32)
            values[nonzero] = others
        return torch.from_numpy(values)

    def given(self, expected: Tensor) -> ValueCodec:
        """The codec for values of which both sides expect these signs: int8, shape (k,), on the CPU; 0 is none."""
        return self

    def finer(self) -> ValueCodec:
        """The codec for a mean of values that had this one, where none is given: what it loses is owed to all ranks."""
        return self

    def size(self, counts: Sequence[int]) -> int:
        """Length in bytes of the code of so many values, none of which is zero; the largest, if it depends on them."""
        numbers = self._check_counts(counts)
        return self._size(numbers) + int(not self._has_zero and numbers.sum() > 0)

    def bound(self, counts: Sequence[int]) -> int:
        """Largest possible length in bytes of the code of so many values."""
        return self.size(counts) + (0 if self._has_zero else zeros_bound(sum(counts)))

    def _check_counts(self, counts: Sequence[int]) -> Integers:
        if any(count < 0 for count in counts):
            raise ValueError(f"{type(self).__name__}(counts=...) must not be negative, got {min(counts)}.")
        return np.array(counts, np.int64)

    def _check_size(self, data: Octets, counts: Integers) -> None:
        size = self._size(counts)
        if data.size > size or (self._has_fixed_size and data.size < size):
            raise PayloadError(
                "values", f"{size} bytes" if self._has_fixed_size else f"at most {size} bytes", data.size
            )

    @abstractmethod
    def _encode(self, values: Floats, counts: Integers) -> Octets: ...

    @abstractmethod
    def _decode(self, data: Octets, counts: Integers) -> Floats: ...

    @abstractmethod
    def _size(self, counts: Integers) -> int: ...


class _Rounded(ValueCodec):
    """Every value by itself in a floating-point format, rounded to nearest even, saturated at its largest."""

    _dtype: ClassVar[torch.dtype]
    _word: ClassVar[torch.dtype]  # the integer of that size

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        limit = torch.finfo(self._dtype).max
        rounded = torch.from_numpy(values).clamp(-limit, limit).to(self._dtype)
        return rounded.view(self._word).numpy().astype(f"<i{self._dtype.itemsize}").view(np.uint8)

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        words = np.frombuffer(data.tobytes(), f"<i{self._dtype.itemsize}").astype(f"=i{self._dtype.itemsize}")
        values: Floats = torch.from_numpy(words).view(self._dtype).to(torch.float32).numpy()
        return values

    def _size(self, counts: Integers) -> int:
        return self._dtype.itemsize * int(counts.sum())


@final
@dataclass(frozen=True)
class Float32(_Rounded):
    """Values as they are, 32 bits each."""

    _dtype, _word = torch.float32, torch.int32


@final
@dataclass(frozen=True)
class Float16(_Rounded):
    """IEEE half precision, rounded to nearest even, saturated at 65504."""

    _dtype, _word = torch.float16, torch.int16


@final
@dataclass(frozen=True)
class BFloat16(_Rounded):
    """The upper half of a float32, rounded to nearest even, saturated at its largest finite value."""

    _dtype, _word = torch.bfloat16, torch.int16


@final
@dataclass(frozen=True)
class Sign(ValueCodec):
    """One bit a value and one magnitude a segment: x -> +-mean |x|, over what is not zero; zeros stay zeros.

    Source: Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019.
    """

    _has_zero = False

    def finer(self) -> LloydMax:
        return LloydMax(FINER_BITS)

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        filled = counts[counts > 0]
        starts = np.cumsum(filled) - filled
        totals = np.add.reduceat(np.abs(values).astype(np.float64), starts) if filled.size else np.zeros(0)
        magnitudes = (totals / filled).astype("<f4")
        return np.concatenate([magnitudes.view(np.uint8), np.packbits(values < 0, bitorder="little")])

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        filled = counts[counts > 0]
        total = int(filled.sum())
        magnitudes = require_scales(Float32()._decode(data[: 4 * filled.size], filled), "values.magnitudes")
        bits = data[4 * filled.size :]
        check_bits(bits, total, "values.signs")
        negative = np.unpackbits(bits, count=total, bitorder="little").view(np.bool_)
        repeated = np.repeat(magnitudes, filled)
        return np.where(negative, -repeated, repeated)

    def _size(self, counts: Integers) -> int:
        return 4 * int((counts > 0).sum()) + octet_count(int(counts.sum()))


@final
@dataclass(frozen=True)
class Uniform(ValueCodec):
    """Signed integers of `bits` bits and the largest magnitude of their segment, or of every `block` values of it.

        q = rint(L x / max |x|) in [-L, L],  L = 2^(bits-1) - 1,  x -> q max |x| / L

    Rounded to nearest, ties to even. The same integers of a latent, by a scale that all ranks share, can be summed:
    see `quantise` and `pack_lanes`.

    Args:
        bits: 2 to 8, or 16.
        block: number of values per scale; one scale per segment if None.

    Raises:
        ValueError: if an argument is out of its range.
    """

    bits: int
    block: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise ValueError(f"Uniform(bits=...) must be 2 to 8, or 16, got {self.bits!r}.")
        if self.block is not None and (type(self.block) is not int or self.block < 1):
            raise ValueError(f"Uniform(block=...) must be an integer of at least 1, got {self.block!r}.")

    def finer(self) -> Uniform:
        return Uniform(max(self.bits, FINER_BITS), self.block)

    @property
    def levels(self) -> int:
        """The largest integer, L = 2^(bits-1) - 1."""
        return int(2 ** (self.bits - 1) - 1)

    def quantise(self, values: Tensor, scale: Tensor | float) -> Tensor:
        """Integers q = rint(L x / scale) in [-L, L], int32, in the shape of `values`; zeros if the scale is zero.

        Values beyond the scale are clamped to it.
        """
        scales = torch.as_tensor(scale, dtype=torch.float64, device=values.device)
        scaled = values.to(torch.float64) / torch.where(scales > 0, scales, torch.inf) * self.levels
        return scaled.round().clamp(-self.levels, self.levels).to(torch.int32)

    def dequantise(self, quantised: Tensor, scale: Tensor | float, terms: int = 1) -> Tensor:
        """Values q scale / L, float32; of a sum of `terms` ranks' integers, their mean."""
        factor = torch.as_tensor(scale, dtype=torch.float64, device=quantised.device)
        return (quantised.to(torch.float64) * factor / (self.levels * terms)).to(torch.float32)

    def fake_quantise(self, values: Tensor, scale: Tensor | float) -> Tensor:
        """`dequantise(quantise(values))` with the gradient of a clamp: 1 within the scale, 0 beyond it.

        Source: straight-through estimator, Bengio et al., arXiv 1308.3432.
        """
        limit = torch.as_tensor(scale, dtype=values.dtype, device=values.device).detach()
        clamped = torch.minimum(torch.maximum(values, -limit), limit)
        rounded = self.dequantise(self.quantise(values.detach(), limit), limit).to(values.dtype)
        return rounded + (clamped - clamped.detach())  # exactly `rounded`: what the others decode

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        groups = _groups(counts, self.block)
        starts = np.cumsum(groups) - groups
        scales = np.maximum.reduceat(np.abs(values), starts) if groups.size else np.zeros(0, np.float32)
        divisors = np.repeat(np.where(scales > 0, scales, 1).astype(np.float64), groups)
        quantised = np.rint(values.astype(np.float64) / divisors * self.levels).astype(np.int64)
        packed = pack_fixed(quantised + self.levels, self.bits)
        return np.concatenate([scales.astype("<f4").view(np.uint8), packed])

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        groups = _groups(counts, self.block)
        scales = require_scales(Float32()._decode(data[: 4 * groups.size], groups), "values.scales").astype(np.float64)
        packed = data[4 * groups.size :]
        shifted = unpack_fixed(packed, int(groups.sum()), self.bits, "values.integers").astype(np.int64)
        if shifted.size and shifted.max() > 2 * self.levels:
            raise PayloadError("values.integers", f"at most {2 * self.levels}", shifted.max())
        return ((shifted - self.levels) * np.repeat(scales, groups) / self.levels).astype(np.float32)

    def _size(self, counts: Integers) -> int:
        return 4 * _groups(counts, self.block).size + octet_count(self.bits * int(counts.sum()))


@final
@dataclass(frozen=True)
class LloydMax(ValueCodec):
    """The nearest of 2^bits levels, the best for Gaussian values, times a scale of every `block`; zeros stay zeros.

        x -> s y,  y the level next to x / s,  s = sum x z / sum z^2 of the block, a bfloat16,
                                               z the level next to x / r,  r = sqrt(mean x^2) of the block

    s is the best scale for z, and y is no worse than z for s. So no block loses as much as it holds, |x|^2, unless its
    values are too small for a bfloat16, and error feedback cannot grow. Blocks are of the values that are not zero, and
    the last block of a segment may be shorter.

    Source: Max, Quantizing for Minimum Distortion, IRE Trans. Information Theory, 1960; Lloyd, Least Squares
    Quantization in PCM, IEEE Trans. Information Theory, 1982.

    Args:
        bits: 1 to 8.
        block: number of values per scale.

    Raises:
        ValueError: if an argument is out of its range.
    """

    bits: int = 2
    block: int = 256

    _has_zero = False
    # A float16 would turn root mean squares below 3e-8 into zero, and those of pseudo-gradients can be 1e-9. A bfloat16
    # raises the squared error of two bits by less than 3e-5 of it beside float32, on Gaussian and heavy-tailed values.
    _scale: ClassVar[BFloat16] = BFloat16()
    _largest: ClassVar[float] = 2.0**125  # of a scale: levels are below 8, so no product overflows

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ValueError(f"LloydMax(bits=...) must be 1 to 8, got {self.bits!r}.")
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"LloydMax(block=...) must be an integer of at least 1, got {self.block!r}.")

    def finer(self) -> LloydMax:
        return LloydMax(max(self.bits, FINER_BITS), self.block)

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        groups, levels = _groups(counts, self.block), self._levels()
        fitted, chosen = np.empty(groups.size), np.empty(values.size, np.uint8)
        for blocks, place in self._at_once(groups):
            fitted[blocks] = self._fit(np.abs(values[place]), groups[blocks])
        data = self._scale._encode(fitted.astype(np.float32), groups)
        scales = self._scale._decode(data, groups)  # what the decoder multiplies with
        for blocks, place in self._at_once(groups):
            nearest = self._nearest(np.abs(values[place]), scales[blocks], groups[blocks])
            complements = (values[place] < 0).view(np.uint8) * np.uint8(2**self.bits - 1)
            chosen[place] = (nearest + np.uint8(levels.size)) ^ complements
        return np.concatenate([data, pack_fixed(chosen, self.bits)])

    def _fit(self, magnitudes: Floats, groups: Integers) -> npt.NDArray[np.float64]:
        """The best scales of some blocks for the levels that are nearest by their root mean squares."""
        starts, exact = np.cumsum(groups) - groups, magnitudes.astype(np.float64)

        def sums(products: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.add.reduceat(products, starts)

        rough = self._nearest(magnitudes, np.sqrt(sums(exact * exact) / groups).astype(np.float32), groups)
        z = np.take(self._levels().astype(np.float64), rough, mode="clip")  # to raise takes several times as long
        return np.minimum(sums(exact * z) / sums(z * z), self._largest)

    def _nearest(self, magnitudes: Floats, scales: Floats, groups: Integers) -> Octets:
        """The numbers of the positive levels that are nearest to the magnitudes by the scales of their blocks."""
        scaled = _by_group(np.divide, magnitudes, np.where(scales > 0, scales, np.float32(1)), groups)
        first, *others = (self._levels()[1:] + self._levels()[:-1]) / 2 if self.bits > 1 else [np.inf]
        nearest = (scaled >= first).view(np.uint8)
        for threshold in others:
            nearest += (scaled >= threshold).view(np.uint8)
        return nearest

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        groups = _groups(counts, self.block)
        scales = require_scales(self._scale._decode(data[: 2 * groups.size], groups), "values.scales")
        if scales.max(initial=0) > self._largest:
            raise PayloadError("values.scales", f"at most {self._largest}", scales.max())
        total, packed = int(groups.sum()), data[2 * groups.size :]
        levels = np.concatenate([-self._levels()[::-1], self._levels()])
        if 8 % self.bits:
            packed, table = unpack_fixed(packed, total, self.bits, "values.levels"), levels[:, None]
        else:  # a byte has whole numbers: all their levels are looked up together
            check_bits(packed, total * self.bits, "values.levels")
            table = levels[unpack_fixed(_ALL_BYTES, 2048 // self.bits, self.bits, "values.levels")].reshape(256, -1)
        values, per_byte = np.empty(total, np.float32), table.shape[1]
        for blocks, place in self._at_once(groups):
            first, skipped = divmod(place.start, per_byte)
            rows = np.take(table, packed[first : octet_count(8 // per_byte * place.stop)], axis=0, mode="clip")
            chosen = rows.reshape(-1)[skipped : skipped + place.stop - place.start]
            values[place] = _by_group(np.multiply, chosen, scales[blocks], groups[blocks])
        return values

    def _at_once(self, groups: Integers) -> Iterator[tuple[slice, slice]]:
        """Some blocks after others, and where their values are: as many as stay in the cache."""
        ends = np.cumsum(groups)
        step = max(1, VALUES_AT_ONCE // self.block)
        for start in range(0, groups.size, step):
            stop = min(start + step, groups.size)
            yield slice(start, stop), slice(int(ends[start] - groups[start]), int(ends[stop - 1]))

    def _size(self, counts: Integers) -> int:
        return 2 * _groups(counts, self.block).size + octet_count(self.bits * int(counts.sum()))

    def _levels(self) -> Floats:
        """The 2^(bits-1) positive levels of values whose root mean square is one, ascending."""
        half = 2 ** (self.bits - 1)
        return _LLOYD_MAX[half - 1 : 2 * half - 1]


# The positive levels of 1, 2, ..., 8 bits, one width after another, in units of 2^-13: constants, so that no machine's
# mathematics library decides a bit, and short enough that a level times a bfloat16 is a float32 without rounding.
_LLOYD_MAX: Floats = np.float32(2**-13) * np.fromstring(
    """
    6536 3709 12373 2008 6193 11009 17629 1052 3179 5380 7720 10291 13255 16949 22385 540 1622 2715 3823 4956 6121
    7328 8592 9927 11357 12912 14641 16619 18987 22046 26712 274 821 1370 1922 2476 3033 3596 4164 4739 5322 5914
    6516 7131 7759 8403 9064 9746 10451 11183 11946 12745 13587 14480 15434 16463 17587 18833 20245 21891 23899
    26546 30672 138 414 690 966 1242 1519 1797 2075 2354 2634 2915 3198 3481 3766 4052 4340 4630 4922 5216 5512 5810
    6112 6415 6722 7032 7346 7663 7984 8309 8639 8973 9312 9657 10007 10364 10728 11098 11477 11863 12259 12664
    13080 13508 13948 14402 14872 15358 15863 16389 16938 17514 18121 18762 19445 20175 20964 21823 22770 23831
    25045 26476 28241 30597 34322 69 208 346 484 623 761 900 1039 1178 1317 1456 1595 1734 1874 2013 2153 2293 2434
    2574 2715 2856 2997 3139 3281 3423 3566 3709 3852 3996 4140 4285 4430 4575 4721 4868 5015 5163 5311 5459 5609
    5759 5909 6061 6213 6365 6519 6673 6828 6984 7140 7298 7456 7615 7776 7937 8099 8263 8427 8593 8760 8928 9097
    9268 9440 9613 9788 9964 10142 10322 10503 10686 10870 11057 11245 11436 11628 11823 12020 12219 12421 12625
    12832 13042 13254 13470 13689 13911 14136 14365 14598 14835 15077 15322 15572 15828 16088 16354 16626 16904
    17189 17481 17780 18088 18404 18730 19066 19413 19772 20144 20530 20933 21353 21792 22254 22740 23255 23802
    24387 25016 25699 26448 27278 28214 29291 30570 32159 34297 37712
    """,
    np.float32,
    sep=" ",
)


def counts_of(chosen: npt.NDArray[np.bool_], counts: Integers) -> Integers:
    """How many of every segment's values are chosen."""
    before = np.concatenate([[0], np.cumsum(chosen)])
    ends = np.cumsum(counts)
    return np.asarray(before[ends] - before[ends - counts], np.int64)


def counts_at(places: Integers, counts: Integers) -> Integers:
    """How many of these ascending places are in every segment."""
    return np.diff(np.searchsorted(places, np.cumsum(counts)), prepend=0)


def _groups(counts: Integers, block: int | None) -> Integers:
    """Number of values of every scale: of every segment's blocks, or of every segment."""
    filled = counts[counts > 0]
    block = block or counts.max(initial=1)
    blocks = -(-filled // block)
    groups = np.full(int(blocks.sum()), block, np.int64)
    groups[np.cumsum(blocks) - 1] = filled - (blocks - 1) * block
    return groups


def _by_group(operation: np.ufunc, values: Floats, scales: Floats, groups: Integers) -> Floats:
    """The operation on every value and the scale of its group."""
    if groups.size and (groups == groups[0]).all():  # in rows, without a copy of the scale for each value
        result: Floats = operation(values.reshape(groups.size, -1), scales[:, None]).reshape(-1)
    else:
        result = operation(values, np.repeat(scales, groups))
    return result


def require_scales(scales: Floats, field: str) -> Floats:
    """The same, which are refused if no encoder writes them."""
    wrong = ~(np.isfinite(scales) & ~np.signbit(scales))
    if wrong.any():
        raise PayloadError(field, "finite and not negative", scales[int(np.argmax(wrong))])
    return scales
