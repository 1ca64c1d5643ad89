"""What a model's step costs: the backward pass, DDP's buckets in it, and every scheme's rounds."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgc.choice.cost import Collective, Profile, SchemeCost, StageCost
from lgc.choice.rehearsal import (
    Bucket,
    Rehearsal,
    agree,
    elapsed,
    rehearse,
    rehearse_dense,
    repeated,
    rounds_in_a_row,
)
from lgc.comm.transport import Transport, clock
from lgc.phase import Phase
from lgc.schemes import Dense, PowerSGD, RoundScheme, Scheme
from lgc.schemes.powersgd import PowerSGDHook, one_bucket_mb

WARMUP_STEPS = 3
UNSTEADY = 2.0  # the longest step over the shortest
FACTOR_COLLECTIVES = 3  # of a PowerSGD round: P, Q, and what is not worth factors


class Job(NamedTuple):
    """What is trained.

    Attributes:
        ddp: the model.
        loss: makes the forward pass; returns the loss of one batch.
        make_optimizer: makes the one that goes with a scheme, with a learning rate of 0, so that the gradients stay
            those of the start, however often they are computed.
    """

    ddp: DistributedDataParallel
    loss: Callable[[], Tensor]
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


class Profiler:
    """Measures what a step of a job costs: under dense when it is made, then under the schemes that are added.

    Both are collectives of the ranks that are there.

    Args:
        make_job: makes the job, with this as DDP's `bucket_cap_mb`, the same whenever it is called.
        local: the ranks that are there.
        world_size: how many ranks it is for, a multiple of those.
        enough: seconds after which a measurement is not repeated any more.

    Attributes:
        profile: what has been measured so far, the same on every rank.
        gradients: this rank's, by parameter name, in the model's order.
        buckets: DDP's, in their order.
        unsteady: a warning, if steps that should take equally long did not; else empty.
    """

    def __init__(
        self, make_job: Callable[[int | None], Job], local: Transport, world_size: int, *, enough: float
    ) -> None:
        self._make_job = make_job
        self._local = local
        self._enough = enough
        self._job = make_job(None)
        model = self._job.ddp.module
        self._device = next(p.device for p in model.parameters() if p.requires_grad)
        self._step = self._job.step(Dense())
        watch = _Watch(model, local, self._device)
        self._job.ddp.register_comm_hook(None, watch.hook)

        def exchanging_step() -> None:
            watch.communicate = True
            self._step()
            watch.communicate = False

        exchanges = local.world_size > 1
        settling = [self._elapsed(exchanging_step if exchanges else self._step) for _ in range(WARMUP_STEPS)]
        self._in_a_row = rounds_in_a_row(settling[-1], local, enough)

        def compare() -> tuple[float, tuple[float, float]]:
            alone = self._elapsed(self._step, self._in_a_row)
            added = self._elapsed(exchanging_step, self._in_a_row) - alone if exchanges else 0.0
            return self._in_a_row * alone, (alone, added)

        plain, added = zip(*repeated(compare, enough), strict=True)
        self._step()
        self._visible = max(0.0, median(added))
        self.buckets = watch.buckets()
        named = [name for name, _ in model.named_parameters() if name in watch.gradients]
        self.gradients = {name: watch.gradients[name].clone() for name in named}
        dense = rehearse_dense(Dense(), self.gradients, self.buckets, self._visible, local)
        self.profile = Profile(world_size, median(plain), [dense])
        self.unsteady = ""
        if max(plain) > UNSTEADY * min(plain):
            self.unsteady = (
                f"a step took {1e3 * min(plain):.1f} to {1e3 * max(plain):.1f} ms: something else runs on this "
                "machine, or there are more threads (OMP_NUM_THREADS) than cores."
            )

    def add(self, scheme: Scheme, *, early: bool, limit: float = math.inf) -> bool:
        """Measure a scheme too.

        Args:
            scheme: what to measure.
            early: whether to measure the stages before the last one of its schedule.
            limit: give up if a first round after the backward pass takes longer than this, in seconds.

        Returns:
            Whether it was not given up.
        """
        arm: SchemeCost | None
        if isinstance(scheme, Dense):
            arm = rehearse_dense(scheme, self.gradients, self.buckets, self._visible, self._local)
        elif isinstance(scheme, PowerSGD):
            arm = self._rehearse_power_sgd(scheme)
        else:
            assert isinstance(scheme, RoundScheme)
            arm = rehearse(
                scheme,
                self.gradients,
                self._local,
                self.profile.world_size,
                early=early,
                work=self._job.step(scheme),
                dense_work=self._step,
                enough=self._enough,
                limit=limit,
            )
        if arm is None:
            return False
        self.profile.arms.append(arm)
        return True

    def _rehearse_power_sgd(self, scheme: PowerSGD) -> SchemeCost:
        """By torch's hook, on a model of its own."""
        job = self._make_job(one_bucket_mb(self._job.ddp))
        transport = Rehearsal(self._local, self.profile.world_size)
        hook = PowerSGDHook(PowerSGD(rank=scheme.rank, start_steps=2), transport)
        job.ddp.register_comm_hook(None, lambda _, bucket: hook.reduce(bucket))
        step = job.step(scheme)
        for _ in range(WARMUP_STEPS):
            step()

        def compare() -> tuple[float, float]:
            seconds = self._elapsed(step, self._in_a_row)
            return self._in_a_row * seconds, seconds - self._elapsed(self._step, self._in_a_row)

        added = median(repeated(compare, self._enough))
        values, factors = transport.collectives[0].size, transport.collectives[-1].size
        collectives = [Collective("all-reduce", size) for size in (factors, *[0] * (FACTOR_COLLECTIVES - 1))]
        start = StageCost(Phase.DENSE.value, scheme.start_steps, 0.0, [Collective("all-reduce", values)])
        last = StageCost(Phase.COMPRESSED.value, None, max(0.0, added), collectives)
        return SchemeCost(str(scheme), [start, last])

    def _elapsed(self, action: Callable[[], object], times: int = 1) -> float:
        return elapsed(action, self._local, self._device, times)


class _Watch:
    """A hook of DDP that notes when the buckets are complete, keeps the gradients, and may exchange them."""

    def __init__(self, model: nn.Module, transport: Transport, device: torch.device) -> None:
        self.communicate = False
        self.gradients: dict[str, Tensor] = {}  # of the last step that did not communicate, by name
        self._transport = transport
        self._device = device
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._complete: list[tuple[float, int, torch.dtype]] = []  # time, elements and dtype of the last step's buckets

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP calls for every bucket."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._complete = []
        self._complete.append((clock(self._device), buffer.numel(), buffer.dtype))
        if self.communicate:
            return self._transport.all_reduce_async(buffer.mul_(1 / self._transport.world_size), "values")
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.gradients[self._names[id(parameter)]] = gradient
        devices: list[int | str | torch.device] = [self._device] if self._device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        future.set_result(buffer)
        return future

    def buckets(self) -> list[Bucket]:
        """Those of the last step, the same on every rank; a collective."""
        *_, (end, _, _) = self._complete
        by_rank = agree(self._transport, [end - time for time, _, _ in self._complete])
        leads = [fmean(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
        return [Bucket(lead, size, dtype) for lead, (_, size, dtype) in zip(leads, self._complete, strict=True)]
