"""Which optimizers step with a model's parameters, whoever made them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The ids of all parameters that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def watch_steps(model: nn.Module, parameters: Iterable[Tensor], before: Callable[[Optimizer], None]) -> None:
    """Call `before(optimizer)` before every step of any optimizer of torch's kind that has one of the parameters.

    Args:
        model: that has them; the watch ends with it.
        parameters: to look for.
        before: a method, whose object is not kept alive.
    """
    watched = {id(parameter) for parameter in parameters}
    method = weakref.WeakMethod(before)

    def look(optimizer: Optimizer, _: Any, __: Any) -> None:
        call = method()
        if call is not None and not watched.isdisjoint(parameters_of(optimizer)):
            call(optimizer)

    weakref.finalize(model, register_optimizer_step_pre_hook(look).remove)
