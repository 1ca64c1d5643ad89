"""Top-k exchanges: every rank's own selection, or one rank's for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgc.coding import Float32, IndexCoder, Kind, ValueCodec, pack, size_limit, unpack
from lgc.comm.transport import SERVER, Transport
from lgc.rounds.exchange import Exchange, Exchanged, nothing, root_mean_square, sum_in_order
from lgc.rounds.feedback import Piece
from lgc.rounds.schedule import Stage
from lgc.rounds.selection import Region


class Codecs(NamedTuple):
    """How indices and values become bytes."""

    indices: IndexCoder
    values: ValueCodec


class TopKExchange(Exchange):
    """Selects from a region by size, and sends values with their indices."""

    def __init__(self, transport: Transport, region: Region, codecs: Codecs) -> None:
        self.transport = transport
        self.region = region
        self.codecs = codecs

    def index_bound(self, stage: Stage) -> int:
        """The largest possible number of bytes of the indices."""
        return self.codecs.indices.bound(self.region.sizes, self.region.counts(stage.least_rate))

    def encode_indices(self, positions: Tensor) -> Tensor:
        """The bytes of selected positions."""
        return self.codecs.indices.encode(positions, self.region.sizes)

    def decode_indices(self, code: Tensor, stage: Stage, device: torch.device) -> Tensor:
        """Elements of the flat vector, int64, ascending."""
        positions = self.codecs.indices.decode(code, self.region.sizes, self.region.counts(stage.least_rate))
        return self.region.elements(positions, stage.least_rate).to(device)


class OwnTopK(TopKExchange):
    """Every rank's own largest values, with their indices, to all ranks: all-gather.

    What a rank receives grows with the number of ranks.
    """

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        positions = self.region.select(v, stage.least_rate)
        values = v[self.region.elements(positions, stage.least_rate)]
        code = self.codecs.values.encode(values, self.region.element_counts(stage.least_rate))
        return pack([self.encode_indices(positions), code], kind=Kind.ENTRIES, step=stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Exchanged:
        """Mean over the ranks of what each selected."""
        assert payload is not None
        if not self.region.segments:
            return Exchanged([], Piece(slice(0), v[:0]))
        payloads = self.transport.all_gather_bytes(payload, "entries", lengths, limit=self._limit(stage))
        pieces = [self._decode(each, stage, v.device) for each in payloads]
        mean = [Piece(where, values / self.transport.world_size) for where, values in pieces]
        return Exchanged(mean, pieces[self.transport.rank])

    def _decode(self, payload: Tensor, stage: Stage, device: torch.device) -> Piece:
        index_code, value_code = unpack(payload, kind=Kind.ENTRIES, step=stage.step, bounds=self._bounds(stage))
        values = self.codecs.values.decode(value_code, self.region.element_counts(stage.least_rate))
        return Piece(self.decode_indices(index_code, stage, device), values.to(device))

    def _bounds(self, stage: Stage) -> list[int]:
        """The largest possible numbers of bytes of indices and values."""
        return [self.index_bound(stage), self.codecs.values.size(self.region.element_counts(stage.least_rate))]

    def _limit(self, stage: Stage) -> int:
        return size_limit(self._bounds(stage))


class ServerTopK(OwnTopK):
    """The same through a server at rank 0, which selects again from the sum.

    What a rank sends and receives does not grow with the number of ranks.

    Attributes:
        residual: what the server still owes, shape (N,), at rank 0; None elsewhere.
    """

    def __init__(self, transport: Transport, region: Region, codecs: Codecs, size: int, device: torch.device) -> None:
        super().__init__(transport, region, codecs)
        self.residual = torch.zeros(size, dtype=torch.float32, device=device) if transport.rank == SERVER else None

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Exchanged:
        """The largest sums of what the ranks selected."""
        assert payload is not None
        if not self.region.segments:
            return Exchanged([], Piece(slice(0), v[:0]))
        limit = self._limit(stage)
        gathered = self.transport.gather_bytes(payload, "entries", lengths, limit=limit)
        reply = payload
        if gathered is not None and self.residual is not None:
            for each in gathered:
                where, values = self._decode(each, stage, v.device)
                self.residual[where] += values / self.transport.world_size
            reply = self.prepare(self.residual, stage)
        reply = self.transport.broadcast_bytes(reply, "entries", source=SERVER, limit=limit)
        chosen = self._decode(reply, stage, v.device)
        if self.residual is not None:
            self.residual[chosen.where] -= chosen.values
        return Exchanged([chosen], self._decode(payload, stage, v.device))


class SharedTopK(TopKExchange):
    """The indices of one rank, the leader, for all; a different leader every step."""

    def leader(self, step: int) -> int:
        """The rank whose indices count in `step`."""
        return step % self.transport.world_size

    def leads(self, step: int) -> bool:
        """Whether this rank has indices to send in `step`."""
        return self.transport.rank == self.leader(step) and bool(self.region.segments)

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        """The leader's indices and the root mean square of its values there; nothing from the other ranks."""
        if not self.leads(stage.step):
            return nothing()
        positions = self.region.select(v, stage.least_rate)
        scale = root_mean_square(v[self.region.elements(positions, stage.least_rate)])
        return pack([self.encode_indices(positions), Float32().encode(scale, [1])], kind=Kind.INDICES, step=stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Exchanged:
        """Mean over the ranks of their values at the leader's indices."""
        indices, _ = self.receive(v, payload, lengths, stage)
        return self.exchange_values(v, indices, stage)

    def receive(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> tuple[Tensor, Tensor]:
        """The leader's indices, int64, and the scale, shape (1,); a collective."""
        assert payload is not None
        if not self.region.segments:
            return torch.empty(0, dtype=torch.int64, device=v.device), v.new_zeros(1)
        leader = self.leader(stage.step)
        bounds = [self.index_bound(stage), Float32().size([1])]
        payload = self.transport.broadcast_bytes(
            payload, "indices", source=leader, length=lengths[leader], limit=size_limit(bounds)
        )
        index_code, scale_code = unpack(payload, kind=Kind.INDICES, step=stage.step, bounds=bounds)
        indices = self.decode_indices(index_code, stage, v.device)
        return indices, Float32().decode(scale_code, [1]).to(v.device)

    def exchange_values(self, v: Tensor, indices: Tensor, stage: Stage) -> Exchanged:
        """Mean over the ranks of their values at shared indices; a collective.

        By all-reduce of float32; coded values have a scale of their own on each rank, so they are gathered and added.
        """
        x = v[indices]
        if x.numel() == 0:
            return Exchanged([], Piece(indices, x))
        if self.codecs.values == Float32():
            mean = self.transport.all_reduce(x, "values") / self.transport.world_size
            return Exchanged([Piece(indices, mean)], Piece(indices, x))
        counts = self.region.element_counts(stage.least_rate)
        payload = pack([self.codecs.values.encode(x, counts)], kind=Kind.VALUES, step=stage.step)
        bounds = [self.codecs.values.size(counts)]
        codes = [
            unpack(row, kind=Kind.VALUES, step=stage.step, bounds=bounds)[0]
            for row in self.transport.all_gather(payload, "values")
        ]
        decoded = torch.stack([self.codecs.values.decode(code, counts) for code in codes]).to(x.device)
        mean = sum_in_order(decoded) / self.transport.world_size
        return Exchanged([Piece(indices, mean)], Piece(indices, decoded[self.transport.rank]))
