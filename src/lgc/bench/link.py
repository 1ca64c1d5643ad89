"""What a step costs under every scheme on links of several speeds: time, bytes, and time to a target.

`lgc bench link` starts ranks in a `temporary_network`; every rank runs `_measure`, which measures one cell after the
other: a scheme in one of its phases on one link. All schemes take turns on a link, several times over, so that what
else the machine does hits them alike. docs/links.md has the conventions.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import torch
import torch.distributed as dist
from torch import Tensor

from lgc import options
from lgc.aggregators import Aggregator
from lgc.launch import RankFailedError, preload, start_ranks
from lgc.network import HEADER_BYTES, Counters, Network, NetworkError, read_counters, temporary_network
from lgc.recipes import RECIPES
from lgc.report import LineRate, Run, find_runs
from lgc.run_folder import OtherRunError, require_same, write_json
from lgc.schedule import Phase, Schedule
from lgc.schemes import Auto, Dense, LGCScheme, PowerSGD, Scheme, SparseScheme, parse_scheme, require_different
from lgc.train import Settings, Training, notify
from lgc.transport import SERVER
from lgc.version import __version__

RESULTS = "results.json"
PICTURE = "link.svg"
UNSHAPED = "unshaped"
LOOPBACK = "loopback"
COMPUTE = "compute"  # the arm that exchanges nothing
SCHEMES = "dense,bf16,powersgd:rank=1,powersgd:rank=2,powersgd:rank=4,dgc,scalecom,lgc-ring,lgc-ps"
START_STEPS = 2
TRAIN_STEPS = 4
SETTLED_STEPS = 2  # compressed ones before anything is measured
ENDLESS = 1_000_000  # epochs
LEARNING_RATE = 1e-4  # so low that no scheme diverges: a round whose gradient is not finite is cut short


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured.

    Args:
        recipe, data, batch_size: see `lgc.train.Settings`.
        world_size: number of ranks, at least 2.
        schemes: text forms; lengths of phases are set to a few steps.
        rates: of the links, as `LineRate.parse` reads them, or "unshaped".
        steps: at most so many a cell, at least 1.
        warm_up: steps of a cell before those that count.
        seconds: stop a cell after about so long; a step that takes longer counts although it is the first.
        repeats: how often every cell is measured, at least 1; early phases are measured once.
    """

    recipe: str
    data: str | None
    batch_size: int | None
    world_size: int
    schemes: tuple[str, ...]
    rates: tuple[str, ...]
    steps: int
    warm_up: int
    seconds: float
    repeats: int

    def __post_init__(self) -> None:
        for text in self.rates:
            if text != UNSHAPED:
                LineRate.parse(text)
        for text in self.schemes:
            if isinstance(self.scheme(text), Auto):
                raise ValueError("schemes must not have auto: it chooses once, on the first link that it sees.")
        require_different(self.schemes, map(self.scheme, self.schemes))
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must differ, got {','.join(self.rates)}.")

    def scheme(self, text: str) -> Scheme:
        """As a run of the recipe has it."""
        return self.training(text).resolve_scheme()

    def training(self, text: str) -> Settings:
        """Settings of a run with the scheme of this text form."""
        return Settings(
            recipe=self.recipe,
            scheme=text,
            world_size=self.world_size,
            batch_size=self.batch_size,
            data=self.data,
            epochs=ENDLESS,
        )

    def configuration(self) -> dict[str, Any]:
        """What must be equal for two measurements to be the same one, as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def shortened(scheme: Scheme) -> Scheme:
    """The same with phases of a few steps: each rate of the warm-up once, an autoencoder that is never refreshed."""
    if isinstance(scheme, PowerSGD):
        return replace(scheme, start_steps=START_STEPS)
    if not isinstance(scheme, SparseScheme):
        return scheme
    short: dict[str, Any] = {"warmup_steps": min(scheme.warmup_steps, len(Schedule(scheme.rate).warmup_rates))}
    if isinstance(scheme, LGCScheme):
        short |= {"dense_steps": min(scheme.dense_steps, START_STEPS)}
        short |= {"train_steps": min(scheme.train_steps, TRAIN_STEPS), "refresh_every": 0, "refresh_below": 0.0}
    return replace(scheme, **short)


def full_text(scheme: Scheme) -> str:
    """The scheme with all its arguments, so that no recipe's default takes the place of one."""
    return ":".join([scheme.name, *(f"{name}={text}" for name, text in scheme.arguments().items() if name != "roles")])


class Cell(NamedTuple):
    """Samples of one scheme in one phase on one link; what is a list of lists is by step and rank, in seconds.

    `compression` and `communication` are None where the exchange goes on amid the backward pass. Bytes are by rank, of
    all these steps together: `counted_*` by the transport, `counter_*` by the interface with headers, `packets_*` that
    these were in; None without a network.
    """

    rate: str
    repeat: int
    scheme: str
    phase: str
    seconds: list[list[float]]
    compression: list[list[float]] | None
    communication: list[list[float]] | None
    counted_sent: list[int]
    counted_received: list[int]
    counter_sent: list[int] | None
    counter_received: list[int] | None
    packets_sent: list[int] | None
    packets_received: list[int] | None


class Samples(NamedTuple):
    """What one rank saw of some steps.

    Attributes:
        seconds: of a step, its compression and its communication, shape (steps, 3).
        moved: bytes sent and received by the transport's count, bytes and packets by the interface's, shape (6,).
    """

    seconds: Tensor
    moved: Tensor


class Arm:
    """A scheme at work, in all its phases one after the other."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.run = Training(settings, device)
        self.run.recipe = replace(self.run.recipe, learning_rate=LEARNING_RATE)
        self.run.handle.policy = replace(self.run.handle.policy, check_every=0)  # not every first step of a phase
        self.batches = self.run.batches()

    def step(self) -> None:
        """One update.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        row = self.run.update(*next(self.batches))
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"{self.run.scheme}: the loss is {row['loss']} after {self.run.step} steps.")

    def seconds(self) -> tuple[float, float]:
        """Compression and communication of the last step; NaN where they cannot be told."""
        return self.run.handle.round_time or (float("nan"), float("nan"))

    def count(self) -> tuple[int, int]:
        """Bytes that this rank has sent and received so far, by the transport."""
        phases = self.run.handle.wire.phases.values()
        return (sum(phase.sent_bytes for phase in phases), sum(phase.received_bytes for phase in phases))

    def phases(self) -> dict[str, tuple[int, int | None]]:
        """First step and length of every phase; of the one that lasts, the length is None."""
        if self.run.handle.aggregator is None:
            first = Phase.COMPRESSED if isinstance(self.run.scheme, PowerSGD) else Phase.DENSE
            return {str(first): (0, None)}
        schedule = self.run.handle.aggregator.schedule
        ends = {Phase.DENSE: schedule.dense_end, Phase.WARMUP: schedule.warmup_end, Phase.TRAIN: schedule.train_end}
        found: dict[str, tuple[int, int | None]] = {}
        first_step = 0
        for phase, end in ends.items():
            if end > first_step:
                found[str(phase)] = (first_step, end - first_step)
            first_step = end
        return found | {str(Phase.COMPRESSED): (first_step, None)}

    def go_to(self, step: int) -> None:
        """Have the scheme do what it does at this step, with the state it has."""
        aggregator: Aggregator | None = self.run.handle.aggregator
        if aggregator is not None and self.run.handle.step != step:
            self.run.handle.load_state_dict(self.run.handle.state_dict() | {"step": step})

    def prepare(self) -> None:
        """Go through all phases once."""
        last = max(first for first, _ in self.phases().values())
        for _ in range(max(last, START_STEPS) + SETTLED_STEPS):
            self.step()


class ComputeArm(Arm):
    """Forward and backward pass and optimizer, without any exchange; a step is over when all ranks are done."""

    def __init__(self, settings: Settings, device: torch.device, barrier: Barrier) -> None:
        super().__init__(settings, device)
        self.barrier = barrier

    def step(self) -> None:
        with self.run.ddp.no_sync():
            super().step()
        self.barrier.wait()


def _measure(plan: Plan, folder: Path, network: Network | None, barrier: Barrier, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the results."""
    rank = dist.get_rank()
    arms: dict[str, Arm] = {COMPUTE: ComputeArm(plan.training("dense"), device, barrier)}
    for text in plan.schemes:
        arms[text] = Arm(plan.training(full_text(shortened(plan.scheme(text)))), device)
    for text, arm in arms.items():
        _say(f"preparing {text}")
        arm.prepare()
    meter = Meter(plan, barrier, has_network=network is not None)
    cells: list[Cell] = []
    rates = (LOOPBACK,) if network is None else plan.rates
    for rate in rates:
        if network is not None and rank == 0:
            network.shape(_bits_per_second(rate))
        for repeat in range(plan.repeats):
            for text, arm in arms.items():
                for phase, samples in meter.phases(arm, early=repeat == 0):
                    cells.append(meter.cell(rate, repeat, text, phase, samples))
                    step_ms = 1e3 * _step(cells[-1:])
                    _say(f"{rate}, {repeat + 1} of {plan.repeats}, {text}, {phase}: {step_ms:.1f} ms")
        if rank == 0:
            _write(folder, plan, arms, cells, finished=rate == rates[-1])


def _bits_per_second(rate: str) -> float | None:
    return None if rate in (UNSHAPED, LOOPBACK) else LineRate.parse(rate).bits_per_second


class Meter:
    """Measures steps of an arm in one rank; all ranks at once."""

    def __init__(self, plan: Plan, barrier: Barrier, *, has_network: bool) -> None:
        self.plan = plan
        self.barrier = barrier
        self.has_network = has_network

    def phases(self, arm: Arm, *, early: bool) -> Iterator[tuple[str, Samples]]:
        """Samples of every phase, or of the lasting one alone."""
        for phase, (first, length) in arm.phases().items():
            if length is None:
                arm.go_to(first)
                yield phase, self._lasting(arm)
            elif early:
                arm.go_to(first)
                yield phase, self._whole(arm, length, may_stop=phase == Phase.DENSE)

    def _whole(self, arm: Arm, length: int, *, may_stop: bool) -> Samples:
        """All steps of a phase; one step is enough of one that is always the same, if it takes that long."""
        probe = self._steps(arm, 1)
        if length == 1 or (may_stop and self._slowest(probe) > self.plan.seconds):
            return probe
        rest = self._steps(arm, length - 1)
        return Samples(torch.cat([probe.seconds, rest.seconds]), probe.moved + rest.moved)

    def _lasting(self, arm: Arm) -> Samples:
        probe = self._steps(arm, 1)
        affordable = int(self.plan.seconds / self._slowest(probe))
        if affordable == 0:
            return probe
        if self.plan.warm_up > 1:
            self._steps(arm, min(self.plan.warm_up - 1, affordable))
        return self._steps(arm, min(self.plan.steps, affordable))

    def _steps(self, arm: Arm, count: int) -> Samples:
        rows = []
        self.barrier.wait()  # not a collective: it would be among what the counters count
        before, counted_before = self._counters(), arm.count()
        started = time.perf_counter()
        for _ in range(count):
            arm.step()
            now = time.perf_counter()
            rows.append((now - started, *arm.seconds()))
            started = now
        self.barrier.wait()  # all have all of this rank's bytes
        after, counted_after = self._counters(), arm.count()
        moved = [end - start for start, end in zip((*counted_before, *before), (*counted_after, *after), strict=True)]
        return Samples(torch.tensor(rows, dtype=torch.float64), torch.tensor(moved, dtype=torch.int64))

    def cell(self, rate: str, repeat: int, scheme: str, phase: str, samples: Samples) -> Cell:
        """What all ranks saw; a collective."""
        seconds, moved = ([torch.empty_like(part) for _ in range(dist.get_world_size())] for part in samples)
        dist.all_gather(seconds, samples.seconds)
        dist.all_gather(moved, samples.moved)
        step, compression, communication = torch.stack(seconds, dim=1).unbind(dim=2)
        is_split = not bool(compression.isnan().any())
        sent, received, *of_interface = torch.stack(moved, dim=1).tolist()
        return Cell(
            rate,
            repeat,
            scheme,
            phase,
            step.tolist(),
            compression.tolist() if is_split else None,
            communication.tolist() if is_split else None,
            sent,
            received,
            *(of_interface if self.has_network else [None] * len(of_interface)),
        )

    def _counters(self) -> Counters:
        return read_counters() if self.has_network else Counters(0, 0, 0, 0)

    def _slowest(self, samples: Samples) -> float:
        slowest = samples.seconds[:, 0].max()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)


def _write(folder: Path, plan: Plan, arms: Mapping[str, Arm], cells: list[Cell], *, finished: bool) -> None:
    content = {
        "finished": finished,
        "configuration": plan.configuration(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": arms[COMPUTE].run.handle.parameters,
        "schemes": {text: str(arm.run.scheme) for text, arm in arms.items() if text != COMPUTE},
        "machine": {
            "cores": os.cpu_count(),
            "threads_per_rank": torch.get_num_threads(),
            "lgc": __version__,
            "torch": torch.__version__,
        },
        "cells": [cell._asdict() for cell in cells],
    }
    write_json(folder / RESULTS, content)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        notify(text)


class Split(NamedTuple):
    """Seconds of a step and what they went into.

    The step is the median over all steps, on average over the ranks. It is not that of the slowest rank of each step:
    another one is late every time, but in the end all take equally long. Compression and communication are those of
    the rank that waits least in a step. While the autoencoder is trained, all are of the rank that does it. Where the
    exchange goes on amid the backward pass, `compression` is None and `communication` has both: the step less what it
    takes without any exchange.
    """

    step: float
    compute: float
    compression: float | None
    communication: float


class Row(NamedTuple):
    """One scheme in one phase on one link.

    `spread` is half of the range over the repeats. Bytes are those that all ranks together have sent, a step:
    `counted` by the transport, `headers` and `payload` by the interfaces, None without a network.
    """

    rate: str
    scheme: str
    phase: str
    split: Split
    spread: float
    counted: float
    headers: float | None
    payload: float | None


class Results:
    """A finished measurement."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.configuration: dict[str, Any] = content["configuration"]
        self.content = content
        cells = [Cell(**cell) for cell in content["cells"]]
        grouped: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in cells:
            grouped.setdefault((cell.rate, cell.scheme, cell.phase), []).append(cell)
        self.compute = {rate: _step(group) for (rate, scheme, _), group in grouped.items() if scheme == COMPUTE}
        self.rows = [self._row(group) for (_, scheme, _), group in grouped.items() if scheme != COMPUTE]

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read a folder.

        Raises:
            ValueError: if there is no finished measurement.
        """
        path = folder / RESULTS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not content["finished"]:
                raise ValueError("it was interrupted")
            return cls(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a finished measurement: {error!r}.") from None

    @property
    def rates(self) -> list[str]:
        """Of the links, in the order they were measured."""
        return list(dict.fromkeys(row.rate for row in self.rows))

    @property
    def schemes(self) -> list[str]:
        """As they were asked for."""
        return list(dict.fromkeys(row.scheme for row in self.rows))

    def lasting(self, rate: str, scheme: str) -> Row:
        """Of the phase that a long run spends its time in, which is a scheme's last."""
        return [row for row in self.rows if (row.rate, row.scheme) == (rate, scheme)][-1]

    def _row(self, cells: list[Cell]) -> Row:
        rate = cells[0].rate
        of_turns = [_step([cell]) for cell in cells]
        steps = sum(len(cell.seconds) for cell in cells)
        counted = sum(sum(cell.counted_sent) for cell in cells) / steps
        headers = payload = None
        if all(cell.counter_sent and cell.packets_sent for cell in cells):
            headers = HEADER_BYTES * sum(sum(cell.packets_sent or []) for cell in cells) / steps
            payload = sum(sum(cell.counter_sent or []) for cell in cells) / steps - headers
        return Row(
            rate,
            cells[0].scheme,
            cells[0].phase,
            _split(cells, self.compute[rate]),
            (max(of_turns) - min(of_turns)) / 2,
            counted,
            headers,
            payload,
        )

    def text(self) -> str:
        """All rows as an aligned table, a block a link."""
        blocks = []
        unlimited = {(row.scheme, row.phase): row.split.step for row in self.rows if row.rate == UNSHAPED}
        for rate in self.rates:
            rows = [row for row in self.rows if row.rate == rate]
            dense = next((row.split.step for row in rows if row.scheme == Dense.name), None)
            lines = [_cells(row, dense, unlimited.get((row.scheme, row.phase))) for row in rows]
            blocks.append(f"{rate}, compute alone {self.compute[rate] * 1e3:.1f} ms\n{aligned([COLUMNS, *lines])}")
        settings = self.configuration
        machine = self.content["machine"]
        title = (
            f"{settings['recipe']}, {self.content['parameters']:,} parameters, {settings['world_size']} ranks on "
            f"{machine['cores']} cores, {settings['repeats']} repeats"
        )
        return "\n\n".join([title, *blocks])


COLUMNS = [
    "scheme",
    "phase",
    "step, ms",
    "±",
    "compute",
    "compression",
    "communication",
    "link",
    "against dense",
    "kB a step",
    "headers",
    "counters",
]


def _cells(row: Row, dense: float | None, unlimited: float | None) -> list[str]:
    split = row.split
    compression = "-" if split.compression is None else f"{split.compression * 1e3:.1f}"
    of_interface = ["-", "-"]
    if row.headers is not None and row.payload is not None and row.counted:
        difference = 100 * (row.payload / row.counted - 1)
        of_interface = [f"{100 * row.headers / row.counted:+.1f} %", f"{difference:+.1f} %"]
    return [
        row.scheme,
        row.phase,
        f"{split.step * 1e3:.1f}",
        f"{row.spread * 1e3:.1f}",
        f"{split.compute * 1e3:.1f}",
        compression,
        f"{split.communication * 1e3:.1f}",
        "-" if unlimited is None else f"{(split.step - unlimited) * 1e3:.1f}",
        "-" if dense is None else f"{dense / split.step:.2f}x",
        f"{row.counted / 1e3:,.1f}",
        *of_interface,
    ]


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text; the first column to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)


def _split(cells: Sequence[Cell], compute: float) -> Split:
    """Of one scheme in one phase, from all turns; `compute` is that of steps without any exchange."""
    step = _step(cells)
    if cells[0].communication is None:
        return Split(step, min(compute, step), None, max(0.0, step - compute))
    waits, own = _by_step(cells, "communication"), _by_step(cells, "compression")
    last = [min(_ranks(cells), key=wait.__getitem__) for wait in waits]
    communication = _typical(cells, [wait[rank] for wait, rank in zip(waits, last, strict=True)])
    compression = _typical(cells, [work[rank] for work, rank in zip(own, last, strict=True)])
    return Split(step, max(0.0, step - compression - communication), compression, communication)


def _step(cells: Sequence[Cell]) -> float:
    by_rank = [_typical(cells, of_rank) for of_rank in zip(*_by_step(cells, "seconds"), strict=True)]
    return statistics.mean(by_rank[rank] for rank in _ranks(cells))


def _ranks(cells: Sequence[Cell]) -> Sequence[int]:
    """The ranks that count: one alone trains the autoencoder, and after a few steps all run at its pace."""
    return [SERVER] if cells[0].phase == Phase.TRAIN else range(len(cells[0].seconds[0]))


def _typical(cells: Sequence[Cell], of_steps: Sequence[float]) -> float:
    """The median; of the warm-up, whose rates differ, the mean."""
    return (statistics.mean if cells[0].phase == Phase.WARMUP else statistics.median)(of_steps)


def _by_step(cells: Sequence[Cell], quantity: Literal["seconds", "compression", "communication"]) -> list[list[float]]:
    """By step of all turns and rank; without the last step of training, the only one that sends the autoencoder."""
    found: list[list[float]] = []
    for cell in cells:
        steps = getattr(cell, quantity)
        found += steps[:-1] if cell.phase == Phase.TRAIN and len(steps) > 1 else steps
    return found


class TimeToTarget(NamedTuple):
    """Seconds until a run's evaluation first reached the target, on one link; None where it never did."""

    rate: str
    scheme: str
    steps: float | None
    seconds: float | None


def times_to_target(results: Results, runs: Sequence[Run], target: float) -> list[TimeToTarget]:
    """Steps of finished training runs until the target, each at the time of its phase; the mean over seeds.

    What a run learns does not depend on the link, so a run is trained once, anywhere, and its steps are weighed by what
    was measured on each link. Evaluations are left out. Where one seed never gets there, there is no time.

    Raises:
        ValueError: if a scheme has no run with the settings of the measurement, or several that differ in more than
            their seeds.
    """
    times = []
    for scheme in results.schemes:
        found = _runs_of(runs, results, scheme)
        if not found:
            raise ValueError(f"no finished run of {results.content['schemes'][scheme]} is among those of --runs.")
        phases = [_phases_to_target(run, target) for run in found]
        for rate in results.rates:
            if any(counts is None for counts in phases):
                times.append(TimeToTarget(rate, scheme, None, None))
                continue
            reached = [counts for counts in phases if counts is not None]
            steps = statistics.mean(sum(counts.values()) for counts in reached)
            seconds = statistics.mean(
                sum(number * _step_of_phase(results, rate, scheme, phase) for phase, number in counts.items())
                for counts in reached
            )
            times.append(TimeToTarget(rate, scheme, steps, seconds))
    return times


def _runs_of(runs: Sequence[Run], results: Results, scheme: str) -> list[Run]:
    """Those of the measured model with a scheme, one of each seed.

    Raises:
        ValueError: if they differ in more than their seeds.
    """
    found = [run for run in runs if _is_run_of(run, results, scheme)]
    for run in found[1:]:
        for field in found[0].conditions | run.conditions:
            here, there = found[0].conditions.get(field), run.conditions.get(field)
            if here != there:
                raise ValueError(
                    f"--runs has runs of {scheme} with different settings, {found[0].folder} ({field}: {here!r}) and "
                    f"{run.folder} ({there!r}): name a folder with one of them."
                )
    return list({run.configuration["seed"]: run for run in reversed(found)}.values())


def _is_run_of(run: Run, results: Results, scheme: str) -> bool:
    here, there = results.configuration, run.configuration
    recipe = RECIPES[here["recipe"]]
    same = all(there[name] == here[name] for name in ("recipe", "world_size"))
    batch_size = here["batch_size"] or recipe.batch_size
    wanted = str(parse_scheme(scheme, recipe.scheme_defaults))
    return same and there["batch_size"] == batch_size and there["scheme"] == wanted


def _phases_to_target(run: Run, target: float) -> dict[str, int] | None:
    """Steps by phase until the target was first reached."""
    counts: dict[str, int] = {}
    for row in run.rows:
        if "phase" in row:
            counts[row["phase"]] = counts.get(row["phase"], 0) + 1
        value = row.get(run.metric)
        if value is not None and (value >= target if run.better == "higher" else value <= target):
            return counts
    return None


def _step_of_phase(results: Results, rate: str, scheme: str, phase: str) -> float:
    """Seconds; an uncompressed start that was not measured takes what plain DDP takes."""
    for name in (scheme, Dense.name):
        for row in results.rows:
            if (row.rate, row.scheme, row.phase) == (rate, name, phase):
                return row.split.step
    raise ValueError(f"{scheme} was not measured in phase {phase}; add dense to --schemes.")


def format_times(results: Results, times: Sequence[TimeToTarget], target: float) -> str:
    """Steps and seconds to the target as an aligned table, a column a link."""
    lines = []
    for scheme in results.schemes:
        of_scheme = [each for each in times if each.scheme == scheme]
        steps = of_scheme[0].steps
        seconds = ["-" if each.seconds is None else f"{each.seconds:,.1f}" for each in of_scheme]
        lines.append([scheme, "never" if steps is None else f"{steps:.0f}", *seconds])
    header = [f"seconds to {target:g}", "steps", *results.rates]
    return aligned([header, *lines])


def write_picture(results: Results, times: Sequence[TimeToTarget], target: float | None, path: Path) -> None:
    """Time a step, and to the target if there is one, against the speed of the link, as SVG."""
    from lgc.figures import Panel, draw_against_links  # here, because most commands need no matplotlib

    speeds = [_bits_per_second(rate) for rate in results.rates]
    panels = [
        Panel(
            "ms a step",
            {
                scheme: [results.lasting(rate, scheme).split.step * 1e3 for rate in results.rates]
                for scheme in results.schemes
            },
        )
    ]
    if times:
        by_scheme = {scheme: [each.seconds for each in times if each.scheme == scheme] for scheme in results.schemes}
        panels.append(Panel(f"seconds to {target:g}", by_scheme))
    name = f"{results.configuration['recipe']} links"
    path.write_text(draw_against_links(name, speeds, panels), encoding="utf-8")


@contextmanager
def _network(world_size: int, loopback: bool) -> Iterator[Network | None]:
    """A network, or None and a note where there is to be or can be none."""
    with ExitStack() as stack:
        network = None
        if not loopback:
            try:
                network = stack.enter_context(temporary_network(world_size))
            except NetworkError as error:
                notify(f"NOTE: shaped links need root, Linux and iproute2. {error}")
        if network is None:
            notify("NOTE: the link is NOT SHAPED: all ranks talk over loopback, and --rates is ignored.")
        yield network


def measure(plan: Plan, folder: Path, network: Network | None, timeout: timedelta) -> None:
    """Start the ranks, which write `folder`/results.json.

    Raises:
        ValueError, OSError: if the data is missing or malformed.
        RankFailedError: if a rank failed; the others have been stopped.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each rank warns that its address has no name
    preload("lgc.bench.link")
    plan.training("dense").load_data()  # decodes into the cache that the ranks map
    barrier = multiprocessing.get_context("forkserver").Barrier(plan.world_size)
    start_ranks(  # NCCL would not take the network, but go from GPU to GPU
        _measure,
        plan,
        folder,
        network,
        barrier,
        world_size=plan.world_size,
        timeout=timeout,
        network=network,
        backend="gloo",
    )


def _is_measured(folder: Path, plan: Plan, *, loopback: bool) -> bool:
    """Whether the folder has this measurement, finished, and of the same kind of link.

    Raises:
        OtherRunError: if it has another one.
    """
    try:
        results = Results.load(folder)
    except ValueError:
        return False
    require_same(results.configuration, plan.configuration(), f"{folder} has a measurement")
    over_loopback = results.rates == [LOOPBACK]
    if over_loopback and os.geteuid() != 0:  # who has to do without a network
        return True
    if over_loopback != loopback:
        kinds = ("of shaped links", "over loopback")
        raise OtherRunError(
            f"{folder} has a measurement {kinds[not loopback]}, this one would be {kinds[loopback]}: choose another "
            "--out, --loopback or --overwrite."
        )
    return True


@click.command()
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="digits", show_default=True, help="What to train.")
@options.data
@options.batch_size
@click.option("--workers", "world_size", type=click.IntRange(2), default=4, show_default=True, help="Number of ranks.")
@click.option("--schemes", default=SCHEMES, show_default=True, help="As for lgc compare.")
@click.option(
    "--rates", default="10mbit,100mbit,1gbit,unshaped", show_default=True, help="Of the links, in both directions."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Measured at a time, at most.")
@click.option("--warm-up", type=click.IntRange(1), default=2, show_default=True, help="Steps before these.")
@click.option(
    "--seconds", type=click.FloatRange(0.001), default=5.0, show_default=True, help="Measured at a time, at most."
)
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Times that all schemes take turns."
)
@click.option("--loopback", is_flag=True, help="No network of its own, and no root: the link is not shaped.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds that a rank waits for another.",
)
@click.option("--target", type=float, help="Value of the recipe's metric to reach; needs --runs.")
@click.option(
    "--runs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of lgc compare with a finished run of every scheme.",
)
@options.out
@click.option("--overwrite", is_flag=True, help="Measure again what is there already.")
def link(
    target: float | None, runs: Path | None, loopback: bool, timeout: float, out: Path, overwrite: bool, **run: Any
) -> None:
    """Measure what a step costs on slow links.

    \b
    lgc bench link --recipe digits --workers 4 --rates 10mbit,100mbit --out runs/link
    lgc compare --recipe digits --workers 4 --schemes dense,dgc --out runs/digits
    lgc bench link ... --out runs/link --runs runs/digits --target 98

    Needs root: every rank gets a network namespace of its own, joined by a bridge to the others, and its link is
    limited in both directions. They are removed at the end; nothing else of the machine's network is touched. Without
    root, or with --loopback, the ranks talk over loopback, which is not limited.

    OUT gets results.json with all samples, and link.svg. What has been measured is not measured again. With --target,
    the steps that the training runs in --runs needed are weighed by the time they take on each link.
    """
    options.refuse_torchrun("bench link")
    if (target is None) != (runs is None):
        raise click.UsageError("--target and --runs go together.")
    run["schemes"], run["rates"] = (tuple(run[name].split(",")) for name in ("schemes", "rates"))
    try:
        plan = Plan(**run)
        if overwrite or not _is_measured(out, plan, loopback=loopback):
            with _network(plan.world_size, loopback) as network:
                measure(plan, out, network, timedelta(seconds=timeout))
        results = Results.load(out)
        click.echo(results.text())
        times: list[TimeToTarget] = []
        if runs is not None and target is not None:
            times = times_to_target(results, find_runs([runs]), target)
            click.echo(f"\n{format_times(results, times, target)}")
        write_picture(results, times, target, out / PICTURE)
    except RankFailedError as error:
        click.echo(error.details, err=True)
        raise click.ClickException(str(error)) from None
    except OtherRunError as error:
        raise click.UsageError(str(error)) from None
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"\n{out / PICTURE}")
