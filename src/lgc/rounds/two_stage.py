"""All-reduce in two coded stages: every rank serves a shard of the region."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lgc.comm.messages import Posting, to_all, to_each
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.exchange import Exchange, Exchanged
from lgc.rounds.feedback import Feedback, Piece
from lgc.rounds.layout import Layout, Segment
from lgc.rounds.schedule import Schedule, Stage

Reduction = Literal["gather", "two_stage"]


class Shard(NamedTuple):
    """The part of the flat vector that one rank serves, and its segments, counted from its start."""

    where: slice
    segments: list[Segment]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.where.stop - self.where.start)


def cut(segments: Sequence[Segment], parts: int) -> list[Shard]:
    """Consecutive segments, cut into contiguous parts of equal size but for a unit; there may be empty ones."""
    first = segments[0].slice.start if segments else 0
    size = sum(segment.size for segment in segments)
    edges = [_edge(segments, first + size * number // parts) for number in range(parts + 1)]
    shards = []
    for start, stop in pairwise(edges):
        pieces = []
        for segment in segments:
            begin, end = max(start, segment.slice.start), min(stop, segment.slice.stop)
            if begin < end:
                pieces.append(segment._replace(slice=slice(begin - start, end - start)))
        shards.append(Shard(slice(start, stop), pieces))
    return shards


def _edge(segments: Sequence[Segment], place: int) -> int:
    """The last place up to this one where no unit is cut."""
    for segment in segments:
        if segment.slice.start <= place < segment.slice.stop:
            place -= (place - segment.slice.start) % segment.unit
    return place


class Code(Protocol):
    """Payloads of a shard's values x, shape (n,); zeros stay zeros.

    Attributes:
        limit: the largest possible payload, in bytes.
    """

    limit: int

    def encode(self, x: Tensor, step: int) -> Tensor:
        """The payload, uint8."""

    def decode(self, payload: Tensor, step: int, device: torch.device) -> Tensor:
        """The values as all ranks decode them; parsed as hostile."""


class TwoStage(Exchange):
    """A mean in two coded stages. What a rank sends and receives hardly grows with the number of ranks.

        code of every shard of v       from every rank to the shard's server: all-to-all
        t    = owed + sum of these     in order of rank
        mean = code of t / K           from every server to all ranks: all-gather
        owed = t - K mean              error feedback of the server

    Source: Tang et al., 1-bit Adam, ICML 2021, arXiv 2102.02888, there with one bit in both stages.

    Attributes:
        owed: K times what this rank, as a server, has still to send, shape (size of its shard,).
    """

    content: str  # what the first stage is counted as; the second one is "means"

    def __init__(self, transport: Transport, segments: Sequence[Segment], device: torch.device) -> None:
        self.transport = transport
        self.shards = cut(segments, transport.world_size)
        self.own = self.shards[transport.rank]
        self.owed = torch.zeros(self.own.size, dtype=torch.float32, device=device)
        self._pending_owed = self.owed
        self._where: slice | Tensor = slice(0)
        self._shares: list[Tensor] = []

    @abstractmethod
    def select(self, v: Tensor, stage: Stage) -> slice | Tensor:
        """The places of v, shape (N,), that this rank sends."""

    @abstractmethod
    def select_mean(self, mean: Tensor, stage: Stage) -> slice | Tensor:
        """The places of the mean of its shard that this rank, as a server, sends."""

    @abstractmethod
    def share_code(self, server: int, stage: Stage) -> Code:
        """How the ranks code their shares of a server's shard."""

    @abstractmethod
    def mean_code(self, server: int, stage: Stage) -> Code:
        """How a server codes its mean."""

    def prepare(self, v: Tensor, stage: Stage) -> None:
        self._where = self.select(v, stage)
        kept = only(v, self._where)
        self._shares = [
            self.share_code(server, stage).encode(kept[shard.where], stage.step)
            for server, shard in enumerate(self.shards)
        ]

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        if self.shards[0].where.start == self.shards[-1].where.stop:
            return Exchanged([], Piece(slice(0), v[:0]))
        codes = [self.share_code(server, stage) for server in range(len(self.shards))]
        received = yield from to_each(self._shares, self.content, limit=codes[self.transport.rank].limit)
        total = self.owed.clone()
        resting = [where for each in stage.resting if (where := self._within_own(each))]
        for where in resting:
            total[where] = 0
        for share in received:
            total += codes[self.transport.rank].decode(share, stage.step, v.device)
        means = yield from self._spread(total, stage)
        for where in resting:
            self._pending_owed[where] += self.owed[where]
        sent = torch.zeros_like(v)
        for shard, code, share in zip(self.shards, codes, self._shares, strict=True):
            sent[shard.where] = code.decode(share, stage.step, v.device)
        return Exchanged(means, Piece(self._where, sent[self._where]))

    def _within_own(self, where: slice) -> slice | None:
        """The part of some places that lies in this rank's shard, counted from its start; None if none does."""
        start, stop = max(where.start, self.own.where.start), min(where.stop, self.own.where.stop)
        return slice(start - self.own.where.start, stop - self.own.where.start) if start < stop else None

    def _spread(self, total: Tensor, stage: Stage) -> Posting[list[Piece]]:
        """The means of all shards, of which this rank has the sum of its own, as the others decode them."""
        world_size, codes = self.transport.world_size, [self.mean_code(rank, stage) for rank in range(len(self.shards))]
        mean = total / world_size
        reply = codes[self.transport.rank].encode(only(mean, self.select_mean(mean, stage)), stage.step)
        means = []
        replies = yield from to_all(world_size, reply, "means", limit=max(code.limit for code in codes))
        for server, payload in zip(map(self.transport.origin, range(world_size)), replies, strict=True):
            decoded = codes[server].decode(payload, stage.step, total.device)
            means.append(Piece(self.shards[server].where, decoded))
            if server == self.transport.rank:
                self._pending_owed = total - world_size * decoded
        return means

    def commit(self) -> None:
        self.owed = self._pending_owed
        self._where, self._shares = slice(0), []


def only(v: Tensor, where: slice | Tensor) -> Tensor:
    """v at these places, zero elsewhere; v itself if the places are a slice, which is all of what is coded."""
    if isinstance(where, slice):
        return v
    kept = torch.zeros_like(v)
    kept[where] = v[where]
    return kept


class ReducingAggregator(Aggregator):
    """A round with one exchange that may be in two stages, whose residuals at the servers are state.

    In the state they are `server_residual` by parameter name: K times what this rank owes as a server, zero outside its
    shard, so that the mean over the ranks is what all servers owe.
    """

    def __init__(
        self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback, reduced: Exchange
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.reduced = reduced

    @property
    def server_residual(self) -> Tensor | None:
        """K times what this rank owes as a server, shape (N,); None if there are no servers."""
        if not isinstance(self.reduced, TwoStage):
            return None
        flat = torch.zeros_like(self.feedback.residual)
        flat[self.reduced.own.where] = self.reduced.owed
        return flat

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if (owed := self.server_residual) is not None:
            state["per_rank"]["server_residual"] = self.named_copies(owed)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if isinstance(self.reduced, TwoStage):
            self.reduced.owed = self.flat(state["per_rank"]["server_residual"])[self.reduced.own.where].clone()

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """Add what the servers owed to the residuals: the shards of another number of ranks are others."""
        per_rank = dict(state["per_rank"])
        owed = per_rank.pop("server_residual", {})
        per_rank["residual"] = {name: residual + owed.get(name, 0) for name, residual in per_rank["residual"].items()}
        fresh = self.state_dict()["per_rank"]
        return {**state, "per_rank": {name: per_rank.get(name, part) for name, part in fresh.items()}}
