"""Which optimizers step with a model's parameters, whoever made them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_Watch = tuple[set[int], "weakref.WeakMethod[Callable[[Optimizer], None]]"]  # ids of parameters, and what is called

_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()


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
    _watches[model] = {id(parameter) for parameter in parameters}, weakref.WeakMethod(before)
    _look_at_every_step()


@functools.cache
def _look_at_every_step() -> None:
    # Once and for good: torch fails if a hook is removed while it calls them, as collecting a model then would.
    register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, _: Any, __: Any) -> None:
    if not _watches:
        return
    own = parameters_of(optimizer)
    for watched, method in list(_watches.values()):
        call = method()
        if call is not None and not watched.isdisjoint(own):
            call(optimizer)
