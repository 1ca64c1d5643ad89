"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from ranks import RankPool, Ranks

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of all processes that tests start
settings.register_profile("lgc", print_blob=True)  # a failure prints what reproduces it, beside the example
settings.load_profile("lgc")

# The files that take minutes, so that none of them is begun last; xdist gives a whole file to one worker.
LONGEST_FIRST = ("test_ddp", "test_resume", "test_cli", "test_fault_network", "test_fault_grid", "test_schemes")


# In a suite that a shell has started in the background SIGINT is ignored, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave out most cells of tests marked as a grid.

    As many stay as it takes to have every value of every parameter; all others are for `make test-all`.
    """
    places = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    grids: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        alone = item.get_closest_marker("exhaustive") or not item.get_closest_marker("grid")
        if isinstance(item, pytest.Function) and not alone:
            grids[item.nodeid.partition("[")[0]].append(item)
    for cells in grids.values():
        values = {cell.nodeid: {(name, repr(v)) for name, v in cell.callspec.params.items()} for cell in cells}
        missing = set.union(*values.values())
        while missing:
            best = max(cells, key=lambda cell: len(values[cell.nodeid] & missing))
            missing -= values[best.nodeid]
            cells.remove(best)
        for cell in cells:
            cell.add_marker("exhaustive")


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
