"""Gradients of a plain module, exchanged right before the optimizer uses them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lgc.caller import Caller
from lgc.comm.transport import Transport
from lgc.schemes import RoundScheme
from lgc.synchronizer import Policy, Synchronizer


class OptimizedGradients(Caller):
    """Exchanges a plain module's gradients right before the optimizer uses them.

    Args:
        parameters: by name.
        scheme: how.
        transport: between the ranks.
        policy: what is done when something is wrong.
    """

    synchronizer: Synchronizer

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], scheme: RoundScheme, transport: Transport, policy: Policy
    ) -> None:
        self._parameters = parameters
        replicas = {f"parameter {name}": parameter for name, parameter in parameters.items()}
        self.synchronizer = Synchronizer(scheme, parameters, transport, policy, replicas)

    @torch.no_grad()
    def exchange_gradients(self) -> None:
        """Replace every gradient by its mean over the ranks; a collective.

        A gradient that is zero throughout is none, and neither is that of a frozen parameter: it rests on this rank.
        Where the mean is zero throughout, no rank's optimizer touches the parameter.

        Raises:
            ValueError: a gradient is sparse.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"lgc: the gradient of {name!r} is sparse; make it with sparse=False, or leave out the start of "
                    "local steps, start_steps=0."
                )
        gradients = {
            name: parameter.grad
            if parameter.requires_grad and parameter.grad is not None
            else torch.zeros_like(parameter)
            for name, parameter in self._parameters.items()
        }
        means = self.synchronizer.synchronize(gradients, self.step, resting=all_zero(gradients))
        unmoved = set(all_zero(means))
        for name, parameter in self._parameters.items():
            if name in unmoved or not parameter.requires_grad:
                parameter.grad = None
            elif parameter.grad is None:  # what another rank used, or what feedback still owed
                parameter.grad = means[name].to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(means[name])
        self.step += 1


def all_zero(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have nothing but zeros."""
    nonzero = torch.stack([tensor.any() for tensor in tensors.values()]).tolist()  # one wait for the device
    return [name for name, has_others in zip(tensors, nonzero, strict=True) if not has_others]
