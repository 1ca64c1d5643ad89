"""The command line: arguments in, runs and reports out."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
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
from lgc_lab.bench.link.command import link
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
    "What is not set has the recipe's default."
).format(names=", ".join(SCHEMES))

LINK = "100mbit"
OF_RECIPES = ("data", "backbone")  # options that take RECIPE=VALUE


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


def run_options(command: options.Command) -> options.Command:
    """What `train` and `compare` have in common."""
    for option in reversed(
        [
            options.epochs,
            options.steps,
            options.batch_size,
            click.option("--learning-rate", type=float, help="Before the schedule's factor.  [the recipe's]"),
            click.option(
                "--data",
                multiple=True,
                help="Folder in the hub's layout, or name on the Hugging Face hub; repeated as RECIPE=FOLDER where "
                "recipes differ.  [the recipe's, if it has one]",
            ),
            options.limit_train,
            click.option("--limit-test", type=click.IntRange(1), help="Evaluate on the first so many samples.  [all]"),
            click.option(
                "--backbone",
                multiple=True,
                help="For recipes that offer several, or RECIPE=BACKBONE.  [the recipe's first]",
            ),
            options.bf16,
            click.option(
                "--compile",
                is_flag=True,
                help="Run the model through torch.compile: a slower start, faster steps. CPUs need a C++ compiler.",
            ),
            click.option(
                "--checkpoint-every",
                metavar="STEPS",
                type=click.IntRange(0),
                help="Steps from one checkpoint to the next; 0 is never.  [an epoch]",
            ),
            click.option("--tensorboard", is_flag=True, help="Write TensorBoard events too; needs lgc[tensorboard]."),
            options.timeout,
            options.out,
            click.option("--overwrite", is_flag=True, help="Start anew where there is a run already."),
        ]
    ):
        command = option(command)
    return command


@main.command()
@options.recipe(required=True)
@click.option("--scheme", default="lgc-ring", show_default=True, help=SCHEME_HELP)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Ranks to start on this machine; not under torchrun, which starts them itself.  [1]",
)
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
    world_size = workers or 1
    if under_torchrun():
        world_size = int(os.environ["WORLD_SIZE"])
        if workers not in (None, world_size):
            raise click.UsageError(f"--workers {workers}: torchrun has started {world_size} ranks; leave it out.")
    launch, run = _launcher(run)
    run |= {name: _of_recipe(recipe, [recipe], run[name]) for name in OF_RECIPES}
    launch(_settings(recipe, scheme, world_size, seed, run), out)
    if not under_torchrun():
        with options.reported_errors():
            click.echo(format_table([Run.load(out)]))


@main.command()
@click.option(
    "--recipe",
    "recipes",
    metavar="NAMES",
    default="digits",
    show_default=True,
    help=f"With commas. {options.RECIPE_HELP}",
)
@options.workers
@click.option("--schemes", default="dense,topk,dgc,scalecom,lgc-ring,lgc-ps", show_default=True, help=SCHEME_HELP)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Train with so many: 0, 1, 2, ...")
@run_options
def compare(recipes: str, workers: int, schemes: str, seeds: int, out: Path, **run: Any) -> None:
    """Train with several schemes, one after the other, and report on them side by side.

    \b
    lgc compare --recipe digits --workers 4 --schemes dense,lgc-ring,lgc-ring:feedback=paper --seeds 3 --out runs/c

    OUT/SCHEME gets the run of seed 0 (summary.json, metrics.jsonl), OUT/SCHEME/seed-1 and so on those of further
    seeds, OUT/report.html the figures; with several recipes there is a folder for each in between. What is
    finished is not run again and what was interrupted goes on from its last checkpoint; seeds can be added later.
    """
    options.refuse_torchrun("compare")
    overwrite = run["overwrite"]
    launch, run = _launcher(run)
    wanted = _settings_by_folder(out, options.split(recipes), options.split(schemes), workers, seeds, run)
    with options.reported_errors():  # of the last run before the first one starts
        left = {
            settings.recipe: settings
            for folder, settings in wanted.items()
            if overwrite or not is_finished(folder, settings.configuration())
        }
        for settings in left.values():
            settings.load_data()
    try:
        for number, (folder, settings) in enumerate(wanted.items(), 1):
            click.echo(f"[{number}/{len(wanted)}] {settings.recipe}, {settings.scheme}, seed {settings.seed}", err=True)
            launch(settings, folder)
    finally:
        runs = load_runs([folder for folder in wanted if (folder / SUMMARY).exists()])
        if runs:
            write_report(runs, out / "report.html", [parse_rate("link", LINK)])
            click.echo(format_table(runs))
            click.echo(f"\n{out / 'report.html'}")


@main.group()
def bench() -> None:
    """Measure one part by itself.

    \b
    lgc bench codec    bits per index and per entry, time per million, of every coder
    lgc bench link     time and bytes a step of every scheme on links of several speeds
    """


bench.add_command(codec)
bench.add_command(link)
main.add_command(analyze)
main.add_command(plan)


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page to write.  [report.html in the first folder]",
)
@click.option(
    "--link",
    "links",
    multiple=True,
    default=[LINK],
    show_default=True,
    callback=lambda _context, _parameter, values: _links(values),
    help="Speed (kbit, mbit, gbit) of a link to predict the time on; several give a figure each.",
)
def report(folders: tuple[Path, ...], out: Path | None, links: list[float]) -> None:
    """Write one page about all finished runs in FOLDERS and below.

    \b
    lgc report runs/first runs/second --link 10mbit --link 1gbit --out both.html

    The page holds its figures and needs no network.
    """
    page = out or folders[0] / "report.html"
    with options.reported_errors():
        runs = find_runs(folders)
        if not runs:
            raise click.UsageError(
                f"no {SUMMARY} in {', '.join(map(str, folders))} or below: no run has finished there."
            )
        write_report(runs, page, links)
    click.echo(format_table(runs))
    click.echo(f"\n{page}")


def _links(texts: tuple[str, ...]) -> list[float]:
    try:
        return [parse_rate("link", text) for text in texts]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _settings(recipe: str, scheme: str, world_size: int, seed: int, run: dict[str, Any]) -> Settings:
    try:
        return Settings(recipe=recipe, scheme=scheme, world_size=world_size, seed=seed, **run)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _of_recipe(recipe: str, recipes: Sequence[str], values: tuple[str, ...]) -> str | None:
    """The last value that is the recipe's own, RECIPE=VALUE, or else one that is for all."""
    own = [value.removeprefix(f"{recipe}=") for value in values if value.startswith(f"{recipe}=")]
    for_all = [value for value in values if not any(value.startswith(f"{name}=") for name in (*RECIPES, *recipes))]
    return next(reversed([*for_all, *own]), None)


def _settings_by_folder(
    out: Path, recipes: list[str], schemes: list[str], workers: int, seeds: int, run: dict[str, Any]
) -> dict[Path, Settings]:
    """The settings of every run by its folder, checked before the first one starts."""
    wanted: dict[Path, Settings] = {}
    for recipe in recipes:
        own = run | {name: _of_recipe(recipe, recipes, run[name]) for name in OF_RECIPES}
        for scheme in schemes:
            for seed in range(seeds):
                parts = [recipe.replace(":", ",")] if len(recipes) > 1 else []
                parts += [scheme.replace(":", ","), *([f"seed-{seed}"] if seed else [])]
                wanted[out.joinpath(*parts)] = _settings(recipe, scheme, workers, seed, own)
        resolved = [_settings(recipe, scheme, workers, 0, own).resolve_scheme() for scheme in schemes]
        try:
            require_different(schemes, resolved)
        except ValueError as error:
            raise click.UsageError(f"{recipe}: {error}") from None
    return wanted


def _launcher(run: dict[str, Any]) -> tuple[Callable[[Settings, Path], None], dict[str, Any]]:
    """What runs settings in a folder, and the options that are left for the settings."""
    settings_of_run = dict(run)
    timeout = timedelta(seconds=settings_of_run.pop("timeout"))
    overwrite = settings_of_run.pop("overwrite")
    kept = {name: settings_of_run.pop(name) for name in ("checkpoint_every", "tensorboard")}
    if kept["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise click.UsageError("--tensorboard needs the package tensorboard: pip install 'lgc[tensorboard]'.")

    def launch(settings: Settings, folder: Path) -> None:
        start = run_in_job if under_torchrun() else run_locally
        with options.reported_errors():
            trained = start(settings, Output(folder=folder, **kept), timeout, overwrite=overwrite)
            if not trained and os.environ.get("RANK", "0") == "0":
                click.echo(f"{folder}: finished before", err=True)

    return launch, settings_of_run
