"""The optimizer that goes with a recipe and a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lgc import Scheme
from lgc_lab.recipes import Recipe

ADAM_SECOND_BETA = 0.95  # as for GPT-3: Brown et al., arXiv 2005.14165, appendix B


def make_optimizer(recipe: Recipe, model: nn.Module, scheme: Scheme) -> torch.optim.Optimizer:
    """Make the recipe's; where the scheme has SGD's momentum, the weight decay makes up for acting without one.

    Where the scheme makes Adam's step, what is left of it is SGD.
    """
    if recipe.optimizer == "adamw":
        decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if scheme.makes_adams_step:
            return torch.optim.SGD(groups, lr=recipe.learning_rate)
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, ADAM_SECOND_BETA))
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=0.0 if scheme.corrected_momentum or scheme.makes_adams_step else recipe.momentum,
        weight_decay=recipe.weight_decay / (1 - scheme.corrected_momentum),
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state whose tensors are contiguous, as in checkpoints, and lay them out as their parameters are.

    Where the two differ, as in channels_last, an update takes several times as long.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, of_parameter in optimizer.state.items():
        for name, value in of_parameter.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                of_parameter[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
