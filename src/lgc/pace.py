"""Rounds that are opened by time: when one is due, what each rank has done until then, and how much it counts for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lgc.comm.transport import RankError


class Work(NamedTuple):
    """What a rank has done from one round to the next.

    Attributes:
        steps: of its optimizer, those that a GradScaler has skipped included.
        samples: that it has counted by `Handle.count`; 0 where they are not counted.
    """

    steps: int
    samples: int = 0


class Progress(NamedTuple):
    """What all ranks have done up to the last round, the same on each.

    Attributes:
        steps: of a rank, on average.
        samples: of all ranks together, where they are counted by `Handle.count`.
        work: of every rank in the last round, by rank, where rounds are opened by time; empty before the first one.
    """

    steps: float
    samples: int = 0
    work: tuple[Work, ...] = ()


def weights_of(work: Sequence[Work], member: str) -> list[int]:
    """How much each rank counts for: its samples where these are counted, else its steps; without a step nothing.

    Raises:
        RankError: on every rank, if what a rank says of itself cannot be, or some count samples and others do not.
    """
    for rank, each in enumerate(work):
        if min(each) < 0:
            raise RankError(f"lgc: {member} {rank} says that it has done {each}, and numbers must be at least 0.")
    stepped = [each for each in work if each.steps]
    if not any(each.samples for each in stepped):
        return [each.steps for each in work]
    if not all(each.samples for each in stepped):
        raise RankError(
            "lgc: handle.count(samples) must be called on every rank, before each optimizer.step(), or on none, and "
            f"since the last round the {member}s have counted {[each.samples for each in work]} in "
            f"{[each.steps for each in work]} steps."
        )
    return [each.samples if each.steps else 0 for each in work]


def counted(weights: Sequence[int], finite: Sequence[bool]) -> list[int]:
    """How much each rank counts for in a round in which some may not be finite, which then weigh nothing.

    Where all others weigh nothing too, each counts for as much as the others. One of them must be finite.
    """
    found = [weight * each for weight, each in zip(weights, finite, strict=True)]
    return found if any(found) else list(map(int, finite))


def scale_of(rank: int, weights: Sequence[int]) -> float:
    """What a rank multiplies its movement by before it codes it, K w / (sum of all w).

    The plain mean of what all K ranks send is then the mean weighted by w, whatever the exchange, and so is what a
    rank still owes when its weight is another one.
    """
    return len(weights) * weights[rank] / sum(weights)


class Pace:
    """One rank's clock from round to round, and its account of what the ranks have done in them.

    Args:
        seconds: from the end of a round until the next one is due.

    Attributes:
        samples: that this rank has counted, by `count`, since the others were told.
        samples_of_start: of these, those of the start, which are told before the first round, as they weigh nothing.
        steps_done, samples_done: by the ranks in all rounds; of the steps their mean.
        work: of every rank in the last round.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due = 0.0
        self.samples = self.samples_of_start = 0
        self.steps_done, self.samples_done = 0.0, 0
        self.work: tuple[Work, ...] = ()
        self._samples_of_step = 0  # of the next one
        self._counts: bool | None = None  # whether steps have samples, as the first one says

    def count(self, samples: int) -> None:
        """Count samples of the next step."""
        self.samples += samples
        self._samples_of_step += samples

    def take_step(self, step: int) -> None:
        """Note that a step has been made.

        Raises:
            RuntimeError: if it has samples and those before have none, or the other way round.
        """
        counted, self._samples_of_step = self._samples_of_step > 0, 0
        if self._counts is None:
            self._counts = counted
        if counted != self._counts:
            now, before = ("with", "without") if counted else ("without", "with")
            raise RuntimeError(
                f"lgc: handle.count(samples) must come before every optimizer.step() or before none; step {step} has "
                f"been made {now} it, those before {before} it. Call it first, handle.count(len(x)) and then "
                "optimizer.step(): after a step it would count for the next one, in another round."
            )

    def start(self) -> None:
        """Count the time from now."""
        self._due = time.monotonic() + self._seconds

    def is_due(self) -> bool:
        """Whether it is time for a round."""
        return time.monotonic() >= self._due

    def take(self, work: Sequence[Work], rank: int) -> None:
        """Add what all ranks have told of themselves, this one, `rank`, included."""
        self.samples -= work[rank].samples
        self.steps_done += sum(each.steps for each in work) / len(work)
        self.samples_done += sum(each.samples for each in work)
        if any(each.steps for each in work):
            self.work = tuple(work)

    def state_dict(self) -> dict[str, int | float]:
        """What goes on in another run; the time does not."""
        return {"samples": self.samples, "steps_done": self.steps_done, "samples_done": self.samples_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state; the next round is due in all of its time."""
        self.samples, self.steps_done, self.samples_done = (
            state[name] for name in ("samples", "steps_done", "samples_done")
        )
        self.samples_of_start, self._samples_of_step = self.samples, 0
        self._counts = self.samples + self.samples_done > 0 if self.steps_done else None
        self.start()
