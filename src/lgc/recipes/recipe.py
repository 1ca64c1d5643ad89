"""What a recipe consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Data(NamedTuple):
    """Inputs and targets; the first dimension counts the samples."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is; higher is better.

    Attributes:
        name: for tables and files.
        sums: of outputs and targets, a vector that may be added up over batches and ranks.
        value: the metric from those sums.
    """

    name: str
    sums: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run but for the scheme.

    Attributes:
        name, summary: for the command line.
        model: a new model, initialised from torch's default generator.
        data: reads the data set; raises ValueError or OSError where that fails.
        loss: of outputs and targets, a scalar.
        metric: on the test data.
        batch_size: per rank.
        epochs: over the training data, all ranks together.
        learning_rate, momentum, weight_decay: of SGD, for uncompressed training.
        learning_rate_factor: by progress in [0, 1).
        augment: changes a batch of training inputs, with a generator.
        scheme_defaults: arguments of schemes that suit the length of this run.
    """

    name: str
    summary: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    batch_size: int
    epochs: int
    learning_rate: float
    momentum: float
    weight_decay: float
    learning_rate_factor: Callable[[float], float]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    scheme_defaults: Mapping[str, Any] = field(default_factory=dict)


def _count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    correct = (outputs.argmax(dim=1) == targets).sum()
    return torch.stack([correct, torch.tensor(len(targets), device=correct.device)]).double()


ACCURACY = Metric("accuracy", _count_correct, lambda sums: float(100 * sums[0] / sums[1]))
