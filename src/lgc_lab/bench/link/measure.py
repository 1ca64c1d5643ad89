"""Measures what a step costs on each link, in ranks of their own.

Every rank measures one cell after the other: a scheme in one of its phases on one link. All schemes take turns on a
link, several times over, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise, product
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lgc.phase import Phase
from lgc.rounds.schedule import Schedule
from lgc.schemes import Dense, LGCScheme, LocalSteps, PowerSGD, Scheme, SparseScheme, require_different
from lgc.version import __version__
from lgc_lab.bench.link.results import (
    COMPUTE,
    LOOPBACK,
    RESULTS,
    Cell,
    bits_per_second,
    delay_of,
    link_of,
    step_seconds,
)
from lgc_lab.folder import write_json
from lgc_lab.launch.network import Network, read_counters
from lgc_lab.launch.ranks import preload, start_ranks
from lgc_lab.terminal import notify
from lgc_lab.training.loop import Training
from lgc_lab.training.settings import Settings

START_STEPS = 2
TRAIN_STEPS = 4
SETTLED_STEPS = 2  # compressed ones before anything is measured
ENDLESS = 1_000_000  # epochs
LEARNING_RATE = 1e-4  # so low that no scheme diverges: a round whose gradient is not finite is cut short


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Says what is to be measured."""

    recipe: str  # this and the next three as in `lgc_lab.training.settings.Settings`
    data: str | None
    batch_size: int | None
    world_size: int  # at least 2
    schemes: Sequence[str]  # text forms; lengths of phases are set to a few steps
    rates: Sequence[str]  # of the links, such as "100mbit", "100mbit/20ms" with a delay, or "unshaped"
    steps: int  # at most so many a cell, at least 1
    warm_up: int  # steps of a cell before those that count
    seconds: float  # to stop a cell after; a step that takes longer counts although it is the first
    repeats: int  # of every cell, at least 1; early phases are measured once

    def __post_init__(self) -> None:
        for text in self.rates:
            link_of(text)
        require_different(self.schemes, map(self.scheme, self.schemes))
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must differ, got {','.join(self.rates)}.")

    def scheme(self, text: str) -> Scheme:
        """Read a text form as a run of the recipe does."""
        return self.training(text).resolve_scheme()

    def training(self, text: str) -> Settings:
        """Settings of a run with the scheme of this text form."""
        own = {name: getattr(self, name) for name in ("recipe", "data", "batch_size", "world_size")}
        return Settings(scheme=text, epochs=ENDLESS, **own)


def machine() -> dict[str, Any]:
    """Describe what the parts of one measurement must have in common."""
    return {"cores": os.cpu_count(), "lgc": __version__, "torch": torch.__version__}


def shortened(scheme: Scheme) -> Scheme:
    """Shorten the phases to a few steps: each rate of the warm-up once, an autoencoder that is never refreshed.

    Local steps begin with the phase that lasts.
    """
    if isinstance(scheme, LocalSteps):
        exchange = scheme.exchange
        if isinstance(exchange, SparseScheme):
            exchange = replace(exchange, warmup_steps=0)
        return replace(scheme, start_steps=0, exchange=exchange)
    if isinstance(scheme, PowerSGD):
        return replace(scheme, start_steps=START_STEPS)
    if not isinstance(scheme, SparseScheme):
        return scheme
    short: dict[str, Any] = {"warmup_steps": min(scheme.warmup_steps, len(Schedule(scheme.rate).warmup_rates))}
    if isinstance(scheme, LGCScheme):
        short |= {"dense_steps": min(scheme.dense_steps, START_STEPS)}
        short |= {"train_steps": min(scheme.train_steps, TRAIN_STEPS), "refresh_every": 0, "refresh_below": 0.0}
    return replace(scheme, **short)


def measure_links(
    wanted: Measurement, out: Path, network: Network | None, timeout: timedelta, done: Sequence[Cell]
) -> None:
    """Start the ranks, which write `out`/results.json after every link of the network, or over loopback without one.

    `done` has the cells of links that have been measured before.

    Raises:
        ValueError, OSError: if the data is missing or malformed.
        RankFailedError: if a rank failed; the others have been stopped.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each rank warns that its address has no name
    preload(__name__)
    wanted.training(Dense.name).load_data()  # decodes into the cache that the ranks map
    barrier = multiprocessing.get_context("forkserver").Barrier(wanted.world_size)
    # NCCL would not take the network, but go from GPU to GPU.
    start = partial(start_ranks, world_size=wanted.world_size, timeout=timeout, network=network, backend="gloo")
    start(_measure_cells, wanted, out, network, barrier, list(done))


def _measure_cells(
    wanted: Measurement, out: Path, network: Network | None, barrier: Barrier, cells: list[Cell], device: torch.device
) -> None:
    """Run in every rank of the default process group; rank 0 writes the results."""
    is_first = dist.get_rank() == 0
    tell = notify if is_first else lambda _: None
    arms: dict[str, Arm] = {COMPUTE: ComputeArm(wanted.training(Dense.name), Dense(), device, barrier)}
    for text in wanted.schemes:
        scheme, settings = wanted.scheme(text), wanted.training(text)
        arms[text] = Arm(settings, shortened(scheme), device)
        if isinstance(scheme, LocalSteps) and scheme.start_steps:
            arms[text].start = Arm(settings, scheme.start_exchange, device)
    for text, arm in arms.items():
        tell(f"preparing {text}")
        arm.prepare()
    meter = Meter(wanted, barrier, has_network=network is not None)
    rates = (LOOPBACK,) if network is None else wanted.rates
    measured = {cell.rate for cell in cells}
    for rate in [rate for rate in rates if rate not in measured]:
        with ExitStack() as stack:
            if network is not None and is_first:
                network.shape(bits_per_second(rate))
                stack.enter_context(network.delayed(delay_of(rate)))
            for repeat, (text, arm) in product(range(wanted.repeats), arms.items()):
                for cell in meter.cells(rate, repeat, text, arm):
                    cells.append(cell)
                    step_ms = 1e3 * step_seconds([cell])
                    tell(f"{rate}, {repeat + 1} of {wanted.repeats}, {text}, {cell.phase}: {step_ms:.1f} ms")
        if is_first:
            content = {
                "finished": rate == rates[-1],
                "configuration": asdict(wanted),
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "parameters": arms[COMPUTE].run.handle.parameters,
                "schemes": {text: str(arms[text].run.scheme) for text in wanted.schemes},
                "machine": machine() | {"threads_per_rank": torch.get_num_threads()},
                "cells": [cell._asdict() for cell in cells],
            }
            write_json(out / RESULTS, content)


COUNTED = ("counted_sent", "counted_received")  # by the transport
MOVED = (*COUNTED, "counter_sent", "counter_received", "packets_sent", "packets_received")  # those of the interface


class Samples(NamedTuple):
    """Samples of some steps, by one rank."""

    seconds: Tensor  # as `Arm.sample` gives them: (samples, 3)
    moved: Tensor  # bytes and packets in the order of `MOVED`: (6,), or those of `COUNTED` without a network


class Arm:
    """Scheme at work, in all its phases one after the other.

    Attributes:
        every: steps after which a step is like the first of them: from one round to the next, of all fragments.
        overlaps: whether the last round of these goes on beside the next ones.
        start: what local steps do at first; they themselves begin with the phase that lasts.
    """

    start: Arm | None = None

    def __init__(self, settings: Settings, scheme: Scheme, device: torch.device) -> None:
        self.run = Training(settings, device, scheme=scheme, check_every=0)  # not every first step of a phase
        self.run.recipe = replace(self.run.recipe, learning_rate=LEARNING_RATE)
        self.batches = self.run.batches()
        self.every, self._period, self.overlaps = 1, 1, False
        if isinstance(scheme, LocalSteps):
            self.every, self._period, self.overlaps = scheme.steps_a_round, scheme.period, scheme.overlap

    def sample(self) -> tuple[float, float, float]:
        """Take `every` steps: seconds of one on average, and of it compression and communication, NaN if unknown."""
        started, compression, communication = time.perf_counter(), 0.0, 0.0
        for number in range(1, self.every + 1):
            self.step()
            if number % self._period == 0:
                of_round = self.run.handle.round_time or (math.nan, math.nan)
                compression, communication = compression + of_round[0], communication + of_round[1]
        seconds = time.perf_counter() - started
        return seconds / self.every, compression / self.every, communication / self.every

    def prepare(self) -> None:
        """Go through all phases."""
        if self.start is not None:
            self.start.prepare()
        last = max(first for first, _ in self.phases().values())
        for _ in range(math.ceil((max(last, START_STEPS) + SETTLED_STEPS) / self.every)):
            self.sample()

    def settle(self) -> None:
        """Wait for a round that is under way."""
        if self.overlaps:
            self.run.handle.state_dict()

    def step(self) -> None:
        """Train on a batch; FloatingPointError if the loss is not finite."""
        row = self.run.update(*next(self.batches))
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"{self.run.scheme}: the loss is {row['loss']} after {self.run.step} steps.")

    def phases(self) -> dict[str, tuple[int, int | None]]:
        """Find the first step and the length of every phase; the one that lasts has length None."""
        if self.run.handle.synchronizer is None:
            only = Phase.COMPRESSED if isinstance(self.run.scheme, PowerSGD) else Phase.DENSE
            return {str(only): (0, None)}
        schedule = self.run.handle.synchronizer.aggregator.schedule
        firsts = [0, schedule.dense_end, schedule.warmup_end, schedule.train_end]
        places = zip(firsts, [*(end - first for first, end in pairwise(firsts)), None], strict=True)
        return {str(phase): place for phase, place in zip(Phase, places, strict=True) if place[1] != 0}

    def go_to(self, step: int) -> None:
        """Have the scheme do what it does at this step, with the state it has."""
        if len(self.phases()) > 1 and self.run.handle.step != step:
            self.run.handle.load_state_dict(self.run.handle.state_dict() | {"step": step})


class ComputeArm(Arm):
    """Forward and backward pass and optimizer, without any exchange; a step is over when all ranks are done."""

    def __init__(self, settings: Settings, scheme: Scheme, device: torch.device, barrier: Barrier) -> None:
        super().__init__(settings, scheme, device)
        self.barrier = barrier

    def step(self) -> None:
        with self.run.ddp.no_sync():
            super().step()
        self.barrier.wait()


@dataclass
class Meter:
    """Measures steps of an arm in one rank; all ranks at once."""

    wanted: Measurement
    barrier: Barrier
    has_network: bool

    def cells(self, rate: str, repeat: int, scheme: str, arm: Arm) -> Iterator[Cell]:
        """Yield what all ranks see of every phase in the first turn, and of the lasting one later; a collective."""
        if arm.start is not None and repeat == 0:
            for cell in self.cells(rate, repeat, scheme, arm.start):
                yield cell._replace(phase=Phase.WARMUP) if cell.phase == Phase.COMPRESSED else cell
        for phase, (first, length) in arm.phases().items():
            if repeat == 0 or length is None:
                arm.go_to(first)
                samples = self._samples(arm, length, are_alike=length is None or phase == Phase.DENSE)
                arm.settle()
                seconds, moved = ([torch.empty_like(part) for _ in range(dist.get_world_size())] for part in samples)
                dist.all_gather(seconds, samples.seconds)
                dist.all_gather(moved, samples.moved)
                step, compression, communication = torch.stack(seconds, dim=1).unbind(dim=2)
                parts = (None, None) if compression.isnan().any() else (compression.tolist(), communication.tolist())
                counts = dict(zip(MOVED, torch.stack(moved, dim=1).tolist(), strict=False))
                cell = Cell(rate, repeat, scheme, phase, step.tolist(), *parts, **counts)
                yield cell._replace(every=arm.every)

    def _samples(self, arm: Arm, length: int | None, *, are_alike: bool) -> Samples:
        """Take all steps of a phase, or some of one without end; a single long one is enough if all are alike.

        In place of a step there may be all those to the next round. What goes on beside the next ones takes two.
        """
        probe = self._take(arm, 1)
        slowest = arm.every * probe.seconds[:, 0].max()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        affordable = max(int(self.wanted.seconds / float(slowest)), 1 if arm.overlaps else 0)
        if length == 1 or (are_alike and affordable == 0):
            return probe
        if length is not None:
            rest = self._take(arm, length - 1)
            return Samples(torch.cat([probe.seconds, rest.seconds]), probe.moved + rest.moved)
        warm_up, most = math.ceil(self.wanted.warm_up / arm.every), max(1, self.wanted.steps // arm.every)
        if warm_up > 1:
            self._take(arm, min(warm_up - 1, affordable))
        return self._take(arm, min(most, affordable))

    def _take(self, arm: Arm, count: int) -> Samples:
        self.barrier.wait()  # not a collective: it would be among what the counters count
        before = self._moved(arm)
        rows = [arm.sample() for _ in range(count)]
        self.barrier.wait()  # all have all of this rank's bytes
        return Samples(torch.tensor(rows, dtype=torch.float64), self._moved(arm) - before)

    def _moved(self, arm: Arm) -> Tensor:
        """Bytes and packets so far, as in `Samples`."""
        phases = arm.run.handle.wire.phases.values()
        counted = sum(phase.sent_bytes for phase in phases), sum(phase.received_bytes for phase in phases)
        return torch.tensor([*counted, *(read_counters() if self.has_network else ())])
