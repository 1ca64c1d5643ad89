"""The round, whatever the scheme: from every rank's gradient to the mean that all apply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgc.comm.messages import lockstep
from lgc.comm.transport import Opening, Transport
from lgc.rounds.exchange import Exchange, Exchanged
from lgc.rounds.feedback import Feedback, Piece
from lgc.rounds.layout import Layout
from lgc.rounds.schedule import Schedule, Stage


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


class Aggregator(ABC):
    """One rank's side of a scheme: its state, and the round that its exchanges make.

    Attributes:
        metrics: what this rank measured in the last round.
        remembering: the exchanges that may know something of earlier rounds.
    """

    remembering: Sequence[Exchange] = ()

    def __init__(self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback) -> None:
        self.layout = layout
        self.transport = transport
        self.schedule = schedule
        self.feedback = feedback
        self.metrics: dict[str, float] = {}

    @abstractmethod
    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        """The exchanges of a round of this stage, in order; at most two of them announce payloads."""

    def vote(self) -> bool:
        """This rank's vote, told to all others in the opening, for `finish`."""
        return False

    def finish(self, step: int, votes: list[bool]) -> None:  # noqa: B027 - most schemes have nothing to do
        """End a round; a collective. No votes are given for one that was abandoned."""

    def aggregate(self, gradient: Tensor, step: int, resting: Sequence[slice] = ()) -> Round:
        """Exchange this rank's gradient, shape (N,); a collective.

        Args:
            gradient: zero where something is resting. Not changed, unless it is in `feedback.intake`.
            step: of the round, counted from 0.
            resting: places that take no part on this rank, as they had no part in its backward pass: nothing of them is
                sent, and what they are owed stays. Where all ranks have them, the mean is zero.

        Raises:
            RankError: on every rank, if one failed to prepare.
        """
        stage = self.schedule.at(step)._replace(resting=tuple(resting))
        self.metrics.clear()
        self.transport.begin(stage.phase)
        v = self.feedback.accumulate(gradient, stage.resting)  # u = m u + g;  v = v + u
        exchanges = self.exchanges(stage)
        opening, payloads = self._open(v, exchanges, stage)
        nonfinite_ranks = tuple(rank for rank, finite in enumerate(opening.finite) if not finite)
        if nonfinite_ranks:
            self.finish(step, [])
            return Round(self.feedback.spare.fill_(torch.nan), (), nonfinite_ranks)
        columns = iter(zip(*opening.numbers, strict=True))
        running = [
            exchange.exchange(v, payload, [] if payload is None else list(next(columns)), stage)
            for exchange, payload in zip(exchanges, payloads, strict=True)
        ]
        result = self._close(lockstep(running, self.transport.together))
        for exchange in exchanges:
            exchange.commit()
        self.finish(step, opening.votes)
        return result

    def _open(self, v: Tensor, exchanges: Sequence[Exchange], stage: Stage) -> tuple[Opening, list[Tensor | None]]:
        """Prepare what this rank sends, and open the round."""
        finite = self.feedback.is_finite(v)
        payloads: list[Tensor | None] = []
        error = None
        try:
            payloads = [exchange.prepare(v, stage) for exchange in exchanges] if finite else []
        except Exception as exception:
            error = exception
        lengths = [payload.numel() for payload in payloads if payload is not None]
        opening = self.transport.open_round(stage.step, finite=finite, vote=self.vote(), numbers=lengths, error=error)
        return opening, payloads

    def _close(self, exchanged: Sequence[Exchanged]) -> Round:
        """Settle what was sent, commit, and add up the mean."""
        for each in exchanged:
            self.feedback.settle(each.sent)
        self.feedback.commit()
        total = self.feedback.spare.zero_()  # a new one each round costs as much as selecting from it
        for mean, _ in exchanged:
            for where, values in mean:
                total[where] += values
        return Round(total, tuple(each.sent for each in exchanged))

    def replicas(self) -> dict[str, Tensor]:
        """Tensors that are the same on all ranks, by name."""
        return {}

    def forget(self) -> None:
        """Know nothing of earlier rounds that would only make codes shorter; on all ranks, or on none."""
        for exchange in self.remembering:
            exchange.forget()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: tensors by parameter name, numbers and strings.

        In three parts, which say what becomes of it at another world size: `per_rank` (its mean over the ranks stays),
        `replicated` (rank 0's counts, for all) and `server` (rank 0's, empty elsewhere).
        """
        per_rank = {name: self.named_copies(buffer) for name, buffer in self.feedback.buffers().items()}
        replicated = {"train_end": self.schedule.train_end, "updates": self.feedback.updates}
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set this rank's state; names, types and shapes have been checked against `state_dict()`."""
        self.feedback.load({name: self.flat(state["per_rank"][name]) for name in self.feedback.buffers()})
        self.feedback.updates = state["replicated"]["updates"]
        self.schedule.train_end = state["replicated"]["train_end"]
        self.forget()

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """`state` of another world size, resharded, with what cannot outlive that as this new aggregator has it."""
        return state

    def named_copies(self, flat: Tensor) -> dict[str, Tensor]:
        """Copies of the parts of a flat vector, by parameter name."""
        return {name: tensor.clone() for name, tensor in self.layout.by_name(flat).items()}

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A new flat vector of its parts by parameter name."""
        flat = torch.empty(self.layout.size, dtype=torch.float32, device=self.feedback.device)
        for name, view in self.layout.by_name(flat).items():
            view.copy_(tensors[name])
        return flat
