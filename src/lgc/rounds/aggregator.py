"""The round, whatever the scheme: from every rank's gradient to the mean that all apply."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgc.comm.messages import lockstep
from lgc.comm.replicas import OnDifference, ReplicaError, unusual
from lgc.comm.transport import Opening, Transport
from lgc.rounds.exchange import Exchange, Exchanged
from lgc.rounds.feedback import Feedback, Piece
from lgc.rounds.layout import Layout
from lgc.rounds.past import Learned, Past
from lgc.rounds.schedule import Schedule, Stage

logger = logging.getLogger("lgc")


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
        pasts: what is known of earlier rounds and coded by, by role of the segments.
        on_difference: what is done where the ranks know different things of them: "raise" ReplicaError, or
            "synchronise", which is to forget them, with a warning.
    """

    pasts: Mapping[str, Past] = MappingProxyType({})
    on_difference: OnDifference = "raise"

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
            ReplicaError: on every rank, if they know different things of earlier rounds. No state has changed.
        """
        stage = self.schedule.at(step)._replace(resting=tuple(resting))
        self.metrics.clear()
        self.transport.begin(stage.phase)
        v = self.feedback.accumulate(gradient, stage.resting)  # u = m u + g;  v = v + u
        exchanges = self.exchanges(stage)
        opening, payloads = self._open(v, exchanges, stage)
        if different := unusual(opening.pasts):
            self._forget_different(different, step)
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
        past = reduce(lambda digest, past: past.digest(digest), self.pasts.values(), 0)
        opening = self.transport.open_round(
            stage.step, finite=finite, vote=self.vote(), numbers=lengths, error=error, past=past
        )
        return opening, payloads

    def _forget_different(self, ranks: Sequence[int], step: int) -> None:
        """Forget what these ranks know other things of than most; ReplicaError, if that is not allowed."""
        member = self.transport.member
        message = (
            f"lgc: step {step}: what the {member}s know of earlier rounds, and code by, is not the same on {member} "
            f"{', '.join(map(str, ranks))}"
        )
        if self.on_difference == "raise":
            raise ReplicaError(
                f"{message}. Nothing has been decoded with it, and no state has changed. Go on from a checkpoint; "
                'attach(on_difference="synchronise") has all ranks forget it, with a warning: that costs bytes for a '
                "few rounds, and changes no number."
            )
        if self.transport.rank == 0:
            logger.warning("%s; all forget it.", message)
        self.forget()

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
        return {name: tensor for past in self.pasts.values() for name, tensor in past.replicas().items()}

    def forget(self) -> None:
        """Know nothing of earlier rounds that would only make codes shorter; on all ranks, or on none."""
        for past in self.pasts.values():
            past.forget()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: tensors by parameter name, numbers, strings and bytes.

        In three parts, which say what becomes of it at another world size: `per_rank` (its mean over the ranks stays),
        `replicated` (rank 0's counts, for all) and `server` (rank 0's, empty elsewhere). In `replicated` there is
        `past`, if codes make use of it; it depends on how the model is cut, and its length differs from step to step.
        """
        per_rank = {name: self.named_copies(buffer) for name, buffer in self.feedback.buffers().items()}
        replicated: dict[str, Any] = {"train_end": self.schedule.train_end, "updates": self.feedback.updates}
        if remembering := self._remembering():
            replicated["past"] = {name: past.to_bytes() for name, past in remembering.items()}
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set this rank's state; names, types and shapes have been checked against `state_dict()`.

        Raises:
            ValueError: as `read_pasts`; nothing has been changed then.
        """
        learned = self.read_pasts(state)
        self.feedback.load({name: self.flat(state["per_rank"][name]) for name in self.feedback.buffers()})
        self.feedback.updates = state["replicated"]["updates"]
        self.schedule.train_end = state["replicated"]["train_end"]
        for name, past in self._remembering().items():
            past.load(learned[name])

    def read_pasts(self, state: Mapping[str, Any]) -> dict[str, Learned]:
        """What a state, of the right form, has of earlier rounds; raises ValueError if ranks cannot know that."""
        return {name: past.read(state["replicated"]["past"][name]) for name, past in self._remembering().items()}

    def _remembering(self) -> dict[str, Past]:
        return {name: past for name, past in self.pasts.items() if past.remembers}

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
