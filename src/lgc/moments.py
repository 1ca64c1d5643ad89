"""An optimizer's moments under local steps, as if a rank's own batch were that of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lgc.fragments import Fragment

FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"  # in torch's state of a parameter, for Adam
MOMENTUM = "momentum_buffer"  # for SGD
MOST = 4.0


def has_first_moments(optimizer: Optimizer) -> bool:
    """Whether it has a momentum, and it is known how far that moves the weights."""
    of_sgd = isinstance(optimizer, SGD) and any(group["momentum"] for group in optimizer.param_groups)
    return of_sgd or has_second_moments(optimizer)


def has_second_moments(optimizer: Optimizer) -> bool:
    """Whether it divides by an average of squares."""
    return isinstance(optimizer, Adam) and not any(group["amsgrad"] for group in optimizer.param_groups)


@torch.no_grad()
def take_first_moments(
    fragment: Fragment,
    moved: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    share: float,
) -> None:
    """Have this rank go on by the momentum of all ranks, as far as a round tells; a collective inside the site.

    With learning rate lr a step moves the weights by lr m / d, where d is Adam's denominator, or 1 for SGD. So what all
    ranks' m were in the mean over a round, this rank's were too but for (mean - moved) d / (sum of lr), which m takes.
    Nesterov's step by SGD moves lr (g + mu m), that is mu / H more in H steps. Where learning rates fall, what is sent
    was moved at higher ones, and the mean counts for as much less.

    Where a rank has moved little, and the mean is much of what was owed before, that is no measure of its momentum: it
    takes at most `MOST` times what it has moved, and nothing where it has not moved at all, as without gradients.

    Args:
        fragment: that the round was of.
        moved: by this rank, by name.
        mean: of what all ranks have moved.
        optimizers: that moved them.
        share: of what the momentum is to take, from 0 to 1.
    """
    apart = {name: _limited(fragment.fallen(name) * mean[name] - each, each) for name, each in moved.items()}
    apart = fragment.site.whole(fragment.parameters, apart)
    named = {parameter: name for name, parameter in fragment.parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in named.keys() & set(group["params"]):
                state, rates = optimizer.state.get(parameter, {}), fragment.rates[named[parameter]]
                m = state.get(FIRST_MOMENT if SECOND_MOMENT in state else MOMENTUM)
                if m is None or not rates > 0:
                    continue
                away = apart[named[parameter]]
                if SECOND_MOMENT not in state:
                    m.add_(away, alpha=share / (rates + group["nesterov"] * group["momentum"] * group["lr"]))
                elif (step := float(state["step"])) > 0:
                    m.addcmul_(away, _denominator(state, group, step), value=share / (rates * _unbiased(group, step)))


def _limited(apart: Tensor, moved: Tensor) -> Tensor:
    """The same, or shorter."""
    length, most = float(apart.norm()), MOST * float(moved.norm())
    return apart if length <= most else apart * (most / length)


class SecondMoments:
    """Has Adam step by what the mean gradient of K ranks varies by, of which a rank sees only its own.

    Of a gradient's square the mean over K ranks leaves all of the signal and a K-th of the noise. A rank that goes by
    its own steps too short, where that is mostly noise by the root of K, and divides by an average over K times fewer
    samples. But it has another mean, its momentum m, with a share q of the noise; so in every step

        v = (1 - (1 - beta_2) / K) v + (1 - beta_2) / K (a g^2 + (1 - a) m^2),    a = (1 / K - q) / (1 - q) or 0,

    in place of v = beta_2 v + (1 - beta_2) g^2. At first v is the plain mean over all steps, while these are fewer than
    K / (1 - beta_2). All of it is done after the optimizer's step, which may make the gradients itself, and may fail.

    Args:
        ranks: K.
        parameters: whose gradients are of one rank; an optimizer may have others.
    """

    def __init__(self, ranks: int, parameters: Iterable[Tensor]) -> None:
        self._ranks = ranks
        self._parameters = frozenset(parameters)
        self._before: dict[Tensor, tuple[float, Tensor]] = {}  # of each parameter, the step and the second moment

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what an optimizer's step will change."""
        self._before = {
            parameter: (float(state["step"]), state[SECOND_MOMENT].clone())
            for parameter, state in optimizer.state.items()
            if parameter in self._parameters and SECOND_MOMENT in state and state["step"] > 0
        }

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, steps: int | None) -> None:
        """Make the step that was made one by the second moments of all ranks.

        Args:
            optimizer: that made it.
            steps: from round to round, if each makes m common to all ranks; else None.
        """
        before, self._before = self._before, {}
        for group in optimizer.param_groups:
            for parameter in self._parameters.intersection(group["params"]):
                state, old = optimizer.state.get(parameter, {}), before.get(parameter)
                if SECOND_MOMENT in state and state["step"] > (old[0] if old else 0):
                    self._correct(parameter, state, group, old, steps)

    def _correct(
        self,
        parameter: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        old: tuple[float, Tensor] | None,
        steps: int | None,
    ) -> None:
        (beta_1, beta_2), m, v = _betas(group), state[FIRST_MOMENT], state[SECOND_MOMENT]
        step = float(state["step"])  # on a GPU it is waited for
        bias_1, bias = 1 - beta_1**step, 1 - beta_2**step  # m and v are smaller by these than what they stand for
        part = self._part_of_own(beta_1, step, steps)
        share = max((1 - beta_2) / (self._ranks * bias), 1 / step)
        back = m / _denominator(state, group, step)
        if old:
            v.sub_(old[1], alpha=beta_2).clamp_(min=0)  # (1 - beta_2) g^2
        v.mul_(part / (1 - beta_2) * bias * share).addcmul_(m, m, value=(1 - part) / bias_1**2 * bias * share)
        if old:
            v.add_(old[1], alpha=bias * (1 - share) / (1 - beta_2 ** old[0]))
        back.addcdiv_(m, _denominator(state, group, step), value=-1)
        # the step is taken back and made again
        parameter.add_(back, alpha=float(group["lr"]) * _unbiased(group, step))

    def _part_of_own(self, beta: float, step: float, steps: int | None) -> float:
        """How much of g^2 there is in the estimate, from 0 to 1; the rest is m^2."""
        q = _noise_of_own(beta) if steps is None else _noise_of_common(beta, steps, self._ranks)
        q *= (1 + beta**step) / (1 - beta**step)  # m is a mean of fewer steps in the first ones
        return min(max(0.0, (1 / self._ranks - q) / (1 - q)), 1.0) if q < 1 else 1.0


def _denominator(state: Mapping[str, Any], group: Mapping[str, Any], step: float) -> Tensor:
    """What Adam has divided m by in its last step, lr m `_unbiased` / this."""
    divisor: Tensor = state[SECOND_MOMENT].sqrt().add_(group["eps"] * math.sqrt(1 - _betas(group)[1] ** step))
    return divisor


def _unbiased(group: Mapping[str, Any], step: float) -> float:
    """What Adam corrects the bias of both moments with."""
    beta_1, beta_2 = _betas(group)
    return math.sqrt(1 - beta_2**step) / float(1 - beta_1**step)


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    """Adam's, which may be tensors."""
    beta_1, beta_2 = group["betas"]
    return float(beta_1), float(beta_2)


def _noise_of_own(beta: float) -> float:
    """The share of a gradient's noise, as variance, that is in a rank's momentum."""
    return (1 - beta) / (1 + beta)


@cache
def _noise_of_common(beta: float, steps: int, ranks: int) -> float:
    """The same, in the mean over a round, where at its beginning every rank has taken the momentum of all."""
    own = _noise_of_own(beta)
    left = sum(((1 - beta) * beta**age - (1 - beta ** (age + 1)) / steps) ** 2 for age in range(steps))
    kept = sum(beta ** (2 * step) for step in range(1, steps + 1)) / steps
    return own * (1 - kept) + (own / ranks + left) * kept
