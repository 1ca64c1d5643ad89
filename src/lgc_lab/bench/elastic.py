"""`lgc bench elastic`: what training loses when ranks are killed, stopped and started, and the lighthouse goes."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from tqdm import tqdm

from lgc.schemes import parse_scheme
from lgc_lab import options
from lgc_lab.folder import occupied, read_objects, require_same, write_json
from lgc_lab.launch.ranks import preload
from lgc_lab.recipes import Metric, find_recipe
from lgc_lab.terminal import aligned, notify
from lgc_lab.training.loop import make_optimizer

RESULTS = "results.json"
TESTED_ON = 1024  # samples
HEARTBEAT_TIMEOUT_S, JOIN_TIMEOUT_S = 2.0, 60.0  # the latter longer than the steps of a round on a busy machine
TIMEOUT_S, QUORUM_TIMEOUT_S, STOPPED_S, ABSENT_S = 20.0, 90.0, 5.0, 1.0
SHARE_OF_FAULTS = (0.05, 0.9)  # of the samples, between which they come


class Job(NamedTuple):
    """What every rank trains."""

    recipe: str
    data: str | None
    batch_size: int | None  # None is the recipe's
    scheme: str
    ranks: int
    samples: int  # of all ranks, those of lost rounds not counted
    seed: int


class Result(NamedTuple):
    """What a rank has at the end."""

    rounds: int
    metric: float | None  # on the test data, of one of them
    digest: str  # of all weights


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        ranks: that were there at the end.
        alike: whether all of them had the same anchor by then, bit for bit.
    """

    rounds: int
    seconds: float
    metric: float
    ranks: int
    alike: bool


@click.command()
@options.recipe(default="text-gpt")
@options.data
@options.batch_size
@click.option("--ranks", type=click.IntRange(2), default=4, help="Number of ranks.")
@click.option("--samples", type=click.IntRange(1), default=32_000, help="Samples to train with, of all ranks together.")
@click.option("--kills", type=click.IntRange(0), default=10, help="Ranks that are killed, and started again.")
@click.option("--stops", type=click.IntRange(0), default=1, help=f"Ranks that are stopped for {STOPPED_S:g} seconds.")
@click.option(
    "--lighthouses", type=click.IntRange(0), default=1, help="Times that the lighthouse is killed, and started again."
)
@click.option("--scheme", default="local:every=20:start_steps=0+quantized", help="Local steps to train with.")
@options.seed
@click.option("--out", type=options.FOLDER, help="Folder for the results, in which a second call goes on.")
@options.measure_again
def elastic(kills: int, stops: int, lighthouses: int, out: Path | None, overwrite: bool, **given: Any) -> None:
    """Measure what training loses when ranks come and go.

    \b
    lgc bench elastic --recipe text-gpt --kills 10 --out runs/elastic

    Trains a recipe undisturbed, and then with faults at random times: ranks are killed and started again a second
    later, or stopped for a while, and the lighthouse is killed and started again. Both runs end when rounds have
    counted as many samples. Then the weights of all ranks are compared bit for bit. Needs lgc[elastic].
    """
    options.refuse_torchrun("bench elastic")
    try:
        import lgc.elastic  # noqa: F401 - says what is missing
    except ImportError as error:
        raise click.UsageError(str(error)) from None
    with options.usage_errors():
        job = Job(**given | {"scheme": str(parse_scheme(given["scheme"]))})
        metric = find_recipe(job.recipe).metric
    disturbed = ["kill"] * kills + ["stop"] * stops + ["lighthouse"] * lighthouses
    runs = {"undisturbed": disturbed[:0], "disturbed": disturbed}
    with options.reported_errors(), occupied(out) if out else contextlib.nullcontext():
        wanted = job._asdict() | {"faults": disturbed}
        outcomes = _found(out / RESULTS, wanted) if out and not overwrite else {}
        preload(__name__)
        for name, faults in runs.items():
            if name not in outcomes:
                outcomes[name] = _Run(job, name).train(faults)
                if out:
                    found = {each: outcome._asdict() for each, outcome in outcomes.items()}
                    write_json(out / RESULTS, {"configuration": wanted, "runs": found})
    click.echo(_table(runs, outcomes, metric))


def _found(file: Path, wanted: Mapping[str, Any]) -> dict[str, Outcome]:
    """The runs of this configuration that are there already."""
    if not file.exists():
        return {}
    (content,) = read_objects(file)
    require_same(content.get("configuration", {}), wanted, f"{file} has a measurement")
    return {name: Outcome(**outcome) for name, outcome in content["runs"].items()}


def _table(runs: Mapping[str, Sequence[str]], outcomes: Mapping[str, Outcome], metric: Metric) -> str:
    table = [["run", "killed", "stopped", "lighthouse", "rounds", "seconds", metric.name, "difference", "weights"]]
    first = outcomes["undisturbed"].metric
    for name, faults in runs.items():
        each = outcomes[name]
        counts = [str(faults.count(fault)) for fault in ("kill", "stop", "lighthouse")]
        measured = [str(each.rounds), f"{each.seconds:.0f}", f"{each.metric:.4f}", f"{each.metric - first:+.4f}"]
        table.append([name, *counts, *measured, f"{each.ranks} {'alike' if each.alike else 'DIFFER'}"])
    return aligned(table)


class _Run:
    """A run of ranks in processes of their own."""

    def __init__(self, job: Job, name: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._job, self._name, self._chance = job, name, random.Random(job.seed)
        self._taken = self._context.RawValue("q", 0)
        self._lighthouse, self._address = self._serve("127.0.0.1:0")
        self._ranks: list[tuple[Any, Connection]] = []
        self._started = 0

    def train(self, faults: Sequence[str]) -> Outcome:
        """Train with faults of these kinds, in random order and at random times."""
        started = time.perf_counter()
        for _ in range(self._job.ranks):
            self._start()
        bar = tqdm(total=self._job.samples, desc=self._name, unit="sample", disable=None, leave=False)
        try:
            times = sorted(self._chance.uniform(*SHARE_OF_FAULTS) * self._job.samples for _ in faults)
            for when, fault in zip(times, self._chance.sample(faults, len(faults)), strict=True):
                self._wait(bar, lambda when=when: self._taken.value >= when, ending=False)  # type: ignore[misc]
                self._disturb(fault)
            for _, connection in self._ranks:
                self._wait(bar, connection.poll, ending=True)
            seconds = time.perf_counter() - started
            results = [result for _, connection in self._ranks if (result := _received(connection))]
        finally:
            bar.close()
            for process in (self._lighthouse, *(process for process, _ in self._ranks)):
                process.kill()
        (metric,) = (each.metric for each in results if each.metric is not None)
        alike = len({each.digest for each in results}) == 1
        return Outcome(results[0].rounds, round(seconds, 1), metric, len(results), alike)

    def _wait(self, bar: Any, until: Callable[[], bool], *, ending: bool) -> None:
        while not until():
            if not ending:
                self._require_ranks()
            bar.update(self._taken.value - bar.n)
            time.sleep(0.1)

    def _disturb(self, fault: str) -> None:
        notify(f"{fault} at {self._taken.value} samples")
        if fault == "lighthouse":
            self._lighthouse.kill()
            self._lighthouse.join()
            time.sleep(ABSENT_S)
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
        time.sleep(ABSENT_S)
        self._start()

    def _require_ranks(self) -> None:
        for process, _ in self._ranks:
            if process.exitcode:
                raise ChildProcessError(f"a rank has ended with exit code {process.exitcode}")

    def _start(self) -> None:
        own, child = self._context.Pipe()
        arguments = (child, self._address, self._job, self._started, self._taken)
        process = self._context.Process(target=_train, args=arguments, daemon=True)
        process.start()
        child.close()
        self._ranks.append((process, own))
        self._started += 1

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


def _train(tell: Connection, address: str, job: Job, number: int, taken: Any) -> None:
    import lgc.elastic  # of an extra

    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    recipe, device = find_recipe(job.recipe), torch.device("cpu")
    data = recipe.data(job.data, None)
    model = recipe.make_model(device)
    optimizer = make_optimizer(recipe, model, parse_scheme(job.scheme))
    sampler = lgc.elastic.Sampler(len(data.train), seed=job.seed)
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
    places, augmentation = iter(sampler), torch.Generator().manual_seed(number)
    while sampler.taken < job.samples:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.learning_rate_factor(sampler.taken / job.samples)
        batch = torch.tensor([next(places) for _ in range(job.batch_size or recipe.batch_size)])
        inputs, targets = recipe.make_batch(data.train, batch, augmentation, device)
        optimizer.zero_grad()
        recipe.loss(model(inputs), targets).backward()
        optimizer.step()
        taken.value = max(taken.value, sampler.taken)
    handle.finish()
    with handle.anchored():
        digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters())).hexdigest()
        metric = None
        if handle.rank == 0:
            samples = torch.arange(min(TESTED_ON, len(data.test)))
            metric = recipe.metric.value(recipe.evaluate(model, data.test, samples, device))
    tell.send(Result(handle.rounds, metric, digest))
