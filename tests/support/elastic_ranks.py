"""Ranks that come and go, for tests: processes that can be killed, stopped and started, and their lighthouse."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from ranks import start_fork_server
from torch import nn

LIMIT_S = 60.0
HEARTBEAT_TIMEOUT_MS = 500


class Ended(NamedTuple):
    """What a process tells last: the exception that has ended it, None if it is done."""

    exception: Exception | None


class Process:
    """A process of a test, which tells what happens in it.

    Args:
        function: what it runs, `function(tell, *args)`; `tell` sends anything to the test.
        args: of it.
    """

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_run, args=(child, function, *args), daemon=True)
        self.process.start()
        child.close()
        self.told: list[Any] = []

    def wait_for(self, what: Callable[[Any], bool]) -> Any:
        """The first that it tells from now on, or has not been waited for, that is so; its exception is raised."""
        while True:
            each = self.tell()
            if isinstance(each, Ended):
                raise each.exception or AssertionError(f"ended without having told it: {self.told[-3:]}")
            if what(each):
                return each

    def result(self) -> Any:
        """What it tells last before it ends; its exception is raised."""
        while not isinstance(end := self.tell(), Ended):
            pass
        if end.exception is not None:
            raise end.exception
        return self.told[-2]

    def tell(self) -> Any:
        """The next that it tells."""
        if not self.connection.poll(LIMIT_S):
            raise TimeoutError(f"told nothing within {LIMIT_S} s; the last was {self.told[-3:]}")
        try:
            self.told.append(self.connection.recv())
        except EOFError:
            self.told.append(Ended(ProcessLookupError(f"ended by force; the last was {self.told[-3:]}")))
        return self.told[-1]

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run(connection: Connection, function: Callable[..., None], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    ended: Exception | None = None
    try:
        function(connection.send, *args)
    except Exception as error:
        ended = type(error)(str(error))
    connection.send(Ended(ended))


def serve_lighthouse(tell: Callable[[Any], None], least: int, bind: str = "127.0.0.1:0") -> None:
    """Be a lighthouse until the end of the process."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=bind,
        min_replicas=least,
        join_timeout_ms=3000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )
    tell(f"127.0.0.1:{server.address().rpartition(':')[2]}")
    signal.pause()


@contextmanager
def lighthouse(least: int) -> Iterator[str]:
    """The address of a lighthouse."""
    process = Process(serve_lighthouse, least)
    try:
        yield process.wait_for(lambda each: isinstance(each, str))
    finally:
        process.kill()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def anchor_of(handle: Any) -> str:
    """A digest of what all ranks have alike."""
    state = handle.state_dict()["aggregator"]["replicated"]
    alike = [tensor for part in ("anchor", "outer_momentum", "buffers") for tensor in state[part].values()]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in alike)).hexdigest()[:12]


def train(tell: Callable[[Any], None], address: str, seed: int, total: int, options: dict[str, Any]) -> None:
    """Train until the run is at `total` steps; tells of every step."""
    import lgc.elastic

    torch.manual_seed(seed)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    sampler = lgc.elastic.Sampler(512)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, sampler=sampler)
    given = {"ranks": 3, "timeout": 5.0, "quorum_timeout": 20.0, "heartbeat_every": 0.05, **options.get("attach", {})}
    handle = lgc.elastic.attach(
        net,
        options.get("scheme", lgc.LocalSteps(every=4, start_steps=0)),
        optimizer,
        lighthouse=address,
        carried={"schedule": schedule, "sampler": sampler},
        **given,
    )
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tell({"step": handle.step, "rounds": handle.rounds, "ranks": len(handle.ranks), "anchor": anchor_of(handle)})
        time.sleep(options.get("pause", 0.0))
        if handle.step >= total:
            break
    handle.finish()
    tell(
        {
            "step": handle.step,
            "anchor": anchor_of(handle),
            "rate": schedule.get_last_lr()[0],
            "loss": loss.item(),
            "names": handle.ranks,
            "sampler": sampler.state_dict(),
        }
    )
