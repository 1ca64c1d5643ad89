"""`lgc analyze`: train, measure, and make the page."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from lgc.schemes import LocalSteps, ScaleCom, TopK
from lgc_lab import options
from lgc_lab.analysis.record import RECORDING, Recording, record
from lgc_lab.folder import occupied, write_whole
from lgc_lab.launch.ranks import preload, start_ranks
from lgc_lab.training.settings import Settings

ROWS = "redundancy.jsonl"
PAGE = "redundancy.html"
LEAST_RECORDS = 2


@click.command()
@options.recipe(required=True)
@options.workers
@click.option("--every", type=click.IntRange(2), default=25, help="Rounds from record to record.")
@click.option(
    "--scheme",
    default="scalecom:values=float32",
    help="Scheme to train with: topk, dgc, scalecom, or local steps that exchange by topk or scalecom.",
)
@click.option("--samples", type=click.IntRange(128), default=2048, help="Coordinates of each layer that are recorded.")
@options.seed
@options.epochs
@options.steps
@options.batch_size
@options.data
@options.limit_train
@options.backbone
@options.timeout
@options.out
@click.option("--overwrite", is_flag=True, help="Replace an analysis that is there.")
def analyze(workers: int, every: int, samples: int, timeout: float, out: Path, overwrite: bool, **run: Any) -> None:
    """Measure what the workers' gradients have in common.

    Trains with --workers ranks on this machine and records a sample of every layer's gradient, of what error
    feedback has accumulated, and of what would be sent:

    \b
    lgc analyze --recipe digits --workers 4 --every 10 --out runs/redundancy

    Under local steps, `--scheme local:every=20+topk:rate=0.03`, what is recorded is what every worker has moved since
    the last round, and a step is a round.

    OUT gets recording.safetensors (the samples), redundancy.jsonl (one JSON object for each layer, quantity and step,
    information in bits) and redundancy.html (the figures).
    """
    options.refuse_torchrun("analyze")
    if not overwrite and any((out / name).exists() for name in (PAGE, RECORDING)):
        raise click.UsageError(f"{out} has an analysis; choose another --out, or --overwrite.")
    with options.usage_errors():
        settings = Settings(world_size=workers, **run)
        scheme = settings.resolve_scheme()
        exchange = scheme.exchange if isinstance(scheme, LocalSteps) else scheme
        if not isinstance(exchange, TopK | ScaleCom):  # others do not send values themselves
            raise ValueError(
                f"analyze: scheme must be {TopK.name}, dgc or {ScaleCom.name}, or local steps that exchange by "
                f"{TopK.name} or {ScaleCom.name}, got {scheme}."
            )
        if isinstance(scheme, LocalSteps) and (scheme.overlap or scheme.fragments > 1):
            raise ValueError(
                "analyze: local steps must have overlap=False and fragments=1, so that all rounds are "
                f"alike and of the whole model, got {scheme}."
            )
        if exchange.rate == 1:
            raise ValueError("analyze: the scheme's rate must be below 1, else there are no indices to look at.")
    with options.reported_errors():
        preload(record.__module__)
        per_epoch = settings.steps_per_epoch(settings.load_data())  # decodes into the cache that the ranks map
        steps = min(settings.steps or math.inf, settings.resolve_recipe().epochs * per_epoch)
    rounds = (steps - scheme.start_steps) // scheme.steps_a_round if isinstance(scheme, LocalSteps) else steps
    if (rounds - 1) // every - max(0, exchange.warmup_steps - 1) // every < LEAST_RECORDS:
        raise click.UsageError(
            f"--every {every} leaves fewer than {LEAST_RECORDS} records in {rounds} rounds, of which "
            f"{exchange.warmup_steps} are the warm-up."
        )
    with options.reported_errors(), occupied(out):
        for name in (PAGE, ROWS, RECORDING):
            (out / name).unlink(missing_ok=True)
        within = timedelta(seconds=timeout)
        start_ranks(record, settings, out, every, samples, world_size=workers, timeout=within)
        click.echo(evaluate(out))


def evaluate(out: Path) -> str:
    """Measure the recording in a folder: writes the rows and the page, returns a summary as text."""
    from lgc_lab.analysis.page import Analysis  # here, because most commands need neither scipy nor matplotlib
    from lgc_lab.analysis.redundancy import measure_redundancy

    recording = Recording.load(out / RECORDING)
    rows = list(measure_redundancy(recording))
    write_whole(out / ROWS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    analysis = Analysis(recording, rows)
    analysis.write_page(out / PAGE)
    training, recorded = recording.seconds["training"], recording.seconds["recording"]
    return (
        f"{analysis.summary()}\n\n{out / PAGE}\n"
        f"recording took {recorded:.2f} s beside {training:.2f} s of training ({recorded / training:.1%})"
    )
