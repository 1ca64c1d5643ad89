"""Adam's second moments under local steps, as if a rank's own batch were that of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

SECOND_MOMENT = "exp_avg_sq"  # in torch's state of a parameter


class MomentsOfAll:
    """Keeps, in Adam's state, what the mean gradient of K ranks varies by, of which a rank sees only its own.

    Where gradients are mostly noise, that of the mean has a K-th of the square of a rank's own. A rank that goes by its
    own steps too short by the root of K, and divides by an average over K times fewer samples. So in every step

        v = (1 - (1 - beta_2) / K) v + (1 - beta_2) / K g^2 / K      in place of v = beta_2 v + (1 - beta_2) g^2

    from which the next step begins: in the step itself, v is torch's. The first averages are plain ones, of all steps
    so far, as long as these are fewer than K / (1 - beta_2).

    Args:
        ranks: K.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._before: dict[Tensor, tuple[float, Tensor]] = {}  # of each parameter, the step and the second moment

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what an optimizer's step will change."""
        self._before = {
            parameter: (float(state["step"]), state[SECOND_MOMENT].clone())
            for parameter, state in optimizer.state.items()
            if SECOND_MOMENT in state
        }

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Make the second moments those of all ranks, where the step has changed them."""
        before, self._before = self._before, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if SECOND_MOMENT in (state := optimizer.state.get(parameter, {})):
                    self._correct(state, group["betas"][1], before.get(parameter))

    def _correct(self, state: dict[str, Any], beta: float, before: tuple[float, Tensor] | None) -> None:
        step, v = float(state["step"]), state[SECOND_MOMENT]
        if before is not None and before[0] == step:  # no gradient, or skipped
            return
        new = 1 - beta**step  # Adam's v is smaller than what it stands for by this
        share = max((1 - beta) / (self._ranks * new), 1 / step)
        if before is not None:
            v.sub_(before[1], alpha=beta).clamp_(min=0)  # (1 - beta_2) g^2
        v.mul_(new * share / (self._ranks * (1 - beta)))
        if before is not None and before[0] > 0:
            v.add_(before[1], alpha=new * (1 - share) / (1 - beta ** before[0]))


def require_adam(optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError for optimizers whose second moments are kept in another way."""
    for optimizer in optimizers:
        adam = isinstance(optimizer, Adam)
        if not adam or any(group["amsgrad"] for group in optimizer.param_groups):
            kind = type(optimizer).__name__ + ("(amsgrad=True)" if adam else "")
            raise ValueError(
                f'LocalSteps(second_moments="all") is for torch.optim.Adam and AdamW without amsgrad, got {kind}; use '
                'second_moments="own", which is for any optimizer.'
            )
