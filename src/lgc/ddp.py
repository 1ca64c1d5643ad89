"""DDP's buckets: collected into one round, or reduced one by one while the backward pass goes on."""

from __future__ import annotations

import logging
import math
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from lgc.buffers import Buffers
from lgc.caller import Caller, Detached, RoundTime
from lgc.comm.replicas import ReplicaCheck
from lgc.comm.transport import Transport, clock
from lgc.gradients import all_zero
from lgc.optimizers import FEW_STEPS, Streak, end_watch, is_within_step, parameters_of, watch_steps
from lgc.phase import Phase
from lgc.requirements import frozen, require_exchanged, require_optimizers_of, require_single_momentum, trained
from lgc.schemes import Dense, PowerSGD, RoundScheme, Scheme
from lgc.schemes.powersgd import PowerSGDHook
from lgc.synchronizer import Policy, Synchronizer

logger = logging.getLogger("lgc")

LOST_MEANS = 3  # after which it is said
SAME_NORM = 0.01  # difference of the logarithms to base 2 that may be rounding


def gradients_in(bucket: dist.GradBucket) -> list[tuple[Tensor, Tensor]]:
    """The parameters in a bucket, and views of it that are their gradients."""
    return [
        (parameter, _laid_out_as(parameter, gradient))
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
    ]


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    # DDP fills a bucket in the order of a dense parameter's memory, which in channels_last is not that of its
    # dimensions; `GradBucket.gradients` views it as if it were.
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return gradient.as_strided(parameter.shape, parameter.stride()) if dense else gradient


class Buckets(Caller):
    """Exchanges a DDP model's buckets.

    Attributes:
        has_begun: whether a backward pass has reached the parameters since the last round, synchronised or not. Only
            under `join()`, once this rank's inputs have run out, is there a round without one.
        rounds: how many it makes; the steps after them are not its own.
    """

    has_begun = False
    rounds = math.inf

    def __init__(self, ddp: DistributedDataParallel, transport: Transport, policy: Policy) -> None:
        self._ddp = weakref.ref(ddp)
        self._transport = transport
        self._buffers_every = policy.buffers_every
        self._buffers = Buffers(ddp.module) if policy.buffers_every else None
        # Unlike hooks of the parameters, these are not called by torch.autograd.grad, which changes no `.grad`.
        accumulators = [_accumulator(parameter) for _, parameter in trained(ddp)]  # which DDP keeps
        hooks = [accumulator.register_prehook(self._before_accumulating) for accumulator in accumulators]
        self._remove_hooks = weakref.finalize(ddp, _remove, hooks)  # the module may be trained on without DDP
        self._replicas = {f"parameter {name}": parameter for name, parameter in trained(ddp)} | frozen(ddp)
        self._steps_without_round = Streak()
        self._looks_for_rounds = True
        watch_steps(ddp, (parameter for _, parameter in trained(ddp)), self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to make a step with some of the parameters."""
        if self.step >= self.rounds:
            return
        steps = self._steps_without_round.add(optimizer)
        # The first one may be one whose closure has yet to make the gradients.
        if self._looks_for_rounds and steps == (FEW_STEPS if self.step else 2):
            self._looks_for_rounds = False  # it is said once
            if self._transport.rank == 0:
                logger.warning(
                    "step %d: %s has made its last %d steps without a round, as no gradient has come from the DDP "
                    "model given to attach: ranks may drift apart. Is its module trained without it, or in "
                    "another wrapper, or has it another dtype since DDP was made? Of a framework, attach to what it "
                    "trains, such as trainer.model_wrapped, trainer.strategy.model or what accelerator.prepare "
                    "returned. Accumulation under no_sync() ends with a backward pass outside it.",
                    self.step,
                    type(optimizer).__name__,
                    steps,
                )

    def _before_accumulating(self, _: object) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.begin()

    def detach(self) -> None:
        self.finish()
        self._remove_hooks()
        if (ddp := self._ddp()) is not None:
            end_watch(ddp)

    def _require_all_exchanged(self) -> None:
        if (ddp := self._ddp()) is not None:
            require_exchanged(ddp)

    @abstractmethod
    def begin(self) -> None:
        """The first backward pass since the last round begins: weights rest, where loops may disturb them later."""

    def exchange(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The mean of a bucket over the ranks, in its buffer."""
        try:
            return self.reduce(bucket)
        except Exception as error:
            if (ddp := self._ddp()) is not None:
                ddp.register_forward_pre_hook(partial(_refuse, self, f"{type(error).__name__}: {error}"))
            raise

    @abstractmethod
    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """As `exchange`. What it raises leaves DDP amid its backward pass, which it cannot go on from."""

    def _end_round(self) -> None:
        self.step += 1
        self.has_begun = False
        self._steps_without_round.end()
        if self._buffers_every and self.step % self._buffers_every == 0:
            self.finish()

    def finish(self) -> None:
        """Bring the buffers together, if that is what `attach` was told to do at an interval; a collective."""
        if self._buffers is not None:
            self._transport.begin(self.phase, steps=0)
            buffers = self._buffers.current()
            combined = self._buffers.combine(buffers, self._buffers.states(buffers), self._transport)
            self._buffers.apply(combined, buffers)


def _accumulator(parameter: Tensor) -> torch.autograd.graph.Node:
    requires_grad = parameter.requires_grad  # not if it was frozen after DDP was made; it may be trained again
    node = get_gradient_edge(parameter.requires_grad_()).node
    parameter.requires_grad_(requires_grad)
    return node


def _remove(hooks: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _refuse(caller: Caller | Detached, reason: str, *_: object) -> None:
    if isinstance(caller, Caller) and torch.is_grad_enabled():  # a copy of the model has a DDP of its own
        raise RuntimeError(f"lgc: DDP cannot run this model again, as its last backward pass has failed: {reason}")


class ReducedBuckets(Buckets):
    """Reduces every bucket as soon as DDP has it, as DDP itself and its hooks do, counted."""

    def __init__(self, ddp: DistributedDataParallel, scheme: Scheme, transport: Transport, policy: Policy) -> None:
        super().__init__(ddp, transport, policy)
        self._scheme = scheme
        self._power_sgd = None
        if isinstance(scheme, PowerSGD):
            self._power_sgd = PowerSGDHook(scheme, transport, finds_unused=ddp.find_unused_parameters)
        self._check = ReplicaCheck(transport, policy.check_every, policy.on_difference)

    def begin(self) -> None:
        self._check.look(self.step, self._replicas)

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if bucket.index() == 0:
            with self._transport.announcing():
                self._require_all_exchanged()
            self.phase = self._power_sgd.phase if self._power_sgd else Phase.DENSE
            self._transport.begin(self.phase)
        if bucket.is_last():
            if self._check.is_due(self.step):
                self._check.run(self.step, self._replicas, counts=self.has_begun)
            self._end_round()
        if self._power_sgd:
            return self._power_sgd.reduce(bucket)
        dtype = self._scheme.dtype if isinstance(self._scheme, Dense) else None
        if dtype is None or dtype == buffer.dtype:
            return self._transport.all_reduce_async(buffer.mul_(1 / self._transport.world_size), "values")
        share = buffer.to(dtype).div_(self._transport.world_size)
        return self._transport.all_reduce_async(share, "values").then(lambda done: buffer.copy_(done.value()))


class _Pending(NamedTuple):
    """A bucket whose mean is still being made."""

    buffer: Tensor
    gradients: list[tuple[str, Tensor]]  # views of the buffer
    future: Future[Tensor]


class CollectedBuckets(Buckets):
    """Keeps all buckets until the last one is here; then one round makes the mean of all."""

    synchronizer: Synchronizer

    def __init__(
        self,
        ddp: DistributedDataParallel,
        scheme: RoundScheme,
        transport: Transport,
        policy: Policy,
        optimizers: Sequence[torch.optim.Optimizer],
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        super().__init__(ddp, transport, policy)
        self._scheme = scheme
        self._optimizers = optimizers
        self._grad_scaler = grad_scaler
        self._parameters = dict(trained(ddp))
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device
        self._unused_possible = ddp.find_unused_parameters or ddp.static_graph
        self._gradients_are_views = ddp.gradient_as_bucket_view
        self._pending: list[_Pending] = []
        self._delivered = False  # the last mean, which is in the gradients until they are zeroed
        self._stale: str | None = None  # a parameter whose gradient had it still when a backward pass began
        self.synchronizer = Synchronizer(scheme, self._parameters, transport, policy, self._replicas)
        self.phase = self.synchronizer.phase(0)
        self._awaits_step: bool | None = None  # whether no step has been made with the last mean; None before any
        self._lost_means = 0
        self._norm: float | None = None  # of the last mean, until a step is made with it
        self._looks_at_norm = bool(scheme.corrected_momentum or scheme.makes_adams_step)

    def use_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        require_optimizers_of(self._parameters, optimizers)
        self._optimizers = optimizers

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        super()._before_step(optimizer)
        if self.step >= self.rounds:
            return
        self._awaits_step = False
        self._notice_changed_mean(optimizer)
        if optimizer not in self._optimizers:  # which rounds look at
            with self._transport.announcing():
                require_single_momentum(self._scheme, optimizer)

    def _before_accumulating(self, gradients: object) -> None:
        super()._before_accumulating(gradients)
        if self._delivered:
            self._stale = self._find_stale_gradient()
            self._delivered = self._stale is not None

    def begin(self) -> None:
        self.synchronizer.look(self.step)

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        gradients = [(self._names[id(parameter)], gradient) for parameter, gradient in gradients_in(bucket)]
        devices: list[int | str | torch.device] = [self._device] if self._device.type == "cuda" else []
        future: Future[Tensor] = Future(devices=devices)
        self._pending.append(_Pending(bucket.buffer(), gradients, future))
        if bucket.is_last():
            pending, self._pending = self._pending, []
            started, communicated = clock(self._device), self._transport.seconds
            self._deliver(self._synchronize(pending), pending)
            communication = self._transport.seconds - communicated
            self.round_time = RoundTime(clock(self._device) - started - communication, communication)
        return future

    def _synchronize(self, pending: list[_Pending]) -> dict[str, Tensor]:
        with self._transport.announcing():
            self._require_all_exchanged()
            self._require_fresh_gradients()
            for optimizer in self._optimizers:  # a scheduler or load_state_dict may have given it momentum since attach
                require_single_momentum(self._scheme, optimizer)
        self._notice_lost_mean()
        self.phase = self.synchronizer.phase(self.step)
        gradients = {name: gradient for bucket in pending for name, gradient in bucket.gradients}
        scale = None if self._grad_scaler is None else self._grad_scaler.get_scale()
        means = self.synchronizer.synchronize(
            gradients, self.step, scale=scale, counts=self.has_begun, resting=self._resting(gradients)
        )
        self._end_round()
        return means

    def _resting(self, gradients: dict[str, Tensor]) -> list[str]:
        """The parameters that had no part in this rank's backward pass: they are frozen, or it has not used them."""
        unused = all_zero(gradients) if self._unused_possible else []
        if len(unused) < len(gradients):
            return unused
        # Under `join()`, once this rank's inputs have run out, it goes on sending what it owes.
        return [name for name, parameter in self._parameters.items() if not parameter.requires_grad]

    def _deliver(self, means: dict[str, Tensor], pending: list[_Pending]) -> None:
        for bucket in pending:
            for name, gradient in bucket.gradients:
                gradient.copy_(means[name])
            bucket.future.set_result(bucket.buffer)
        if self._unused_possible:
            self._deliver_to_unused(means, {name: view for bucket in pending for name, view in bucket.gradients})
        self._delivered = True
        if self._looks_at_norm:
            self._norm = float(get_total_norm(means.values()))
        if self._awaits_step is not None:
            self._awaits_step = self.synchronizer.was_finite and not is_within_step()

    def _deliver_to_unused(self, means: dict[str, Tensor], views: dict[str, Tensor]) -> None:
        # Of a parameter that no rank used DDP leaves `.grad` as it was, and with it what a rank without inputs owed.
        unmoved = set(all_zero(means))
        for name, parameter in self._parameters.items():
            if name not in unmoved and parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = views[name] if self._gradients_are_views else torch.empty_like(parameter)
                parameter.grad.copy_(means[name])

    def _find_stale_gradient(self) -> str | None:
        """A parameter whose gradient still has the last mean, if any; zeroes those that another optimizer has."""
        stale, optimized = None, parameters_of(*self._optimizers)
        for name, parameter in self._parameters.items():
            if parameter.grad is None or not parameter.requires_grad:
                continue
            if self._optimizers and id(parameter) not in optimized:
                parameter.grad.zero_()
            elif stale is None and bool(parameter.grad.any()):
                stale = name
        return stale

    def _require_fresh_gradients(self) -> None:
        # This backward pass has added the last mean to the new gradients, and feedback would count it twice.
        if self._stale is not None:
            raise RuntimeError(
                f"lgc: backward() with the last step's mean still in the gradient of {self._stale!r}; call "
                "optimizer.zero_grad() between steps, and accumulate under the model's no_sync(). Where it is the loss "
                "of another model that goes through this one, such as a generator's through its discriminator, switch "
                "this one off meanwhile by requires_grad_(False): its scheme would take it for a step of its own."
            )

    def _notice_changed_mean(self, optimizer: torch.optim.Optimizer) -> None:
        # A momentum that acts before sending has no part in what clipping after the round cuts.
        left, self._norm = self._norm, None
        if (
            left is None
            or self.has_begun  # it accumulates again: the next round is within this step, in its closure
            or not 0 < left < math.inf
            or not parameters_of(optimizer).issuperset(map(id, self._parameters.values()))
        ):
            return
        gradients = [each.grad for each in self._parameters.values() if each.grad is not None]
        now = float(get_total_norm(gradients))
        exponent = math.log2(now / left) if 0 < now < math.inf else 0.0
        if abs(exponent - round(exponent)) < SAME_NORM:  # a GradScaler's scales are powers of two
            return
        self._looks_at_norm = False  # it is said once
        if self._transport.rank == 0:
            logger.warning(
                "step %d: the gradients have norm %.3g at the %s's step, and the round left them with %.3g. Under %s, "
                "whose momentum acts before sending, clipping or scaling them afterwards harms; give the scheme "
                "clip_norm=..., which clips each rank's gradient before, and leave it out of the loop (in a framework: "
                "max_grad_norm, gradient_clip_val).",
                self.step - 1,
                now,
                type(optimizer).__name__,
                left,
                self._scheme.name,
            )

    def _notice_lost_mean(self) -> None:
        # What the last round sent has left the residual. A rank without inputs, under `join()`, makes no steps.
        if not (self._awaits_step and self.has_begun):
            return
        self._lost_means += 1
        if self._lost_means == LOST_MEANS and self._transport.rank == 0:
            logger.warning(
                "step %d: no optimizer has made a step with the means of %d rounds, and what they have sent is lost. "
                "Every synchronised backward pass is a round: where no step follows, use the model's no_sync(), as for "
                "the first pass of SAM, or switch the model off by requires_grad_(False), as for a generator's loss "
                "through its discriminator.",
                self.step,
                LOST_MEANS,
            )
