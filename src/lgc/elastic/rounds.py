"""Local steps of ranks that come and go."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lgc.caller import RoundTime
from lgc.checkpoint.state import from_bytes, to_bytes
from lgc.comm.replicas import digest
from lgc.comm.transport import RankError, clock
from lgc.elastic.lighthouse import NoQuorumError
from lgc.elastic.sampler import Sampler
from lgc.elastic.transport import ElasticTransport, LostError
from lgc.fragments import Fragment
from lgc.local_state import Result
from lgc.local_steps import LocalRounds
from lgc.requirements import frozen
from lgc.schemes import LocalSteps
from lgc.sites import Site
from lgc.synchronizer import Policy, require_same_form

logger = logging.getLogger("lgc")

REMEMBERED = 256  # processes of which it is known which round last counted them


class Stateful(Protocol):
    """Something that a newcomer must have like all others: a schedule, a place in the data."""

    def state_dict(self) -> dict[str, Any]:
        """What it is, of tensors, numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Be that."""


class Attempt(NamedTuple):
    """A round that this rank has come to the end of, with payload and all.

    Attributes:
        number: of the round.
        whole: what this rank owes if nobody has counted it, shape (N,).
        rest: what it owes if the others have, shape (N,); None once this rank has too, and owes its residual.
    """

    number: int
    whole: Tensor
    rest: Tensor | None


class ElasticRounds(LocalRounds):
    """Makes a round whenever one is due, with the ranks that are there, until they all have its result.

    A rank's first round is after its first step, whatever `every` is: then it has the others' state, and is in its loop
    where they are in theirs.

    Args:
        model: not in DDP.
        scheme: how often, and how.
        transport: between the ranks.
        optimizers: whose steps are counted.
        grad_scaler: whose skipped steps are counted too.
        carried: what else a newcomer must have like all others, by name.
        attempts: at a round, before this rank gives up; half as many for a newcomer, so that one whom the others cannot
            reach leaves before they do.
    """

    _transport: ElasticTransport

    def __init__(
        self,
        model: nn.Module,
        scheme: LocalSteps,
        transport: ElasticTransport,
        optimizers: Sequence[Optimizer],
        grad_scaler: torch.amp.GradScaler | None,
        carried: Mapping[str, Stateful],
        attempts: int,
    ) -> None:
        super().__init__(model, scheme, Site(), transport, Policy(check_every=0), optimizers, grad_scaler)
        self._carried = dict(carried)
        self._samplers = [each for each in carried.values() if isinstance(each, Sampler)]
        self._attempts = attempts
        self._attempt: Attempt | None = None
        self._joined = False
        self._counted: dict[str, int] = {}  # by process, the last round that its payload is in
        self.shared_state()  # raises TypeError now, and not when the first newcomer comes

    @property
    def rounds(self) -> int:
        """Number of rounds that the run has made."""
        return self._fragment.rounds

    _number = rounds

    @property
    def _fragment(self) -> Fragment:
        return self._fragments[0]

    def _next_round(self) -> tuple[Fragment, bool]:
        return self._fragment, not self._joined or self.step - self._last_round >= self._scheme.period

    def _combine_buffers(self) -> None:
        """Nothing: the first round does it."""

    def _round(self, fragment: Fragment) -> None:
        started, communicated = clock(self._transport.device), self._transport.seconds
        self._try_until_done(closing=False)
        communication = self._transport.seconds - communicated
        self.round_time = RoundTime(clock(self._transport.device) - started - communication, communication)

    def _try_until_done(self, *, closing: bool) -> None:
        weights = self._fragment.part().items()
        if bad := [name for name, own in weights if not bool(own.isfinite().all())]:
            self._transport.leave()
            raise FloatingPointError(
                f"lgc: step {self.step}: {bad[0]} is not finite on this rank (parameters like it: {len(bad)}), which "
                "leaves the others. They go on; start it again, and it takes their state."
            )
        attempts = self._attempts if self._joined else -(-self._attempts // 2)
        try:
            failures, done = 0, False
            while not done:
                try:
                    done, failures = self._try(closing=closing), 0
                except LostError as error:
                    failures += 1
                    self._transport.disconnect()
                    logger.warning("round %d is tried again: %s", self._fragment.rounds, error)
                    if failures == attempts:
                        raise RankError(
                            f"lgc: round {self._fragment.rounds} has failed {failures} times in sequence, the last "
                            f"time so: {error} Nothing of it has changed."
                        ) from error
        except Exception:
            self._transport.leave()
            raise

    def _try(self, *, closing: bool) -> bool:
        """Make a round, and say if this is what was to be done. A rank that is closing has nothing to add."""
        transport, fragment = self._transport, self._fragment
        told: dict[str, Any] = {"digest": self._digest(), "closing": closing, "step": self.step}
        told |= {"steps": self.step - self._last_round, "drawn": [each.drawn for each in self._samplers]}
        begun = transport.begin_round(fragment.rounds, told, self.shared_state, self.heal)
        for each in begun.ranks:
            if len(each.told["drawn"]) != len(self._samplers):
                raise LostError(
                    f"lgc: rank {each.name} tells of {len(each.told['drawn'])} samplers, and there are "
                    f"{len(self._samplers)}."
                )
        if self._joined and transport.rank in begun.behind:
            logger.warning(
                "the others are at round %d, which they have come to without this rank; it counts again from the next "
                "one on. Where it had only taken longer for its steps than they, give the lighthouse a "
                "--join_timeout_ms that is longer than %d steps take.",
                fragment.rounds,
                self._scheme.period,
            )
        if all(each.told["closing"] for each in begun.ranks):
            return not begun.behind
        if any(begun.counts):
            self._make(fragment, counts=begun.counts[transport.rank])
        else:
            transport.commit()  # of ranks that have all been healed by one that was lost then
        self._joined = True
        self.step = fragment.step = self._last_round = max(
            each.told["step"] for rank, each in enumerate(begun.ranks) if rank not in begun.behind
        )
        counted = [each for each, counts in zip(begun.ranks, begun.counts, strict=True) if counts]
        for number, sampler in enumerate(self._samplers):
            drawn = [each.told["drawn"][number] for each in counted]
            sampler.divide(drawn, rank=transport.rank, world_size=transport.world_size)
        names = [each.name for each in counted]
        before = [item for item in self._counted.items() if item[0] not in names]
        self._counted = dict([*before, *((name, fragment.rounds - 1) for name in names)][-REMEMBERED:])
        return not closing

    def _make(self, fragment: Fragment, *, counts: bool) -> None:
        """Exchange, and apply what comes of it; whatever keeps it from being committed leaves all as it was."""
        feedback = fragment.synchronizer.aggregator.feedback
        number, step, last_round = fragment.rounds, fragment.step, self._last_round
        before, updates = {name: each.clone() for name, each in feedback.buffers().items()}, feedback.updates
        whole = self._owed_with(feedback.residual)
        if not counts:  # what it owes waits for a round in which it counts
            feedback.residual.zero_()
        fragment.synchronizer.aggregator.forget()  # no rank knows the past of all that may have come
        committed = False
        try:
            self._launch(fragment, wait=True)
            if counts:
                self._attempt = Attempt(number, whole, feedback.residual.clone())
            self._transport.commit()
            committed = True
        finally:
            if not committed:
                fragment.rounds, fragment.step, self._last_round, self._launched = number, step, last_round, None
            if not committed or not counts:
                feedback.load(before)
                feedback.updates = updates
        if counts:
            self._attempt = Attempt(number, whole, None)
        self._complete()

    def _owed_with(self, owed: Tensor) -> Tensor:
        """What this rank owes with what it has moved since the last round, shape (N,)."""
        feedback = self._fragment.synchronizer.aggregator.feedback
        return torch.add(
            self._fragment.synchronizer.aggregator.flat(self._fragment.moved()), owed, alpha=feedback.decay
        )

    def _exchange(
        self, fragment: Fragment, distance: dict[str, Tensor], buffers: dict[str, Tensor], **given: Any
    ) -> Result:
        given |= {"finite": given["steps"] > 0, "steps": max(given["steps"], 1)}
        result = super()._exchange(fragment, distance, buffers, **given)
        return result._replace(finite=True)

    def _report_nonfinite(self, finite: list[bool], step: int) -> None:
        """Nothing: what is not finite does not come so far."""

    def shared_state(self) -> bytes:
        """What a rank needs to go on from where this one is: what all have alike, and this one's inner optimizer."""
        state = {
            "alike": self._alike(),
            "rounds": self._fragment.rounds,
            "step": self.step,
            "counted": self._counted,
            "optimizers": [each.state_dict() for each in self._optimizers],
            "carried": {name: each.state_dict() for name, each in self._carried.items()},
        }
        return to_bytes(state)[0]

    def _alike(self) -> dict[str, dict[str, Tensor]]:
        fragment = self._fragment
        return {
            "anchor": fragment.anchor,
            "momentum": fragment.momentum,
            "buffers": self._buffers.shared,
            "frozen": frozen(self._module),
        }

    @torch.no_grad()
    def heal(self, data: bytes) -> None:
        """Go on from where another rank is; what of this one's work has not been counted is owed from now on."""
        fragment, alike = self._fragment, self._alike()
        feedback = fragment.synchronizer.aggregator.feedback
        try:
            state = from_bytes(data)
            for part, here in (("alike", alike), ("rounds", fragment.rounds), ("step", self.step)):
                require_same_form(here, state[part], part)
            counted = {str(name): int(number) for name, number in state["counted"].items()}
            owed = self._owed_after(counted.get(self._transport.lighthouse.name))
            for optimizer, each in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(each)
            for name, carried in self._carried.items():
                carried.load_state_dict(state["carried"][name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RankError(f"lgc: the state that another rank has sent does not fit this one: {error}") from error
        for part, tensors in alike.items():
            for name, tensor in tensors.items():
                tensor.copy_(state["alike"][part][name])
        feedback.load({name: owed if name == "residual" else each for name, each in feedback.buffers().items()})
        for own, value in zip(self._buffers.current().values(), self._buffers.shared.values(), strict=True):
            own.copy_(value)
        self._site.fill(fragment.parameters, fragment.anchor)
        self.step = fragment.step = self._last_round = state["step"]
        fragment.rounds, self._counted, self._attempt = state["rounds"], counted, None

    def _owed_after(self, counted: int | None) -> Tensor:
        """What this rank owes once it has the others' anchor, shape (N,).

        Args:
            counted: the last round that the others have counted this rank in.
        """
        residual = self._fragment.synchronizer.aggregator.feedback.residual
        if not self._joined:
            return torch.zeros_like(residual)
        last = self._attempt
        if last is not None and last.rest is not None:  # the work since the last round is in it
            return last.rest if counted == last.number else last.whole
        return self._owed_with(residual if last is None or counted == last.number else last.whole)

    def finish(self) -> None:
        """Exchange what has been moved since the last round, and see that every rank that is there has the result."""
        self._require_own_weights("handle.finish()")
        if self.step > self._last_round:
            self._try_until_done(closing=False)
        try:
            self._try_until_done(closing=True)
        except NoQuorumError as error:
            logger.warning("this rank has made its last round, and could not see that the others have: %s", error)

    def _digest(self) -> str:
        """Of everything that all ranks have alike after a round."""
        digests = torch.stack(
            [digest(each).cpu() for part in self._alike().values() for each in part.values()]
        ).tolist()
        return hashlib.sha256(str(digests).encode()).hexdigest()[:16]
