"""`lgc bench stragglers`: what one slower rank costs, where rounds are opened by count and where by time."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from statistics import mean
from typing import NamedTuple

import click
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

import lgc
from lgc.schemes import LocalSteps, parse_scheme
from lgc_lab import options
from lgc_lab.launch.ranks import preload, start_ranks
from lgc_lab.recipes.data import Data
from lgc_lab.recipes.recipe import warmup_and_cosine
from lgc_lab.recipes.text import BYTES, CONTEXT, GPT, TEXT_GPT, load_text, next_byte_loss
from lgc_lab.terminal import aligned, notify

BATCH = 2  # windows of a rank and step
LEARNING_RATE = 4e-3
START = 10  # one step in so many exchanges its gradients, at the beginning
TRAINED_ON, TESTED_ON = 20_000, 256  # windows
TIMEOUT_S = 60.0


class Arm(NamedTuple):
    """A way to train: when rounds are opened, and how many times slower the last rank is."""

    scheme: LocalSteps
    slower: float


class Outcome(NamedTuple):
    """What came of it: samples of all ranks, how many a second after the start, and the loss on other text by then."""

    samples: float
    rate: float
    bits_per_byte: float


@click.command()
@options.workers
@click.option("--slower", type=options.Finite(1), default=3.0, help="How many times slower the last rank is.")
@click.option("--step-ms", type=options.Finite(1), default=50.0, help="Milliseconds of a step of the others.")
@click.option("--every", type=click.IntRange(1), default=20, help="Steps of a round; by time, of the others.")
@click.option("--exchange", default="quantized", help="A scheme, as after the plus sign of local steps.")
@click.option("--steps", type=click.IntRange(20), default=400, help="Steps of a rank, on average.")
@options.seeds
def stragglers(workers: int, slower: float, step_ms: float, every: int, exchange: str, steps: int, seeds: int) -> None:
    """Measure what one slow rank costs.

    \b
    lgc bench stragglers --workers 4 --slower 3

    Trains a small GPT on the bytes of Python's standard library, as far with equal ranks as with a slow one; by local
    steps in rounds of so many steps, for which all wait for the slow one, and in rounds of the time that the others
    take for as many. Every rank computes its steps, and waits out the rest of their time, so that all have a processor.
    """
    options.refuse_torchrun("bench stragglers")
    with options.usage_errors():
        by_count = parse_scheme(f"local:every={every}:start_steps={steps // START}+{exchange}")
        assert isinstance(by_count, LocalSteps)
        by_time = replace(by_count, every=lgc.Seconds(every * step_ms / 1e3), outer_momentum=by_count.outer[1])
        arms = [Arm(scheme, factor) for factor in (1.0, slower) for scheme in (by_count, by_time)]
    with options.reported_errors():
        preload(__name__)
        arguments = (arms, step_ms / 1e3, steps, seeds)
        timeout = timedelta(seconds=TIMEOUT_S)
        start_ranks(_measure, *arguments, world_size=workers, timeout=timeout, backend="gloo")


def _measure(arms: list[Arm], step_s: float, steps: int, seeds: int, device: torch.device) -> None:
    """Run in every rank; rank 0 prints the table."""
    data = load_text(None, TRAINED_ON)
    table = [["slowest rank", "a round every", "samples", "samples a second", "by count: 1", "bits per byte, by seed"]]
    by_count: dict[float, float] = {}
    for arm in arms:
        outcomes = [_train(arm, data, step_s, steps, seed) for seed in range(seeds)]
        samples, rate = mean(each.samples for each in outcomes), mean(each.rate for each in outcomes)
        every, losses = arm.scheme.every, "  ".join(f"{each.bits_per_byte:.3f}" for each in outcomes)
        relative = rate / by_count.setdefault(arm.slower, rate)
        slower = f"{arm.slower:g} times slower" if arm.slower > 1 else "as the others"
        text = str(every) if isinstance(every, lgc.Seconds) else f"{every} steps"
        table.append([slower, text, f"{samples:,.0f}", f"{rate:,.1f}", f"{relative:.2f}", losses])
        if dist.get_rank() == 0:
            notify("  ".join(table[-1]))
    if dist.get_rank() == 0:
        click.echo(aligned(table))


def _train(arm: Arm, data: Data, step_s: float, steps: int, seed: int) -> Outcome:
    """Train until the ranks have made so many steps on average, and look at the loss; a collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = GPT(vocabulary=BYTES, context=CONTEXT, width=48, depth=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    handle = lgc.attach(model, arm.scheme, optimizer, timeout=TIMEOUT_S)
    schedule = LambdaLR(optimizer, lambda _: warmup_and_cosine(min(1.0, handle.progress.steps / steps)))
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    step_s *= arm.slower if rank == ranks - 1 else 1.0
    started = time.perf_counter()
    while handle.progress.steps < steps:
        if handle.step == arm.scheme.start_steps:
            started = time.perf_counter()
        end = time.perf_counter() + step_s
        inputs, targets = data.train.batch(torch.randint(len(data.train), (BATCH,), generator=generator), generator)
        optimizer.zero_grad()
        next_byte_loss(model(inputs), targets).backward()
        time.sleep(max(0.0, end - time.perf_counter()))
        optimizer.step()
        schedule.step()
    seconds, done = time.perf_counter() - started, handle.progress.steps
    handle.finish()
    rate = (done - arm.scheme.start_steps) / seconds
    samples = torch.arange(min(TESTED_ON, len(data.test)))
    bits = TEXT_GPT.evaluate(model, data.test, samples, torch.device("cpu"))
    return Outcome(ranks * BATCH * done, ranks * BATCH * rate, TEXT_GPT.metric.value(bits))
