"""Recipes and their parts: metrics and learning-rate schedules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgc_lab.recipes.data import Data, Split

WARMUP = 0.1  # fraction of the run over which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Number that says how good a model is."""

    name: str  # for tables and files
    sums: Callable[[Tensor, Tensor], Tensor]  # of outputs and targets; what may be added up over batches and ranks
    value: Callable[[Tensor], float]  # of those sums
    better: Literal["higher", "lower"] = "higher"


def _count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    correct = (outputs.argmax(dim=1) == targets).sum()
    return torch.stack([correct, torch.tensor(len(targets), device=correct.device)]).double()


ACCURACY = Metric(name="accuracy", sums=_count_correct, value=lambda sums: float(100 * sums[0] / sums[1]))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Describes a training run but for the scheme.

    `model` makes a new model from torch's default generator, given the name of a backbone if the recipe has some.
    `data` reads the data set at a path (None: the recipe's own) with the first samples of the training data only (None:
    all); it raises ValueError or OSError where that fails. The first call decodes into a cache, later ones map it into
    memory. What the optimizer is given is for uncompressed training.
    """

    name: str
    summary: str
    model: Callable[..., nn.Module]
    data: Callable[[str | None, int | None], Data]
    memory_format: torch.memory_format = torch.contiguous_format  # channels_last takes inputs of four dimensions
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy  # of outputs and targets, a scalar
    metric: Metric = ACCURACY  # on the test data
    batch_size: int  # per rank, as the next two
    least_batch_size: int = 1
    evaluation_batch: int = 512  # samples that are evaluated at once
    epochs: int  # over the training data, all ranks together
    optimizer: Literal["sgd", "adamw"] = "sgd"  # AdamW decays tensors of two or more dimensions only
    learning_rate: float
    momentum: float = 0.9  # the first beta of AdamW
    weight_decay: float
    learning_rate_factor: Callable[[float], float]  # by progress in [0, 1)
    backbones: tuple[str, ...] = ()  # names that `model` accepts; the first is the default
    scheme_defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments that suit the length of this run

    def make_model(self, device: torch.device) -> nn.Module:
        """Make a new model on a device, in the recipe's memory format."""
        model = self.model()
        model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's has them apart
        return model

    def make_batch(
        self, split: Split, indices: Tensor, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Make inputs and targets of these samples, see `Split.batch`, on a device and in the recipe's format."""
        inputs, targets = split.batch(indices, generator)
        return inputs.to(device, memory_format=self.memory_format), targets.to(device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, samples: Tensor, device: torch.device) -> Tensor:
        """Add up the metric's sums over these samples; the model is in evaluation mode from then on."""
        model.eval()
        parts = []
        for indices in samples.split(self.evaluation_batch):
            inputs, targets = self.make_batch(split, indices, None, device)
            parts.append(self.metric.sums(model(inputs).float(), targets))
        return torch.stack(parts).sum(dim=0)


def warmup_and_cosine(progress: float) -> float:
    """Rises linearly, then falls by half a cosine to zero. Source: Loshchilov and Hutter, SGDR, arXiv 1608.03983."""
    if progress < WARMUP:
        return (progress + 0.01) / (WARMUP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def step_decay(*milestones: float, warmup: float = 0.0) -> Callable[[float], float]:
    """Make a schedule: a linear rise over the fraction `warmup` of the run, then a tenth from each milestone on."""

    def factor(progress: float) -> float:
        if progress < warmup:
            return (progress + 0.1 * warmup) / (1.1 * warmup)
        return float(0.1 ** sum(progress >= milestone for milestone in milestones))

    return factor


def poly_decay(power: float) -> Callable[[float], float]:
    """Make the schedule (1 - progress)^power. Source: Chen et al., DeepLab, arXiv 1606.00915."""
    return lambda progress: float((1 - progress) ** power)
