"""From every rank's gradient to the mean that all apply: the round, its exchanges, and the classical schemes.

An exchange says what all ranks get of the pending residual v and what this rank contributed. What it selects and
codes it offers before the round is opened, so that the opening can tell all ranks how long the payloads are, or that a
rank has failed. An aggregator's round is a sequence of exchanges over the regions of the flat vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgc.coding import Float32, IndexCoder, Kind, ValueCodec, pack, size_limit, unpack
from lgc.comm.transport import SERVER, Transport
from lgc.rounds.feedback import Feedback, Piece
from lgc.rounds.layout import Layout
from lgc.rounds.schedule import Schedule, Stage
from lgc.rounds.selection import Region


class Offer(NamedTuple):
    """What a rank is about to send: its contribution, and the payload that carries it."""

    piece: Piece
    payload: Tensor


class Codecs(NamedTuple):
    """How indices and values become bytes."""

    indices: IndexCoder
    values: ValueCodec


class Exchange(NamedTuple):
    """Contributions to the mean, to be added up, and this rank's own as the others decode it."""

    mean: list[Piece]
    sent: Piece


class Round(NamedTuple):
    """Result of one round.

    Attributes:
        mean: what the optimizer is given, shape (N,), the same bits on every rank; valid until the next round. NaN
            throughout if any rank's gradient was not finite, in which case no state has changed.
        sent: this rank's contribution as the others decode it.
        nonfinite_ranks: the ranks whose gradient was not finite.
    """

    mean: Tensor
    sent: tuple[Piece, ...]
    nonfinite_ranks: tuple[int, ...] = ()


class OpenRound(NamedTuple):
    """An open round: the votes of all ranks, this rank's offers, and the lengths of each offer's payload by rank.

    If a rank's gradient was not finite, the round must not change anything.
    """

    votes: list[bool]
    offers: list[Offer]
    lengths: list[list[int]]
    nonfinite_ranks: tuple[int, ...]


class Aggregator(ABC):
    """One rank's side of a scheme: its parts, and the round made of them."""

    def __init__(self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback) -> None:
        self.layout = layout
        self.transport = transport
        self.schedule = schedule
        self.feedback = feedback
        self.metrics: dict[str, float] = {}
        self._mean = torch.empty_like(feedback.residual)  # a new one each round costs as much as selecting from it

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
        if self.feedback.second_moment_buffer is not None:
            per_rank["second_moment"] = self._by_name(self.feedback.second_moment_buffer)
        replicated = {"train_end": self.schedule.train_end, "updates": self.feedback.updates}
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set this rank's state; names, types and shapes have been checked against `state_dict()`."""
        self._set_by_name(self.feedback.residual, state["per_rank"]["residual"])
        if self.feedback.momentum_buffer is not None:
            self._set_by_name(self.feedback.momentum_buffer, state["per_rank"]["momentum"])
        if self.feedback.second_moment_buffer is not None:
            self._set_by_name(self.feedback.second_moment_buffer, state["per_rank"]["second_moment"])
        self.feedback.updates = state["replicated"]["updates"]
        self.schedule.train_end = state["replicated"]["train_end"]

    def replicas(self) -> dict[str, Tensor]:
        """What all ranks have the same of, by name."""
        return {}

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """`state` of another world size, resharded, with what cannot outlive that as this new aggregator has it."""
        return state

    def _begin(self, step: int) -> Stage:
        """The stage of `step`; what follows is counted under its phase."""
        self.metrics = {}
        stage = self.schedule.at(step)
        self.transport.begin(stage.phase)
        return stage

    def _open(self, v: Tensor, step: int, *offers: Callable[[], Offer], vote: bool = False) -> OpenRound:
        """Prepare this rank's offers, at most two, and open the round.

        Raises:
            RankError: on every rank, if one failed to prepare.
        """
        finite = self.feedback.is_finite(v)
        prepared: list[Offer] = []
        error = None
        try:
            prepared = [offer() for offer in offers] if finite else []
        except Exception as exception:
            error = exception
        own, leader, *_ = [offer.payload.numel() for offer in prepared] + [0, 0]
        opening = self.transport.open_round(step, finite=finite, vote=vote, lengths=(own, leader), error=error)
        nonfinite_ranks = tuple(rank for rank, finite in enumerate(opening.finite) if not finite)
        lengths = [list(lengths) for lengths in zip(*opening.lengths, strict=True)]
        return OpenRound(opening.votes, prepared, lengths, nonfinite_ranks)

    def _abandon(self, opened: OpenRound) -> Round:
        return Round(self._mean.fill_(torch.nan), (), opened.nonfinite_ranks)

    def _close(self, *exchanges: Exchange) -> Round:
        """Settle what was sent, commit, and add up the mean."""
        self._mean.zero_()
        for exchange in exchanges:
            self.feedback.settle(exchange.sent)
            _add_up(exchange.mean, self._mean)
        self.feedback.commit()
        return Round(self._mean, tuple(exchange.sent for exchange in exchanges))

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

    def __init__(self, transport: Transport, region: Region, codecs: Codecs) -> None:
        self.transport = transport
        self.region = region
        self.codecs = codecs
        self.residual: Tensor | None = None  # of a server, shape (N,)

    def offer(self, v: Tensor, least_rate: float, step: int) -> Offer:
        """This rank's selection, as the others will decode it, and its payload."""
        positions = self.region.select(v, least_rate)
        payload = self._pack(positions, v, least_rate, step)
        return Offer(self._unpack(payload, least_rate, step, v.device), payload)

    def exchange(self, offer: Offer, lengths: list[int], least_rate: float, step: int) -> Exchange:
        """Mean over the ranks of what each selected."""
        if not self.region.segments:
            return Exchange([], offer.piece)
        limit = size_limit(self._bounds(least_rate))
        payloads = self.transport.all_gather_bytes(offer.payload, "entries", lengths, limit=limit)
        device = offer.piece.values.device
        pieces = [
            offer.piece if rank == self.transport.rank else self._unpack(payload, least_rate, step, device)
            for rank, payload in enumerate(payloads)
        ]
        mean = [Piece(where, values / self.transport.world_size) for where, values in pieces]
        return Exchange(mean, offer.piece)

    def _pack(self, positions: Tensor, v: Tensor, least_rate: float, step: int) -> Tensor:
        values = v[self.region.elements(positions, least_rate)]
        parts = [
            self.codecs.indices.encode(positions, self.region.sizes),
            self.codecs.values.encode(values, self.region.element_counts(least_rate)),
        ]
        return pack(parts, kind=Kind.ENTRIES, step=step)

    def _unpack(self, payload: Tensor, least_rate: float, step: int, device: torch.device) -> Piece:
        counts, value_counts = self.region.counts(least_rate), self.region.element_counts(least_rate)
        index_code, value_code = unpack(payload, kind=Kind.ENTRIES, step=step, bounds=self._bounds(least_rate))
        positions = self.codecs.indices.decode(index_code, self.region.sizes, counts)
        values = self.codecs.values.decode(value_code, value_counts)
        return Piece(self.region.elements(positions, least_rate).to(device), values.to(device))

    def _bounds(self, least_rate: float) -> list[int]:
        """The largest possible numbers of bytes of indices and values."""
        counts, value_counts = self.region.counts(least_rate), self.region.element_counts(least_rate)
        return [self.codecs.indices.bound(self.region.sizes, counts), self.codecs.values.size(value_counts)]


class ServerTopK(OwnTopK):
    """The same through a server at rank 0, which selects again from the sum.

    It keeps a residual of its own, shape (N,), at rank 0 only. What a rank sends and receives does not grow with the
    number of ranks.
    """

    def __init__(self, transport: Transport, region: Region, codecs: Codecs, size: int, device: torch.device) -> None:
        super().__init__(transport, region, codecs)
        if transport.rank == SERVER:
            self.residual = torch.zeros(size, dtype=torch.float32, device=device)

    def exchange(self, offer: Offer, lengths: list[int], least_rate: float, step: int) -> Exchange:
        """The largest sums of what the ranks selected."""
        if not self.region.segments:
            return Exchange([], offer.piece)
        device = offer.piece.values.device
        limit = size_limit(self._bounds(least_rate))
        gathered = self.transport.gather_bytes(offer.payload, "entries", lengths, limit=limit)
        reply = offer.payload
        if gathered is not None and self.residual is not None:
            for payload in gathered:
                where, values = self._unpack(payload, least_rate, step, device)
                self.residual[where] += values / self.transport.world_size
            reply = self._pack(self.region.select(self.residual, least_rate), self.residual, least_rate, step)
        reply = self.transport.broadcast_bytes(reply, "entries", source=SERVER, limit=limit)
        chosen = self._unpack(reply, least_rate, step, device)
        if self.residual is not None:
            self.residual[chosen.where] -= chosen.values
        return Exchange([chosen], offer.piece)


class SharedTopK:
    """The indices of one rank, the leader, for all; a different leader every step."""

    def __init__(self, transport: Transport, region: Region, codecs: Codecs) -> None:
        self.transport = transport
        self.region = region
        self.codecs = codecs

    def leader(self, step: int) -> int:
        """The rank whose indices count in `step`."""
        return step % self.transport.world_size

    def leads(self, step: int) -> bool:
        """Whether that is this rank."""
        return self.transport.rank == self.leader(step)

    def offer(self, v: Tensor, least_rate: float, step: int) -> Offer:
        """The leader's indices and the root mean square of its values there; nothing from the other ranks."""
        if not self.leads(step) or not self.region.segments:
            return Offer(Piece(slice(0), v[:0]), torch.empty(0, dtype=torch.uint8, device="cpu"))
        positions = self.region.select(v, least_rate)
        indices = self.region.elements(positions, least_rate)
        parts = [
            self.codecs.indices.encode(positions, self.region.sizes),
            Float32().encode(root_mean_square(v[indices]), [1]),
        ]
        return Offer(Piece(indices, v[indices]), pack(parts, kind=Kind.INDICES, step=step))

    def receive(self, offer: Offer, lengths: list[int], least_rate: float, step: int) -> tuple[Tensor, Tensor]:
        """The leader's indices, int64, and the scale, shape (1,); a collective."""
        device = offer.piece.values.device
        if not self.region.segments:
            return torch.empty(0, dtype=torch.int64, device=device), torch.zeros(1, device=device)
        leader = self.leader(step)
        bounds = [self.index_bound(least_rate), Float32().size([1])]
        payload = self.transport.broadcast_bytes(
            offer.payload, "indices", source=leader, length=lengths[leader], limit=size_limit(bounds)
        )
        index_code, scale_code = unpack(payload, kind=Kind.INDICES, step=step, bounds=bounds)
        return self.decode_indices(index_code, least_rate, device), Float32().decode(scale_code, [1]).to(device)

    def index_bound(self, least_rate: float) -> int:
        """The largest possible number of bytes of the leader's indices."""
        return self.codecs.indices.bound(self.region.sizes, self.region.counts(least_rate))

    def decode_indices(self, code: Tensor, least_rate: float, device: torch.device) -> Tensor:
        """Elements of the flat vector, int64, ascending."""
        positions = self.codecs.indices.decode(code, self.region.sizes, self.region.counts(least_rate))
        return self.region.elements(positions, least_rate).to(device)

    def exchange_values(self, v: Tensor, indices: Tensor, least_rate: float, step: int) -> Exchange:
        """Mean over the ranks of their values at shared indices.

        By all-reduce of float32; coded values have a scale of their own on each rank, so they are gathered and added.
        """
        x = v[indices]
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        if self.codecs.values == Float32():
            mean = self.transport.all_reduce(x, "values") / self.transport.world_size
            return Exchange([Piece(indices, mean)], Piece(indices, x))
        counts = self.region.element_counts(least_rate)
        payload = pack([self.codecs.values.encode(x, counts)], kind=Kind.VALUES, step=step)
        payloads = self.transport.all_gather(payload, "values")
        bounds = [self.codecs.values.size(counts)]
        parts = [unpack(payload, kind=Kind.VALUES, step=step, bounds=bounds)[0] for payload in payloads]
        decoded = torch.stack([self.codecs.values.decode(part, counts) for part in parts]).to(x.device)
        sent = Piece(indices, decoded[self.transport.rank])
        return Exchange([Piece(indices, sum_in_order(decoded) / self.transport.world_size)], sent)


class OwnAggregator(Aggregator):
    """Sparse gradient descent and DGC: every rank's own top-k, directly or through a server."""

    def __init__(
        self,
        layout: Layout,
        transport: Transport,
        schedule: Schedule,
        feedback: Feedback,
        own: OwnTopK,
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = own

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        _, least_rate = self._begin(step)
        v = self.feedback.accumulate(gradient)  # u = m u + g;  v = v + u
        opened = self._open(v, step, partial(self.own.offer, v, least_rate, step))
        if opened.nonfinite_ranks:
            return self._abandon(opened)
        return self._close(
            self._exchange_dense(v, self.layout.dense),
            self.own.exchange(opened.offers[0], opened.lengths[0], least_rate, step),
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.own.residual is not None:
            state["server"]["residual"] = self._by_name(self.own.residual)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.own.residual is not None:
            self._set_by_name(self.own.residual, state["server"]["residual"])


class SharedAggregator(Aggregator):
    """ScaleCom: values at a rotating leader's indices.

    Source: Chen et al., NeurIPS 2020, arXiv 2104.11125.
    """

    def __init__(
        self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback, codecs: Codecs
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = OwnTopK(transport, Region(layout.own), codecs)
        self.shared = SharedTopK(transport, Region(layout.shared), codecs)

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        _, least_rate = self._begin(step)
        v = self.feedback.accumulate(gradient)
        offers = [self.own.offer, self.shared.offer]
        opened = self._open(v, step, *(partial(offer, v, least_rate, step) for offer in offers))
        if opened.nonfinite_ranks:
            return self._abandon(opened)
        (own, leader), (own_lengths, leader_lengths) = opened.offers, opened.lengths
        indices, _ = self.shared.receive(leader, leader_lengths, least_rate, step)
        return self._close(
            self._exchange_dense(v, self.layout.dense),
            self.own.exchange(own, own_lengths, least_rate, step),
            self.shared.exchange_values(v, indices, least_rate, step),
        )


def root_mean_square(x: Tensor) -> Tensor:
    """Of all elements, shape (1,)."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)  # squares of float32 may vanish
    mean: Tensor = norm / math.sqrt(max(x.numel(), 1))
    return mean.float().view(1)


def sum_in_order(rows: Tensor) -> Tensor:
    """Sum over the first dimension, the same bits on any hardware."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _add_up(pieces: list[Piece], total: Tensor) -> None:
    for where, values in pieces:
        total[where] += values
