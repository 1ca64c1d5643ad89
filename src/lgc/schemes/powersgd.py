"""PowerSGD as torch has it, to compare with: its own hook, counted and kept from hanging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lgc.comm.transport import Transport
from lgc.phase import Phase
from lgc.schemes.arguments import require_integer
from lgc.schemes.scheme import Scheme

MB = 2**20


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Scheme):
    """Low-rank factors of the larger weights by torch's own hook, with its error feedback and warm start.

    On gloo that hook hangs with more than one bucket, so build the model as `DistributedDataParallel(model,
    bucket_cap_mb=...)` with room for all gradients; else the first backward pass raises. With `find_unused_parameters`
    it aborts the process on gloo, and `attach` raises. The optimizer keeps its
    momentum. `Handle.state_dict()` does not save the hook's state: a resumed run starts again with `start_steps`
    uncompressed steps, an empty residual and new random factors. A NaN stays in the hook's residual for ever.
    Source: Vogels et al., NeurIPS 2019, arXiv 1905.13727.

    Args:
        rank: of the factors, at least 1.
        start_steps: uncompressed steps at the start, at least 2, which is when DDP's buckets are final.
    """

    name: ClassVar[str] = "powersgd"
    rank: int = 1
    start_steps: int = 10

    def __post_init__(self) -> None:
        require_integer(self, "rank", 1)
        require_integer(self, "start_steps", 2)


class PowerSGDHook:
    """One rank's side of `PowerSGD`. Source: Vogels et al., NeurIPS 2019, arXiv 1905.13727.

    torch performs the collectives; the bytes are computed from the shapes of what it sends: content `values` is the
    uncompressed start, `factors` are P, Q and the tensors that are not worth factors.

    Raises:
        ValueError: on gloo, if DDP finds unused parameters, of which it tells the others amid the hook's collectives.
    """

    def __init__(self, scheme: PowerSGD, transport: Transport, *, finds_unused: bool = False) -> None:
        if finds_unused and transport.device.type == "cpu":
            raise ValueError(
                "attach(model=...) has find_unused_parameters=True, with which torch's PowerSGD hook aborts the "
                "process on gloo: DDP's own exchange comes amid the hook's. Build the model without it."
            )
        self._transport = transport
        self._state = PowerSGDState(
            process_group=transport.group,
            matrix_approximation_rank=scheme.rank,
            start_powerSGD_iter=scheme.start_steps,
        )

    @property
    def phase(self) -> Phase:
        """The phase of the next round."""
        return Phase.DENSE if self._state.iter < self._state.start_powerSGD_iter else Phase.COMPRESSED

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean of the bucket over the ranks, in its buffer.

        Raises:
            RuntimeError: on gloo, if this is not the only bucket.
        """
        buffer = bucket.buffer()
        if self._transport.device.type == "cpu" and not (bucket.index() == 0 and bucket.is_last()):
            raise RuntimeError(
                "PowerSGD: DDP has several buckets, with which torch's hook hangs on gloo; build the model as "
                "DistributedDataParallel(model, bucket_cap_mb=...) with room for all gradients "
                "(lgc.schemes.powersgd.one_bucket_mb(model)), and in one dtype."
            )
        if self.phase is Phase.DENSE:
            self._transport.count_all_reduce(buffer.nbytes, "values")
            return powerSGD_hook(self._state, bucket)
        before = self._state.total_numel_after_compression
        future = powerSGD_hook(self._state, bucket)
        numbers = self._state.total_numel_after_compression - before
        self._transport.count_all_reduce(numbers * buffer.element_size(), "factors")
        return future


def one_bucket_mb(model: nn.Module) -> int:
    """A `bucket_cap_mb` with which DDP has all gradients of `model` in one bucket, if they are of one dtype."""
    return bucket_mb(sum(p.nbytes for p in model.parameters() if p.requires_grad))


def bucket_mb(size: int) -> int:
    """A `bucket_cap_mb` with room for so many bytes of gradients."""
    return math.ceil(size / MB) + 1
