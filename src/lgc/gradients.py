"""Gradients of a plain module, exchanged right before the optimizer uses them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lgc.caller import Caller
from lgc.comm.transport import Transport
from lgc.schemes import RoundScheme
from lgc.sites import Site
from lgc.synchronizer import Policy, Synchronizer


class OptimizedGradients(Caller):
    """Exchanges a plain module's gradients right before the optimizer uses them.

    Args:
        parameters: by name.
        scheme: how.
        site: whose ranks have the parameters together, and the same gradients of them.
        transport: between the sites.
        policy: what is done when something is wrong.
    """

    synchronizer: Synchronizer

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        scheme: RoundScheme,
        site: Site,
        transport: Transport,
        policy: Policy,
    ) -> None:
        self._parameters = parameters
        self._site = site
        self._transport = transport
        self._replicas = self._parts_of_parameters()
        self.synchronizer = Synchronizer(scheme, site.part(parameters), transport, policy, self._replicas)

    @torch.no_grad()
    def exchange_gradients(self) -> None:
        """Replace every gradient by its mean over the sites; a collective.

        A gradient that is zero throughout is none, and neither is that of a frozen parameter: it rests on this rank.
        Where the mean is zero throughout, no rank's optimizer touches the parameter. If a gradient of some rank is not
        finite, and the policy is to go on, it touches none on any.

        Raises:
            ValueError: a gradient is sparse.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"lgc: the gradient of {name!r} is sparse; make it with sparse=False, or leave out the start of "
                    "local steps, start_steps=0."
                )
        gradients = self._site.part(
            {
                name: parameter.grad
                if parameter.requires_grad and parameter.grad is not None
                else torch.zeros_like(parameter)
                for name, parameter in self._parameters.items()
            }
        )
        self._site.begin(self.synchronizer.phase(self.step))
        gradients = self._agreed(gradients)
        self._replicas |= self._parts_of_parameters()
        with self._site.together(self.step):
            means = self.synchronizer.synchronize(gradients, self.step, resting=all_zero(gradients))
        unmoved = self._site.common(all_zero(means), means) if self.synchronizer.was_finite else set(means)
        filled = {  # where this rank has none, it is what another used, or what feedback still owed
            name: torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._parameters.items()
        }
        self._site.fill(filled, means)
        for name, parameter in self._parameters.items():
            parameter.grad = filled[name] if parameter.requires_grad and name not in unmoved else None
        self.step += 1

    def _agreed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part, but NaN throughout where that of another rank of its site is not finite.

        A round takes in all parts of a site's gradients, or none.
        """
        if self._site.inside is None:
            return gradients
        finite = all(bool(each.isfinite().all()) for each in gradients.values())
        finite, _ = self._site.agree(self._transport, self.step, finite=finite)
        return gradients if finite else {name: torch.full_like(each, torch.nan) for name, each in gradients.items()}

    def _parts_of_parameters(self) -> dict[str, Tensor]:
        return {f"parameter {name}": part for name, part in self._site.part(self._parameters).items()}


def all_zero(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have nothing but zeros."""
    nonzero = torch.stack([tensor.any() for tensor in tensors.values()]).tolist()  # one wait for the device
    return [name for name, has_others in zip(tensors, nonzero, strict=True) if not has_others]
