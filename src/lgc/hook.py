"""DDP's communication hook, of which a model has one for good."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lgc.caller import Detached


class Exchanges(Protocol):
    """A caller that takes DDP's buckets."""

    def exchange(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The mean of a bucket over the ranks, in its buffer."""


class Hook:
    """A DDP model's one communication hook, which stays for good: to the caller of now, or as DDP without a hook.

    Attributes:
        caller: that exchanges the buckets; None before anything is attached, and after it is detached.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.caller: Exchanges | None = None
        self.group = group

    def __reduce__(self) -> tuple[type[Detached], tuple[()]]:
        return Detached, ()


def hook_of(ddp: DistributedDataParallel) -> Hook:
    """The hook of a DDP model, which it gets at the first call."""
    for _, state in ddp._comm_hooks:
        if isinstance(state, Hook):
            return state
    hook = Hook(ddp.process_group)
    ddp.register_comm_hook(hook, _exchange)
    return hook


def _exchange(hook: Hook, bucket: dist.GradBucket) -> Future[Tensor]:
    # A function, which copies of the model can share.
    return allreduce_hook(hook.group, bucket) if hook.caller is None else hook.caller.exchange(bucket)
