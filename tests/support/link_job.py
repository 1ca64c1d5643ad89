"""Two ranks in a network of their own, which meet and then end, raise, or wait to be stopped."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lgc_lab.launch.network import read_counters, temporary_network
from lgc_lab.launch.ranks import start_ranks

LIMIT_S = 120


def job(folder: Path, fate: str) -> None:
    """Start the ranks; their process ids are in `folder`/RANK as soon as they have met."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with temporary_network(2) as network:
        start_ranks(meet, folder, fate, world_size=2, timeout=timedelta(seconds=LIMIT_S), network=network)


def meet(folder: Path, fate: str, device: torch.device) -> None:
    """Be one rank."""
    rank = dist.get_rank()
    before = read_counters()
    total = torch.ones(100_000)
    dist.all_reduce(total)
    after = read_counters()
    assert bool((total == 2).all())
    assert after.sent - before.sent > 200_000  # of 400 kB, some may be on their way
    (folder / f"{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"{rank}.tmp").rename(folder / str(rank))
    dist.barrier()
    if fate == "raise" and rank == 1:
        raise RuntimeError("as told")
    if fate != "end":
        time.sleep(LIMIT_S)


def met(folder: Path) -> list[int]:
    """The process ids of the ranks that have met so far."""
    return [int((folder / str(rank)).read_text()) for rank in range(2) if (folder / str(rank)).exists()]
