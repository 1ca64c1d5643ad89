"""Where the model that `lgc plan` measures comes from: a recipe, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lgc.choice.profile import Job, stand_in, wrap
from lgc_lab.recipes import find_object
from lgc_lab.training.loop import make_optimizer
from lgc_lab.training.settings import Settings

# Makes the job, in every rank of a group, with so large buckets of DDP.
JobSource = Callable[[torch.device, dist.ProcessGroup, int | None], Job]


@dataclass(frozen=True)
class RecipeJob:
    """A recipe with the first batch of its data."""

    settings: Settings

    def __call__(self, device: torch.device, group: dist.ProcessGroup, bucket_cap_mb: int | None) -> Job:
        recipe = self.settings.resolve_recipe()
        ddp = wrap(recipe.make_model(device), group, bucket_cap_mb=bucket_cap_mb)
        train = self.settings.load_data().train
        generator = torch.Generator().manual_seed(0)
        inputs, targets = recipe.make_batch(train, torch.arange(recipe.batch_size), generator, device)

        def loss() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
                return recipe.loss(ddp(inputs), targets)

        return Job(ddp, loss, partial(make_optimizer, replace(recipe, learning_rate=0.0), ddp.module))


@dataclass(frozen=True)
class FunctionJob:
    """A function `module:name` without arguments that returns a model and its loss on one batch.

    The loss is a function of the model, which is on the device that `torch.get_default_device()` has in there.
    """

    text: str

    def __call__(self, device: torch.device, group: dist.ProcessGroup, bucket_cap_mb: int | None) -> Job:
        with device:
            model, loss = find_object("model", self.text)()
        ddp = wrap(model.to(device), group, bucket_cap_mb=bucket_cap_mb)
        return Job(ddp, partial(loss, ddp), partial(stand_in, ddp))
