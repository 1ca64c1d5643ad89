"""From every rank's gradient to the mean that all apply: the round, its exchanges, and the classical schemes.

An exchange takes the pending residual v and says what all ranks get of it and what this rank contributed. An
aggregator's round is a sequence of exchanges over the regions of the flat vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgc.feedback import Feedback, Piece
from lgc.layout import Layout, Segment
from lgc.schedule import Phase, Schedule, Stage
from lgc.selection import count, top_k
from lgc.transport import SERVER, Transport


class Exchange(NamedTuple):
    """Contributions to the mean, to be added up, and this rank's own as the others decode it."""

    mean: list[Piece]
    sent: Piece


class Round(NamedTuple):
    """Result of one round.

    Attributes:
        mean: what the optimizer is given, shape (N,), the same bits on every rank; NaN throughout if any rank's
            gradient was not finite, in which case no state has changed.
        sent: this rank's contribution as the others decode it.
    """

    mean: Tensor
    sent: tuple[Piece, ...]

    def sent_dense(self) -> Tensor:
        """`sent` as a vector, shape (N,)."""
        return _add_up(self.sent, torch.zeros_like(self.mean))


class Aggregator(ABC):
    """One rank's side of a scheme: its parts, and the round made of them."""

    def __init__(self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback) -> None:
        self.layout = layout
        self.transport = transport
        self.schedule = schedule
        self.feedback = feedback
        self.metrics: dict[str, float] = {}

    @abstractmethod
    def aggregate(self, gradient: Tensor, step: int) -> Round:
        """Exchange this rank's gradient, shape (N,); a collective. The gradient is not changed."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: tensors by parameter name, numbers and strings.

        In three parts, which say what becomes of it at another world size: `per_rank` (its mean over the ranks stays),
        `replicated` (rank 0's counts, for all) and `server` (rank 0's, empty elsewhere).
        """
        per_rank = {"residual": self._by_name(self.feedback.residual)}
        if self.feedback.momentum_buffer is not None:
            per_rank["momentum"] = self._by_name(self.feedback.momentum_buffer)
        return {"per_rank": per_rank, "replicated": {"train_end": self.schedule.train_end}, "server": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set this rank's state; names, types and shapes have been checked against `state_dict()`."""
        self._set_by_name(self.feedback.residual, state["per_rank"]["residual"])
        if self.feedback.momentum_buffer is not None:
            self._set_by_name(self.feedback.momentum_buffer, state["per_rank"]["momentum"])
        self.schedule.train_end = state["replicated"]["train_end"]

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """`state` of another world size, resharded, with what cannot outlive that as this new aggregator has it."""
        return state

    def _begin(self, step: int) -> Stage:
        """The stage of `step`; what follows is counted under its phase."""
        self.metrics = {}
        stage = self.schedule.at(step)
        self.transport.begin(stage.phase)
        return stage

    def _open(self, v: Tensor, step: int, *, vote: bool = False) -> list[bool] | None:
        """Open the round: the ranks' votes, or None if it must not change anything."""
        finite = bool(torch.isfinite(v.sum()))
        opening = self.transport.open_round(step, finite=finite, vote=vote, device=v.device)
        return opening.votes if all(opening.finite) else None

    def _non_finite(self) -> Round:
        return Round(torch.full_like(self.feedback.residual, torch.nan), ())

    def _close(self, *exchanges: Exchange) -> Round:
        """Settle what was sent, commit, and add up the mean."""
        mean = torch.zeros_like(self.feedback.residual)
        for exchange in exchanges:
            self.feedback.settle(exchange.sent)
            _add_up(exchange.mean, mean)
        self.feedback.commit()
        return Round(mean, tuple(exchange.sent for exchange in exchanges))

    def _exchange_dense(self, v: Tensor, where: slice) -> Exchange:
        """All-reduce of a whole region."""
        sent = v[where].clone()
        if sent.numel() == 0:
            return Exchange([], Piece(where, sent))
        mean = self.transport.all_reduce(sent, "values") / self.transport.world_size
        return Exchange([Piece(where, mean)], Piece(where, sent))

    def _exchange_everything(self, v: Tensor) -> Exchange:
        return self._exchange_dense(v, slice(0, self.layout.size))

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.layout.by_name(flat).items()}

    def _set_by_name(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        for name, view in self.layout.by_name(flat).items():
            view.copy_(tensors[name])


class OwnTopK:
    """Every rank's own largest values, with their indices, to all ranks: all-gather.

    What a rank receives grows with the number of ranks.
    """

    def __init__(self, transport: Transport, segments: list[Segment]) -> None:
        self.transport = transport
        self.segments = segments

    def exchange(self, v: Tensor, least_rate: float) -> Exchange:
        """Mean over the ranks of what each selected."""
        indices = top_k(v, self.segments, least_rate)
        sent = Piece(indices, v[indices])
        if not self.segments:
            return Exchange([], sent)
        gathered = self.transport.all_gather(pack_entries(sent), "entries")
        pieces = [unpack_entries(entries) for entries in gathered]
        mean = [Piece(where, values / self.transport.world_size) for where, values in pieces]
        return Exchange(mean, sent)


class ServerTopK:
    """The same through a server at rank 0, which selects again from the sum.

    It keeps a residual of its own, shape (N,), at rank 0 only. What a rank sends and receives does not grow with the
    number of ranks.
    """

    def __init__(self, transport: Transport, segments: list[Segment], size: int, device: torch.device) -> None:
        self.transport = transport
        self.segments = segments
        self.residual = torch.zeros(size if transport.rank == SERVER else 0, device=device)

    def exchange(self, v: Tensor, least_rate: float) -> Exchange:
        """The largest sums of what the ranks selected."""
        indices = top_k(v, self.segments, least_rate)
        sent = Piece(indices, v[indices])
        if not self.segments:
            return Exchange([], sent)
        reply = pack_entries(sent)
        gathered = self.transport.gather(reply, "entries")
        if gathered is not None:
            for where, values in map(unpack_entries, gathered):
                self.residual[where] += values / self.transport.world_size
            chosen = top_k(self.residual, self.segments, least_rate)
            reply = pack_entries(Piece(chosen, self.residual[chosen]))
            self.residual[chosen] = 0
        return Exchange([unpack_entries(self.transport.broadcast(reply, "entries", source=SERVER))], sent)


class SharedTopK:
    """The indices of one rank, the leader, for all; a different leader every step."""

    def __init__(self, transport: Transport, segments: list[Segment]) -> None:
        self.transport = transport
        self.segments = segments

    def leader(self, step: int) -> int:
        """The rank whose indices count in `step`."""
        return step % self.transport.world_size

    def select(self, v: Tensor, least_rate: float, step: int) -> tuple[Tensor, Tensor]:
        """The leader's indices and the root mean square of its values there; a collective."""
        leader = self.leader(step)
        if self.transport.rank == leader:
            indices = top_k(v, self.segments, least_rate)
            packet = pack_entries(Piece(indices, root_mean_square(v[indices])))
        else:
            packet = torch.empty(self.count(least_rate) + 1, dtype=torch.int32, device=v.device)
        packet = self.transport.broadcast(packet, "indices", source=leader)
        return packet[:-1].long(), packet[-1:].view(torch.float32)

    def count(self, least_rate: float) -> int:
        """How many indices the leader sends."""
        return count(self.segments, least_rate)

    def exchange_values(self, v: Tensor, indices: Tensor) -> Exchange:
        """Mean over the ranks of their values at shared indices, by all-reduce."""
        sent = Piece(indices, v[indices])
        if not self.segments:
            return Exchange([], sent)
        mean = self.transport.all_reduce(sent.values, "values") / self.transport.world_size
        return Exchange([Piece(indices, mean)], sent)


class OwnAggregator(Aggregator):
    """Sparse gradient descent and DGC: every rank's own top-k, directly or through a server."""

    def __init__(
        self,
        layout: Layout,
        transport: Transport,
        schedule: Schedule,
        feedback: Feedback,
        own: OwnTopK | ServerTopK,
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = own

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        stage = self._begin(step)
        v = self.feedback.accumulate(gradient)  # u = m u + g;  v = v + u
        if self._open(v, step) is None:
            return self._non_finite()
        if stage.phase is Phase.DENSE:
            return self._close(self._exchange_everything(v))
        return self._close(
            self._exchange_dense(v, self.layout.dense),
            self.own.exchange(v, stage.least_rate),
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if isinstance(self.own, ServerTopK) and self.own.residual.numel():
            state["server"]["residual"] = self._by_name(self.own.residual)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if isinstance(self.own, ServerTopK) and self.own.residual.numel():
            self._set_by_name(self.own.residual, state["server"]["residual"])


class SharedAggregator(Aggregator):
    """ScaleCom: a rotating leader's indices, values all-reduced.

    Source: Chen et al., NeurIPS 2020, arXiv 2104.11125.
    """

    def __init__(self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = OwnTopK(transport, layout.own)
        self.shared = SharedTopK(transport, layout.shared)

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        stage = self._begin(step)
        v = self.feedback.accumulate(gradient)
        if self._open(v, step) is None:
            return self._non_finite()
        if stage.phase is Phase.DENSE:
            return self._close(self._exchange_everything(v))
        indices, _ = self.shared.select(v, stage.least_rate, step)
        return self._close(
            self._exchange_dense(v, self.layout.dense),
            self.own.exchange(v, stage.least_rate),
            self.shared.exchange_values(v, indices),
        )


def pack_entries(piece: Piece) -> Tensor:
    """Indices as int32 and values as the bits of float32, one int32 vector."""
    assert isinstance(piece.where, Tensor)
    return torch.cat([piece.where.to(torch.int32), piece.values.contiguous().view(torch.int32)])


def unpack_entries(packed: Tensor) -> Piece:
    """As many indices as values, back from `pack_entries`."""
    indices, values = packed.chunk(2)
    return Piece(indices.long(), values.view(torch.float32))


def root_mean_square(x: Tensor) -> Tensor:
    """Of all elements, shape (1,)."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)  # squares of float32 may vanish
    mean: Tensor = norm / math.sqrt(max(x.numel(), 1))
    return mean.float().view(1)


def _add_up(pieces: tuple[Piece, ...] | list[Piece], total: Tensor) -> Tensor:
    for where, values in pieces:
        total[where] += values
    return total
