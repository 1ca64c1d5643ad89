"""Accelerate: a scheme on what `accelerator.prepare` returned, with its state in the accelerator's checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc import Handle, Scheme
from lgc.integrations import own_state
from lgc.integrations.own_state import Attached
from lgc.requirements import uncompiled


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheme: Scheme | str,
    **attach_arguments: Any,
) -> Handle:
    """Exchange by `scheme` what this model learns, and save and load every rank's state with the accelerator's.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        handle = attach(accelerator, model, optimizer, "local:every=20+quantized")

    A collective. `accelerator.save_state` writes what each rank has of its own into the folder `lgc` of its checkpoint,
    and `load_state` loads it. The weights that it and `save_model` save are those that all ranks share. Several models
    may be attached, one call for each. `load_state` goes before this call for a checkpoint of a run without lgc.

    Args:
        accelerator: whose `prepare` has wrapped model and optimizer, and whose GradScaler is used.
        model: as `prepare` returned it.
        optimizer: the same.
        scheme: as for `lgc.attach`.
        attach_arguments: the others of `lgc.attach`. `timeout` is None here: that of the accelerator's process group.

    Raises:
        ValueError: the accelerator is not distributed, or not by DistributedDataParallel.
        TypeError: the model is not what `prepare` returned.
        As `lgc.attach`.
    """
    require_ddp(accelerator, model)
    inner = inner_optimizer(optimizer)
    scaler = accelerator.scaler
    handle = lgc.attach(model, scheme, inner, grad_scaler=scaler, **{"timeout": None, **attach_arguments})
    checkpoints = getattr(accelerator.save_state, "__self__", None)
    if not isinstance(checkpoints, _Checkpoints):
        checkpoints = _Checkpoints(accelerator)
    checkpoints.attached.append(Attached(handle, inner, scaler))
    return handle


def require_ddp(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise ValueError or TypeError if the accelerator does not train this model in DistributedDataParallel."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        raise ValueError(
            "lgc: Accelerate is not distributed (DistributedType.NO): there is nothing to exchange. Start several "
            "processes, with `torchrun --nproc-per-node 2 script.py` or `accelerate launch --multi_gpu script.py`."
        )
    if not kind.name.startswith("MULTI_"):
        raise ValueError(
            f"lgc: Accelerate is set to DistributedType.{kind.name}, where a rank does not have the whole gradient; "
            "lgc needs plain DistributedDataParallel: DistributedType.MULTI_GPU or MULTI_CPU."
        )
    if not isinstance(uncompiled(model), DistributedDataParallel):
        raise TypeError(
            f"attach(model=...) must be what accelerator.prepare returned, a DistributedDataParallel model, got "
            f"{type(model).__name__}: model, optimizer = accelerator.prepare(model, optimizer)."
        )


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that makes the steps, out of Accelerate's wrapper."""
    inner: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner


class _Checkpoints:
    """An accelerator's, with what every rank has of its own.

    `save_state` and `load_state` are wrapped, as their own hooks come before: under local steps the anchor must be in
    the model before its weights are collected, and this rank's weights come back after all has been loaded. What is
    in the folder `lgc` is removed first and written last, so that it is there only if the rest is of the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.attached: list[Attached] = []
        self._accelerator = accelerator
        self._folder = Path()
        self._save_state = accelerator.save_state
        self._load_state = accelerator.load_state
        self._save_model = accelerator.save_model
        self._register = accelerator.register_for_checkpointing
        self._free_memory = accelerator.free_memory
        accelerator.save_state = self.save_state
        accelerator.load_state = self.load_state
        accelerator.save_model = self.save_model
        accelerator.register_for_checkpointing = self.register_for_checkpointing
        accelerator.free_memory = self.free_memory
        accelerator.register_save_state_pre_hook(self._before_saving)
        accelerator.register_load_state_pre_hook(self._before_loading)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerator.save_state."""
        with self._anchored():
            saved = self._save_state(*args, **kwargs)
        if attached := self._still_attached():
            first = attached[0].handle
            state = {"attached": [each.state_dict(self._accelerator._schedulers) for each in attached]}
            own_state.save(self._folder, state, step=first.step, group=first.transport.group)
        return saved

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        """As Accelerator.load_state."""
        with self._anchored():  # in place of this rank's own weights, which come back last
            self._load_state(*args, **kwargs)
        if attached := self._still_attached():
            group, without = attached[0].handle.transport.group, "call load_state before attach"
            states = own_state.load(self._folder, group=group, without=without)["attached"]
            if len(states) != len(attached):
                raise ValueError(
                    f"{self._folder} has the state of {len(states)} attached schemes, and {len(attached)} are attached "
                    "here; attach the same models, in the same order."
                )
            for each, state in zip(attached, states, strict=True):
                each.load_state_dict(state, self._accelerator._schedulers)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As Accelerator.save_model."""
        with self._anchored():
            self._save_model(*args, **kwargs)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """As Accelerator.register_for_checkpointing, which saves rank 0's state alone."""
        if any(isinstance(each, Handle) for each in objects):
            raise TypeError(
                "register_for_checkpointing(handle) would save rank 0's state alone; leave it out: save_state and "
                "load_state have every rank's, since lgc.integrations.accelerate.attach."
            )
        self._register(*objects)

    def free_memory(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerator.free_memory, after which other models are trained."""
        self.attached.clear()
        return self._free_memory(*args, **kwargs)

    def _before_saving(self, _: object, __: object, folder: str) -> None:
        self._folder = Path(folder) / own_state.FOLDER
        if attached := self._still_attached():
            own_state.remove(self._folder, group=attached[0].handle.transport.group)

    def _before_loading(self, _: object, folder: str) -> None:
        self._folder = Path(folder) / own_state.FOLDER

    def _still_attached(self) -> list[Attached]:
        return [each for each in self.attached if not each.handle.is_detached]

    @contextlib.contextmanager
    def _anchored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in self._still_attached():
                stack.enter_context(each.handle.anchored())
            yield
