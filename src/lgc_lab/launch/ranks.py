"""Start ranks on this machine, each a process of one process group."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver, parent_process
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lgc_lab.launch.network import Network

STORE_PORT = 29500  # in a namespace of its own, where nobody else listens


class RankFailedError(Exception):
    """Rank of a local job that failed; the message is its last line, `details` its traceback."""

    def __init__(self, rank: int, details: str) -> None:
        super().__init__(f"rank {rank}: {details.strip().splitlines()[-1]}")
        self.details = details


def under_torchrun() -> bool:
    """Tell whether a launcher has set the variables of torch's env:// rendezvous."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def pick_device(local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """Pick a rank's device and backend: NCCL where every rank has a GPU, else gloo: on shared GPUs or on the CPU."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device, "nccl" if local_world_size <= gpus else "gloo"


@contextmanager
def process_group(
    timeout: timedelta, local_rank: int, local_world_size: int, *, backend: str | None = None, **rendezvous: Any
) -> Iterator[torch.device]:
    """Be a rank on its device, in the default process group, for as long as the `with` block lasts.

    Ranks find each other by torch's variables of the environment, unless the rendezvous says otherwise.
    """
    device, fitting = pick_device(local_rank, local_world_size)
    dist.init_process_group(backend or fitting, timeout=timeout, **rendezvous)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def place_under_torchrun() -> tuple[int, int]:
    """Read this rank's number among those of its machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def preload(module: str) -> None:
    """Have this module imported for all ranks that will be started, in the background."""
    mp.get_context("forkserver").set_forkserver_preload([module, "torch._dynamo"])
    forkserver.ensure_running()


def start_ranks(
    function: Callable[..., None],
    *arguments: Any,
    world_size: int,
    timeout: timedelta,
    network: Network | None = None,
    backend: str | None = None,
) -> None:
    """Run `function(*arguments, device)` in so many ranks of a process group on this machine, until all are done.

    They talk over loopback or, where there is a network, each from its own namespace; by the backend that fits the
    devices, unless one is given. Raises RankFailedError if a rank failed; the others have been stopped.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if network is None else None
    ranks = mp.start_processes(
        _run_rank,
        (function, arguments, world_size, timeout, store.port if store else network, backend),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    try:
        while not ranks.join():
            pass
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise RankFailedError(error.error_index, str(error)) from None
    finally:
        for process in ranks.processes:
            process.terminate()
        for process in ranks.processes:
            process.join()


def _run_rank(
    rank: int,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    world_size: int,
    timeout: timedelta,
    place: int | Network,
    backend: str | None,
) -> None:
    """Be one rank; `place` is the port of the launcher's store, or the network whose rank 0 has the store."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    if isinstance(place, Network):
        os.environ["GLOO_SOCKET_IFNAME"] = place.enter(rank)
        store = dist.TCPStore(place.address(0), STORE_PORT, is_master=rank == 0, wait_for_workers=False)
    else:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.TCPStore("127.0.0.1", place, is_master=False)
    if torch.cuda.device_count() == 0 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    rendezvous = {"store": store, "rank": rank, "world_size": world_size}
    with process_group(timeout, rank, world_size, backend=backend, **rendezvous) as device:
        function(*arguments, device)


def _end_with_launcher() -> None:
    # A killed launcher stops nothing, and the run that goes on in the folder must be the only one there.
    launcher = parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)
