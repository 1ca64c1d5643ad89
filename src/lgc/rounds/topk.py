"""Top-k exchanges: every rank's own selection, or one rank's for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgc.coding import (
    Float32,
    IndexCoder,
    Kind,
    PayloadError,
    ValueCodec,
    decode_zeros,
    encode_zeros,
    pack,
    size_limit,
    unpack,
    zeros_bound,
)
from lgc.comm.messages import FromOne, Posting, Sum, ToAll, nothing, to_all_usual
from lgc.comm.transport import Transport
from lgc.rounds.exchange import Exchange, Exchanged, root_mean_square, sum_in_order
from lgc.rounds.feedback import Piece
from lgc.rounds.past import Past
from lgc.rounds.schedule import Stage
from lgc.rounds.selection import Region
from lgc.rounds.two_stage import Code, TwoStage

COUNT_BYTES = 4
FEWER_ARE_LONGER = 4  # no code of fewer indices is longer than so many times the bound of more, with any of the coders


class Codecs(NamedTuple):
    """How indices and values become bytes."""

    indices: IndexCoder
    values: ValueCodec


class TopKExchange(Exchange):
    """Selects from a region by size, and sends values with their indices.

    Args:
        transport: between the ranks.
        region: that is selected from.
        codecs: how indices and values become bytes.
        past: what the codes know of earlier rounds; None is nothing yet.
    """

    def __init__(self, transport: Transport, region: Region, codecs: Codecs, past: Past | None = None) -> None:
        self.transport = transport
        self.region = region
        self.codecs = codecs
        self.past = past or Past(transport, region, codecs.indices)

    def commit(self) -> None:
        self.past.commit()

    def index_bound(self, stage: Stage) -> int:
        """The largest possible number of bytes of the indices."""
        return self.codecs.indices.bound(self.region.sizes, self.region.counts(stage.least_rate))

    def encode_indices(self, positions: Tensor) -> Tensor:
        """The bytes of selected positions."""
        return self.past.coder(self.transport.rank).encode(positions, self.region.sizes)

    def decode_indices(self, codes: Mapping[int, Tensor], stage: Stage, device: torch.device) -> list[Tensor]:
        """Elements of the flat vector, int64, ascending, for the code of each sender."""
        counts = self.region.counts(stage.least_rate)
        selected = {
            sender: self.past.coder(sender).decode(code, self.region.sizes, counts) for sender, code in codes.items()
        }
        self.past.learn_selected(selected)
        return [self.region.elements(positions).to(device) for positions in selected.values()]


class OwnTopK(TopKExchange):
    """Every rank's own largest values, with their indices, to all ranks: all-gather.

    What a rank receives grows with the number of ranks.
    """

    def __init__(self, transport: Transport, region: Region, codecs: Codecs) -> None:
        super().__init__(transport, region, codecs, Past(transport, region, *codecs))

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        positions = self.region.select(v, stage.least_rate)
        elements = self.region.elements(positions)
        codec = self.past.codec(self.transport.rank, elements)
        code = codec.encode(v[elements], self.region.element_counts(stage.least_rate))
        return pack([self.encode_indices(positions), code], kind=Kind.ENTRIES, step=stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        """Mean over the ranks of what each selected."""
        assert payload is not None
        if not self.region.segments:
            return Exchanged([], Piece(slice(0), v[:0]))
        counts = self.region.element_counts(stage.least_rate)
        bounds = [self.index_bound(stage), self.codecs.values.bound(counts)]
        payloads = yield ToAll(content="entries", payload=payload, lengths=lengths, limit=size_limit(bounds))
        parts = [unpack(each, kind=Kind.ENTRIES, step=stage.step, bounds=bounds) for each in payloads]
        indices = self.decode_indices(dict(enumerate(code for code, _ in parts)), stage, v.device)
        pieces = [
            Piece(where, self.past.codec(sender, where).decode(code, counts).to(v.device))
            for sender, (where, (_, code)) in enumerate(zip(indices, parts, strict=True))
        ]
        self.past.learn_sent(indices, [values for _, values in pieces])
        mean = [Piece(where, values / self.transport.world_size) for where, values in pieces]
        return Exchanged(mean, pieces[self.transport.rank])


class TwoStageTopK(TwoStage):
    """The same in two stages: a selection falls into the shards by index, and a server selects again from its shard."""

    content = "entries"

    def __init__(
        self, transport: Transport, region: Region, codecs: Codecs, mean_values: ValueCodec, device: torch.device
    ) -> None:
        super().__init__(transport, region.segments, device)
        self.region = region
        self.codecs = codecs
        self.mean_codecs = codecs._replace(values=mean_values)
        self.served = [Region(shard.segments) for shard in self.shards]

    def select(self, v: Tensor, stage: Stage) -> Tensor:
        return self.region.elements(self.region.select(v, stage.least_rate))

    def select_mean(self, mean: Tensor, stage: Stage) -> Tensor:
        served = self.served[self.transport.rank]
        return served.elements(served.select(mean, stage.least_rate))

    def share_code(self, server: int, stage: Stage) -> Code:
        counts = self.region.counts(stage.least_rate)
        of_whole = {segment.name: count for segment, count in zip(self.region.segments, counts, strict=True)}
        served = self.served[server]
        most = [min(size, of_whole[part.name]) for part, size in zip(served.segments, served.sizes, strict=True)]
        return SparseCode(served, most, self.codecs)

    def mean_code(self, server: int, stage: Stage) -> Code:
        served = self.served[server]
        return SparseCode(served, served.counts(stage.least_rate), self.mean_codecs)


class SparseCode:
    """Payloads of the units of a region that are not zero: how many every segment has, their indices, their values.

    Args:
        region: of a vector that has nothing else.
        most: units of every segment that may be there.
        codecs: how indices and values become bytes.
    """

    def __init__(self, region: Region, most: Sequence[int], codecs: Codecs) -> None:
        self.region = region
        self.most = list(most)
        self.codecs = codecs
        self.bounds = [
            COUNT_BYTES * len(self.most),
            FEWER_ARE_LONGER * codecs.indices.bound(region.sizes, self.most),
            codecs.values.bound(region.in_elements(self.most)),
        ]
        self.limit = size_limit(self.bounds)

    def encode(self, x: Tensor, step: int) -> Tensor:
        """The payload of values of shape (n,)."""
        filled = [x[segment.slice].view(-1, segment.unit).any(dim=1) for segment in self.region.segments]
        counts = [int(units.sum()) for units in filled]
        positions = torch.cat([*filled, x.new_zeros(0, dtype=torch.bool)]).nonzero().flatten()
        values = x[self.region.elements(positions)]
        parts = [
            torch.from_numpy(np.array(counts, f"<u{COUNT_BYTES}").view(np.uint8)),
            self.codecs.indices.encode(positions, self.region.sizes),
            self.codecs.values.encode(values, self.region.in_elements(counts)),
        ]
        return pack(parts, kind=Kind.SHARE, step=step)

    def decode(self, payload: Tensor, step: int, device: torch.device) -> Tensor:
        """The values as all ranks decode them, shape (n,); parsed as hostile."""
        count_code, index_code, value_code = unpack(payload, kind=Kind.SHARE, step=step, bounds=self.bounds)
        if count_code.numel() != self.bounds[0]:
            raise PayloadError("counts", f"{self.bounds[0]} bytes", count_code.numel())
        counts = np.frombuffer(count_code.numpy().tobytes(), f"<u{COUNT_BYTES}").tolist()
        for count, most in zip(counts, self.most, strict=True):
            if count > most:
                raise PayloadError("counts", f"at most {most}", count)
        positions = self.codecs.indices.decode(index_code, self.region.sizes, counts)
        x = torch.zeros(sum(segment.size for segment in self.region.segments), dtype=torch.float32, device="cpu")
        x[self.region.elements(positions)] = self.codecs.values.decode(value_code, self.region.in_elements(counts))
        return x.to(device)


class Announced(NamedTuple):
    """What the leader has said of its selection.

    Attributes:
        indices: elements of the flat vector, int64, ascending, shape (mu,).
        scale: root mean square of its values there, shape (1,).
        nonzero: where they are not zero, bool, shape (mu,).
    """

    indices: Tensor
    scale: Tensor
    nonzero: Tensor


class SharedTopK(TopKExchange):
    """The indices of one rank, the leader, for all; a different leader every step."""

    def leader(self, step: int) -> int:
        """The rank whose indices count in `step`."""
        return step % self.transport.world_size

    def leads(self, step: int) -> bool:
        """Whether this rank has indices to send in `step`."""
        return self.transport.rank == self.leader(step) and bool(self.region.segments)

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        """The leader's indices, the root mean square and the zeros of its values there; nothing from other ranks."""
        if not self.leads(stage.step):
            return nothing()
        positions = self.region.select(v, stage.least_rate)
        parts = self.announce(positions, v[self.region.elements(positions)])
        return pack(parts, kind=Kind.INDICES, step=stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        """Mean over the ranks of their values at the leader's indices."""
        announced = yield from self.receive(v, payload, lengths, stage)
        return (yield from self.exchange_values(v, announced.indices, stage))

    def announce(self, positions: Tensor, x: Tensor) -> list[Tensor]:
        """The parts of a payload that say what the leader has selected: where, and of its values x size and zeros."""
        return [self.encode_indices(positions), Float32().encode(root_mean_square(x), [1]), encode_zeros(x)]

    def announced_bounds(self, stage: Stage) -> list[int]:
        """The largest possible numbers of bytes of these parts."""
        selected = sum(self.region.element_counts(stage.least_rate))
        return [self.index_bound(stage), Float32().size([1]), zeros_bound(selected)]

    def announced(self, parts: Sequence[Tensor], stage: Stage, device: torch.device) -> Announced:
        """What they say."""
        index_code, scale_code, zeros = parts
        (indices,) = self.decode_indices({self.leader(stage.step): index_code}, stage, device)
        nonzero = ~decode_zeros(zeros, indices.numel()).to(device)
        return Announced(indices, Float32().decode(scale_code, [1]).to(device), nonzero)

    def receive(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Announced]:
        """What the leader has selected; a collective."""
        assert payload is not None
        if not self.region.segments:
            empty = torch.empty(0, dtype=torch.int64, device=v.device)
            return Announced(empty, v.new_zeros(1), empty.bool())
        leader, bounds = self.leader(stage.step), self.announced_bounds(stage)
        (received,) = yield FromOne(
            content="indices", payload=payload, source=leader, length=lengths[leader], limit=size_limit(bounds)
        )
        return self.announced(unpack(received, kind=Kind.INDICES, step=stage.step, bounds=bounds), stage, v.device)

    def exchange_values(self, v: Tensor, indices: Tensor, stage: Stage) -> Posting[Exchanged]:
        """Mean over the ranks of their values at shared indices; a collective.

        By a sum of float32; coded values have a scale of their own on each rank, so they are gathered and added.
        """
        x = v[indices]
        if x.numel() == 0:
            return Exchanged([], Piece(indices, x))
        if self.codecs.values == Float32():
            (total,) = yield Sum(content="values", tensor=x)
            return Exchanged([Piece(indices, total / self.transport.world_size)], Piece(indices, x))
        counts = self.region.element_counts(stage.least_rate)
        payload = pack([self.codecs.values.encode(x, counts)], kind=Kind.VALUES, step=stage.step)
        bounds = [self.codecs.values.bound(counts)]
        usual = size_limit([self.codecs.values.size(counts)])  # and another length where a rank has zeros
        world_size, limit = self.transport.world_size, size_limit(bounds)
        payloads = yield from to_all_usual(world_size, payload, "values", usual=usual, limit=limit)
        codes = [unpack(each, kind=Kind.VALUES, step=stage.step, bounds=bounds)[0] for each in payloads]
        decoded = torch.stack([self.codecs.values.decode(code, counts) for code in codes]).to(x.device)
        mean = sum_in_order(decoded) / world_size
        return Exchanged([Piece(indices, mean)], Piece(indices, decoded[self.transport.rank]))
