"""`lgc plan`: measure here, predict for a link, and recommend."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
from torch import Tensor

from lgc.choice.cost import Collective, Link, Profile, SchemeCost, StageCost, as_fast, predict
from lgc.choice.profile import Job, Profiler, stand_in, wrap
from lgc.choice.rehearsal import probe
from lgc.comm.transport import Transport
from lgc.schemes import (
    Dense,
    LocalSteps,
    Scheme,
    parse_scheme,
    require_different,
    require_rounds_by_count,
)
from lgc_lab import options
from lgc_lab.bench.link.results import Results, link_of
from lgc_lab.folder import read_objects, write_json
from lgc_lab.launch.ranks import place_under_torchrun, preload, process_group, start_ranks, under_torchrun
from lgc_lab.plan.answer import MEASURED, Answer
from lgc_lab.plan.ladder import LADDERS, Ladder
from lgc_lab.recipes import find_object, find_recipe
from lgc_lab.terminal import aligned, notify
from lgc_lab.training.loop import make_optimizer
from lgc_lab.training.settings import Settings

THOROUGH = 3.0  # seconds after which a scheme is not measured again
TIMEOUT = timedelta(seconds=600)  # ranks wait for the one that trains an autoencoder


class Question(NamedTuple):
    """Question to be sent to the ranks that measure."""

    make_job: Callable[[torch.device, dist.ProcessGroup, int | None], Job]  # in every rank, with so large buckets
    schemes: dict[str, Scheme]  # as asked for, with what comes from the recipe
    world_size: int
    ladder: Ladder


@click.command()
@options.recipe()
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="The model, from Python: a function without arguments that returns it and its loss on one batch.",
)
@click.option(
    "--optimizer",
    type=click.Choice(list(LADDERS)),
    help="With --model, what will train it, for the losses that count.  [adamw]",
)
@click.option("--workers", type=click.IntRange(2), help="Ranks that will train; not under torchrun.  [4]")
@click.option(
    "--ranks-per-machine", type=click.IntRange(1), default=1, help="So many measure here at once; divides --workers."
)
@click.option(
    "--bandwidth",
    "bandwidths",
    multiple=True,
    help="Speed of each rank's link (kbit, mbit, gbit); repeatable, with a table for each.  "
    "[measured under torchrun, else 100mbit]",
)
@click.option("--latency", default="0ms", help="Delay of a message, about what ping shows (us, ms, s).")
@click.option(
    "--schemes",
    help="Schemes to choose from, beside dense; as for lgc compare.  [some of every kind]",
)
@options.batch_size
@options.data
@options.backbone
@options.bf16
@click.option(
    "--check", type=options.EXISTING_FOLDER, help="Folder of a finished lgc bench link: predict what it measured."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(
    workers: int | None,
    ranks_per_machine: int,
    bandwidths: tuple[str, ...],
    latency: str,
    check: Path | None,
    as_json: bool,
    **run: Any,
) -> None:
    """Predict a step's time under every scheme, and recommend one.

    Measures a model's computation and every scheme's own on this machine, counts what would be sent, and adds what
    that takes on the link:

    \b
    lgc plan --recipe digits --workers 4 --bandwidth 100mbit --latency 1ms
    lgc plan --model train:job --workers 16 --bandwidth 1gbit
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m lgc plan --model train:job

    Under torchrun the link is measured between its ranks, unless --bandwidth is given. The function of --model:

    \b
    def job():
        model, x, y = Net(), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
        return model, lambda model: cross_entropy(model(x), y)

    It recommends the scheme that is the first on your link to reach the loss of dense training, where more steps make
    up for what it was measured to lose. That was on another model than yours: lgc compare tells what yours loses.
    """
    if check is not None:
        options.refuse_torchrun("plan --check")
        with options.usage_errors():
            click.echo(_check(check))
        return
    world_size = options.count_ranks(workers, default=4)
    if under_torchrun() and ranks_per_machine != 1:
        raise click.UsageError("torchrun has started the ranks: leave out --ranks-per-machine.")
    if world_size == 1:
        raise click.UsageError("torchrun has started one rank; to measure a link takes at least 2.")
    if world_size % ranks_per_machine:
        raise click.UsageError(f"--ranks-per-machine {ranks_per_machine} must divide --workers {world_size}.")
    with options.usage_errors():
        question = _question(world_size, **run)
        links = {bandwidth: Link.parse(bandwidth, latency) for bandwidth in bandwidths or ("100mbit",)}
    if under_torchrun():
        profile, measured = _profile_in_job(question)
        if os.environ["RANK"] != "0":
            return
        links = links if bandwidths else {MEASURED: measured}
    else:
        profile = _profile_here(question, ranks_per_machine)
    labels = _labels(question)
    answers = [
        Answer(name, link, profile, predict(profile, link), labels, question.ladder) for name, link in links.items()
    ]
    click.echo(
        json.dumps([each.as_json() for each in answers], indent=1) if as_json else "\n\n".join(map(str, answers))
    )


def _question(
    world_size: int,
    *,
    recipe: str | None,
    model: str | None,
    schemes: str | None,
    optimizer: str | None = None,
    **run: Any,
) -> Question:
    if (recipe is None) == (model is None):
        raise ValueError("one of --recipe and --model must be given.")
    if recipe is not None and optimizer is not None:
        raise ValueError("--optimizer is for --model; a recipe has its own.")
    ladder = LADDERS[optimizer or "adamw" if recipe is None else find_recipe(recipe).optimizer]
    texts = list(ladder.losses) if schemes is None else options.split(schemes)
    make_job: Callable[..., Job]
    if recipe is not None:
        settings = {text: Settings(recipe=recipe, scheme=text, world_size=world_size, **run) for text in texts}
        planned = {text: one.resolve_scheme() for text, one in settings.items()}
        make_job = partial(_job_of_recipe, settings[texts[0]])
        settings[texts[0]].load_data()  # decodes into the cache that the ranks map
    else:
        assert model is not None
        if any(run.values()):
            raise ValueError(
                "--batch-size, --data, --backbone and --bf16 are for recipes; the function of --model decides them "
                "itself (autocast goes into its loss)."
            )
        planned = {text: parse_scheme(text) for text in texts}
        for scheme in planned.values():
            require_rounds_by_count(scheme, "lgc plan")
        find_object("model", model)  # raises here rather than in the ranks
        make_job = partial(_job_of_function, model)
    for text, scheme in planned.items():
        if ladder is LADDERS["sgd"] and isinstance(scheme, LocalSteps) and scheme.second_moments == "all":
            raise ValueError(f"schemes: {text} has second_moments=all, which is for Adam and AdamW, not for SGD.")
    require_different(texts, (planned[text] for text in texts))
    return Question(make_job, planned, world_size, ladder)


def _job_of_recipe(
    settings: Settings, device: torch.device, group: dist.ProcessGroup, bucket_cap_mb: int | None
) -> Job:
    """Make the job of a recipe and the first batch of its data."""
    recipe = settings.resolve_recipe()
    ddp = wrap(recipe.make_model(device), group, bucket_cap_mb=bucket_cap_mb)
    train, generator = settings.load_data().train, torch.Generator().manual_seed(0)
    inputs, targets = recipe.make_batch(train, torch.arange(recipe.batch_size), generator, device)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            return recipe.loss(ddp(inputs), targets)

    return Job(ddp, loss, partial(make_optimizer, replace(recipe, learning_rate=0.0), ddp.module))


def _job_of_function(text: str, device: torch.device, group: dist.ProcessGroup, bucket_cap_mb: int | None) -> Job:
    """Make the job of what the function of --model returns; the device is torch's default in there."""
    with device:
        model, loss = find_object("model", text)()
    ddp = wrap(model.to(device), group, bucket_cap_mb=bucket_cap_mb)
    return Job(ddp, partial(loss, ddp), partial(stand_in, ddp))


def _profile_here(question: Question, ranks: int) -> Profile:
    """Measure with so many ranks on this machine."""
    preload(__name__)
    with tempfile.TemporaryDirectory() as folder, options.reported_errors():
        path = Path(folder) / "profile.json"
        start_ranks(_write_profile, question, path, world_size=ranks, timeout=TIMEOUT)
        return _profile_from(read_objects(path)[0])


def _write_profile(question: Question, path: Path, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the profile."""
    assert dist.group.WORLD is not None
    profile = _profile(question, dist.group.WORLD, device)
    if dist.get_rank() == 0:
        write_json(path, asdict(profile))


def _profile_from(fields: dict[str, Any]) -> Profile:
    """Read a profile back from the fields that `asdict` gives."""
    for arm in fields["arms"]:
        for stage in arm["stages"]:
            stage["collectives"] = [Collective(**one) for one in stage["collectives"]]
        arm["stages"] = [StageCost(**stage) for stage in arm["stages"]]
    return Profile(**fields | {"arms": [SchemeCost(**arm) for arm in fields["arms"]]})


def _profile_in_job(question: Question) -> tuple[Profile, Link]:
    """Measure as one rank of a torchrun job: the ranks of a machine together, and all of them the link."""
    local_rank, on_machine = place_under_torchrun()
    with process_group(TIMEOUT, local_rank, on_machine) as device:
        assert dist.group.WORLD is not None
        link = probe(Transport(dist.group.WORLD, device), device)
        local, _ = dist.new_subgroups(group_size=on_machine)
        profile = _profile(question, local, device)
        dist.barrier()
        return profile, link


def _profile(question: Question, group: dist.ProcessGroup, device: torch.device) -> Profile:
    """Measure what is asked; a collective of the ranks that share this machine."""
    tell = notify if dist.get_rank() == 0 else lambda text: None
    tell(f"measuring compute, {torch.get_num_threads()} threads a rank")
    transport, make_job = Transport(group, device), partial(question.make_job, device, group)
    profiler = Profiler(make_job, transport, question.world_size, enough=THOROUGH)
    if profiler.unsteady:
        tell(f"WARNING: {profiler.unsteady} Do not trust what follows.")
    for scheme in question.schemes.values():
        if scheme != Dense():
            tell(f"measuring {scheme}")
            profiler.add(scheme, early=True)
    return profiler.profile


def _check(folder: Path) -> str:
    """Set what was measured in a folder of `lgc bench link` beside what is predicted for it here and now."""
    results = Results.load(folder)
    run = {name: results.configuration[name] for name in ("recipe", "batch_size", "data")}
    world_size, schemes = results.configuration["world_size"], ",".join(results.schemes)
    question = _question(world_size, model=None, schemes=schemes, backbone=None, bf16=False, **run)
    profile = _profile_here(question, world_size)
    labels = _labels(question)
    blocks = []
    for rate in results.rates:
        rows = [row for row in predict(profile, link_of(rate)) if row.scheme in labels]
        measured = [results.lasting(rate, labels[row.scheme]).step for row in rows]
        table = [("scheme", "predicted", "measured", "error")]
        for row, seconds in zip(rows, measured, strict=True):
            difference = f"{100 * (row.step / seconds - 1):+.1f} %"
            table.append((labels[row.scheme], f"{1e3 * row.step:,.1f} ms", f"{1e3 * seconds:,.1f} ms", difference))
        advised = rows.index(as_fast(rows)[0])
        loss = 100 * (measured[advised] / min(measured) - 1)
        first, best = (labels[rows[place].scheme] for place in (advised, measured.index(min(measured))))
        advice = f"advised {first}; fastest when measured {best}; following the advice loses {loss:.1f} %"
        blocks += [rate, aligned(table), advice]
    return "\n\n".join(blocks)


def _labels(question: Question) -> dict[str, str]:
    """Map the full text of each scheme to the one that was asked for, dense among them."""
    return {str(Dense()): Dense.name} | {str(scheme): text for text, scheme in question.schemes.items()}
