"""Random streams of a run, and the batches of the training data that each rank reads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lgc_lab.recipes import Data
from lgc_lab.training.settings import Settings


class Stream(IntEnum):
    """Names what random numbers are for. The values are part of what a seed means: new streams go to the end."""

    MODEL = 0  # dropout and the like: of a rank, and after a change of their number of a step too
    SHUFFLE = 1  # the order of the training data: of an epoch
    AUGMENTATION = 2  # what is done to the samples of a batch: of a step and a rank


def derive(seed: int, stream: Stream, *key: int) -> int:
    """Derive the seed of one generator, in 0 .. 2^64 - 1, from the run's and what the generator is for.

    Different streams and keys (such as a step and a rank, each in 0 .. 2^32 - 1) give independent generators, the same
    on every machine and in every release: numpy documents `SeedSequence` as stable,
    https://numpy.org/doc/stable/reference/random/bit_generators/.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *key))
    return int(sequence.generate_state(1, np.uint64)[0])


def batches(
    settings: Settings, data: Data, total: int, device: torch.device, *, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches of the steps from `start` to `total`, one ahead of what has been asked for.

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
