"""Codes of fixed length for float32 values. See docs/wire.md for the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.bits import Integers, octet_count, unpack_bits
from lgc.coding.payload import Octets, PayloadError, octets, tensor

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ValueCodec(ABC):
    """Codes float32 values, `counts[s]` of segment s, in a number of bytes that follows from the counts alone.

    The code is computed on the CPU, so the bytes do not depend on the device, and decoding uses only exactly rounded
    operations, so every rank decodes the same bits. What a codec loses is `values - decode(encode(values))`.
    """

    def encode(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """The code of `values`, a uint8 tensor of shape (size(counts),) on the CPU.

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
        return tensor(self._encode(array, numbers))

    def decode(self, data: Tensor | bytes, counts: Sequence[int]) -> Tensor:
        """The values as the others decode them, a float32 tensor of shape (sum(counts),) on the CPU.

        Raises:
            PayloadError: if no values have this code.
        """
        numbers = self._check_counts(counts)
        array = octets(data)
        if array.size != self.size(counts):
            raise PayloadError("values", f"{self.size(counts)} bytes", array.size)
        values = self._decode(array, numbers)
        if not np.isfinite(values).all():
            raise PayloadError("values", "finite", values[int(np.argmin(np.isfinite(values)))])
        return torch.from_numpy(values)

    def size(self, counts: Sequence[int]) -> int:
        """Length in bytes of the code of so many values."""
        return self._size(self._check_counts(counts))

    def _check_counts(self, counts: Sequence[int]) -> Integers:
        if any(count < 0 for count in counts):
            raise ValueError(f"{type(self).__name__}(counts=...) must not be negative, got {min(counts)}.")
        return np.array(counts, np.int64)

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
    """One bit a value and one magnitude a segment: x -> +-mean |x|; zeros count as positive.

    Source: Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019.
    """

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        filled = counts[counts > 0]
        starts = np.cumsum(filled) - filled
        totals = np.add.reduceat(np.abs(values).astype(np.float64), starts) if filled.size else np.zeros(0)
        magnitudes = (totals / filled).astype("<f4")
        return np.concatenate([magnitudes.view(np.uint8), np.packbits(values < 0, bitorder="little")])

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        filled = counts[counts > 0]
        total = int(filled.sum())
        magnitudes = _scales(data[: 4 * filled.size], "values.magnitudes")
        bits = data[4 * filled.size :]
        if total % 8 and bits[-1] >> (total % 8):
            raise PayloadError("values.signs", "zero after its last bit", f"byte {bits[-1]:#04x}")
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
        groups = self._groups(counts)
        starts = np.cumsum(groups) - groups
        scales = np.maximum.reduceat(np.abs(values), starts) if groups.size else np.zeros(0, np.float32)
        divisors = np.repeat(np.where(scales > 0, scales, 1).astype(np.float64), groups)
        quantised = np.rint(values.astype(np.float64) / divisors * self.levels).astype(np.int64)
        words = (quantised + self.levels).astype("<u2").view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(words, axis=1, count=self.bits, bitorder="little")
        return np.concatenate([scales.astype("<f4").view(np.uint8), np.packbits(bits, bitorder="little")])

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        groups = self._groups(counts)
        scales = _scales(data[: 4 * groups.size], "values.scales").astype(np.float64)
        packed = data[4 * groups.size :]
        if self.bits in (8, 16):
            shifted = np.frombuffer(packed.tobytes(), f"<u{self.bits // 8}").astype(np.int64)
        else:
            shifted = unpack_bits(packed, np.full(groups.sum(), self.bits, np.int64), "values.integers")
        if shifted.size and shifted.max() > 2 * self.levels:
            raise PayloadError("values.integers", f"at most {2 * self.levels}", shifted.max())
        return ((shifted - self.levels) * np.repeat(scales, groups) / self.levels).astype(np.float32)

    def _size(self, counts: Integers) -> int:
        return 4 * self._groups(counts).size + octet_count(self.bits * int(counts.sum()))

    def _groups(self, counts: Integers) -> Integers:
        """Number of values of every scale."""
        filled = counts[counts > 0]
        block = self.block or counts.max(initial=1)
        blocks = -(-filled // block)
        groups = np.full(int(blocks.sum()), block, np.int64)
        groups[np.cumsum(blocks) - 1] = filled - (blocks - 1) * block
        return groups


def _scales(data: Octets, field: str) -> Floats:
    scales = np.frombuffer(data.tobytes(), "<f4").astype(np.float32)
    wrong = ~(np.isfinite(scales) & ~np.signbit(scales))
    if wrong.any():
        raise PayloadError(field, "finite and not negative", scales[int(np.argmax(wrong))])
    return scales
