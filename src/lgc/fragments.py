"""Parameters that are exchanged together under local steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lgc.comm.transport import Transport
from lgc.gradients import all_zero
from lgc.rounds.schedule import Schedule
from lgc.schemes import Dense, LocalSteps
from lgc.sites import Site
from lgc.synchronizer import Policy, Synchronizer


class Fragment:
    """Parameters that are exchanged together: their anchor, and the outer optimizer that moves it.

    What is by name here is of this rank's part of the parameters, which is all of them in a site of one rank.

    Args:
        parameters: by name.
        scheme: how they are exchanged.
        site: whose ranks have the parameters together.
        transport: between the sites.
        policy: what is done when something is wrong.
        others: what else all ranks must have the same of, by name.

    Attributes:
        anchor: where all ranks were after the last round, by name, float32 or wider.
        momentum: of the outer optimizer, like the anchor; empty if it has none.
        is_ahead: whether this rank has begun the present round ahead of the anchor.
        rounds: number of rounds begun.
        step: of the optimizer, at the last of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        scheme: LocalSteps,
        site: Site,
        transport: Transport,
        policy: Policy,
        others: Mapping[str, Tensor],
    ) -> None:
        self.parameters = dict(parameters)
        self.site = site
        self.anchor = {name: _wide(part) for name, part in self.part().items()}
        self._outer_lr, self._outer_momentum = scheme.outer
        moved = self.anchor if self._outer_momentum else {}
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in moved.items()}
        self._ahead, self.is_ahead = scheme.ahead, False
        self.rounds = 0
        self.step = scheme.start_steps
        self._others = others
        self._replicas = {f"anchor of {name}": tensor for name, tensor in self.anchor.items()} | site.part(others)
        self.synchronizer = Synchronizer(scheme.exchange, self.anchor, transport, policy, self._replicas, unit="round")
        aggregator = self.synchronizer.aggregator
        aggregator.feedback.decay = scheme.decay
        if isinstance(scheme.exchange, Dense):
            aggregator.schedule = Schedule(1.0)  # rounds are what compresses

    def part(self) -> dict[str, Tensor]:
        """This rank's own weights, by name."""
        return self.site.part(self.parameters)

    def look(self) -> None:
        """Take for the comparison what all ranks must have the same of, as it is now."""
        self._replicas |= self.site.part(self._others)
        self.synchronizer.look(self.rounds)

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights, which are the same on all ranks, as the anchor."""
        for name, own in self.part().items():
            self.anchor[name].copy_(own)

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """What this rank has moved since the last round, `origin - weights`, by name."""
        origin = self._origin()
        return {name: origin[name].to(own.dtype) - own.to(origin[name].dtype) for name, own in self.part().items()}

    def _origin(self) -> dict[str, Tensor]:
        """Where this rank has begun the round, by name: at the anchor, or ahead of it by some of what it still owes."""
        if not self.is_ahead:
            return self.anchor
        aggregator = self.synchronizer.aggregator
        owed = aggregator.layout.by_name(aggregator.feedback.residual)
        return {name: anchor - self._ahead * owed[name] for name, anchor in self.anchor.items()}

    @torch.no_grad()
    def apply(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor] | None, *, last: bool = False) -> None:
        """Move the anchor by the mean, and the weights to it or ahead of it; a collective inside the site.

        Args:
            mean: of what was moved, by name.
            before: the weights when the round began: what they have moved since then is kept. None keeps nothing.
            last: whether all ranks are to have the same weights now.
        """
        unmoved = self.site.common(all_zero(mean), mean)
        for name, anchor in self.anchor.items():
            if name not in unmoved:  # the outer momentum alone does not move what no rank has
                anchor.sub_(self._outer_step(name, mean[name], rests=not self.parameters[name].requires_grad))
        self.is_ahead = self._ahead > 0 and not last
        weights = self._origin()
        if before is not None:
            own = self.part()
            weights = {name: each + (own[name].to(each.dtype) - before[name]) for name, each in weights.items()}
        self.site.fill(self.parameters, weights)

    def come_back(self) -> None:
        """Have the anchor as the weights, where this rank has not moved since the last round; inside the site alike."""
        self.is_ahead = False
        self.site.fill(self.parameters, self.anchor)

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
