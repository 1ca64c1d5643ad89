"""`lgc bench sites`: what a step costs where several ranks are close together, and only sites are far apart."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.choice.cost import parse_rate
from lgc.schemes import LocalSteps, parse_scheme, require_rounds_by_count
from lgc_lab import options
from lgc_lab.launch.network import Network, NetworkError, read_counters, temporary_network
from lgc_lab.launch.ranks import preload, start_ranks
from lgc_lab.recipes.text import BYTES, CONTEXT, GPT, next_byte_loss
from lgc_lab.terminal import aligned, notify

RANKS = 2  # of a site
DENSE = "dense"
PLAIN = "one rank"  # which has all of a site's samples
LEARNING_RATE = 1e-4
TIMEOUT_S = 600.0


class Question(NamedTuple):
    """What is measured: the link between the sites, and how each trains and exchanges."""

    rate: str
    inside: str  # ddp, fsdp, or PLAIN
    exchange: str  # a scheme of local steps as text, or dense


@click.command()
@click.option("--sites", "sites", type=click.IntRange(2), default=2, help=f"Number of sites, of {RANKS} ranks each.")
@click.option("--rates", default="10mbit,100mbit", help="Speeds of the links between them, in both directions.")
@click.option("--scheme", default="local:every=20+quantized", help="Local steps to measure.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=2,
    help="Steps of dense, and rounds of local steps, after one to warm up.",
)
def sites(sites: int, rates: str, scheme: str, steps: int) -> None:
    """Measure what a step costs between sites.

    \b
    lgc bench sites --rates 10mbit,100mbit

    Trains a GPT of 1.85 million parameters, on random bytes, with DDP and with FSDP inside each site; by local steps
    between them, and by exchanging every gradient: DDP over all ranks, and FSDP that is replicated between the sites.
    First, local steps of one rank a site, without a model inside: what they send is what all others are divided by.

    Needs root: every site gets a network namespace of its own, whose ranks talk to each other unlimited. They are
    removed at the end; nothing else of the machine's network is touched. Bytes are those that a site's interface has
    sent, with headers.
    """
    options.refuse_torchrun("bench sites")
    with options.usage_errors():
        for rate in options.split(rates):
            parse_rate("rates", rate)
        local = parse_scheme(scheme)
        if not isinstance(local, LocalSteps):
            raise ValueError(f"scheme must be one of local steps, as in local:every=20+quantized, got {scheme}.")
        require_rounds_by_count(local, "lgc bench sites")
    questions = [
        Question(rate, inside, exchange)
        for rate in options.split(rates)
        for inside in (PLAIN, "ddp", "fsdp")
        for exchange in (DENSE, str(replace(local, start_steps=0)))
        if (inside, exchange) != (PLAIN, DENSE)
    ]
    with options.reported_errors():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each rank warns that its address has no name
        preload(__name__)
        barrier = multiprocessing.get_context("forkserver").Barrier(RANKS * sites)
        try:
            with temporary_network(sites) as network:
                place = replace(network, ranks=RANKS)
                arguments = (questions, place, barrier, steps)
                world, timeout = RANKS * sites, timedelta(seconds=TIMEOUT_S)
                start_ranks(_measure, *arguments, world_size=world, timeout=timeout, network=place, backend="gloo")
        except NetworkError as error:
            raise click.UsageError(f"shaped links need root, Linux and iproute2. {error}") from None


def _measure(
    questions: Sequence[Question], network: Network, barrier: Barrier, steps: int, device: torch.device
) -> None:
    """Run in every rank; rank 0 prints the table."""
    logging.getLogger("lgc.advice").setLevel(logging.ERROR)  # that with PLAIN some ranks stand aside
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // RANKS, RANKS), mesh_dim_names=("site", "inside"))
    table = [["link", "inside", "exchange", "ms a step", "kB a step and site", "of one rank's"]]
    of_one_rank = 1.0
    arms: dict[tuple[str, str], tuple[Callable[[], None], int]] = {}
    for question in questions:
        barrier.wait()
        if rank == 0:
            network.shape(None)
        barrier.wait()
        if question[1:] not in arms:
            arms[question[1:]] = _arm(question, mesh)
        step, every = arms[question[1:]]
        if rank == 0:
            network.shape(parse_rate("rates", question.rate))
        for _ in range(every):
            step()
        seconds, sent = _take(step, every * steps, barrier)
        of_one_rank = sent if question.inside == PLAIN else of_one_rank
        if rank == 0:
            figures = [f"{1e3 * seconds:,.1f}", f"{sent / 1e3:,.1f}", f"{sent / of_one_rank:.3f}"]
            row = [question.rate, question.inside, question.exchange, *figures]
            notify("  ".join(row))
            table.append(row)
    if rank == 0:
        click.echo(aligned(table))


def _take(step: Callable[[], None], count: int, barrier: Barrier) -> tuple[float, float]:
    """Seconds and bytes of a step: of the slowest rank, and on average over the sites; a collective."""
    barrier.wait()  # not a collective: it would be among what the counters count
    before, started = read_counters().sent, time.perf_counter()
    for _ in range(count):
        step()
    seconds = time.perf_counter() - started
    barrier.wait()
    figures = torch.tensor([seconds, read_counters().sent - before], dtype=torch.float64)
    barrier.wait()
    rows = [torch.empty_like(figures) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, figures)
    by_rank = torch.stack(rows) / count
    return float(by_rank[:, 0].max()), float(by_rank[:, 1].mean())


def _arm(question: Question, mesh: DeviceMesh) -> tuple[Callable[[], None], int]:
    """A training step, and after how many of them they repeat; nothing on ranks that take no part."""
    scheme: Any = None if question.exchange == DENSE else parse_scheme(question.exchange)
    every = 1 if scheme is None else scheme.steps_a_round
    if question.inside == PLAIN and mesh["inside"].get_local_rank():
        return lambda: None, every
    torch.manual_seed(0)
    net = GPT(vocabulary=BYTES, context=CONTEXT, width=192, depth=4, heads=4)
    model: nn.Module = net
    if question.inside == "ddp":
        model = DistributedDataParallel(net, process_group=mesh["inside"].get_group() if scheme else None)
    if question.inside == "fsdp":
        from torch.distributed.fsdp import fully_shard  # slow to import

        for module in (*net.blocks, net):
            fully_shard(module, mesh=mesh["inside"] if scheme else mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    if scheme is not None:
        lgc.attach(model, scheme, optimizer, timeout=TIMEOUT_S, check_every=0, between=mesh["site"])
    samples = RANKS if question.inside == PLAIN else 1
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        tokens = torch.randint(BYTES, (samples, CONTEXT + 1), generator=generator)
        optimizer.zero_grad()
        next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()

    return step, every
