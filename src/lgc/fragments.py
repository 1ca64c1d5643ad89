"""Parameters that are exchanged together under local steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        ahead: names of what this rank has begun the present round with ahead of the anchor.
        apart: whether some rank may have, the same on all.
        rates: the sum of the optimizer's learning rates since the last round, by name, where it is asked for.
        owed_rates: the same, of the time when what is owed was moved.
        rounds: number of rounds begun.
        step: of the optimizer, at the last of them.
        synchronizer: of its rounds.
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
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self.site = site
        self.anchor = {name: _wide(part) for name, part in self.part().items()}
        self._outer_lr, self._outer_momentum = scheme.outer
        moved = self.anchor if self._outer_momentum else {}
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in moved.items()}
        self._by = scheme.ahead
        self._last_exchange = scheme.start_exchange
        self.ahead: frozenset[str] = frozenset()
        self.apart = False
        self._seen: dict[str, bool] = {}  # whether a parameter was trained, at its optimizer's last step in this round
        self.rates: dict[str, float] = dict.fromkeys(self.parameters, 0.0) if scheme.common_momentum else {}
        self.owed_rates = dict(self.rates)
        self._waiting = scheme.rounds_of_waiting
        self.rounds = 0
        self.step = scheme.start_steps
        self._others = others
        self._replicas = {f"anchor of {name}": tensor for name, tensor in self.anchor.items()} | site.part(others)
        self.synchronizer = Synchronizer(scheme.exchange, self.anchor, transport, policy, self._replicas, unit="round")
        self.synchronizer.aggregator.feedback.decay = scheme.decay
        if isinstance(scheme.exchange, Dense):
            self.synchronizer.aggregator.schedule = Schedule(1.0)  # rounds are what compresses

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
        owed = self.owed() if self.ahead else {}
        return {
            name: anchor - self._by * owed[name] if name in self.ahead else anchor
            for name, anchor in self.anchor.items()
        }

    def owed(self) -> dict[str, Tensor]:
        """This rank's residual, by name."""
        aggregator = self.synchronizer.aggregator
        return aggregator.layout.by_name(aggregator.feedback.residual)

    @torch.no_grad()
    def apply(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> None:
        """Move the anchor by the mean, and the weights to it or ahead of it; a collective inside the site.

        Args:
            mean: of what was moved, by name.
            before: the weights when the round began: what they have moved since then is kept. None keeps nothing.
        """
        at_rest, self._seen = frozenset(self.at_rest()), {}
        unmoved = self.site.common(all_zero(mean), mean)
        for name, anchor in self.anchor.items():
            if name not in unmoved:  # the outer momentum alone does not move what no rank has
                anchor.sub_(self._outer_step(name, mean[name], rests=name in at_rest))
        self.ahead = frozenset(self.parameters.keys() - at_rest) if self._by > 0 else frozenset()
        self.apart = self._by > 0
        weights = self._origin()
        if before is not None:
            own = self.part()
            weights = {name: each + (own[name].to(each.dtype) - before[name]) for name, each in weights.items()}
        self.site.fill(self.parameters, weights)

    def look_at_flags(self, optimizer: Optimizer) -> None:
        """See which parameters an optimizer's step leaves at rest: frozen now, whatever they are at the round.

        As a GAN's loop freezes one network while the other's optimizer steps.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (name := self._names.get(parameter)) is not None:
                    self._seen[name] = parameter.requires_grad

    def at_rest(self) -> list[str]:
        """The parameters that were frozen at their optimizer's last step, or are now if that has made none."""
        return [name for name, each in self.parameters.items() if not self._seen.get(name, each.requires_grad)]

    def add_rates(self, optimizer: Optimizer) -> None:
        """Add the learning rates of an optimizer's step, if they are asked for."""
        if not self.rates:
            return
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            for name in filter(None, map(self._names.get, group["params"])):
                self.rates[name] += rate

    def mix_rates(self) -> None:
        """Take into the rates of what is owed those of this round, as far as what is owed is of this round.

        Where rates rise, that is taken to be all: what was moved at lower ones is little.
        """
        for name, rates in self.rates.items():
            self.owed_rates[name] = max(rates, self.owed_rates[name] + (rates - self.owed_rates[name]) / self._waiting)

    def fallen(self, name: str) -> float:
        """What is left of the rates at which what is sent was moved, from 0 to 1."""
        return self.rates[name] / self.owed_rates[name] if self.owed_rates[name] > 0 else 0.0

    @torch.no_grad()
    def come_together(self, *, keep: bool) -> None:
        """Move the anchor to the mean of where the ranks have begun the round ahead of it, and all there; a collective.

        By the code of the start, whose loss stays in the residual.

        Args:
            keep: leave this rank's weights as they are.
        """
        owed, transport = self.owed(), self.synchronizer.transport
        ahead = {name: self._by * each for name, each in owed.items()}
        synchronizer = Synchronizer(self._last_exchange, self.anchor, transport, Policy(check_every=0), unit="round")
        synchronizer.aggregator.schedule = Schedule(1.0)
        transport.begin(synchronizer.phase(0), steps=-1)  # it is no step of the optimizer
        mean = synchronizer.synchronize(ahead, 0, resting=ahead.keys() - self.ahead)
        left = synchronizer.state_dict()["per_rank"]
        for name, anchor in self.anchor.items():
            anchor.sub_(mean[name])
            if name in self.ahead:
                owed[name].sub_(ahead[name])
            owed[name].add_(left["residual"][name])
            if "server_residual" in left:
                owed[name].add_(left["server_residual"][name])
        self.ahead, self.apart = frozenset(), False
        if not keep:
            self.site.fill(self.parameters, self.anchor)

    def come_back(self) -> None:
        """Have the weights with which the round began, whatever this rank has moved; inside the site alike."""
        self.site.fill(self.parameters, self._origin())

    @torch.no_grad()
    def go_ahead(self, ahead: Iterable[str], before: Mapping[str, Tensor]) -> None:
        """Have begun the round ahead of the anchor, by the residual, where the weights are so by another one.

        Args:
            ahead: names of what is ahead.
            before: the residual by which it was, by name.
        """
        self.ahead = frozenset(ahead)
        self.apart = bool(self.ahead)
        owed, own = self.owed(), self.part()
        for name in self.ahead:
            own[name] = own[name] - self._by * (owed[name] - before[name])
        self.site.fill(self.parameters, own)

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
