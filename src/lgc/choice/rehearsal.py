"""Rounds of a scheme with fewer ranks than it is meant for, to see what they cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby, islice
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from torch import Tensor

from lgc.choice.cost import Collective, Kind, Link, SchemeCost, StageCost
from lgc.coding import Recent
from lgc.comm.messages import FromOne, Post, Sum, ToAll, ToEach
from lgc.comm.transport import Transport, clock
from lgc.phase import Phase
from lgc.rounds.schedule import Schedule, Stage
from lgc.schemes import Dense, LGCScheme, LocalSteps, RoundScheme, Scheme, SparseScheme, TopK
from lgc.synchronizer import Policy, Synchronizer

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
PROBE_BYTES = (2**18, 2**26)
PROBE_SECONDS = 0.1
PROBE_MESSAGES = 5
KINDS: dict[type[Post], Kind] = {ToAll: "all-gather", ToEach: "all-to-all", FromOne: "spread", Sum: "sum"}
CONTENT = "rehearsal"  # what the ranks tell each other of their measurements is counted as

Action = Callable[[], object]
Result = TypeVar("Result")


class Rehearsal(Transport):
    """Transport of K ranks of which only some are there: each of them stands in for K / R ranks.

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
        total: Tensor = self._perform("all-reduce", self.local.all_reduce, tensor, content)
        return total * (self.world_size // self.local.world_size)

    def all_gather(self, tensor: Tensor, content: str) -> Tensor:
        return self._for_all(self._perform("all-gather", self.local.all_gather, tensor, content))

    def broadcast(self, tensor: Tensor, content: str, *, source: int) -> Tensor:
        return self._perform("broadcast", self.local.broadcast, tensor, content, source=source)

    def gather(self, tensor: Tensor, content: str) -> Tensor | None:
        rows = self._perform("gather", self.local.gather, tensor, content)
        return None if rows is None else self._for_all(rows)

    def together(self, posts: Sequence[Post]) -> list[list[Tensor]]:
        there, times = self.local.world_size, self.world_size // self.local.world_size
        started = clock(self.local.device)
        found = self.local.together([_among(there, post) for post in posts])
        seconds = clock(self.local.device) - started
        noted = [Collective(KINDS[type(post)], post.size()) for post in posts]
        first, *others = sorted(noted, key=lambda one: one.messages(self.world_size), reverse=True)
        self.collectives += [replace(first, seconds=seconds), *(replace(one, joined=True) for one in others)]
        return [_from_all(times, post, results) for post, results in zip(posts, found, strict=True)]

    def origin(self, rank: int) -> int:
        return rank % self.local.world_size

    def count_all_reduce(self, size: int, content: str) -> None:
        """Note one that torch has performed."""
        self.collectives.append(Collective("all-reduce", size))

    def _for_all(self, rows: Tensor) -> Tensor:
        return rows.repeat(self.world_size // self.local.world_size, *[1] * (rows.dim() - 1))

    def _perform(
        self, kind: Kind, action: Callable[..., Result], tensor: Tensor, content: str, **source: Any
    ) -> Result:
        started = clock(tensor.device)
        result = action(tensor, content, **source)
        self.collectives.append(Collective(kind, tensor.nbytes, clock(tensor.device) - started))
        return result


def _among(there: int, post: Post) -> Post:
    """The same post among so many ranks."""
    match post:
        case ToAll(lengths=lengths):
            return replace(post, lengths=lengths[:there])
        case ToEach(payloads=payloads, lengths=lengths):
            return replace(post, payloads=payloads[:there], lengths=lengths[:there])
    return post


def _from_all(times: int, post: Post, results: list[Tensor]) -> list[Tensor]:
    """Its results as they would be of so many times as many ranks."""
    match post:
        case FromOne():
            return results
        case Sum():
            return [total * times for total in results]
    return results * times


@dataclass(frozen=True)
class Timer:
    """Times what the ranks of `local` do together, on `device`; most of it are collectives.

    A measurement is not repeated any more after `enough` seconds.
    """

    local: Transport
    device: torch.device
    enough: float

    def agree(self, *numbers: float) -> list[list[float]]:
        """Gather the numbers of all ranks, by rank; all pass the same count of them."""
        rows: list[list[float]] = self.local.all_gather(torch.tensor(numbers, dtype=torch.float64), CONTENT).tolist()
        return rows

    def start(self) -> float:
        """Read the clock, once all ranks are here."""
        self.agree(0.0)
        return clock(self.device)

    def elapsed(self, action: Action, times: int = 1) -> float:
        """Seconds of an action, `times` in a row from a common start; the mean over the ranks."""
        started = self.start()
        for _ in range(times):
            action()
        return fmean(row[0] for row in self.agree((clock(self.device) - started) / times))

    def in_a_row(self, seconds: float) -> int:
        """Count the rounds of this length to measure together: one for each rank to lead, if there is time."""
        return self.local.world_size if self.local.world_size * seconds < self.enough else 1

    def repeated(self, measure: Callable[[], tuple[float, Result]]) -> list[Result]:
        """Measure 3 to 15 times, in `enough` seconds if it can be; `measure` gives the seconds and what it found."""
        spent = 0.0
        found: list[Result] = []
        while len(found) < LEAST_ROUNDS or (len(found) < MOST_ROUNDS and spent < self.enough):
            seconds, result = measure()
            spent += seconds
            found.append(result)
        return found


class Rounds:
    """Rounds of a scheme for `world_size` ranks, always with the same gradients, by those ranks that `timer` has.

    The scheme's real aggregator does them, with a residual of its own that is dropped afterwards. Beside every round a
    rank does its `work`, a forward and backward pass and the optimizer's step: ranks that share cores share them in
    both. What is taken off for that is the same under dense, `dense_work`, whose optimizer may have more to do.
    Without `early`, the stages before the last one are left out.
    """

    def __init__(
        self,
        scheme: RoundScheme,
        gradients: Mapping[str, Tensor],
        timer: Timer,
        world_size: int,
        work: Action,
        dense_work: Action,
        *,
        early: bool,
    ) -> None:
        self._name = str(scheme)
        if isinstance(scheme, LGCScheme):  # gradients that are always the same do not tell how good an autoencoder is,
            train_steps = scheme.train_steps if early else 0  # and without training its weights need not be sent
            scheme = replace(scheme, refresh_below=0.0, train_steps=train_steps)
        self._gradients = gradients
        self._means = {name: torch.empty_like(gradient) for name, gradient in gradients.items()}
        self._timer = timer
        self._early = early
        self._work = work
        self._dense_work = dense_work
        self._transport = Rehearsal(timer.local, world_size)
        self._synchronizer = Synchronizer(scheme, gradients, self._transport, Policy(check_every=0))
        if isinstance(scheme, Dense):
            self._synchronizer.aggregator.schedule = Schedule(1.0)  # of one stage
        self._schedule = self._synchronizer.aggregator.schedule
        there = timer.local.world_size
        self._steps = (turn * world_size + leader for turn in count() for leader in range(there))  # who leads is there

    def rehearse(self, limit: float = math.inf) -> SchemeCost | None:
        """Measure what they cost, the same on every rank; a collective of the ranks that are there.

        The last stage is measured several times after two rounds that do not count, each time with as many rounds in
        a row as there are ranks, if there is time, so that each leads once; the early ones are single rounds. If the
        first round of the last stage takes more than `limit` seconds, it is given up: None. Raises FloatingPointError
        on every rank if a gradient is not finite.
        """
        *first, (last, _) = _stages(self._schedule)
        costs = [self._cost(stage, steps, [self._measure(stage)[1]]) for stage, steps in first] if self._early else []
        alone = max(row[0] for row in self._perform(last, 1, lambda: None))
        if alone > limit:  # its end freezes the autoencoder
            return None
        in_a_row = self._timer.in_a_row(self._measure(last)[0])
        found = self._timer.repeated(lambda: self._measure(last, in_a_row))
        return SchemeCost(self._name, [*costs, self._cost(last, None, found)])

    def _measure(self, stage: Stage, in_a_row: int = 1) -> tuple[float, list[float]]:
        """Seconds that it takes to time so many rounds, and those of one: a rank's own, then its collectives'."""
        beside = self._timer.elapsed(self._dense_work, in_a_row)
        ends, *waits = zip(*self._perform(stage, in_a_row, self._work), strict=True)
        end = max(ends) if in_a_row == 1 else fmean(ends)  # in a row, a rank that is late does not hold up the others
        least = [min(of_ranks) for of_ranks in waits]  # the others wait for the last rank as well
        own = (end - sum(least)) / in_a_row - beside
        length = len(least) // in_a_row
        return end + in_a_row * beside, [own, *(fmean(least[place::length]) for place in range(length))]

    def _cost(self, stage: Stage, steps: int | None, measured: Sequence[Sequence[float]]) -> StageCost:
        """Cost of the stage that was measured last, each part for itself the median; sizes are the ranks' mean."""
        own, *waits = (median(part) for part in zip(*measured, strict=True))
        performed = self._transport.collectives[: len(waits)]
        sizes = zip(*self._timer.agree(*(one.size for one in performed)), strict=True)
        collectives = [
            replace(one, size=round(fmean(of_ranks)), seconds=seconds)
            for one, of_ranks, seconds in zip(performed, sizes, waits, strict=True)
        ]
        return StageCost(stage.phase.value, steps, max(0.0, own), collectives)

    def _perform(self, stage: Stage, times: int, work: Action) -> list[list[float]]:
        """Seconds of so many rounds together, and of each of their collectives, by rank."""
        _hold(self._schedule, stage)
        self._transport.collectives = []
        started = self._timer.start()
        for step in islice(self._steps, times):
            work()
            for name, mean in self._synchronizer.synchronize(self._gradients, step).items():
                self._means[name].copy_(mean)  # as it is copied back to DDP's buckets
            self._synchronizer.aggregator.forget()  # gradients that are always the same would be foreseen
        seconds = clock(self._timer.device) - started
        return self._timer.agree(seconds, *(one.seconds for one in self._transport.collectives))


def knows_past(scheme: Scheme) -> bool:
    """Whether its codes know earlier rounds, of which a rehearsal has none: they are counted as in a first round."""
    exchange = scheme.exchange if isinstance(scheme, LocalSteps) else scheme
    if not isinstance(exchange, SparseScheme) or (isinstance(exchange, TopK) and exchange.reduction == "two_stage"):
        return False
    return isinstance(exchange.indices, Recent) or exchange.values.remembers


def probe(transport: Transport, device: torch.device) -> Link:
    """Measure latency and bandwidth between the ranks of a group, by a few all-reduces; a collective of under a second.

    The larger ones double in size until one takes a tenth of a second. The same result on every rank.
    """
    others, world_size = transport.world_size - 1, transport.world_size
    if not others:
        raise ValueError("probe(transport=...) must have at least 2 ranks, got 1.")
    timer = Timer(transport, device, PROBE_SECONDS)

    def seconds(size: int) -> float:
        tensor = torch.zeros(size // 4, device=device)
        started = timer.start()
        transport.all_reduce(tensor, CONTENT)
        return min(row[0] for row in timer.agree(clock(device) - started))

    small = median([seconds(4 * world_size) for _ in range(PROBE_MESSAGES + 1)][1:])
    size, most = PROBE_BYTES
    while (large := seconds(size)) < PROBE_SECONDS and size < most:
        size *= 2
    return Link(2 * others / world_size * size / max(large - small, 1e-9), small / (2 * others))


def _stages(of: Schedule) -> list[tuple[Stage, int | None]]:
    """List the stages of a schedule and how many steps each has, None for the last one."""
    stages: list[tuple[Stage, int | None]] = []
    for _, alike in groupby(map(of.at, range(of.train_end)), lambda stage: stage[1:]):  # but for the step
        first, *others = alike
        stages.append((first, 1 + len(others)))
    return [*stages, (of.at(of.train_end), None)]


def _hold(schedule: Schedule, stage: Stage) -> None:
    """Have every step at this stage."""
    schedule.dense_end = sys.maxsize if stage.phase is Phase.DENSE else 0
    schedule.warmup_end = 0 if stage.phase in (Phase.TRAIN, Phase.COMPRESSED) else sys.maxsize
    schedule.train_end = 0 if stage.phase is Phase.COMPRESSED else sys.maxsize
    schedule.warmup_rates = [stage.least_rate] if stage.least_rate else []
