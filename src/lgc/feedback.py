"""What a rank still owes: momentum correction and error feedback."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Values that a rank contributed at some places of the flat vector, as the other ranks decode them.

    `where` is a slice (dense) or a vector of indices (selected); `values` has one number for each.
    """

    where: slice | Tensor
    values: Tensor


class Feedback:
    """Momentum u and residual v of one rank, both of shape (N,).

        u = m * u + g;  v = v + u

    A round works on pending copies: `accumulate`, then `settle` for everything that is sent, then `commit`.
    A round that is abandoned before `commit` has changed nothing. With `keep_loss=False` what the codec lost of what
    was sent is lost (the paper's way). Source: DGC, sections 3.1 and 3.2.

    With `low_pass=b` below 1 the residual takes only a part b of every change, v = v_before + b * (v - v_before), so
    that what has accumulated at a coordinate leaves over several rounds and not in one; momentum is then never
    masked. Source of the filter: ScaleCom, section 3, arXiv 2104.11125, there without momentum.
    """

    def __init__(
        self,
        size: int,
        *,
        momentum: float,
        clip_norm: float | None,
        keep_loss: bool,
        low_pass: float,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.momentum = momentum
        self.clip_norm = None if clip_norm is None else clip_norm / math.sqrt(world_size)
        self.keep_loss = keep_loss
        self.low_pass = low_pass
        self.residual = torch.zeros(size, device=device)
        self.momentum_buffer = torch.zeros(size, device=device) if momentum else None
        self._pending_residual = torch.empty_like(self.residual)
        self._pending_momentum = None if self.momentum_buffer is None else torch.empty_like(self.residual)

    def accumulate(self, gradient: Tensor) -> Tensor:
        """The pending residual v after taking in the local gradient, shape (N,); it may be read until `settle`."""
        scale = 1.0
        if self.clip_norm is not None:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))  # squares of float32 may overflow
            scale = min(1.0, self.clip_norm / max(norm, 1e-30))
        increment = gradient if scale == 1.0 else gradient * scale
        if self.momentum_buffer is not None and self._pending_momentum is not None:
            increment = torch.add(increment, self.momentum_buffer, alpha=self.momentum, out=self._pending_momentum)
        return torch.add(self.residual, increment, out=self._pending_residual)

    def settle(self, piece: Piece) -> None:
        """Take what was sent off the pending residual.

        Selected coordinates lose their momentum (factor masking) unless `low_pass` is below 1, dense ones keep it.
        """
        if isinstance(piece.where, slice):
            self._pending_residual[piece.where] = 0
            return
        if self.keep_loss:
            self._pending_residual[piece.where] -= piece.values
        else:
            self._pending_residual[piece.where] = 0
        if self._pending_momentum is not None and self.low_pass == 1:
            self._pending_momentum[piece.where] = 0

    def commit(self) -> None:
        """Make the pending state the state."""
        if self.low_pass < 1:
            torch.lerp(self.residual, self._pending_residual, self.low_pass, out=self._pending_residual)
        self.residual, self._pending_residual = self._pending_residual, self.residual
        self.momentum_buffer, self._pending_momentum = self._pending_momentum, self.momentum_buffer
