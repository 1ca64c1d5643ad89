"""Momentum correction and error feedback: what a rank still owes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-8  # of Adam, as in its paper and in torch


class Piece(NamedTuple):
    """Values that a rank contributed at some places of the flat vector, as the other ranks decode them.

    `where` is a slice (dense) or a vector of indices (selected); `values` has one number for each.
    """

    where: slice | Tensor
    values: Tensor


class Feedback:
    """Momentum u and residual v of one rank, both of shape (N,).

        u = m * u + g;  v = v + u

    With `second_moment` the step is Adam's (Kingma and Ba, arXiv 1412.6980) instead of SGD's, from this rank's own
    moments: after t updates

        w = m w + (1 - m) g;  s = m_2 s + (1 - m_2) g^2;  u = w / (1 - m^t) / (sqrt(s / (1 - m_2^t)) + 1e-8)

    A round works on pending copies: `accumulate`, then `settle` for everything that is sent, then `commit`.
    A round that is abandoned before `commit` has changed nothing. The copies are all the memory that it has of its own:
    the gradient comes in `intake`, which becomes one of them, and the mean leaves in `spare`, which was another. With
    `keep_loss=False` what the codec lost of what was sent is lost (the paper's way). Source: DGC, sections 3.1 and 3.2.

    With `low_pass=b` below 1 the residual takes only a part b of every change, v = v_before + b * (v - v_before), so
    that what has accumulated at a coordinate leaves over several rounds and not in one; momentum is then never
    masked. Source of the filter: ScaleCom, section 3, arXiv 2104.11125, there without momentum.

    What rests in a round sends nothing and keeps its state, as an optimizer keeps that of a parameter without gradient.

    Attributes:
        decay: what is left of the residual from one round to the next, 1 unless it is set.
        device: of all vectors.
    """

    decay = 1.0

    def __init__(
        self,
        size: int,
        *,
        world_size: int,
        device: torch.device,
        momentum: float = 0.0,
        second_moment: float = 0.0,
        clip_norm: float | None = None,
        keep_loss: bool = True,
        low_pass: float = 1.0,
    ) -> None:
        self.momentum = momentum
        self.second_moment = second_moment
        self.clip_norm = None if clip_norm is None else clip_norm / math.sqrt(world_size)
        self.keep_loss = keep_loss
        self.low_pass = low_pass
        kept = {"residual": True, "momentum": momentum > 0, "second_moment": second_moment > 0}
        self.device, self._size = device, size
        self._kept = {
            name: torch.zeros(size, dtype=torch.float32, device=device) for name, used in kept.items() if used
        }
        self._pending: dict[str, Tensor] = {}
        self.updates = 0
        self._resting: Sequence[slice] = ()

    @property
    def residual(self) -> Tensor:
        """v, what is owed, shape (N,)."""
        return self._kept["residual"]

    @property
    def momentum_buffer(self) -> Tensor | None:
        """u, or Adam's first moment w, shape (N,); None without momentum."""
        return self._kept.get("momentum")

    @property
    def second_moment_buffer(self) -> Tensor | None:
        """s, shape (N,); None unless the step is Adam's."""
        return self._kept.get("second_moment")

    @property
    def intake(self) -> Tensor:
        """Memory for the next gradient, shape (N,), undefined; `accumulate` overwrites it, wherever the gradient is."""
        return self._copy_of("momentum" if "momentum" in self._kept else "residual")

    @property
    def spare(self) -> Tensor:
        """Memory that the round needs no longer once it is committed or abandoned, shape (N,), until the next one."""
        return self._copy_of("residual")

    def _copy_of(self, name: str) -> Tensor:
        """The pending copy of what is kept under this name, undefined at first."""
        if name not in self._pending:
            self._pending[name] = torch.empty(self._size, dtype=torch.float32, device=self.device)
        return self._pending[name]

    def release(self) -> None:
        """Give back the memory that rounds need; the next one takes it anew."""
        self._pending.clear()

    def forget(self) -> None:
        """Have nothing but zeros, in no memory. There can be no round before the next `load`."""
        self.release()
        self._kept = {name: each.new_zeros(1).expand(self._size) for name, each in self._kept.items()}

    def load(self, buffers: Mapping[str, Tensor]) -> None:
        """Go on from these vectors, of the names of `buffers()`; they are kept, not copied."""
        self._kept = dict(buffers)

    def accumulate(self, gradient: Tensor, resting: Sequence[slice] = ()) -> Tensor:
        """The pending residual v after taking in the local gradient, shape (N,); it may be read until `settle`.

        It is zero where something is resting, whose gradient must be zero. The gradient is not changed, unless it is in
        `intake`, which saves memory.
        """
        self._resting = resting
        scale = 1.0
        if self.clip_norm is not None:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))  # squares of float32 may overflow
            scale = min(1.0, self.clip_norm / max(norm, 1e-30))
        gradient = gradient if scale == 1.0 else gradient * scale
        step = self._adam(gradient) if self.second_moment else self._sgd(gradient)
        v = torch.add(step, self.residual, alpha=self.decay, out=self._copy_of("residual"))
        for where in resting:
            v[where] = 0
        return v

    def is_finite(self, v: Tensor) -> bool:
        """Whether the pending state is: v, from `accumulate`, and Adam's second moment, whose squares may overflow."""
        total = v.sum()
        if "second_moment" in self._kept:
            total = total + self._pending["second_moment"].sum()
        return bool(torch.isfinite(total))

    def buffers(self) -> dict[str, Tensor]:
        """The vectors that are kept from round to round, each of shape (N,), by name."""
        return dict(self._kept)

    def _sgd(self, gradient: Tensor) -> Tensor:
        if self.momentum_buffer is None:
            return gradient
        return torch.add(gradient, self.momentum_buffer, alpha=self.momentum, out=self._copy_of("momentum"))

    def _adam(self, gradient: Tensor) -> Tensor:
        assert self.second_moment_buffer is not None
        first, number = gradient, self.updates + 1
        second = torch.mul(self.second_moment_buffer, self.second_moment, out=self._copy_of("second_moment"))
        second.addcmul_(gradient, gradient, value=1 - self.second_moment)
        if self.momentum_buffer is not None:
            first = torch.lerp(self.momentum_buffer, gradient, 1 - self.momentum, out=self._copy_of("momentum"))
        deviation = (second / (1 - self.second_moment**number)).sqrt_().add_(EPSILON)
        return torch.div(first, deviation, out=deviation).div_(1 - self.momentum**number)

    def settle(self, piece: Piece) -> None:
        """Take what was sent off the pending residual.

        Selected coordinates lose SGD's momentum (factor masking) unless `low_pass` is below 1, dense ones keep it.
        """
        residual, where = self._pending["residual"], piece.where
        if isinstance(where, slice):
            residual[where] -= piece.values
            return
        if self.keep_loss:
            residual[where] -= piece.values
        else:
            residual[where] = 0
        if self.momentum and self.low_pass == 1 and not self.second_moment:
            self._pending["momentum"][where] = 0

    def commit(self) -> None:
        """Make the pending state the state."""
        pending = self._pending
        for where in self._resting:
            pending["residual"][where] += self.residual[where]
            for name in pending.keys() - {"residual"}:
                pending[name][where] = self._kept[name][where]
        if self.low_pass < 1:
            torch.lerp(self.residual, pending["residual"], self.low_pass, out=pending["residual"])
        self._kept, self._pending = {name: pending[name] for name in self._kept}, self._kept  # in the same order
        self.updates += 1
