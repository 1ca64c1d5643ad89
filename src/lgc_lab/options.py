"""Options that mean the same in several commands, as decorators."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from lgc.comm.transport import MOST_TIMEOUT
from lgc_lab.folder import OtherRunError
from lgc_lab.launch.ranks import RankFailedError, under_torchrun
from lgc_lab.recipes import RECIPES

Command = TypeVar("Command", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """Number that is neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


RECIPE_HELP = f"One of {', '.join(RECIPES)}; or your own, as MODULE:NAME."
recipe = partial(click.option, "--recipe", metavar="NAME", help=RECIPE_HELP)  # with a default, required, or neither
epochs = click.option("--epochs", type=click.IntRange(1), help="Passes over the training data.  [the recipe's]")
steps = click.option("--steps", type=click.IntRange(1), help="Stop after so many steps.  [after the epochs]")
batch_size = click.option("--batch-size", type=click.IntRange(1), help="Samples per rank and step.  [the recipe's]")
DATA_HELP = "Data set: a folder, or a name on the Hugging Face hub.  [the recipe's, if it has one]"
data = click.option("--data", help=DATA_HELP)
limit_train = click.option("--limit-train", type=click.IntRange(1), help="Train on the first so many samples.  [all]")
BACKBONE_HELP = "One of those that the recipe offers.  [the first]"
backbone = click.option("--backbone", help=BACKBONE_HELP)
bf16 = click.option("--bf16", is_flag=True, help="Compute in bfloat16 by autocast, on the CPU and the GPU.")
workers = click.option("--workers", type=click.IntRange(1), default=4, help="Ranks on this machine.")
seed = click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the model and of the shuffling.")
seeds = click.option("--seeds", type=click.IntRange(1), default=1, help="Number of seeds to train with: 0, 1, 2, ...")
timeout = click.option(
    "--timeout", type=Finite(1, MOST_TIMEOUT), default=60.0, help="Seconds for which a rank waits for another."
)
FOLDER = click.Path(file_okay=False, path_type=Path)
out = click.option("--out", type=FOLDER, required=True, help="Folder for the results.")
measure_again = click.option("--overwrite", is_flag=True, help="Measure again what is there already.")
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def split(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",")]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report what is wrong with the arguments, as click prints it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


@contextmanager
def reported_errors() -> Iterator[None]:
    """Report what a user can do something about, as click prints it: bad input, other runs, failed ranks."""
    try:
        yield
    except OtherRunError as error:
        raise click.UsageError(str(error)) from None
    except RankFailedError as error:
        click.echo(error.details, err=True)
        raise click.ClickException(str(error)) from None
    except (ValueError, OSError) as error:
        if under_torchrun():  # which prints the first rank's traceback
            raise
        raise click.ClickException(str(error)) from None


def count_ranks(workers: int | None, default: int) -> int:
    """Count the ranks: as many as asked for, or those of the torchrun job. UsageError if that has another number."""
    if not under_torchrun():
        return workers or default
    world_size = int(os.environ["WORLD_SIZE"])
    if workers not in (None, world_size):
        raise click.UsageError(f"--workers {workers}: torchrun has started {world_size} ranks; leave it out.")
    return world_size


def refuse_torchrun(command: str) -> None:
    """Raise UsageError in a rank of a torchrun job, for a command that starts ranks of its own."""
    if under_torchrun():
        raise click.UsageError(f"{command} starts its own ranks, on one machine; torchrun is for lgc train and plan.")
