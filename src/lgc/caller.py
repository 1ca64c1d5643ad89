"""What a training loop drives: one caller of rounds for each way of exchanging."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lgc.pace import Progress
from lgc.phase import Phase
from lgc.synchronizer import Synchronizer, require_same_form


class RoundTime(NamedTuple):
    """Seconds of this rank in one round, from the last gradient to the mean.

    `communication` is that in collectives, waiting for other ranks included; `compression` is the rest.
    """

    compression: float
    communication: float


class Detached:
    """Stands in a copy of a model for what is attached to the original, and says so when it is used."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"lgc: this is part of a copy of a model, to which nothing is attached; use the original's handle for "
            f"{name}, or attach a scheme to the copy."
        )


class Caller:
    """The part of an attached scheme that a training loop drives, and that makes its rounds.

    Attributes:
        step: number of steps done: synchronised backward passes, or the optimizer's steps under local steps.
        phase: of the last step; before the first one, of the first.
        synchronizer: makes the rounds; None where DDP's buckets are reduced one by one.
        round_time: of the last round; None where DDP's buckets are reduced one by one, amid the backward pass.
    """

    step = 0
    phase = Phase.DENSE
    synchronizer: Synchronizer | None = None
    round_time: RoundTime | None = None

    def __reduce__(self) -> tuple[type[Detached], tuple[()]]:
        return Detached, ()

    @property
    def progress(self) -> Progress:
        """What all ranks have done; where they count their steps, as many as this one."""
        return Progress(self.step)

    def count(self, samples: int) -> None:
        """Count samples; RuntimeError where nothing is weighted by them."""
        raise RuntimeError(
            "lgc: handle.count() is for rounds that are opened by time, LocalSteps(every=lgc.Seconds(...)); in all "
            "others every rank counts for as much."
        )

    def anchored(self) -> AbstractContextManager[None]:
        """Have in the model for a while what all ranks share; where every step is exchanged it is there anyway."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Exchange what this rank has moved since the last round; nothing, where every step is exchanged."""

    def use_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Go on with other optimizers; nothing, where none is looked at."""

    def detach(self) -> None:
        """Have the same on all ranks, and remove every hook but DDP's own, which stays; a collective."""

    def settle(self) -> None:
        """Wait for what is exchanged meanwhile, and count its bytes; nothing, where steps wait for their exchange."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state in three parts, see `Aggregator.state_dict`; empty where there is none."""
        return self.synchronizer.state_dict() if self.synchronizer else {}

    def require_form(self, state: Any, *, resharded: bool) -> None:
        """Raise ValueError if a state has another form than this one's, where that is looked at before it is loaded."""

    def whole(self, state: Any) -> Any:
        """A state with whole tensors where it has this rank's part of them; as it is, where every rank has all."""
        return state

    def part(self, state: Any) -> Any:
        """A state as this rank has it, of one with whole tensors."""
        return state

    def load_state_dict(self, state: Any, step: int, *, resharded: bool) -> None:
        """Go on from a state before `step`, after `require_form`; see `Synchronizer.load_state_dict`."""
        if self.synchronizer:
            self.synchronizer.load_state_dict(state, step, resharded=resharded)
        else:
            require_same_form({}, state, "aggregator")
