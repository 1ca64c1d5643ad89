"""Rounds of a scheme with fewer ranks than it is meant for, to see what they cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from statistics import fmean, median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lgc.choice.cost import Collective, Kind, Link, SchemeCost, StageCost
from lgc.comm.transport import Transport, clock
from lgc.phase import Phase
from lgc.rounds.schedule import Schedule, Stage
from lgc.schemes import Dense, RoundScheme
from lgc.schemes.learned import LGCScheme
from lgc.synchronizer import Policy, Synchronizer

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
LONG_ROUND = 1.0  # seconds; one such exchange of everything is enough
PROBE_BYTES = (2**18, 2**26)
PROBE_SECONDS = 0.1
PROBE_MESSAGES = 5
CONTENT = "rehearsal"  # what the ranks tell each other of their measurements is counted as

Result = TypeVar("Result")


class Rehearsal(Transport):
    """A transport of K ranks of which only some are there: each of them stands in for K / R ranks.

    What they exchange goes through `local`; to the others they have sent the same. So every rank does the work of one
    of K, without the time on the link. Whoever is a source must be there.

    Attributes:
        local: the ranks that are there; their number R divides K.
        collectives: what has been performed, with this rank's own time in it.
    """

    def __init__(self, local: Transport, world_size: int) -> None:
        super().__init__(local.group, local.device)
        if world_size % local.world_size:
            raise ValueError(f"{local.world_size} ranks cannot stand in for {world_size}: it is not a multiple.")
        self.local = local
        self.world_size = world_size
        self.collectives: list[Collective] = []

    def all_reduce(self, tensor: Tensor, content: str) -> Tensor:
        total = self._perform("all-reduce", tensor, lambda: self.local.all_reduce(tensor, content))
        return total * self._copies

    def all_gather(self, tensor: Tensor, content: str) -> Tensor:
        rows = self._perform("all-gather", tensor, lambda: self.local.all_gather(tensor, content))
        return rows.repeat(self._copies, *[1] * tensor.dim())

    def broadcast(self, tensor: Tensor, content: str, *, source: int) -> Tensor:
        return self._perform("broadcast", tensor, lambda: self.local.broadcast(tensor, content, source=source))

    def gather(self, tensor: Tensor, content: str) -> Tensor | None:
        rows = self._perform("gather", tensor, lambda: self.local.gather(tensor, content))
        return None if rows is None else rows.repeat(self._copies, *[1] * tensor.dim())

    def relay(self, tensor: Tensor, content: str, *, source: int) -> Tensor:
        return self._perform("relay", tensor, lambda: self.local.relay(tensor, content, source=source))

    def count_all_reduce(self, size: int, content: str) -> None:
        """Note one that torch has performed."""
        self.collectives.append(Collective("all-reduce", size))

    @property
    def _copies(self) -> int:
        return self.world_size // self.local.world_size

    def _perform(self, kind: Kind, tensor: Tensor, action: Callable[[], Result]) -> Result:
        started = clock(tensor.device)
        result = action()
        size = tensor.numel() * tensor.element_size()
        self.collectives.append(Collective(kind, size, clock(tensor.device) - started))
        return result


def rehearse(
    scheme: RoundScheme,
    gradients: Mapping[str, Tensor],
    local: Transport,
    world_size: int,
    *,
    early: bool,
    work: Callable[[], object],
    dense_work: Callable[[], object],
    enough: float,
    limit: float = math.inf,
) -> SchemeCost | None:
    """Measure what rounds of `scheme` with these gradients cost; a collective of the ranks in `local`.

    The scheme's real aggregator does them, with a residual of its own that is dropped afterwards. The last stage is
    measured several times after two rounds that do not count, each time with as many rounds in a row as there are
    ranks, if there is time, so that each leads once; the early ones are single rounds.

    Args:
        scheme: what to rehearse.
        gradients: this rank's, by parameter name, in the model's order; not changed.
        local: the ranks that are there.
        world_size: how many ranks the rounds are for.
        early: whether to rehearse the stages before the last one too.
        work: what a rank does beside every round, a forward and backward pass and the optimizer's step. Ranks that
            share cores share them in both.
        dense_work: what is taken off for that, the same under dense, whose optimizer may have more to do.
        enough: seconds after which the last one is not repeated any more.
        limit: give up if the first round of the last stage takes longer than this, in seconds.

    Returns:
        The costs, the same on every rank; None if it was given up.

    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    rounds = _Rounds(_rehearsed(scheme, early=early), gradients, Rehearsal(local, world_size), work, dense_work)
    *first, (last, _) = rounds.stages
    costs = [replace(rounds.cost(stage)[1], steps=steps) for stage, steps in first] if early else []
    if rounds.alone(last) > limit:  # its end freezes the autoencoder
        return None
    settling, _ = rounds.cost(last)
    in_a_row = rounds_in_a_row(settling, local, enough)
    found = repeated(lambda: rounds.cost(last, in_a_row), enough)
    return SchemeCost(str(scheme), [*costs, _median(found)])


def _median(costs: Sequence[StageCost]) -> StageCost:
    """Of each part for itself."""
    collectives = [
        replace(of_all[0], seconds=median([one.seconds for one in of_all]))
        for of_all in zip(*(cost.collectives for cost in costs), strict=True)
    ]
    return replace(costs[0], seconds=median([cost.seconds for cost in costs]), collectives=collectives)


class _Rounds:
    """Rounds of a scheme's aggregator, always with the same gradients, and what is done beside them.

    Attributes:
        stages: of the scheme's schedule, and how many steps each has, the last one 0 for no end.
    """

    def __init__(
        self,
        scheme: RoundScheme,
        gradients: Mapping[str, Tensor],
        transport: Rehearsal,
        work: Callable[[], object],
        dense_work: Callable[[], object],
    ) -> None:
        self._gradients = gradients
        self._means = {name: torch.empty_like(gradient) for name, gradient in gradients.items()}
        self._transport = transport
        self._local = transport.local
        self._work = work
        self._dense_work = dense_work
        self._device = next(iter(gradients.values())).device
        self._synchronizer = Synchronizer(scheme, gradients, transport, Policy(check_every=0))
        self._schedule = self._synchronizer.aggregator.schedule
        self.stages = _stages(self._schedule)
        there, meant = self._local.world_size, transport.world_size
        self._steps = (turn * meant + leader for turn in count() for leader in range(there))  # whoever leads is there

    def alone(self, stage: Stage) -> float:
        """Seconds of one round with nothing beside it; a collective."""
        return max(row[0] for row in self._perform(stage, 1, lambda: None))

    def cost(self, stage: Stage, in_a_row: int = 1) -> tuple[float, StageCost]:
        """Seconds that it takes to time so many rounds of a stage, and what one of them costs; a collective."""
        beside = elapsed(self._dense_work, self._local, self._device, in_a_row)
        ends, *waits = zip(*self._perform(stage, in_a_row, self._work), strict=True)
        end = max(ends) if in_a_row == 1 else fmean(ends)  # in a row, a rank that is late does not hold up the others
        least = [min(of_ranks) for of_ranks in waits]  # the others wait for the last rank as well
        own = (end - sum(least)) / in_a_row - beside
        length = len(least) // in_a_row
        collectives = [
            replace(one, seconds=fmean(least[position::length]))
            for position, one in enumerate(self._transport.collectives[:length])
        ]
        return end + in_a_row * beside, StageCost(stage.phase.value, None, max(0.0, own), collectives)

    def _perform(self, stage: Stage, times: int, work: Callable[[], object]) -> list[list[float]]:
        """Seconds of so many rounds together, and of each of their collectives, by rank."""
        _hold(self._schedule, stage)
        self._transport.collectives = []
        started = start_together(self._local, self._device)
        for step in islice(self._steps, times):
            work()
            for name, mean in self._synchronizer.synchronize(self._gradients, step).items():
                self._means[name].copy_(mean)  # as it is copied back to DDP's buckets
        seconds = clock(self._device) - started
        return agree(self._local, [seconds, *(one.seconds for one in self._transport.collectives)])


class Bucket(NamedTuple):
    """A bucket of DDP: how many seconds before the end of the backward pass it is complete, and its tensor's form."""

    lead: float
    elements: int
    dtype: torch.dtype


def rehearse_dense(
    scheme: Dense, gradients: Mapping[str, Tensor], buckets: Sequence[Bucket], visible: float, local: Transport
) -> SchemeCost:
    """Find what all-reduce of every bucket as soon as it is complete costs; a collective of the ranks in `local`.

    Args:
        scheme: dense, or one that converts what it sends.
        gradients: this rank's, by parameter name, in the model's order; not changed.
        buckets: in their order.
        visible: seconds that float32 all-reduce was seen to add to a step.
        local: the ranks that are there.
    """
    seconds = 0.0
    if scheme.dtype is not None:
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        seconds, narrow = _all_reduce_seconds(flat, scheme.dtype, local)
        _, wide = _all_reduce_seconds(flat, flat.dtype, local)
        visible = max(0.0, visible - (wide - narrow))
    sizes = [bucket.elements * (scheme.dtype or bucket.dtype).itemsize for bucket in buckets]
    collectives = [Collective("all-reduce", size, lead=b.lead) for size, b in zip(sizes, buckets, strict=True)]
    collectives[-1] = replace(collectives[-1], seconds=visible)
    return SchemeCost(str(scheme), [StageCost(Phase.DENSE.value, None, seconds, collectives)])


def _all_reduce_seconds(flat: Tensor, dtype: torch.dtype, local: Transport) -> tuple[float, float]:
    """What converting there and back, and what all-reduce takes."""
    rounds: list[tuple[float, float]] = []
    while len(rounds) <= LEAST_ROUNDS and (not rounds or sum(rounds[-1]) < LONG_ROUND):
        started = start_together(local, flat.device)
        converted = flat.to(dtype)
        sending = clock(flat.device)
        total = local.all_reduce(converted, CONTENT)
        received = clock(flat.device)
        flat.copy_(total)
        by_rank = agree(local, [sending - started + clock(flat.device) - received, received - sending])
        rounds.append((max(row[0] for row in by_rank), min(row[1] for row in by_rank)))
    counted = rounds[1:] or rounds
    return median([own for own, _ in counted]), median([wait for _, wait in counted])


def probe(transport: Transport, device: torch.device) -> Link:
    """Measure latency and bandwidth between the ranks of a group, by a few all-reduces; a collective of under a second.

    The larger ones double in size until one takes a tenth of a second. The same result on every rank.
    """
    others, world_size = transport.world_size - 1, transport.world_size
    if not others:
        raise ValueError("probe(transport=...) must have at least 2 ranks, got 1.")

    def seconds(size: int) -> float:
        tensor = torch.zeros(size // 4, device=device)
        started = start_together(transport, device)
        transport.all_reduce(tensor, CONTENT)
        return min(row[0] for row in agree(transport, [clock(device) - started]))

    small = median([seconds(4 * world_size) for _ in range(PROBE_MESSAGES + 1)][1:])
    size, most = PROBE_BYTES
    large = seconds(size)
    while large < PROBE_SECONDS and size < most:
        size *= 2
        large = seconds(size)
    return Link(2 * others / world_size * size / max(large - small, 1e-9), small / (2 * others))


def agree(transport: Transport, numbers: list[float]) -> list[list[float]]:
    """The numbers of all ranks, by rank; all pass the same count of them."""
    rows: list[list[float]] = transport.all_gather(torch.tensor(numbers, dtype=torch.float64), CONTENT).tolist()
    return rows


def start_together(transport: Transport, device: torch.device) -> float:
    """The time, once all ranks are here; a collective."""
    agree(transport, [0.0])
    return clock(device)


def elapsed(action: Callable[[], object], transport: Transport, device: torch.device, times: int = 1) -> float:
    """Seconds of an action, `times` in a row from a common start; the mean over the ranks. A collective."""
    started = start_together(transport, device)
    for _ in range(times):
        action()
    return fmean(row[0] for row in agree(transport, [(clock(device) - started) / times]))


def rounds_in_a_row(seconds: float, local: Transport, enough: float) -> int:
    """How many rounds that take so long to measure together: one for each rank to lead, if there is time."""
    return local.world_size if local.world_size * seconds < enough else 1


def repeated(measure: Callable[[], tuple[float, Result]], enough: float) -> list[Result]:
    """What is measured, 3 to 15 times, within so many seconds if it can be; `measure` also gives the seconds."""
    spent: list[float] = []
    found: list[Result] = []
    while len(spent) < LEAST_ROUNDS or (len(spent) < MOST_ROUNDS and sum(spent) < enough):
        seconds, result = measure()
        spent.append(seconds)
        found.append(result)
    return found


def _rehearsed(scheme: RoundScheme, *, early: bool) -> RoundScheme:
    """The same, whose autoencoder, if it has one, is not judged by gradients that are always the same.

    Without early stages it goes without training too, so that its weights need not be sent.
    """
    if not isinstance(scheme, LGCScheme):
        return scheme
    return replace(scheme, refresh_below=0.0, train_steps=scheme.train_steps if early else 0)


def _stages(of: Schedule) -> list[tuple[Stage, int]]:
    """The stages of a schedule and how many steps each has, the last one 0 for no end."""
    stages: list[tuple[Stage, int]] = []
    for step in range(of.train_end):
        stage = of.at(step)
        if stages and stages[-1][0][1:] == stage[1:]:  # but for the step
            stages[-1] = (stage, stages[-1][1] + 1)
        else:
            stages.append((stage, 1))
    return [*stages, (of.at(of.train_end), 0)]


def _hold(schedule: Schedule, stage: Stage) -> None:
    """Have every step at this stage."""
    schedule.dense_end = sys.maxsize if stage.phase is Phase.DENSE else 0
    schedule.warmup_end = 0 if stage.phase in (Phase.TRAIN, Phase.COMPRESSED) else sys.maxsize
    schedule.train_end = 0 if stage.phase is Phase.COMPRESSED else sys.maxsize
    schedule.warmup_rates = [stage.least_rate] if stage.least_rate else []
