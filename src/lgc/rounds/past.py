"""What ranks have sent in earlier rounds, where their codes make use of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgc.coding import IndexCoder, PayloadError, ValueCodec
from lgc.coding.bits import octet_count, pack_fixed, unpack_fixed
from lgc.comm.transport import Transport
from lgc.rounds.selection import Region

LENGTH_BYTES = 8
SIGN_BITS = 2


class Learned(NamedTuple):
    """What is known of each sender.

    Attributes:
        coders: of its indices, by sender; what they know is what it has selected.
        signs: that it has last sent of every element, int8, shape (senders, n); 0 where it has sent none.
    """

    coders: list[IndexCoder]
    signs: Tensor


class Past:
    """What all ranks have decoded from each of them in earlier rounds, as far as their codes make use of it.

    Both sides of a code must know the same, so this is replicated state: it is compared before every round in which it
    is used, and saved with the rest. What a round teaches becomes part of it in `commit`, so that one that is abandoned
    teaches nothing.

    Args:
        transport: between the ranks.
        region: that they select from.
        indices: how indices become bytes.
        values: how the values there do, if all that is sent of an element is sent by these.
    """

    def __init__(
        self, transport: Transport, region: Region, indices: IndexCoder, values: ValueCodec | None = None
    ) -> None:
        self._transport = transport
        self._indices, self._values = indices, values
        self._units = sum(region.sizes)
        end = max((segment.slice.stop for segment in region.segments), default=0)
        self._elements = end if values is not None and values.remembers else 0
        self.remembers = indices.remembers or self._elements > 0
        self._selected: dict[int, IndexCoder] = {}
        self._sent: list[tuple[Tensor, Tensor]] = []
        self.forget()

    def coder(self, sender: int) -> IndexCoder:
        """The coder of what a rank selects."""
        return self._learned.coders[sender]

    def codec(self, sender: int, elements: Tensor) -> ValueCodec:
        """The codec of what a rank sends of these elements of the flat vector."""
        assert self._values is not None
        if not self._elements:
            return self._values
        return self._values.given(self._learned.signs[sender][elements.cpu()])

    def learn_selected(self, positions: Mapping[int, Tensor]) -> None:
        """Take note of what each of these ranks has selected."""
        self._selected = {sender: self.coder(sender).after(selected) for sender, selected in positions.items()}

    def learn_sent(self, elements: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Take note of the values that each rank has sent of these elements."""
        if self._elements:
            self._sent = [
                (where.cpu(), sent.cpu().sign().to(torch.int8)) for where, sent in zip(elements, values, strict=True)
            ]

    def commit(self) -> None:
        """Know what was taken note of."""
        for sender, coder in self._selected.items():
            self._learned.coders[sender] = coder
        for sender, (where, signs) in enumerate(self._sent):
            row = self._learned.signs[sender]
            self._marks[sender] += _mark(where, signs - row[where])
            row[where] = signs
        self._selected, self._sent = {}, []

    def forget(self) -> None:
        """Know nothing, of as many ranks as there are now."""
        senders = self._transport.world_size
        signs = torch.zeros(senders, self._elements, dtype=torch.int8, device="cpu")
        self.load(Learned([self._indices] * senders, signs))

    def digest(self, start: int = 0) -> int:
        """A number of 32 bits that tells pasts apart which are not the same; continued from `start`."""
        if not self.remembers:
            return start
        numbers = [*(coder.digest() for coder in self._learned.coders), *self._marks.tolist()]
        return zlib.crc32(np.array(numbers, "<i8").tobytes(), start)

    def replicas(self) -> dict[str, Tensor]:
        """The signs themselves, of which the digest has only what they have changed by."""
        name = f"signs sent by {self._transport.member}"
        return {f"{name} {sender}": row for sender, row in enumerate(self._learned.signs) if self._elements}

    def to_bytes(self) -> bytes:
        """All of it: about a byte for every selection that is known, and two bits for every element of each sender."""
        parts = []
        for coder, signs in zip(*self._learned, strict=True):
            known = coder.known(self._units)
            packed = pack_fixed(signs.numpy() + 1, SIGN_BITS).tobytes()
            parts += [len(known).to_bytes(LENGTH_BYTES, "little"), known, packed]
        return b"".join(parts)

    def read(self, data: bytes) -> Learned:
        """What other ranks, or these, have made `to_bytes` of; nothing is changed yet. Parsed as hostile.

        At another number of ranks each knows what was known of the one in the middle of its share: see
        `lgc.checkpoint.reshard`.

        Raises:
            ValueError: if that is nothing that such ranks know.
        """
        coders: list[IndexCoder] = []
        rows: list[Tensor] = []
        stop = 0
        while stop < len(data) or not coders:
            start = stop + LENGTH_BYTES
            end = start + int.from_bytes(data[stop:start], "little")
            stop = end + octet_count(SIGN_BITS * self._elements)
            if len(data) < max(start, stop):
                raise PayloadError("past", f"at least {max(start, stop)} bytes", len(data))
            coders.append(self._indices.knowing(data[start:end], self._units))
            packed = np.frombuffer(data[end:stop], np.uint8)
            signs = unpack_fixed(packed, self._elements, SIGN_BITS, "past.signs").astype(np.int8) - 1
            if (signs > 1).any():
                raise PayloadError("past.signs", "at most 1", signs.max())
            rows.append(torch.from_numpy(signs))
        senders = self._transport.world_size
        saved = [(2 * sender + 1) * len(coders) // (2 * senders) for sender in range(senders)]
        return Learned([coders[each] for each in saved], torch.stack([rows[each] for each in saved]))

    def load(self, learned: Learned) -> None:
        """Know this from now on, and nothing else."""
        self._learned = learned
        self._marks = torch.zeros(len(learned.coders), dtype=torch.int64, device="cpu")
        for sender, row in enumerate(learned.signs):
            where = row.nonzero().flatten()
            self._marks[sender] = _mark(where, row[where])
        self._selected, self._sent = {}, []


def _mark(where: Tensor, signs: Tensor) -> Tensor:
    """Sum of the signs times odd numbers of their places: it adds up, and any one sign changes it."""
    return ((2 * where + 1) * signs).sum()
