"""`lgc plan`: measure here, predict for a link, and recommend."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
from torch import Tensor

from lgc.choice.cost import Collective, Link, Prediction, Profile, SchemeCost, StageCost, as_fast, predict
from lgc.choice.profile import Job, Profiler, stand_in, wrap
from lgc.choice.rehearsal import knows_past, probe
from lgc.comm.transport import Transport
from lgc.schemes import (
    Dense,
    LocalSteps,
    PowerSGD,
    Scheme,
    SparseScheme,
    parse_scheme,
    require_different,
    require_rounds_by_count,
)
from lgc.schemes.powersgd import bucket_mb
from lgc_lab import options
from lgc_lab.bench.link.results import Results, link_of
from lgc_lab.folder import read_objects, write_json
from lgc_lab.launch.ranks import place_under_torchrun, preload, process_group, start_ranks, under_torchrun
from lgc_lab.plan.ladder import CONDITIONS, LOSSES, find_loss
from lgc_lab.recipes import find_object, find_recipe
from lgc_lab.terminal import aligned, notify
from lgc_lab.training.loop import make_optimizer
from lgc_lab.training.settings import Settings

MEASURED = "measured"
FAST_ENOUGH = 0.1  # so much longer than the fastest a step may take, if less is lost
THOROUGH = 3.0  # seconds after which a scheme is not measured again
TIMEOUT = timedelta(seconds=600)  # ranks wait for the one that trains an autoencoder


class Question(NamedTuple):
    """Question to be sent to the ranks that measure."""

    make_job: Callable[[torch.device, dist.ProcessGroup, int | None], Job]  # in every rank, with so large buckets
    schemes: dict[str, Scheme]  # as asked for, with what comes from the recipe
    world_size: int


@click.command()
@options.recipe()
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="The model, from Python: a function without arguments that returns it and its loss on one batch.",
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

    Of the schemes that are within 10 % of the fastest on your link it recommends the one that lost least where that was
    measured, which was on another model than yours: lgc compare tells what yours loses.
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
    answers = [(name, link, predict(profile, link)) for name, link in links.items()]
    labels = _labels(question)
    if as_json:
        click.echo(json.dumps([_as_json(name, link, profile, rows, labels) for name, link, rows in answers], indent=1))
    else:
        click.echo("\n\n".join(_as_text(name, link, profile, rows, labels) for name, link, rows in answers))


def _question(world_size: int, *, recipe: str | None, model: str | None, schemes: str | None, **run: Any) -> Question:
    if (recipe is None) == (model is None):
        raise ValueError("one of --recipe and --model must be given.")
    texts = list(LOSSES) if schemes is None else options.split(schemes)
    if schemes is None and recipe is not None and find_recipe(recipe).optimizer != "adamw":
        texts = [text for text in texts if not _is_for_adam(parse_scheme(text))]
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
    require_different(texts, (planned[text] for text in texts))
    return Question(make_job, planned, world_size)


def _is_for_adam(scheme: Scheme) -> bool:
    return isinstance(scheme, LocalSteps) and scheme.second_moments == "all"


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


def _recommend(rows: Sequence[Prediction], labels: Mapping[str, str]) -> Prediction:
    """Take, of those that are fast enough, the first that lost least; what was not measured comes last.

    One that gained is no better than dense: so little is chance.
    """

    def loss(row: Prediction) -> float:
        measured = find_loss(labels[row.scheme])
        return math.inf if measured is None else max(0.0, measured)

    return min(as_fast(rows, FAST_ENOUGH), key=loss)


HEADER = ("scheme", "sent", "compute", "compression", "communication", "step", "vs dense", "ahead from", "loss")


def _as_text(name: str, link: Link, profile: Profile, rows: Sequence[Prediction], labels: Mapping[str, str]) -> str:
    table: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        seconds = [f"{1e3 * value:,.1f} ms" for value in (row.compute, row.compression, row.communication, row.step)]
        ahead = "-" if row.pays_from is None else f"step {row.pays_from:,}"
        label, loss = labels[row.scheme], _loss(find_loss(labels[row.scheme]))
        table.append((label, _bytes(row.sent_bytes), *seconds, f"{row.speedup:.2f} x", ahead, loss))
    title = f"{profile.world_size} ranks, {name}: {link}"
    if name != MEASURED:
        title += "" if link.latency else " (--latency sets it)"
    remembering = [labels[row.scheme] for row in rows if knows_past(parse_scheme(row.scheme))]
    notes = [f"Counted as in a first round, after which its codes are shorter: {each}." for each in remembering]
    return "\n\n".join([title, aligned(table), *notes, *_advice(rows, labels, profile)])


def _advice(rows: Sequence[Prediction], labels: Mapping[str, str], profile: Profile) -> list[str]:
    """Say which scheme to take and what else to know, by paragraphs."""
    best = _recommend(rows, labels)
    scheme = parse_scheme(best.scheme)
    if best == rows[0]:
        return [f"Dense is best here: nothing is more than {FAST_ENOUGH:.0%} faster. Use plain DDP."]
    paragraphs = [
        f"{labels[best.scheme]} is best here, {best.speedup:.1f} times as fast as dense:",
        f"    {_attach(best)}",
        _reason(best, rows, labels),
    ]
    if isinstance(scheme, SparseScheme):
        paragraphs.append(f"Its rate is {100 * scheme.rate:g} %.")
    if best.early:
        steps = sum(stage.steps for stage in best.early)
        mean = sum(stage.steps * stage.step for stage in best.early) / steps
        phases = ", ".join(dict.fromkeys(stage.phase for stage in best.early))
        paragraphs.append(
            f"Its first {steps} steps ({phases}) take {1e3 * mean:,.1f} ms on average; the run as a whole is ahead of "
            f"dense from step {best.pays_from} on."
        )
    if isinstance(scheme, LocalSteps):
        paragraphs.append("Evaluate and save within handle.anchored(), and end with handle.finish().")
    if _is_for_adam(scheme):
        paragraphs.append("It is for torch.optim.Adam and AdamW.")
    if scheme.makes_adams_step:
        paragraphs.append("It makes Adam's step: train with SGD without momentum.")
    elif scheme.corrected_momentum:
        paragraphs.append("It has the momentum: give the optimizer none, or the scheme momentum=0.")
    if isinstance(scheme, PowerSGD):
        size = bucket_mb(sum(collective.size for collective in profile.arms[0].stages[-1].collectives))
        paragraphs.append(
            f"On gloo it needs all gradients in one bucket: DistributedDataParallel(model, bucket_cap_mb={size})."
        )
    return paragraphs


def _reason(best: Prediction, rows: Sequence[Prediction], labels: Mapping[str, str]) -> str:
    """Say in which respect it is the best."""
    others = [labels[row.scheme] for row in as_fast(rows, FAST_ENOUGH) if row != best]
    loss = find_loss(labels[best.scheme])
    near = f"within {FAST_ENOUGH:.0%} of the fastest"
    if not others:
        lost = "was not measured" if loss is None else f"was {_loss(loss)} {CONDITIONS}"
        return f"Nothing else is {near}. Its loss {lost}; lgc compare tells what your model loses."
    names = f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} {near} as well"
    if loss is None:
        why = "None of these has a measured loss, so it is the first of --schemes"
    else:
        why = f"It lost least of those measured, {_loss(loss)} {CONDITIONS}; what was not measured comes last"
    return f"{names}. {why}. lgc compare tells what your model loses."


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:+.3f}"


def _attach(best: Prediction) -> str:
    return f'handle = lgc.attach(model, "{best.scheme}", optimizer)'


def _as_json(
    name: str, link: Link, profile: Profile, rows: Sequence[Prediction], labels: Mapping[str, str]
) -> dict[str, Any]:
    def answer(row: Prediction) -> dict[str, Any]:
        seconds = {f"{name}_s": getattr(row, name) for name in ("compute", "compression", "communication", "step")}
        early = [{"phase": stage.phase, "steps": stage.steps, "step_s": stage.step} for stage in row.early]
        own = {"scheme": row.scheme, "sent_bytes": round(row.sent_bytes), **seconds, "speedup": row.speedup}
        loss = find_loss(labels[row.scheme])
        return own | {"early": early, "ahead_from_step": row.pays_from, "loss_bits_per_byte": loss}

    best = _recommend(rows, labels)
    return {
        "link": {"name": name, "bytes_per_s": link.bandwidth, "latency_s": link.latency, "measured": name == MEASURED},
        "workers": profile.world_size,
        "schemes": [answer(row) for row in rows],
        "recommended": best.scheme,
        "attach": _attach(best) if best != rows[0] else None,
    }


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
