"""`lgc bench elastic`: what training loses when ranks are killed, stopped and started, and the lighthouse goes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sysconfig
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from lgc.schemes import parse_scheme
from lgc_lab import options
from lgc_lab.launch.ranks import preload
from lgc_lab.recipes.recipe import warmup_and_cosine
from lgc_lab.recipes.text import BYTES, CONTEXT, GPT, bits_per_byte, load_text, next_byte_loss
from lgc_lab.terminal import aligned, notify

FOLDER = "asyncio"  # of the standard library
BATCH = 8
LEARNING_RATE = 2e-3
TEST_WINDOWS = 256
HEARTBEAT_TIMEOUT_S, JOIN_TIMEOUT_S = 2.0, 10.0
TIMEOUT_S, QUORUM_TIMEOUT_S, STOPPED_S = 20.0, 60.0, 5.0
SHARE_OF_FAULTS = (0.05, 0.9)  # of the samples, between which they come


class Job(NamedTuple):
    """What every rank trains."""

    scheme: str
    ranks: int
    samples: int  # of all ranks, those of lost rounds not counted
    width: int
    depth: int


class Result(NamedTuple):
    """What a rank has at the end."""

    rounds: int
    bits: float  # per byte of the test
    digest: str  # of all weights


@click.command()
@click.option("--ranks", type=click.IntRange(2), default=4, help="Of the undisturbed run.")
@click.option("--samples", type=click.IntRange(1), default=32_000, help=f"Of {CONTEXT} bytes, of all ranks together.")
@click.option("--kills", type=click.IntRange(0), default=10, help="Ranks that are killed, and started again.")
@click.option("--stops", type=click.IntRange(0), default=1, help=f"Ranks that are stopped for {STOPPED_S:g} seconds.")
@click.option("--lighthouses", type=click.IntRange(0), default=1, help="Times that it is killed, and started again.")
@click.option("--scheme", default="local:every=20:start_steps=0+quantized", help="Of local steps.")
@click.option("--width", type=click.IntRange(4), default=64, help="Of the GPT.")
@click.option("--depth", type=click.IntRange(1), default=2, help="Of the GPT.")
@options.seed
def elastic(
    ranks: int, samples: int, kills: int, stops: int, lighthouses: int, scheme: str, width: int, depth: int, seed: int
) -> None:
    """Measure what training loses when ranks come and go.

    \b
    lgc bench elastic --kills 10

    Trains a small GPT on the asyncio of Python's standard library by the byte, undisturbed and then with faults at
    random times: ranks are killed and started again a second later, or stopped for a while, and the lighthouse is
    killed and started again. Both runs end when rounds have counted as many samples. Then the weights of all ranks are
    compared bit for bit.
    """
    options.refuse_torchrun("bench elastic")
    try:
        import lgc.elastic  # noqa: F401 - says what is missing
    except ImportError as error:
        raise click.UsageError(str(error)) from None
    with options.usage_errors():
        job = Job(str(parse_scheme(scheme)), ranks, samples, width, depth)
    with options.reported_errors():
        preload(__name__)
        table = [["run", "killed", "stopped", "lighthouse", "rounds", "seconds", "bits per byte", "weights"]]
        disturbed = ["kill"] * kills + ["stop"] * stops + ["lighthouse"] * lighthouses
        for name, faults in {"undisturbed": disturbed[:0], "disturbed": disturbed}.items():
            started = time.perf_counter()
            results = _Run(job, random.Random(seed)).train(faults)
            alike = "alike" if len({each.digest for each in results}) == 1 else "DIFFER"
            row = [name, *(str(faults.count(each)) for each in ("kill", "stop", "lighthouse")), str(results[0].rounds)]
            table.append([*row, f"{time.perf_counter() - started:.0f}", f"{results[0].bits:.3f}", alike])
            notify("  ".join(table[-1]))
        click.echo(aligned(table))


class _Run:
    """A run of ranks in processes of their own."""

    def __init__(self, job: Job, chance: random.Random) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._job, self._chance = job, chance
        self._taken = self._context.RawValue("q", 0)
        self._lighthouse, self._address = self._serve("127.0.0.1:0")
        self._ranks: list[tuple[Any, Connection]] = []

    def train(self, faults: Sequence[str]) -> list[Result]:
        """Train with faults of these kinds, in random order and at random times; what the ranks have at the end."""
        for _ in range(self._job.ranks):
            self._start()
        try:
            times = sorted(self._chance.uniform(*SHARE_OF_FAULTS) * self._job.samples for _ in faults)
            for when, fault in zip(times, self._chance.sample(faults, len(faults)), strict=True):
                while self._taken.value < when:
                    self._require_ranks()
                    time.sleep(0.05)
                self._disturb(fault)
            return [result for _, connection in self._ranks if (result := _received(connection))]
        finally:
            for process in (self._lighthouse, *(process for process, _ in self._ranks)):
                process.kill()

    def _disturb(self, fault: str) -> None:
        notify(f"{fault} at {self._taken.value} samples")
        if fault == "lighthouse":
            self._lighthouse.kill()
            self._lighthouse.join()
            time.sleep(1)
            self._lighthouse, _ = self._serve(self._address)
            return
        process, connection = self._chance.choice(self._ranks)
        if fault == "stop":
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(process.pid, signal.SIGCONT)
            return
        self._ranks.remove((process, connection))
        process.kill()
        process.join()
        time.sleep(1)
        self._start()

    def _require_ranks(self) -> None:
        for process, _ in self._ranks:
            if process.exitcode:
                raise ChildProcessError(f"a rank has ended with exit code {process.exitcode}")

    def _start(self) -> None:
        own, child = self._context.Pipe()
        process = self._context.Process(target=_train, args=(child, self._address, self._job, self._taken), daemon=True)
        process.start()
        child.close()
        self._ranks.append((process, own))

    def _serve(self, bind: str) -> tuple[Any, str]:
        own, child = self._context.Pipe()
        process = self._context.Process(
            target=_be_lighthouse, args=(child, bind, self._job.ranks // 2 + 1), daemon=True
        )
        process.start()
        child.close()
        return process, own.recv()


def _received(connection: Connection) -> Result | None:
    try:
        result: Result = connection.recv()
    except EOFError:
        notify("a rank was started too late to join")
        return None
    return result


def _be_lighthouse(tell: Connection, bind: str, least: int) -> None:
    from torchft.coordination import LighthouseServer

    timeouts = {"join_timeout_ms": int(1e3 * JOIN_TIMEOUT_S), "heartbeat_timeout_ms": int(1e3 * HEARTBEAT_TIMEOUT_S)}
    server = LighthouseServer(bind=bind, min_replicas=least, quorum_tick_ms=20, **timeouts)
    tell.send(f"127.0.0.1:{server.address().rpartition(':')[2]}")
    signal.pause()


def _train(tell: Connection, address: str, job: Job, taken: Any) -> None:
    import lgc.elastic  # of an extra

    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = load_text(str(Path(sysconfig.get_path("stdlib"), FOLDER)), None)
    model: nn.Module = GPT(vocabulary=BYTES, context=CONTEXT, width=job.width, depth=job.depth, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    sampler = lgc.elastic.Sampler(len(text.train))
    handle = lgc.elastic.attach(
        model,
        job.scheme,
        optimizer,
        lighthouse=address,
        ranks=job.ranks,
        carried={"sampler": sampler},
        timeout=TIMEOUT_S,
        quorum_timeout=QUORUM_TIMEOUT_S,
    )
    places = iter(sampler)
    while sampler.taken < job.samples:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup_and_cosine(sampler.taken / job.samples)
        inputs, labels = text.train.batch(torch.tensor([next(places) for _ in range(BATCH)]), None)
        optimizer.zero_grad()
        next_byte_loss(model(inputs), labels).backward()
        optimizer.step()
        taken.value = max(taken.value, sampler.taken)
    handle.finish()
    digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters())).hexdigest()
    tell.send(Result(handle.rounds, bits_per_byte(model, text.test, TEST_WINDOWS), digest))
