"""What a model's step costs on this machine: the backward pass, DDP's buckets in it, and every scheme's rounds."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from lgc.choice.cost import Collective, Profile, SchemeCost, StageCost
from lgc.choice.rehearsal import (
    THOROUGH,
    Bucket,
    Rehearsal,
    before_end,
    elapsed,
    rehearse,
    rehearse_dense,
    rounds_in_a_row,
    wants_more,
)
from lgc.comm.transport import Transport, clock
from lgc.phase import Phase
from lgc.powersgd import PowerSGDHook, one_bucket_mb
from lgc.schemes import Dense, PowerSGD, Scheme, SparseScheme
from lgc_lab.recipes import find_object
from lgc_lab.training.optimizer import make_optimizer
from lgc_lab.training.settings import Settings

WARMUP_STEPS = 3
UNSTEADY = 2.0  # the longest step over the shortest
FACTOR_COLLECTIVES = 3  # of a PowerSGD round: P, Q, and what is not worth factors


class Job(NamedTuple):
    """What is trained: a model, its loss on one batch, given the model, and the optimizer that goes with a scheme.

    The optimizers' learning rate is 0, so that the gradients stay those of the start, however often they are computed.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    make_optimizer: Callable[[Scheme], torch.optim.Optimizer]


class JobSource(Protocol):
    """Makes the job, in every rank."""

    def __call__(self, device: torch.device) -> Job: ...


@dataclass(frozen=True)
class RecipeJob:
    """A recipe with the first batch of its data."""

    settings: Settings

    def __call__(self, device: torch.device) -> Job:
        recipe = self.settings.resolve_recipe()
        model = recipe.make_model(device)
        train = self.settings.load_data().train
        generator = torch.Generator().manual_seed(0)
        inputs, targets = recipe.make_batch(train, torch.arange(recipe.batch_size), generator, device)

        def loss(model: nn.Module) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
                return recipe.loss(model(inputs), targets)

        return Job(model, loss, partial(make_optimizer, replace(recipe, learning_rate=0.0), model))


@dataclass(frozen=True)
class FunctionJob:
    """A function `module:name` without arguments that returns a model and its loss on one batch.

    The loss is a function of the model, which is on the device that `torch.get_default_device()` has in there.
    """

    text: str

    def __call__(self, device: torch.device) -> Job:
        function = self.find()
        with device:
            model, loss = function()

        def optimizer(scheme: Scheme) -> torch.optim.Optimizer:
            momentum = 0.0 if scheme.corrected_momentum or scheme.makes_adams_step else 0.9
            return torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum)

        return Job(model.to(device), loss, optimizer)

    def find(self) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
        """The function.

        Raises:
            ValueError: if there is none.
        """
        function: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]] = find_object("model", self.text)
        return function


class _Watch:
    """A hook of DDP that notes when the buckets are complete, keeps the gradients, and may exchange them."""

    def __init__(self, model: nn.Module, transport: Transport, device: torch.device) -> None:
        self.communicate = False
        self.gradients: dict[str, Tensor] = {}  # of the last step that did not communicate, by name
        self._transport = transport
        self._device = device
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._complete: list[Bucket] = []

    def hook(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP calls for every bucket."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._complete = []
        self._complete.append(Bucket(clock(self._device), buffer.numel(), buffer.dtype))
        if self.communicate:
            return self._transport.all_reduce_async(buffer.mul_(1 / self._transport.world_size), "values")
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.gradients[self._names[id(parameter)]] = gradient
        devices: list[int | str | torch.device] = [self._device] if self._device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        future.set_result(buffer)
        return future

    def buckets(self) -> list[Bucket]:
        """Those of the last step; a collective."""
        return before_end(self._complete, self._transport)


def measure(
    source: JobSource,
    schemes: list[Scheme],
    world_size: int,
    local: Transport,
    device: torch.device,
    tell: Callable[[str], object] = lambda _: None,
) -> Profile:
    """The costs of a job under dense and under these schemes; a collective of the ranks in `local`.

    Args:
        source: of the job.
        schemes: what to measure.
        world_size: how many ranks it is for, a multiple of those that are here.
        local: the ranks that share this machine.
        device: that the model is on.
        tell: is told what is being measured, and if that varies.

    Returns:
        The same on every rank.
    """
    job = source(device)
    ddp = _wrap(job, local)
    watch = _Watch(ddp.module, local, device)
    ddp.register_comm_hook(None, watch.hook)

    step = partial(_step, ddp, job.loss, job.make_optimizer(Dense()))

    def exchanging_step() -> None:
        watch.communicate = True
        step()
        watch.communicate = False

    tell(f"measuring compute, {torch.get_num_threads()} threads a rank")
    settling = [elapsed(exchanging_step if local.world_size > 1 else step, local, device) for _ in range(WARMUP_STEPS)]
    in_a_row = rounds_in_a_row(settling[-1], local, THOROUGH)
    plain: list[float] = []
    added: list[float] = []
    while wants_more([in_a_row * seconds for seconds in plain], THOROUGH):
        plain.append(elapsed(step, local, device, in_a_row))
        exchanging = elapsed(exchanging_step, local, device, in_a_row) if local.world_size > 1 else plain[-1]
        added.append(exchanging - plain[-1])
    step()
    compute, visible = median(plain), max(0.0, median(added))
    if max(plain) > UNSTEADY * min(plain):
        tell(
            f"WARNING: a step took {1e3 * min(plain):.1f} to {1e3 * max(plain):.1f} ms: something else runs on this "
            "machine, or there are more threads (OMP_NUM_THREADS) than cores. Do not trust what follows."
        )
    buckets = watch.buckets()
    gradients = {
        name: watch.gradients[name].clone() for name, _ in ddp.module.named_parameters() if name in watch.gradients
    }
    arms = [rehearse_dense(Dense(), gradients, buckets, visible, local)]
    for scheme in schemes:
        if scheme == Dense():
            continue
        tell(f"measuring {scheme}")
        if isinstance(scheme, SparseScheme):
            work = partial(_step, ddp, job.loss, job.make_optimizer(scheme))
            arm = rehearse(
                scheme, gradients, local, world_size, early=True, work=work, dense_work=step, enough=THOROUGH
            )
            assert arm is not None
            arms.append(arm)
        elif isinstance(scheme, Dense):
            arms.append(rehearse_dense(scheme, gradients, buckets, visible, local))
        else:
            assert isinstance(scheme, PowerSGD)
            arms.append(_rehearse_power_sgd(scheme, source, step, in_a_row, world_size, local, device))
    return Profile(world_size, compute, arms)


def _rehearse_power_sgd(
    scheme: PowerSGD,
    source: JobSource,
    dense_work: Callable[[], object],
    in_a_row: int,
    world_size: int,
    local: Transport,
    device: torch.device,
) -> SchemeCost:
    job = source(device)
    ddp = _wrap(job, local, bucket_cap_mb=one_bucket_mb(job.model))
    transport = Rehearsal(local, world_size)
    hook = PowerSGDHook(PowerSGD(rank=scheme.rank, start_steps=2), transport)
    ddp.register_comm_hook(None, lambda _, bucket: hook.reduce(bucket))
    step = partial(_step, ddp, job.loss, job.make_optimizer(scheme))
    for _ in range(WARMUP_STEPS):
        step()
    seconds: list[float] = []
    added: list[float] = []
    while wants_more([in_a_row * each for each in seconds], THOROUGH):
        seconds.append(elapsed(step, local, device, in_a_row))
        added.append(seconds[-1] - elapsed(dense_work, local, device, in_a_row))
    factors = transport.collectives[-1].size
    values = transport.collectives[0].size
    collectives = [Collective("all-reduce", factors), *[Collective("all-reduce", 0)] * (FACTOR_COLLECTIVES - 1)]
    return SchemeCost(
        str(scheme),
        [
            StageCost(Phase.DENSE.value, scheme.start_steps, 0.0, [Collective("all-reduce", values)]),
            StageCost(Phase.COMPRESSED.value, None, max(0.0, median(added)), collectives),
        ],
    )


def _wrap(job: Job, local: Transport, bucket_cap_mb: int | None = None) -> DistributedDataParallel:
    ddp = DistributedDataParallel(job.model, process_group=local.group, bucket_cap_mb=bucket_cap_mb)
    ddp.broadcast_buffers = False
    return ddp


def _step(ddp: DistributedDataParallel, loss: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer) -> None:
    value = loss(ddp)
    optimizer.zero_grad()
    torch.autograd.backward(value)
    optimizer.step()
