"""Measuring what a model's step costs: the backward pass, DDP's buckets in it, and every scheme's rounds."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgc.choice.cost import Collective, Profile, SchemeCost, StageCost
from lgc.choice.rehearsal import CONTENT, LEAST_ROUNDS, Rehearsal, Rounds, Timer
from lgc.comm.transport import Transport, clock
from lgc.ddp import gradients_in
from lgc.phase import Phase
from lgc.schemes import Dense, LocalSteps, PowerSGD, RoundScheme, Scheme
from lgc.schemes.powersgd import PowerSGDHook, one_bucket_mb

WARMUP_STEPS = 3
LONG_ROUND = 1.0  # seconds; one such exchange of everything is enough
UNSTEADY = 2.0  # the longest step over the shortest


class Job(NamedTuple):
    """Job to be measured: a model and what trains it.

    The learning rate of the optimizer that goes with a scheme is 0, so that the gradients stay those of the start,
    however often they are computed.
    """

    ddp: DistributedDataParallel
    loss: Callable[[], Tensor]  # makes the forward pass; returns the loss of one batch
    make_optimizer: Callable[[Scheme], torch.optim.Optimizer]

    def step(self, scheme: Scheme) -> Callable[[], None]:
        """Make the training step under a scheme, all but the exchange."""
        optimizer = self.make_optimizer(scheme)

        def step() -> None:
            value = self.loss()
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()

        return step


def wrap(module: nn.Module, group: dist.ProcessGroup, **arguments: Any) -> DistributedDataParallel:
    """Make a DDP model that sends nothing but gradients."""
    ddp = DistributedDataParallel(module, process_group=group, **arguments)
    ddp.broadcast_buffers = False  # the constructor's argument has another name since torch 2.13
    return ddp


def stand_in(module: nn.Module, scheme: Scheme) -> torch.optim.SGD:
    """Make an optimizer that changes nothing, with momentum unless the scheme has it."""
    momentum = 0.0 if scheme.corrected_momentum or scheme.makes_adams_step else 0.9
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0, momentum=momentum)


class Bucket(NamedTuple):
    """Bucket of DDP: how many seconds before the end of the backward pass it is complete, and its tensor's form."""

    lead: float
    elements: int
    dtype: torch.dtype


class Profiler:
    """Measures what a step of a job costs: under dense when it is made, then under the schemes that are added.

    Both are collectives of the ranks that are there, `local`; what they measure is for `world_size` ranks, a multiple
    of those, and is not repeated any more after `enough` seconds. `make_job` makes the job with this `bucket_cap_mb` of
    DDP, the same whenever it is called.

    Attributes:
        ddp: the job's model.
        profile: what has been measured so far, the same on every rank.
        buckets: DDP's, in their order.
        unsteady: a warning, if steps that should take equally long did not; else empty.
    """

    def __init__(
        self, make_job: Callable[[int | None], Job], local: Transport, world_size: int, *, enough: float
    ) -> None:
        self.local = local
        self._make_job = make_job
        self._job = make_job(None)
        self.ddp = self._job.ddp
        parameters = dict(self.ddp.module.named_parameters())
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._timer = Timer(local, next(p.device for p in parameters.values() if p.requires_grad), enough)
        self._communicates = False
        self._noted: list[Bucket] = []  # in the last step, with the time in place of the lead
        self._noted_gradients: dict[str, Tensor] = {}  # in the last step that did not communicate
        self._rehearsed: dict[str, SchemeCost] = {}  # rounds, by the scheme's text
        self._step = self._job.step(Dense())
        self.ddp.register_comm_hook(None, self._hook)
        settling = [self._timer.elapsed(self._exchanging_step) for _ in range(WARMUP_STEPS)]
        self._in_a_row = self._timer.in_a_row(settling[-1])
        plain, added = self._compare(self._exchanging_step)
        self._visible = max(0.0, median(added)) if local.world_size > 1 else 0.0
        self._step()
        self._gradients = {
            name: self._noted_gradients[name].clone() for name in parameters if name in self._noted_gradients
        }
        by_rank = self._timer.agree(*(self._noted[-1].lead - bucket.lead for bucket in self._noted))
        leads = [fmean(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
        self.buckets = [bucket._replace(lead=lead) for bucket, lead in zip(self._noted, leads, strict=True)]
        self.profile = Profile(world_size, median(plain), [self._rehearse_dense(Dense())])
        self.unsteady = ""
        if max(plain) > UNSTEADY * min(plain):
            self.unsteady = (
                f"a step took {1e3 * min(plain):.1f} to {1e3 * max(plain):.1f} ms: something else runs on this "
                "machine, or there are more threads (OMP_NUM_THREADS) than cores."
            )

    def add(self, scheme: Scheme, *, early: bool, limit: float = math.inf) -> bool:
        """Measure a scheme too, with the stages before the last one of its schedule if `early`.

        Returns:
            False if it was given up, as its first round of the last stage took more than `limit` seconds a step.
        """
        arm: SchemeCost | None
        if isinstance(scheme, Dense):
            arm = self._rehearse_dense(scheme)
        elif isinstance(scheme, PowerSGD):
            arm = self._rehearse_power_sgd(scheme)
        elif isinstance(scheme, LocalSteps):
            arm = self._rehearse_local_steps(scheme, early=early, limit=limit)
        else:
            assert isinstance(scheme, RoundScheme)
            arm = self._rehearse_rounds(scheme, early=early, limit=limit)
        if arm is not None:
            self.profile.arms.append(arm)
        return arm is not None

    def _rehearse_dense(self, scheme: Dense) -> SchemeCost:
        """Derive it from what float32 all-reduce of each bucket, once it is complete, was seen to add to a step."""
        seconds, visible = 0.0, self._visible
        if scheme.dtype is not None:
            flat = torch.cat([gradient.flatten() for gradient in self._gradients.values()])
            seconds, narrow = self._all_reduce_seconds(flat, scheme.dtype)
            _, wide = self._all_reduce_seconds(flat, flat.dtype)
            visible = max(0.0, visible - (wide - narrow))
        collectives = [
            Collective("all-reduce", bucket.elements * (scheme.dtype or bucket.dtype).itemsize, lead=bucket.lead)
            for bucket in self.buckets
        ]
        collectives[-1] = replace(collectives[-1], seconds=visible)
        return SchemeCost(str(scheme), [StageCost(Phase.DENSE.value, None, seconds, collectives)])

    def _all_reduce_seconds(self, flat: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        """Time converting there and back, and all-reduce."""
        rounds: list[tuple[float, float]] = []
        while len(rounds) <= LEAST_ROUNDS and (not rounds or sum(rounds[-1]) < LONG_ROUND):
            started = self._timer.start()
            converted = flat.to(dtype)
            sending = clock(flat.device)
            total = self.local.all_reduce(converted, CONTENT)
            received = clock(flat.device)
            flat.copy_(total)
            by_rank = self._timer.agree(sending - started + clock(flat.device) - received, received - sending)
            rounds.append((max(row[0] for row in by_rank), min(row[1] for row in by_rank)))
        own, waits = zip(*(rounds[1:] or rounds), strict=True)
        return median(own), median(waits)

    def _rehearse_rounds(self, scheme: RoundScheme, *, early: bool, limit: float = math.inf) -> SchemeCost | None:
        """Measure a scheme's rounds, only once: local steps may have the same ones, at several intervals."""
        arm = self._rehearsed.get(str(scheme))
        if arm is None:
            world_size, work = self.profile.world_size, self._job.step(scheme)
            rounds = Rounds(scheme, self._gradients, self._timer, world_size, work, self._step, early=early)
            arm = rounds.rehearse(limit)
        if arm is not None:
            self._rehearsed[str(scheme)] = arm
        return arm

    def _rehearse_local_steps(self, scheme: LocalSteps, *, early: bool, limit: float) -> SchemeCost | None:
        """Derive it from the rounds of its exchange, and of its start."""
        arm = self._rehearse_rounds(scheme.exchange, early=early, limit=limit * scheme.steps_a_round)
        if arm is None:
            return None
        stages = [_spread(stage, scheme, self.profile.compute) for stage in arm.stages]
        if early and scheme.start_steps:
            start = self._rehearse_rounds(scheme.start_exchange, early=False)
            assert start is not None  # without a limit
            phase = Phase.DENSE if isinstance(scheme.start_exchange, Dense) else Phase.WARMUP
            stages.insert(0, replace(start.stages[-1], phase=phase.value, steps=scheme.start_steps))
        return SchemeCost(str(scheme), stages)

    def _rehearse_power_sgd(self, scheme: PowerSGD) -> SchemeCost:
        """Measure torch's hook, on a model of its own."""
        job = self._make_job(one_bucket_mb(self.ddp))
        transport = Rehearsal(self.local, self.profile.world_size)
        hook = PowerSGDHook(PowerSGD(rank=scheme.rank, start_steps=2), transport)
        job.ddp.register_comm_hook(None, lambda _, bucket: hook.reduce(bucket))
        step = job.step(scheme)
        for _ in range(WARMUP_STEPS):
            step()
        _, added = self._compare(step)
        values, factors = transport.collectives[0].size, transport.collectives[-1].size
        sizes = (factors, 0, 0)  # three collectives: P, Q, and what is not worth factors
        collectives = [Collective("all-reduce", size) for size in sizes]
        start = StageCost(Phase.DENSE.value, scheme.start_steps, 0.0, [Collective("all-reduce", values)])
        last = StageCost(Phase.COMPRESSED.value, None, max(0.0, median(added)), collectives)
        return SchemeCost(str(scheme), [start, last])

    def _compare(self, step: Callable[[], None]) -> tuple[list[float], list[float]]:
        """Seconds of steps that communicate nothing, and how much longer this one takes, each time it is measured."""

        def compare() -> tuple[float, tuple[float, float]]:
            alone = self._timer.elapsed(self._step, self._in_a_row)
            added = self._timer.elapsed(step, self._in_a_row) - alone
            return self._in_a_row * alone, (alone, added)

        found = self._timer.repeated(compare)
        return [alone for alone, _ in found], [added for _, added in found]

    def _exchanging_step(self) -> None:
        self._communicates = self.local.world_size > 1
        self._step()
        self._communicates = False

    def _hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Note that a bucket is complete, and its gradients, and exchange it or not; DDP calls it."""
        buffer, device = bucket.buffer(), self._timer.device
        if bucket.index() == 0:
            self._noted = []
        self._noted.append(Bucket(clock(device), buffer.numel(), buffer.dtype))
        if self._communicates:
            return self.local.all_reduce_async(buffer.mul_(1 / self.local.world_size), "values")
        for parameter, gradient in gradients_in(bucket):
            self._noted_gradients[self._names[id(parameter)]] = gradient
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device] if device.type == "cuda" else [])
        future.set_result(buffer)
        return future


def _spread(stage: StageCost, scheme: LocalSteps, compute: float) -> StageCost:
    """Spread a round of everything over the steps that local steps make from one to the next, in fragments if any.

    A roll call, which is another opening, precedes each of them. Beside the next steps, which take `compute` seconds
    each, only the link is busy: what a round computes takes the processor from them.
    """
    lead = scheme.period * compute if scheme.overlap else 0.0
    opening, *others = (replace(one, lead=lead) for one in stage.collectives)
    parts = [
        replace(one, size=math.ceil(one.size / scheme.fragments), seconds=one.seconds / scheme.fragments)
        for one in others
    ]
    steps = None if stage.steps is None else stage.steps * scheme.steps_a_round
    seconds = stage.seconds / scheme.fragments
    return StageCost(stage.phase, steps, seconds, [opening, opening, *parts], every=scheme.period)
