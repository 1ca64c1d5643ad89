"""Gradients of a plain module, exchanged right before the optimizer uses them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

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

        A mean that is zero throughout is no gradient, and neither is that of a frozen parameter: no rank's optimizer
        then touches the parameter, whether this rank has used it or not.
        """
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._parameters.items()
        }
        means = self.synchronizer.synchronize(gradients, self.step)
        nonzero = torch.stack([means[name].any() for name in self._parameters]).tolist()  # one wait for the device
        for (name, parameter), moves in zip(self._parameters.items(), nonzero, strict=True):
            if not (moves and parameter.requires_grad):
                parameter.grad = None
            elif parameter.grad is None:  # what another rank used, or what feedback still owed
                parameter.grad = means[name].to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(means[name])
        self.step += 1
