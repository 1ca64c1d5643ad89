"""Momentum correction and error feedback: what a rank still owes."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    A round that is abandoned before `commit` has changed nothing. With `keep_loss=False` what the codec lost of what
    was sent is lost (the paper's way). Source: DGC, sections 3.1 and 3.2.

    With `low_pass=b` below 1 the residual takes only a part b of every change, v = v_before + b * (v - v_before), so
    that what has accumulated at a coordinate leaves over several rounds and not in one; momentum is then never
    masked. Source of the filter: ScaleCom, section 3, arXiv 2104.11125, there without momentum.

    What rests in a round sends nothing and keeps its state, as an optimizer keeps that of a parameter without gradient.

    Attributes:
        decay: what is left of the residual from one round to the next, 1 unless it is set.
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
        self.residual = torch.zeros(size, dtype=torch.float32, device=device)
        self.momentum_buffer = torch.zeros_like(self.residual) if momentum else None
        self.second_moment_buffer = torch.zeros_like(self.residual) if second_moment else None
        self.updates = 0
        self._resting: Sequence[slice] = ()
        self._pending_residual = torch.empty_like(self.residual)
        self._pending_momentum = None if self.momentum_buffer is None else torch.empty_like(self.residual)
        self._pending_second_moment = None if self.second_moment_buffer is None else torch.empty_like(self.residual)

    def accumulate(self, gradient: Tensor, resting: Sequence[slice] = ()) -> Tensor:
        """The pending residual v after taking in the local gradient, shape (N,); it may be read until `settle`.

        It is zero where something is resting, whose gradient must be zero.
        """
        self._resting = resting
        scale = 1.0
        if self.clip_norm is not None:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))  # squares of float32 may overflow
            scale = min(1.0, self.clip_norm / max(norm, 1e-30))
        gradient = gradient if scale == 1.0 else gradient * scale
        step = self._adam(gradient) if self.second_moment else self._sgd(gradient)
        v = torch.add(step, self.residual, alpha=self.decay, out=self._pending_residual)
        for where in resting:
            v[where] = 0
        return v

    def is_finite(self, v: Tensor) -> bool:
        """Whether the pending state is: v, from `accumulate`, and Adam's second moment, whose squares may overflow."""
        total = v.sum()
        if self._pending_second_moment is not None:
            total = total + self._pending_second_moment.sum()
        return bool(torch.isfinite(total))

    def buffers(self) -> dict[str, Tensor]:
        """The vectors that are kept from round to round, each of shape (N,), by name."""
        kept = {
            "residual": self.residual,
            "momentum": self.momentum_buffer,
            "second_moment": self.second_moment_buffer,
        }
        return {name: buffer for name, buffer in kept.items() if buffer is not None}

    def _sgd(self, gradient: Tensor) -> Tensor:
        if self.momentum_buffer is None or self._pending_momentum is None:
            return gradient
        return torch.add(gradient, self.momentum_buffer, alpha=self.momentum, out=self._pending_momentum)

    def _adam(self, gradient: Tensor) -> Tensor:
        first, number = gradient, self.updates + 1
        if self.momentum_buffer is not None and self._pending_momentum is not None:
            first = torch.lerp(self.momentum_buffer, gradient, 1 - self.momentum, out=self._pending_momentum)
        assert self.second_moment_buffer is not None
        assert self._pending_second_moment is not None
        second = torch.mul(self.second_moment_buffer, self.second_moment, out=self._pending_second_moment)
        second.addcmul_(gradient, gradient, value=1 - self.second_moment)
        deviation = (second / (1 - self.second_moment**number)).sqrt_().add_(EPSILON)
        return torch.div(first, deviation, out=deviation).div_(1 - self.momentum**number)

    def settle(self, piece: Piece) -> None:
        """Take what was sent off the pending residual.

        Selected coordinates lose SGD's momentum (factor masking) unless `low_pass` is below 1, dense ones keep it.
        """
        if isinstance(piece.where, slice):
            self._pending_residual[piece.where] -= piece.values
            return
        if self.keep_loss:
            self._pending_residual[piece.where] -= piece.values
        else:
            self._pending_residual[piece.where] = 0
        if self._pending_momentum is not None and self.low_pass == 1 and not self.second_moment:
            self._pending_momentum[piece.where] = 0

    def commit(self) -> None:
        """Make the pending state the state."""
        for where in self._resting:
            self._pending_residual[where] += self.residual[where]
            for state, pending in (
                (self.momentum_buffer, self._pending_momentum),
                (self.second_moment_buffer, self._pending_second_moment),
            ):
                if state is not None and pending is not None:
                    pending[where] = state[where]
        if self.low_pass < 1:
            torch.lerp(self.residual, self._pending_residual, self.low_pass, out=self._pending_residual)
        self.residual, self._pending_residual = self._pending_residual, self.residual
        self.momentum_buffer, self._pending_momentum = self._pending_momentum, self.momentum_buffer
        pending = self._pending_second_moment
        self.second_moment_buffer, self._pending_second_moment = pending, self.second_moment_buffer
        self.updates += 1
