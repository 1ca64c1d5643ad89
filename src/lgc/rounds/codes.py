"""Exchanges of everything, coded: gathered at all ranks, or in two stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgc.coding import Kind, ValueCodec, Zoned, decode_zeros, encode_zeros, pack, size_limit, unpack, zeros_bound
from lgc.comm.messages import Posting, ToAll
from lgc.comm.transport import Transport
from lgc.rounds.exchange import Exchange, Exchanged
from lgc.rounds.feedback import Piece
from lgc.rounds.layout import Segment
from lgc.rounds.schedule import Stage
from lgc.rounds.two_stage import Code, TwoStage


class QuantizedCode:
    """Payloads of every value of some consecutive segments, of which exact zeros stay exact zeros.

    They have two parts: which values are zero, and the code of all others, each segment by itself.

    Attributes:
        limit: the largest possible payload, in bytes.
    """

    def __init__(self, segments: Sequence[Segment], values: ValueCodec) -> None:
        self.values = values
        self.sizes = [segment.size for segment in segments]
        self.bounds = [zeros_bound(sum(self.sizes)), values.size(self.sizes)]
        self.limit = size_limit(self.bounds)

    def encode(self, x: Tensor, step: int) -> Tensor:
        """The payload of values of shape (n,)."""
        x, counts = x.cpu(), self.sizes
        zeros = encode_zeros(x)
        if zeros.numel():
            nonzero = x != 0
            x = torch.from_numpy(x.numpy()[nonzero.numpy()])  # torch's own indexing takes four times as long
            counts = self._counts(nonzero)
        return pack([zeros, self.values.encode(x, counts)], kind=Kind.QUANTIZED, step=step)

    def decode(self, payload: Tensor, step: int, device: torch.device) -> Tensor:
        """The values as all ranks decode them, shape (n,); parsed as hostile."""
        where, values = self.decode_piece(payload, step, device)
        if isinstance(where, slice):
            return values
        x = torch.zeros(sum(self.sizes), dtype=torch.float32, device=device)
        x[where] = values
        return x

    def decode_piece(self, payload: Tensor, step: int, device: torch.device) -> Piece:
        """The same as what is sent of them, where that is little."""
        zeros, code = unpack(payload, kind=Kind.QUANTIZED, step=step, bounds=self.bounds)
        size, counts = sum(self.sizes), self.sizes
        nonzero = ~decode_zeros(zeros, size) if zeros.numel() else None
        if nonzero is not None:
            counts = self._counts(nonzero)
        if isinstance(self.values, Zoned):
            places, values = self.values.decode_places(code, counts)
            if nonzero is not None:
                places = nonzero.nonzero().view(-1)[places]
            return Piece(places.to(device), values.to(device))
        values = self.values.decode(code, counts)
        if nonzero is not None:
            values = torch.zeros(size, dtype=torch.float32, device="cpu").masked_scatter_(nonzero, values)
        return Piece(slice(0, size), values.to(device))

    def _counts(self, nonzero: Tensor) -> list[int]:
        """How many values of every segment are coded."""
        return [int(part.sum()) for part in nonzero.split(self.sizes)] if self.sizes else []


class GatheredCodes(Exchange):
    """Every rank's code of everything, to all ranks: all-gather.

    What a rank receives grows with the number of ranks.
    """

    def __init__(self, transport: Transport, segments: Sequence[Segment], values: ValueCodec) -> None:
        self.transport = transport
        self.code = QuantizedCode(segments, values)

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        return self.code.encode(v, stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        """Mean over the ranks of what each sent, added up in order of rank."""
        assert payload is not None
        payloads = yield ToAll(content="values", payload=payload, lengths=lengths, limit=self.code.limit)
        everything = slice(0, v.numel())
        total, sent = torch.zeros_like(v), Piece(everything, v)
        for rank, each in enumerate(payloads):
            piece = self.code.decode_piece(each, stage.step, v.device)
            total[piece.where] += piece.values
            if rank == self.transport.rank:
                sent = piece
        return Exchanged([Piece(everything, total.div_(self.transport.world_size))], sent)


class TwoStageCodes(TwoStage):
    """The same in two stages, with a code of its own, which should be a finer one, for the mean."""

    content = "values"

    def __init__(
        self,
        transport: Transport,
        segments: Sequence[Segment],
        values: ValueCodec,
        mean_values: ValueCodec,
        device: torch.device,
    ) -> None:
        super().__init__(transport, segments, device)
        self._share_codes = [QuantizedCode(shard.segments, values) for shard in self.shards]
        self._mean_codes = [QuantizedCode(shard.segments, mean_values) for shard in self.shards]

    def select(self, v: Tensor, stage: Stage) -> slice:
        return slice(0, v.numel())

    def select_mean(self, mean: Tensor, stage: Stage) -> slice:
        return slice(0, mean.numel())

    def share_code(self, server: int, stage: Stage) -> Code:
        return self._share_codes[server]

    def mean_code(self, server: int, stage: Stage) -> Code:
        return self._mean_codes[server]
