"""State that each rank has of its own, in the folder `lgc` of a framework's checkpoint, which has rank 0's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lgc import Handle, LocalSteps, checkpoint

FOLDER = "lgc"


class Attached(NamedTuple):
    """A scheme that a model trains under, and what else each rank has of its own then."""

    handle: Handle
    optimizer: torch.optim.Optimizer
    grad_scaler: torch.amp.GradScaler | None

    def state_dict(self, schedulers: Sequence[Any] = ()) -> dict[str, Any]:
        """What this rank has of its own: under local steps also its optimizer's moments, its scale, and schedules.

        Args:
            schedulers: of the learning rate, which make no step where a GradScaler has skipped the optimizer's.
        """
        state: dict[str, Any] = {"handle": self.handle.state_dict()}
        if isinstance(self.handle.scheme, LocalSteps):
            state["optimizer"] = self.optimizer.state_dict()
            if self.grad_scaler is not None:
                state["grad_scaler"] = self.grad_scaler.state_dict()
                state["schedulers"] = [each.state_dict() for each in schedulers]
        return state

    def load_state_dict(self, state: Mapping[str, Any], schedulers: Sequence[Any] = ()) -> None:
        """Go on from it, once the framework has loaded what it has of rank 0."""
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None and "grad_scaler" in state:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
            for scheduler, each in zip(schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(each)
        self.handle.load_state_dict(state["handle"])  # last, as it puts this rank's own weights back


def save(folder: Path, state: Mapping[str, Any], *, step: int, group: dist.ProcessGroup) -> None:
    """Write every rank's state, in place of what is there; a collective. Raises as `lgc.checkpoint.save` does."""
    remove(folder, group=group)
    checkpoint.save(folder, state, step=step, group=group, keep=1)


def remove(folder: Path, *, group: dist.ProcessGroup) -> None:
    """Remove what is there of an earlier checkpoint in the same place; not a collective, rank 0 does it."""
    if dist.get_rank(group) == 0:
        shutil.rmtree(folder, ignore_errors=True)  # if something stays, saving says on all ranks that it is there


def load(folder: Path, *, group: dist.ProcessGroup, without: str) -> dict[str, Any]:
    """Load this rank's state; a collective.

    Args:
        folder: that `save` was given.
        group: the ranks.
        without: what to do to go on without it.

    Raises:
        CheckpointError: on every rank, if there is none, or as `lgc.checkpoint.load`.
    """
    found = checkpoint.available(folder, group=group)
    if not found:
        raise checkpoint.CheckpointError(
            f"{folder} does not have every rank's state: this checkpoint was made without lgc, or not finished. Load "
            f"another one; to go on without what the ranks owed, {without}."
        )
    return checkpoint.load(found[0], group=group)
