"""Fixtures of the whole suite."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from ranks import RankPool, Ranks

torch.set_num_threads(1)
settings.register_profile("lgc", print_blob=True)  # a failure prints what reproduces it, beside the example
settings.load_profile("lgc")


# In a suite that a shell has started in the background SIGINT is ignored, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The processes behind `ranks`, started with the first test that needs them."""
    pool = RankPool()
    yield pool
    pool.kill()


@pytest.fixture(scope="session")
def ranks(rank_pool: RankPool) -> Callable[[int], Ranks]:
    """`ranks(world_size).run(function, *args)`: `function(rank, world_size, *args)` on real gloo ranks."""
    return lambda world_size: Ranks(rank_pool, world_size)
