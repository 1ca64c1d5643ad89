"""Command line: arguments in, runs and reports out."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from lgc.choice.cost import parse_rate
from lgc.schemes import SCHEMES, require_different
from lgc.version import __version__
from lgc_lab import options
from lgc_lab.analysis.command import analyze
from lgc_lab.bench.codec import codec
from lgc_lab.bench.elastic import elastic
from lgc_lab.bench.link.command import link
from lgc_lab.bench.round import bench_round
from lgc_lab.bench.sites import sites
from lgc_lab.bench.stragglers import stragglers
from lgc_lab.launch.ranks import under_torchrun
from lgc_lab.plan.command import plan
from lgc_lab.recipes import RECIPES
from lgc_lab.report.report import format_table, write_report
from lgc_lab.report.runs import Run, find_runs, load_runs
from lgc_lab.training.run_folder import SUMMARY, is_finished
from lgc_lab.training.settings import Output, Settings
from lgc_lab.training.train import run_in_job, run_locally

SCHEME_HELP = (
    "A name ({names}), with arguments after colons: lgc-ring:rate=0.002:feedback=paper. "
    "Local steps have their exchange after a plus sign: local:every=8+quantized. "
    "What is not set has the recipe's default; in the exchange of local steps, the library's."
).format(names=", ".join(SCHEMES))
LIST_HELP = "One or more, separated by commas."
SCHEMES_HELP = f"{LIST_HELP} {SCHEME_HELP}"
COMPARED = "dense,topk,dgc,scalecom,lgc-ring,lgc-ps,local:every=8+quantized"

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
LINKS = ("10mbit", "100mbit", "1gbit")
LINK_HELP = "Speed (kbit, mbit, gbit) of a link to predict the time on; several give a figure each."


@click.group(context_settings=HELP)
@click.version_option(__version__)
def main() -> None:
    """Learned gradient compression for PyTorch DistributedDataParallel.

    Will it pay on your link, and does accuracy hold? For a recipe of this project, or for your own model:

    \b
    lgc plan --model train:job --workers 16 --bandwidth 100mbit
    lgc compare --recipe digits --workers 4 --schemes dense,dgc,lgc-ring --out runs/first
    lgc report runs/first
    torchrun --nproc-per-node 4 -m lgc train --recipe digits --scheme lgc-ring --out runs/one
    """


RUN_OPTIONS = [  # what `train` and `compare` have in common
    options.epochs,
    options.steps,
    options.batch_size,
    click.option("--learning-rate", type=float, help="Learning rate, before the schedule's factor.  [the recipe's]"),
    click.option("--data", multiple=True, help=f"Repeatable, as RECIPE=DATA. {options.DATA_HELP}"),
    options.limit_train,
    click.option("--limit-test", type=click.IntRange(1), help="Evaluate on the first so many samples.  [all]"),
    click.option("--backbone", multiple=True, help=f"Repeatable, as RECIPE=BACKBONE. {options.BACKBONE_HELP}"),
    options.bf16,
    click.option(
        "--compile", is_flag=True, help="Use torch.compile: slow start, fast steps; CPUs need a C++ compiler."
    ),
    click.option("--checkpoint-every", type=click.IntRange(0), help="Steps between checkpoints; 0: none.  [an epoch]"),
    click.option("--tensorboard", is_flag=True, help="Write TensorBoard events too; needs lgc[tensorboard]."),
    options.timeout,
    options.out,
    click.option("--overwrite", is_flag=True, help="Start anew where there is a run already."),
]


def run_options(command: options.Command) -> options.Command:
    """Give a command the `RUN_OPTIONS`."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


@main.command()
@options.recipe(required=True)
@click.option("--scheme", default="lgc-ring", help=SCHEME_HELP)
@click.option("--workers", type=click.IntRange(1), help="Ranks on this machine; torchrun starts its own.  [1]")
@options.seed
@run_options
def train(recipe: str, scheme: str, workers: int | None, seed: int, out: Path, **run: Any) -> None:
    """Train one recipe with one scheme.

    Starts --workers ranks on this machine or, under torchrun, is one of its ranks:

    \b
    lgc train --recipe digits --scheme lgc-ring --workers 4 --out runs/one
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m lgc train --recipe digits --scheme lgc-ring --out runs/one

    OUT gets metrics.jsonl while it trains (one JSON object a step), checkpoints, and summary.json when it is done.
    The same command goes on from the newest checkpoint if the run was interrupted.
    """
    launch, run = _launcher(**run)
    own = _of_recipe(recipe, [recipe], run)
    with options.usage_errors():
        world_size = options.count_ranks(workers, default=1)
        settings = Settings(recipe=recipe, scheme=scheme, world_size=world_size, seed=seed, **own)
    launch(settings, out)
    if not under_torchrun():
        with options.reported_errors():
            click.echo(format_table([Run.load(out)]))


@main.command()
@click.option("--recipe", "recipes", metavar="NAMES", default="digits", help=f"{LIST_HELP} {options.RECIPE_HELP}")
@options.workers
@click.option("--schemes", default=COMPARED, help=SCHEMES_HELP)
@options.seeds
@run_options
def compare(recipes: str, workers: int, schemes: str, seeds: int, out: Path, **run: Any) -> None:
    """Train with several schemes, and report on them side by side.

    \b
    lgc compare --recipe digits --workers 4 --schemes dense,lgc-ring,lgc-ring:feedback=paper --seeds 3 --out runs/c

    The runs are made one after the other. OUT/SCHEME gets that of seed 0 (summary.json, metrics.jsonl),
    OUT/SCHEME/seed-1 and so on those of further seeds, OUT/report.html the figures; with several recipes there is a
    folder for each in between. What is finished is not run again, and what was interrupted goes on from its last
    checkpoint; seeds can be added later.
    """
    options.refuse_torchrun("compare")
    overwrite = run["overwrite"]
    launch, run = _launcher(**run)
    with options.usage_errors():
        wanted = _settings_by_folder(out, options.split(recipes), options.split(schemes), workers, seeds, run)
    with options.reported_errors():  # of the last run before the first one starts
        left = [one for folder, one in wanted.items() if overwrite or not is_finished(folder, one.configuration())]
        for settings in {settings.recipe: settings for settings in left}.values():
            settings.load_data()
    try:
        for number, (folder, settings) in enumerate(wanted.items(), 1):
            click.echo(f"[{number}/{len(wanted)}] {settings.recipe}, {settings.scheme}, seed {settings.seed}", err=True)
            launch(settings, folder)
    finally:
        runs = load_runs([folder for folder in wanted if (folder / SUMMARY).exists()])
        if runs:
            _report(runs, out / "report.html", [parse_rate("link", text) for text in LINKS])


@main.group()
def bench() -> None:
    """Measure one part by itself."""


for command in (codec, link, bench_round, sites, elastic, stragglers):
    bench.add_command(command)
main.add_command(analyze)
main.add_command(plan)


@main.command()
@click.argument("folders", nargs=-1, required=True, type=options.EXISTING_FOLDER)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [report.html in the first folder]"
)
@click.option("--link", "links", multiple=True, default=LINKS, help=LINK_HELP)
def report(folders: tuple[Path, ...], out: Path | None, links: tuple[str, ...]) -> None:
    """Write one page about all finished runs in FOLDERS and below.

    \b
    lgc report runs/first runs/second --link 10mbit --link 1gbit --out both.html

    The page holds its figures and needs no network.
    """
    page = out or folders[0] / "report.html"
    with options.usage_errors():
        rates = [parse_rate("link", text) for text in links]
    with options.reported_errors():
        runs = find_runs(folders)
        if not runs:
            where = ", ".join(map(str, folders))
            found = any(True for folder in folders for _ in folder.rglob(SUMMARY))
            raise click.UsageError(
                f"none of the runs in {where} or below can be read; repeat those left out with --overwrite."
                if found
                else f"no {SUMMARY} in {where} or below: no run has finished there."
            )
        _report(runs, page, rates)


def _report(runs: list[Run], page: Path, links: list[float]) -> None:
    write_report(runs, page, links)
    click.echo(f"{format_table(runs)}\n\n{page}")


def _of_recipe(recipe: str, recipes: Sequence[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the options of a run; of those that take RECIPE=VALUE the last for the recipe, or else the last for all."""
    prefixes = tuple(f"{name}=" for name in (*RECIPES, *recipes))
    own = dict(run)
    for name in ("data", "backbone"):
        for_all = [value for value in run[name] if not value.startswith(prefixes)]
        for_recipe = [value.removeprefix(f"{recipe}=") for value in run[name] if value.startswith(f"{recipe}=")]
        own[name] = next(reversed([*for_all, *for_recipe]), None)
    return own


def _settings_by_folder(
    out: Path, recipes: list[str], schemes: list[str], workers: int, seeds: int, run: dict[str, Any]
) -> dict[Path, Settings]:
    """List the settings of every run by its folder, checked before the first one starts."""
    wanted: dict[Path, Settings] = {}
    for recipe in recipes:
        own = _of_recipe(recipe, recipes, run)
        parts = [recipe.replace(":", ",")] if len(recipes) > 1 else []
        resolved = []
        for scheme in schemes:
            for seed in range(seeds):
                folder = out.joinpath(*parts, scheme.replace(":", ","), *([f"seed-{seed}"] if seed else []))
                wanted[folder] = Settings(recipe=recipe, scheme=scheme, world_size=workers, seed=seed, **own)
            resolved.append(wanted[folder].resolve_scheme())
        try:
            require_different(schemes, resolved)
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from None
    return wanted


def _launcher(
    *, timeout: float, overwrite: bool, checkpoint_every: int | None, tensorboard: bool, **settings: Any
) -> tuple[Callable[[Settings, Path], None], dict[str, Any]]:
    """Make what runs settings in a folder, and leave the options of the settings."""
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise click.UsageError("--tensorboard needs the package tensorboard: pip install 'lgc[tensorboard]'.")

    def launch(settings: Settings, folder: Path) -> None:
        start = run_in_job if under_torchrun() else run_locally
        output = Output(folder=folder, checkpoint_every=checkpoint_every, tensorboard=tensorboard)
        with options.reported_errors():
            trained = start(settings, output, timedelta(seconds=timeout), overwrite=overwrite)
            if not trained and os.environ.get("RANK", "0") == "0":
                click.echo(f"{folder}: finished before", err=True)

    return launch, settings
