"""DDP's buckets: collected into one round, or reduced one by one while the backward pass goes on."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
import weakref
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lgc.caller import Caller, RoundTime
from lgc.comm.replicas import ReplicaCheck
from lgc.comm.transport import Transport, clock
from lgc.phase import Phase
from lgc.requirements import parameters_of, require_single_momentum, trained
from lgc.schemes import Dense, PowerSGD, RoundScheme, Scheme
from lgc.schemes.powersgd import PowerSGDHook
from lgc.synchronizer import Policy, Synchronizer


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
    """A DDP model's communication hook."""

    @abstractmethod
    def exchange(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        """The mean of a bucket over the ranks, in its buffer."""


class ReducedBuckets(Buckets):
    """Reduces every bucket as soon as DDP has it, as DDP itself and its hooks do, counted."""

    def __init__(self, ddp: DistributedDataParallel, scheme: Scheme, transport: Transport, policy: Policy) -> None:
        self._scheme = scheme
        self._transport = transport
        self._power_sgd = PowerSGDHook(scheme, transport) if isinstance(scheme, PowerSGD) else None
        self._replicas = {f"parameter {name}": parameter for name, parameter in trained(ddp)}
        self._check = ReplicaCheck(transport, policy.check_every, policy.on_difference)
        self._has_gradient = False  # in this round

    def exchange(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self.phase = self._power_sgd.phase if self._power_sgd else Phase.DENSE
            self._transport.begin(self.phase)
            self._has_gradient = False
        if self._check.is_due(self.step):
            self._has_gradient |= bool(buffer.any())
            if bucket.is_last():
                self._check.run(self.step, self._replicas, counts=self._has_gradient)
        self.step += bucket.is_last()
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
        optimizer: torch.optim.Optimizer | None,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._scheme = scheme
        self._transport = transport
        self._optimizer = optimizer
        self._optimized = None if optimizer is None else parameters_of(optimizer)
        self._grad_scaler = grad_scaler
        self._parameters = dict(trained(ddp))
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device
        self._unused_possible = ddp.find_unused_parameters or ddp.static_graph
        self._gradients_are_views = ddp.gradient_as_bucket_view
        self._pending: list[_Pending] = []
        self._delivered = False
        replicas = {f"parameter {name}": parameter for name, parameter in self._parameters.items()}
        self.synchronizer = Synchronizer(scheme, self._parameters, transport, policy, replicas)
        self.phase = self.synchronizer.phase(0)
        guard = torch.autograd.graph.register_multi_grad_hook(
            list(self._parameters.values()), self._require_fresh_gradients, mode="any"
        )
        weakref.finalize(ddp, guard.remove)  # the module may be trained on without DDP

    def exchange(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
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
        if self._optimizer is not None:  # a scheduler or load_state_dict may have given it momentum since attach
            with self._transport.announcing():
                require_single_momentum(self._scheme, self._optimizer)
        self.phase = self.synchronizer.phase(self.step)
        gradients = {name: gradient for bucket in pending for name, gradient in bucket.gradients}
        scale = None if self._grad_scaler is None else self._grad_scaler.get_scale()
        means = self.synchronizer.synchronize(gradients, self.step, scale=scale)
        self.step += 1
        return means

    def _deliver(self, means: dict[str, Tensor], pending: list[_Pending]) -> None:
        for bucket in pending:
            for name, gradient in bucket.gradients:
                gradient.copy_(means[name])
            bucket.future.set_result(bucket.buffer)
        if self._unused_possible:
            self._deliver_to_unused(means, {name: view for bucket in pending for name, view in bucket.gradients})
        self._delivered = True

    def _deliver_to_unused(self, means: dict[str, Tensor], views: dict[str, Tensor]) -> None:
        # DDP leaves `.grad` of a parameter that no rank used as it was, and with it what feedback still owed.
        nonzero = torch.stack([means[name].any() for name in self._parameters]).tolist()  # one wait for the device
        for (name, parameter), owed in zip(self._parameters.items(), nonzero, strict=True):
            if owed:
                if parameter.grad is None:
                    parameter.grad = views[name] if self._gradients_are_views else torch.empty_like(parameter)
                parameter.grad.copy_(means[name])

    def _require_fresh_gradients(self, _: Tensor) -> None:
        # A second backward would add the last mean to the new gradients, and feedback would count it twice.
        if not self._delivered:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._optimized is not None and id(parameter) not in self._optimized:
                parameter.grad.zero_()  # nobody else does
            elif bool(parameter.grad.any()):
                raise RuntimeError(
                    f"lgc: backward() with the last step's mean still in the gradient of {name!r}; call "
                    "optimizer.zero_grad() between steps, and accumulate under the model's no_sync()."
                )
        self._delivered = False
