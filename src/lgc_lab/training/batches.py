"""What each rank reads: its batches of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lgc_lab.recipes import Data
from lgc_lab.training.seeds import Stream, derive
from lgc_lab.training.settings import Settings


def batches(
    settings: Settings, data: Data, total: int, device: torch.device, *, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of the steps from `start` to `total`, one ahead of what has been asked for.

    Every epoch is one shuffle, dealt out to the ranks. A batch is a function of seed, step and rank alone.
    """
    rank = dist.get_rank()
    recipe, per_epoch = settings.resolve_recipe(), settings.steps_per_epoch(data)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        shuffler = torch.Generator().manual_seed(derive(settings.seed, Stream.SHUFFLE, epoch))
        return torch.randperm(len(data.train), generator=shuffler)[rank :: settings.world_size]

    def load(step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, per_epoch)
        indices = order(epoch)[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        generator = torch.Generator().manual_seed(derive(settings.seed, Stream.AUGMENTATION, step, rank))
        return recipe.make_batch(data.train, indices, generator, device)

    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(load, start)
        for step in range(start, total):
            batch = upcoming.result()
            if step + 1 < total:
                upcoming = loader.submit(load, step + 1)
            yield batch
