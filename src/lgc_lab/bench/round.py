"""`lgc bench round`: what the parts of a round cost, beside a plain copy of as many numbers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

import lgc
from lgc.choice.rehearsal import Rehearsal
from lgc.comm.messages import Posting
from lgc.comm.transport import Transport
from lgc.rounds.exchange import Exchanged
from lgc.schemes import RoundScheme
from lgc.synchronizer import Policy, Synchronizer
from lgc_lab import options

SCHEMES = "topk,dgc,scalecom,lgc-ring,quantized,quantized:reduction=two_stage"
TENSORS = 10
EARLY = ("warmup_steps", "dense_steps", "train_steps")
UNCOUNTED = 2  # rounds before those that count
PARTS = ("take in", "accumulate", "look", "prepare", "exchange", "settle", "commit", "rest", "round")
ROW = "{:<32}" + "{:>11}" * len(PARTS) + "{:>12}"


@click.command("round")
@click.option("--schemes", default=SCHEMES, help="As for lgc compare.")
@click.option("--parameters", default=10_000_000, type=click.IntRange(10_000), help="In ten square tensors.")
@click.option("--workers", "world_size", default=4, type=click.IntRange(1), help="Ranks, of which only one is there.")
@click.option("--repeats", default=9, type=click.IntRange(1), help="Rounds of every scheme, which take turns.")
def bench_round(schemes: str, parameters: int, world_size: int, repeats: int) -> None:
    """Measure what a compressed round computes, by its parts.

    One rank does the work of one of several, as in lgc plan, in one thread, and sends nothing. Figures are processor
    times in units of a plain copy of as many float32 numbers, made right before each round, and their medians, so that
    what else the machine does hardly matters: "take in" copies the gradients, "accumulate" is u and v, "look" whether
    they are finite, "prepare" selects and encodes, "exchange" decodes and averages, "settle" and "commit" are feedback,
    "rest" adds up the mean.
    """
    torch.set_num_threads(1)
    with options.usage_errors():
        wanted = {text: _lasting(lgc.parse_scheme(text)) for text in options.split(schemes)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for line in measure(wanted, parameters, world_size, repeats):
            click.echo(line)
    finally:
        dist.destroy_process_group()


def _lasting(scheme: object) -> RoundScheme:
    """Leave out the phases before the last one."""
    if not isinstance(scheme, RoundScheme):
        raise ValueError(f"bench round measures schemes with rounds of their own, and {scheme} has none.")
    return replace(scheme, **{item.name: 0 for item in fields(scheme) if item.name in EARLY})


def measure(schemes: dict[str, RoundScheme], parameters: int, world_size: int, repeats: int) -> Iterator[str]:
    """Yield the lines of the table."""
    side = round((parameters / TENSORS) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    gradients = {f"tensor {n}": torch.randn(side, side, generator=generator) for n in range(TENSORS)}
    assert dist.group.WORLD is not None
    rounds = {}
    for text, scheme in schemes.items():
        transport = Rehearsal(Transport(dist.group.WORLD), world_size)
        rounds[text] = TimedRounds(Synchronizer(scheme, gradients, transport, Policy(check_every=0)), gradients)
    source = torch.randn(TENSORS * side * side, generator=generator)
    copy = torch.empty_like(source)
    ratios: dict[str, list[dict[str, float]]] = defaultdict(list)
    copies = []
    for step in range(UNCOUNTED + repeats):
        for text, each in rounds.items():
            started = time.process_time()
            copy.copy_(source)
            copies.append(time.process_time() - started)
            parts = each.make(step * world_size)  # which the rank that is there leads
            if step >= UNCOUNTED:
                ratios[text].append({part: seconds / copies[-1] for part, seconds in parts.items()})
    yield ROW.format("in copies of all numbers", *PARTS, "round in ms")
    for text, found in ratios.items():
        figures = [median(one[part] for one in found) for part in PARTS]
        yield ROW.format(text, *(f"{figure:.2f}" for figure in figures), f"{1e3 * figures[-1] * median(copies):.1f}")


class TimedRounds:
    """Rounds whose parts are timed, always with the same gradients."""

    def __init__(self, synchronizer: Synchronizer, gradients: dict[str, torch.Tensor]) -> None:
        self._synchronizer = synchronizer
        self._gradients = gradients
        self._seconds: dict[str, float] = {}
        aggregator = synchronizer.aggregator
        of_feedback = {"accumulate": "accumulate", "is_finite": "look", "settle": "settle", "commit": "commit"}
        self._time(aggregator.feedback, of_feedback)
        for exchange in aggregator.exchanges(aggregator.schedule.at(0)):
            self._time(exchange, {"prepare": "prepare"})
            exchange.exchange = self._timed_exchange(exchange.exchange)  # type: ignore[method-assign]
        self._time(aggregator.transport, {"together": "exchange"})
        self._time(aggregator, {"aggregate": "aggregate"})

    def make(self, step: int) -> dict[str, float]:
        """Seconds of the parts of one round."""
        seconds = self._seconds = dict.fromkeys((*PARTS, "aggregate"), 0.0)
        started = time.process_time()
        self._synchronizer.synchronize(self._gradients, step)
        whole, aggregated = time.process_time() - started, seconds.pop("aggregate")
        return seconds | {"take in": whole - aggregated, "rest": aggregated - sum(seconds.values()), "round": whole}

    def _time(self, of: object, parts: dict[str, str]) -> None:
        for name, part in parts.items():
            setattr(of, name, self._timed(getattr(of, name), part))

    def _timed_exchange(self, method: Callable[..., Posting[Exchanged]]) -> Callable[..., Posting[Exchanged]]:
        def exchange(*args: Any) -> Posting[Exchanged]:
            running = method(*args)
            go_on = self._timed(running.send, "exchange")
            received = None
            while True:
                try:
                    post = go_on(received)
                except StopIteration as end:
                    exchanged: Exchanged = end.value
                    return exchanged
                received = yield post

        return exchange

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **arguments: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **arguments)
            finally:
                self._seconds[part] += time.process_time() - started

        return timed
