"""Cost of a step on a link: t = compute + compression + the collectives that the backward pass does not hide.

Where a round is made every H steps, a step has an H-th of the last two.

A collective takes (messages in sequence) * latency + (bytes in sequence) / bandwidth, as `Collective` counts them, but
never less than it took where it was measured. Every rank has a link of its own, the same in both directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from lgc.comm.messages import DIRECT_RANKS

PAYLOAD = 1448 / (1514 + 66 / 2)  # of an Ethernet frame with IPv4 and TCP, and an acknowledgement for every other one
RATE_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
TOLERANCE = 0.05  # below that, a difference between two predicted steps may be chance

Kind = Literal["all-reduce", "all-gather", "broadcast", "gather", "all-to-all", "spread", "sum"]


@dataclass(frozen=True)
class Link:
    """Link that joins the ranks.

    Args:
        bandwidth: payload bytes per second each way, above 0.
        latency: seconds that a message takes on top, at least 0.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name, bound in (("bandwidth", "a number above 0"), ("latency", "a number of at least 0")):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (value > 0 or (value == 0 and name == "latency")):
                raise ValueError(f"Link({name}=...) must be {bound}, got {value!r}; Link.parse reads text.")

    @classmethod
    def parse(cls, bandwidth: str, latency: str = "0ms") -> Self:
        """Read a link from its line rate (kbit, mbit, gbit per second) and latency (us, ms, s): "100mbit", "1ms".

        6.4 % of the line rate go to headers and acknowledgements of TCP/IP and Ethernet.

        Raises:
            ValueError: if one is not that.
        """
        seconds = _quantity("latency", latency, TIME_UNITS, "1ms")
        return cls(parse_rate("bandwidth", bandwidth) / 8 * PAYLOAD, seconds)

    def __str__(self) -> str:
        return f"{self.bandwidth * 8e-6:.3g} Mbit/s of payload, {self.latency * 1e3:.3g} ms"


@dataclass(frozen=True)
class Collective:
    """Collective of a round."""

    kind: Kind
    size: int  # bytes of one rank's buffer
    seconds: float = 0.0  # what it took between the ranks that measured it, from the arrival of the last one on
    lead: float = 0.0  # how many seconds before the end of the backward pass it can start
    joined: bool = False  # whether it travels in the messages of the one before

    def sent_bytes(self, world_size: int) -> float:
        """Bytes that a rank sends of it, on average over the ranks and over the possible sources."""
        return self._counts(world_size)[2] * self.size

    def messages(self, world_size: int) -> float:
        """Messages of it that wait for each other, on average over the possible sources."""
        return 0 if self.joined else self._counts(world_size)[0]

    def time(self, link: Link, world_size: int) -> float:
        """Seconds from the arrival of the last rank on."""
        copies = self._counts(world_size)[1]
        return max(self.seconds, self.messages(world_size) * link.latency + copies * self.size / link.bandwidth)

    def _counts(self, world_size: int) -> tuple[float, float, float]:
        """Count messages in sequence, buffers in sequence, and how often a rank sends its buffer on average."""
        others = world_size - 1
        share = others / world_size
        depth = math.ceil(math.log2(world_size))
        return {
            "all-reduce": (2 * others, 2 * share, 2 * share),  # ring
            "all-gather": (min(others, 1), others, others),  # direct, to each the same
            "broadcast": (depth, depth, share),  # binomial tree
            "gather": (min(others, 1), others, share),  # direct, into one rank's link
            "all-to-all": (min(others, 1), share, share),  # direct, to each its part
            "spread": (min(others, 1), others, share)
            if world_size <= DIRECT_RANKS
            else (2, 2 * share, share),  # FromOne
            "sum": (2 * min(others, 1), 2 * share, 2 * share),  # direct, of each a part, and its sum to all
        }[self.kind]


@dataclass(frozen=True)
class StageCost:
    """Steps of one scheme that cost the same."""

    phase: str
    steps: int | None  # None for those that go on to the end
    seconds: float  # of a rank's own work in a round, on top of the forward and backward pass
    collectives: list[Collective]  # of a round, in their order
    every: int = 1  # steps from one round to the next

    @property
    def compression(self) -> float:
        """Seconds per step of a rank's own work."""
        return self.seconds / self.every

    def communication(self, link: Link, world_size: int) -> float:
        """Seconds per step for which a rank waits for the link, after its backward pass."""
        end = -math.inf
        for collective in self.collectives:
            end = max(end, -collective.lead) + collective.time(link, world_size)
        return max(0.0, end) / self.every

    def sent_bytes(self, world_size: int) -> float:
        """Bytes that a rank sends per step, on average."""
        return sum(collective.sent_bytes(world_size) for collective in self.collectives) / self.every


@dataclass(frozen=True)
class SchemeCost:
    """Scheme, as text, and its stages; the last one goes on to the end."""

    scheme: str
    stages: list[StageCost]


@dataclass(frozen=True)
class Profile:
    """Profile of what has been measured."""

    world_size: int  # K, the number of ranks that the arms are for
    compute: float  # seconds of a step that communicates nothing
    arms: list[SchemeCost]  # the first is dense


class Early(NamedTuple):
    """Stage before the last one: what a step of it takes."""

    phase: str
    steps: int
    step: float


class Prediction(NamedTuple):
    """Prediction of a step under one scheme on one link, once its early stages are over; seconds and bytes."""

    scheme: str
    sent_bytes: float
    compute: float
    compression: float
    communication: float
    step: float
    speedup: float  # how many times as fast as dense
    early: list[Early]
    pays_from: int | None  # the first step from which on the run as a whole is ahead of dense, None if it never is


def predict(profile: Profile, link: Link) -> list[Prediction]:
    """Predict what a step takes on `link`, by arm."""

    def step(stage: StageCost) -> float:
        return profile.compute + stage.compression + stage.communication(link, profile.world_size)

    def predicted(arm: SchemeCost) -> Prediction:
        *first, last = arm.stages
        early = [Early(stage.phase, stage.steps or 0, step(stage)) for stage in first]
        return Prediction(
            scheme=arm.scheme,
            sent_bytes=last.sent_bytes(profile.world_size),
            compute=profile.compute,
            compression=last.compression,
            communication=last.communication(link, profile.world_size),
            step=step(last),
            speedup=dense / step(last),
            early=early,
            pays_from=_pays_from(early, step(last), dense),
        )

    dense = step(profile.arms[0].stages[-1])
    return [predicted(arm) for arm in profile.arms]


def as_fast(predictions: Sequence[Prediction], tolerance: float = TOLERANCE) -> list[Prediction]:
    """List those that take no more than `tolerance` longer than the fastest, in their order."""
    fastest = min(prediction.step for prediction in predictions)
    return [prediction for prediction in predictions if prediction.step <= fastest * (1 + tolerance)]


def _pays_from(early: list[Early], step: float, dense: float) -> int | None:
    if step >= dense:
        return None
    done, lost, caught_up = 0, 0.0, 0
    for steps, pace in [*((stage.steps, stage.step) for stage in early), (0, step)]:
        if lost > 0 and pace < dense:
            caught_up = done + math.ceil(lost / (dense - pace))
        done += steps
        lost += steps * (pace - dense)
    return caught_up


def parse_rate(name: str, text: str) -> float:
    """Read bits per second, above 0, from a number with kbit, mbit or gbit; ValueError names the argument `name`."""
    rate = _quantity(name, text, RATE_UNITS, "100mbit")
    if rate == 0:
        raise ValueError(f"{name} must be above 0, got {text!r}.")
    return rate


def _quantity(name: str, text: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text.lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{name} must be a number with {', '.join(units)}, as in {example}, got {text!r}.")
    return float(match[1]) * units[match[2]]
