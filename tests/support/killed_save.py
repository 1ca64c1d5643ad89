"""A process that kills itself while it saves a checkpoint; apart, so that it starts quickly."""

from __future__ import annotations

import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lgc import checkpoint
from lgc.comm import transport

CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}  # audit events; os.fsync has none
IN_A_WRITE = -1


def save_and_die(rank: int, port: int, directory: Path, victim: int, call: int) -> None:
    """Save the checkpoint after the latest; the victim kills itself before its `call`-th file-system call.

    With `IN_A_WRITE` for `call`, the kernel kills it when half of its file is written.
    """
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    assert dist.group.WORLD is not None
    transport.ANNOUNCEMENT_WAIT_S = 0.0  # who is killed announces nothing
    path = checkpoint.latest(directory)
    step = 0 if path is None else checkpoint.load(path, group=dist.group.WORLD)["step"]
    remaining = call
    sync = os.fsync

    def count() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        count()
        sync(descriptor)

    new = {"step": step + 1, "w": torch.full((1000,), float(step + 1 + rank))}
    if rank == victim and call == IN_A_WRITE:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    elif rank == victim:
        os.fsync = fsync  # type: ignore[assignment]
        sys.addaudithook(lambda event, _: count() if event in CALLS else None)
    checkpoint.save(directory, new, step=step + 1, group=dist.group.WORLD, keep=1)
    dist.destroy_process_group()
    os._exit(0)
