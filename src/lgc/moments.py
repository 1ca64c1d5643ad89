"""Adam's second moments under local steps, as if a rank's own batch were that of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"  # in torch's state of a parameter


class MomentsOfAll:
    """Has Adam step by what the mean gradient of K ranks varies by, of which a rank sees only its own.

    Of a gradient's square the mean over K ranks leaves all of the signal and a K-th of the noise. A rank that goes by
    its own steps too short, where that is mostly noise by the root of K, and divides by an average over K times fewer
    samples. But it has another mean, its momentum m, of n = (1 + beta_1) / (1 - beta_1) steps; so in every step

        v = (1 - (1 - beta_2) / K) v + (1 - beta_2) / K (a g^2 + (1 - a) m^2),    a = (n - K) / (K (n - 1)),

    in place of v = beta_2 v + (1 - beta_2) g^2; a is 0 from K = n on. At first v is the plain mean over all steps,
    while these are fewer than K / (1 - beta_2). All of it is done after the optimizer's step, which may make the
    gradients itself, and may fail.

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
            if SECOND_MOMENT in state and state["step"] > 0
        }

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Make the step that was made one by the second moments of all ranks."""
        before, self._before = self._before, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state, old = optimizer.state.get(parameter, {}), before.get(parameter)
                if SECOND_MOMENT in state and state["step"] > (old[0] if old else 0):
                    self._correct(parameter, state, group, old)

    def _correct(
        self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], old: tuple[float, Tensor] | None
    ) -> None:
        (beta_1, beta_2), v, step = group["betas"], state[SECOND_MOMENT], float(state["step"])
        bias = 1 - beta_2**step  # Adam's v is smaller than what it stands for by this
        m = state[FIRST_MOMENT] / (1 - beta_1**step)
        part = _part_of_own(self._ranks, beta_1, step)
        divided = (v / bias).sqrt_().add_(group["eps"]).reciprocal_()
        share = max((1 - beta_2) / (self._ranks * bias), 1 / step)
        if old:
            v.sub_(old[1], alpha=beta_2).clamp_(min=0)  # (1 - beta_2) g^2
        v.mul_(part / (1 - beta_2)).addcmul_(m, m, value=1 - part).mul_(bias * share)
        if old:
            v.add_(old[1], alpha=bias * (1 - share) / (1 - beta_2 ** old[0]))
        divided -= (v / bias).sqrt_().add_(group["eps"]).reciprocal_()
        parameter.addcmul_(m.mul_(group["lr"]), divided)  # the step is taken back and made again, rounded once


def _part_of_own(ranks: int, beta: float, step: float) -> float:
    """How much of g^2 there is in the estimate, from 0 to 1; the rest is m^2."""
    averaged = (1 + beta) / (1 - beta) * (1 - beta**step) / (1 + beta**step)  # steps, fewer in the first ones
    return max(0.0, (averaged - ranks) / (ranks * (averaged - 1))) if averaged > 1 else 1.0
