"""A code for signs that are often those of the last time. See docs/wire.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from lgc.coding.bits import Integers, check_bits, octet_count
from lgc.coding.indices import Rice
from lgc.coding.payload import Octets, PayloadError
from lgc.coding.recent import PLAIN, RELATIVE, Bools
from lgc.coding.values import Floats, Sign, ValueCodec

COUNT_BYTES = 4


@final
@dataclass(frozen=True)
class RecentSign(ValueCodec):
    """`Sign`, with a short code where a sign is the one that its sender sent there the last time.

    The signs that are not as expected are coded by their places, those of which nothing is known by a bit. Where that
    is not shorter, and where a value is zero, the signs are coded as by `Sign`, with one byte more.
    """

    remembers: ClassVar[bool] = True
    _has_zero = False
    _has_fixed_size = False
    _expected: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int8, device="cpu"), init=False, repr=False, compare=False
    )

    def given(self, expected: Tensor) -> RecentSign:
        codec = RecentSign()
        object.__setattr__(codec, "_expected", expected)
        return codec

    def finer(self) -> ValueCodec:
        return Sign().finer()

    def _encode(self, values: Floats, counts: Integers) -> Octets:
        plain = Sign()._encode(values, counts)
        model, code = PLAIN, plain
        if 0 < values.size == self._expected.numel():
            negative = values < 0
            known, other = self._known()
            places = torch.from_numpy(np.flatnonzero(negative[known] != other))
            parts = [
                plain[: plain.size - octet_count(values.size)],
                np.packbits(negative[~known], bitorder="little"),
                np.array([places.numel()], f"<u{COUNT_BYTES}").view(np.uint8),
                Rice().encode(places, [other.size]).numpy(),
            ]
            if sum(part.size for part in parts) < plain.size:
                model, code = RELATIVE, np.concatenate(parts)
        return np.concatenate([np.array([model], np.uint8), code])

    def _decode(self, data: Octets, counts: Integers) -> Floats:
        model, code, total = data[:1].tolist(), data[1:], int(counts.sum())
        plain = Sign()._size(counts)
        if model == [RELATIVE] and 0 < total == self._expected.numel():
            magnitudes = plain - octet_count(total)
            negative = self._decode_relative(code[magnitudes:])
            code = np.concatenate([code[:magnitudes], np.packbits(negative, bitorder="little")])
        elif model != [PLAIN]:
            raise PayloadError("values.model", f"{PLAIN}, or {RELATIVE} where signs are expected", model)
        if code.size != plain:
            raise PayloadError("values", f"{plain} bytes", code.size)
        return Sign()._decode(code, counts)

    def _decode_relative(self, data: Octets) -> Bools:
        """Which values are negative."""
        known, negative = self._known()
        start = octet_count(known.size - negative.size)
        check_bits(data[:start], known.size - negative.size, "values.signs")
        number = data[start : start + COUNT_BYTES]
        if number.size != COUNT_BYTES:
            raise PayloadError("values.signs", f"a number of {COUNT_BYTES} bytes", number.size)
        count = int.from_bytes(number.tobytes(), "little")
        if count > negative.size:
            raise PayloadError("values.signs", f"at most {negative.size} that are not as expected", count)
        places = Rice().decode(data[start + COUNT_BYTES :].tobytes(), [negative.size], [count]).numpy()
        negative[places] ^= True
        decoded = np.zeros(known.size, np.bool_)
        decoded[known] = negative
        others = known.size - negative.size
        decoded[~known] = np.unpackbits(data[:start], count=others, bitorder="little").view(np.bool_)
        return decoded

    def _known(self) -> tuple[Bools, Bools]:
        """Of which values a sign is expected, and for each of these whether it is negative."""
        expected = self._expected.numpy()
        known = expected != 0
        return known, expected[known] < 0

    def _size(self, counts: Integers) -> int:
        return 1 + Sign()._size(counts)
