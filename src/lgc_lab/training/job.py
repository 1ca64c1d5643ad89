"""Train in ranks on this machine, or as the one rank of a torchrun job that this process is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from lgc.comm.transport import Transport
from lgc_lab.folder import occupied
from lgc_lab.launch.ranks import pick_device, preload, start_ranks
from lgc_lab.terminal import notify
from lgc_lab.training.run_folder import claim, is_to_be_overwritten
from lgc_lab.training.settings import Output, Settings
from lgc_lab.training.train import train

DATA_TIMEOUT = timedelta(hours=6)  # the first rank of each machine may have a data set to fetch and to decode


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
        preload(train.__module__)
        settings.load_data()  # decodes into the cache that the ranks map
        start_ranks(train, settings, output, world_size=settings.world_size, timeout=timeout)
        return True
