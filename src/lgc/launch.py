"""Ranks on this machine, or this process as one rank of a torchrun job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lgc.train import Settings, train


class RankFailedError(Exception):
    """A rank of a local job failed; the message is its last line, `details` its traceback."""

    def __init__(self, rank: int, details: str) -> None:
        super().__init__(f"rank {rank}: {details.strip().splitlines()[-1]}")
        self.details = details


def under_torchrun() -> bool:
    """Whether a launcher has set the variables of torch's env:// rendezvous."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def run_in_job(settings: Settings, out: Path, timeout: timedelta) -> None:
    """Train as the one rank that this process is."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device, backend = _pick_device(local_rank, local_world_size)
    if local_rank == 0:
        settings.load_data()  # decodes into the cache that the other ranks of this machine map
    dist.init_process_group(backend, timeout=timeout)
    dist.barrier()
    _train_and_leave(settings, out, device)


def run_locally(settings: Settings, out: Path, timeout: timedelta) -> None:
    """Train with `settings.world_size` ranks on this machine.

    Raises:
        ValueError, OSError: if the data is missing or malformed, before any rank starts.
        RankFailedError: if a rank failed; the others have been stopped.
    """
    settings.load_data()  # decodes into the cache that the ranks map
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp_context = mp.get_context("forkserver")
    mp_context.set_forkserver_preload(["lgc.launch"])  # torch is imported once, not in every rank
    ranks = mp.start_processes(
        _local_rank,
        (settings, out, timeout, store.port),
        nprocs=settings.world_size,
        join=False,
        start_method="forkserver",
    )
    try:
        while not ranks.join():
            pass
    except mp.ProcessRaisedException as error:
        raise RankFailedError(error.error_index, str(error)) from None
    except mp.ProcessExitedException as error:
        raise RankFailedError(error.error_index, str(error)) from None
    finally:
        for process in ranks.processes:
            process.terminate()
        for process in ranks.processes:
            process.join()


def _local_rank(rank: int, settings: Settings, out: Path, timeout: timedelta, port: int) -> None:
    device, backend = _pick_device(rank, settings.world_size)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.world_size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=settings.world_size, timeout=timeout)
    _train_and_leave(settings, out, device)


def _train_and_leave(settings: Settings, out: Path, device: torch.device) -> None:
    try:
        train(settings, out, device)
    finally:
        dist.destroy_process_group()


def _pick_device(local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """NCCL where every rank has a GPU of its own, else gloo: on shared GPUs or on the CPU."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device, "nccl" if local_world_size <= gpus else "gloo"


Runner = Callable[[Settings, Path, timedelta], None]
