"""Ranks on this machine, or this process as one rank of a torchrun job."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver, parent_process
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lgc.comm.transport import Transport
from lgc_lab.launch.network import Network
from lgc_lab.training.run_folder import claim, is_to_be_overwritten, occupied
from lgc_lab.training.train import Output, Settings, notify, train

DATA_TIMEOUT = timedelta(hours=6)  # the first rank of each machine may have a data set to fetch and to decode
STORE_PORT = 29500  # in a namespace of its own, where nobody else listens


class RankFailedError(Exception):
    """A rank of a local job failed; the message is its last line, `details` its traceback."""

    def __init__(self, rank: int, details: str) -> None:
        super().__init__(f"rank {rank}: {details.strip().splitlines()[-1]}")
        self.details = details


def under_torchrun() -> bool:
    """Whether a launcher has set the variables of torch's env:// rendezvous."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def run_in_job(settings: Settings, output: Output, timeout: timedelta, *, overwrite: bool) -> bool:
    """Train as the one rank that this process is; False if the run had finished before.

    An older run is overwritten once; after restarts by torchrun (--max-restarts) the new one goes on.

    Raises:
        ValueError, OSError: on rank 0 if the folder has a run of other settings or one that is going on, or on the
            first rank of a machine if the data is missing or malformed.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_first = os.environ["RANK"] == "0"
    with occupied(output.folder) if is_first else contextlib.nullcontext():
        if is_first:
            _warn_of_stale_store()
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        overwrite = is_first and overwrite and is_to_be_overwritten(output.folder, first_start=first_start)
        device, backend = pick_device(local_rank, local_world_size)
        unfinished = torch.ones((), dtype=torch.int64, device=device)
        if is_first and not overwrite:  # before the others are met: if this raises, they end silently
            unfinished *= claim(output.folder, settings.configuration(), overwrite=False)
        dist.init_process_group(backend, timeout=timeout)
        assert dist.group.WORLD is not None
        transport = Transport(dist.group.WORLD, device)
        try:
            unfinished = transport.broadcast(unfinished, "agreement", source=0)  # NCCL connects while no rank is busy
            if unfinished:
                transport.set_timeout(DATA_TIMEOUT.total_seconds())
                _prepare(settings, output, transport, local_rank, overwrite=overwrite)
                transport.set_timeout(timeout.total_seconds())
                train(settings, output, device)
        finally:
            dist.destroy_process_group()
    return bool(unfinished)


def _prepare(settings: Settings, output: Output, transport: Transport, local_rank: int, *, overwrite: bool) -> None:
    """Decode into the cache that the other ranks of this machine map, then remove what is to be overwritten."""
    if local_rank == 0:
        with _announced(transport):
            settings.load_data()
    transport.all_gather(torch.zeros(1), "agreement")  # nothing is removed before all machines have the data
    if overwrite:
        with _announced(transport):
            claim(output.folder, settings.configuration(), overwrite=True)
    transport.all_gather(torch.zeros(1), "agreement")


@contextlib.contextmanager
def _announced(transport: Transport) -> Iterator[None]:
    """Tell the other ranks of an error, which then wait no longer."""
    try:
        yield
    except Exception as error:
        transport.announce(error)
        raise


def _warn_of_stale_store() -> None:
    # Restarted ranks find the addresses of the dead ones in the store: pytorch/pytorch#135712.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        notify(
            "WARNING: torchrun cannot restart ranks that share its store. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and "
            "use --standalone or --rdzv-backend c10d."
        )


def run_locally(settings: Settings, output: Output, timeout: timedelta, *, overwrite: bool) -> bool:
    """Train with `settings.world_size` ranks on this machine; False if the run had finished before.

    Raises:
        ValueError, OSError: if the folder has a run of other settings or one that is going on, or the data is missing
            or malformed, before any rank starts.
        RankFailedError: if a rank failed; the others have been stopped.
    """
    with occupied(output.folder):
        if overwrite:  # nothing is removed before the data is there
            settings.load_data()
        if not claim(output.folder, settings.configuration(), overwrite=overwrite):
            return False
        preload("lgc_lab.training.launch")
        settings.load_data()  # decodes into the cache that the ranks map
        start_ranks(train, settings, output, world_size=settings.world_size, timeout=timeout)
        return True


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
    devices, unless one is given.

    Raises:
        RankFailedError: if a rank failed; the others have been stopped.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if network is None else None
    ranks = mp.start_processes(
        _local_rank,
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


def _local_rank(
    rank: int,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    world_size: int,
    timeout: timedelta,
    place: int | Network,
    backend: str | None,
) -> None:
    """One rank; `place` is the port of the launcher's store, or the network whose rank 0 has the store."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    if isinstance(place, Network):
        os.environ["GLOO_SOCKET_IFNAME"] = place.enter(rank)
        store = dist.TCPStore(place.address(0), STORE_PORT, is_master=rank == 0, wait_for_workers=False)
    else:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.TCPStore("127.0.0.1", place, is_master=False)
    device, fitting = pick_device(rank, world_size)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group(backend or fitting, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        function(*arguments, device)
    finally:
        dist.destroy_process_group()


def _end_with_launcher() -> None:
    # A killed launcher stops nothing, and the run that goes on in the folder must be the only one there.
    launcher = parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)


def pick_device(local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """A rank's device and backend: NCCL where every rank has a GPU, else gloo: on shared GPUs or on the CPU."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device, "nccl" if local_world_size <= gpus else "gloo"
