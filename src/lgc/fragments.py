"""Parameters that are exchanged together under local steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lgc.comm.transport import Transport
from lgc.gradients import all_zero
from lgc.rounds.schedule import Schedule
from lgc.schemes import Dense, LocalSteps
from lgc.synchronizer import Policy, Synchronizer


class Fragment:
    """Parameters that are exchanged together: their anchor, and the outer optimizer that moves it.

    Args:
        parameters: by name.
        scheme: how they are exchanged.
        transport: between the ranks.
        policy: what is done when something is wrong.
        replicas: what else all ranks must have the same of, by name.

    Attributes:
        anchor: where all ranks were after the last round, by name, float32 or wider.
        momentum: of the outer optimizer, like the anchor; empty if it has none.
        rounds: number of rounds begun.
        step: of the optimizer, at the last of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        scheme: LocalSteps,
        transport: Transport,
        policy: Policy,
        replicas: Mapping[str, Tensor],
    ) -> None:
        self.parameters = dict(parameters)
        self.anchor = {name: _wide(parameter) for name, parameter in parameters.items()}
        self._outer_lr, self._outer_momentum = scheme.outer
        moved = self.anchor if self._outer_momentum else {}
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in moved.items()}
        self.rounds = 0
        self.step = scheme.start_steps
        replicas = {f"anchor of {name}": tensor for name, tensor in self.anchor.items()} | dict(replicas)
        self.synchronizer = Synchronizer(scheme.exchange, self.anchor, transport, policy, replicas, unit="round")
        aggregator = self.synchronizer.aggregator
        aggregator.feedback.decay = scheme.decay
        if isinstance(scheme.exchange, Dense):
            aggregator.schedule = Schedule(1.0)  # rounds are what compresses

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights, which are the same on all ranks, as the anchor."""
        for name, parameter in self.parameters.items():
            self.anchor[name].copy_(parameter)

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """What this rank has moved since the last round, `anchor - weights`, by name."""
        return {
            name: self.anchor[name].to(own.dtype) - own.to(self.anchor[name].dtype)
            for name, own in self.parameters.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's own weights, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def apply(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> None:
        """Move the anchor by the mean, and the weights to it.

        Args:
            mean: of what was moved, by name.
            before: the weights when the round began: what they have moved since then is kept. None keeps nothing.
        """
        unmoved = set(all_zero(mean))
        for name, parameter in self.parameters.items():
            anchor = self.anchor[name]
            if name not in unmoved:  # the outer momentum alone does not move what no rank has
                anchor.sub_(self._outer_step(name, mean[name], rests=not parameter.requires_grad))
            parameter.copy_(anchor if before is None else anchor + (parameter.to(anchor.dtype) - before[name]))

    def _outer_step(self, name: str, d: Tensor, *, rests: bool) -> Tensor:
        """What the anchor moves by, given the mean d; what is frozen takes d itself, and comes to rest."""
        m = self.momentum.get(name)
        if rests:
            if m is not None:
                m.zero_()
            return d
        if m is not None:
            d = d + self._outer_momentum * m.mul_(self._outer_momentum).add_(d)
        return self._outer_lr * d


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float32, or in float64 if it is that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def fragmented(parameters: Mapping[str, nn.Parameter], number: int) -> list[dict[str, nn.Parameter]]:
    """The parameters in their order, in `number` groups of about the same size."""
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(number)]
    total, before = sum(parameter.numel() for parameter in parameters.values()), 0
    for name, parameter in parameters.items():
        groups[min(int((before + parameter.numel() / 2) * number / max(total, 1)), number - 1)][name] = parameter
        before += parameter.numel()
    if not all(groups):
        raise ValueError(
            f"LocalSteps(fragments=...) must leave no fragment without a tensor, got {number} for {len(parameters)} "
            "tensors, some of which are large; use fewer."
        )
    return groups
