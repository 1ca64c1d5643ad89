"""Which phase a step belongs to, and at which rate it sends."""

from __future__ import annotations

from typing import NamedTuple

from lgc.phase import Phase

WARMUP_START = 0.25
WARMUP_FACTOR = 0.25
FOREVER = 2**62  # steps


class Stage(NamedTuple):
    """What a round is like.

    Attributes:
        step: counted from 0.
        phase: of the step.
        least_rate: of its segments; 0 after the warm-up, when each has its own.
        resting: the places of the flat vector that take no part on this rank.
    """

    step: int
    phase: Phase
    least_rate: float = 0.0
    resting: tuple[slice, ...] = ()


class Schedule:
    """Phases by step: `dense_steps`, then `warmup_steps`, then `train_steps`, then compressed.

    The warm-up takes the rates 25, 6.25, 1.5625, 0.4, ... % that are above the final one, for equally many steps
    each. Source: DGC, section 3.3.
    """

    def __init__(self, rate: float, *, dense_steps: int = 0, warmup_steps: int = 0, train_steps: int = 0) -> None:
        self.dense_end = dense_steps
        self.warmup_end = dense_steps + warmup_steps
        self.train_end = self.warmup_end + train_steps
        self.warmup_rates = []
        warmup_rate = WARMUP_START
        while warmup_rate > rate:
            self.warmup_rates.append(warmup_rate)
            warmup_rate *= WARMUP_FACTOR

    def at(self, step: int) -> Stage:
        """The stage of `step`, counted from 0."""
        if step < self.dense_end:
            return Stage(step, Phase.DENSE)
        if step < self.warmup_end and self.warmup_rates:
            done = (step - self.dense_end) * len(self.warmup_rates) // (self.warmup_end - self.dense_end)
            return Stage(step, Phase.WARMUP, self.warmup_rates[done])
        if step < self.warmup_end:
            return Stage(step, Phase.WARMUP)
        return Stage(step, Phase.TRAIN if step < self.train_end else Phase.COMPRESSED)

    def retrain(self, step: int, steps: int) -> None:
        """Go back to phase train for `steps` steps from `step` on."""
        self.train_end = step + steps
