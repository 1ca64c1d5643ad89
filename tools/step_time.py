"""Time training steps of a recipe: contiguous and channels_last, each plain, in bfloat16, compiled, and both.

    python tools/step_time.py cifar10-resnet20 --data DATA --batch-size 64

A step is forward, loss, backward and optimizer on one batch, in one process with one thread. The variants take turns,
and a time is the median over the turns of the processor's time: on an idle machine that is how long a step takes, on a
busy one it changes little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import median

import click
import torch

from lgc_lab.recipes import Recipe
from lgc_lab.terminal import aligned
from lgc_lab.training.loop import make_optimizer
from lgc_lab.training.settings import Settings

CPU = torch.device("cpu")
FORMATS = (torch.contiguous_format, torch.channels_last)
MODES = {"plain": (False, False), "--bf16": (True, False), "--compile": (False, True), "both": (True, True)}
WARMUP_STEPS = 2  # the first one compiles


def make_step(recipe: Recipe, settings: Settings) -> Callable[[], None]:
    """Make a new model's training step on the first batch, as `settings.bf16` and `settings.compile` say."""
    data = settings.load_data()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = recipe.make_batch(data.train, torch.arange(recipe.batch_size), generator, CPU)
    model = recipe.make_model(CPU)
    optimizer = make_optimizer(replace(recipe, learning_rate=0.0), model, settings.resolve_scheme())
    # Static, because each variant meets one shape only; else those compiled later would be compiled for any strides.
    forward = torch.compile(model, dynamic=False) if settings.compile else model

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.bf16):
            loss = recipe.loss(forward(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def processor_seconds(function: Callable[[], None]) -> float:
    """Measure one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


@click.command()
@click.argument("recipe")
@click.option("--data", help="Folder or name of the data set.")
@click.option("--backbone", help="One of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), help="The recipe's, unless given.")
@click.option("--turns", type=click.IntRange(min=1), default=9, show_default=True)
def main(turns: int, **run: object) -> None:
    """Print the milliseconds of a step of RECIPE by memory format and mode, and their ratios."""
    torch.set_num_threads(1)
    settings = Settings(scheme="dense", world_size=1, **run)  # type: ignore[arg-type]
    recipe = settings.resolve_recipe()
    print(
        f"{recipe.name}, batches of {recipe.batch_size}, one thread on {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, {turns} turns",
        flush=True,
    )
    steps = {
        (mode, memory_format): make_step(
            replace(recipe, memory_format=memory_format), replace(settings, bf16=bf16, compile=compiled)
        )
        for (mode, (bf16, compiled)), memory_format in product(MODES.items(), FORMATS)
    }
    times: dict[tuple[str, torch.memory_format], list[float]] = {key: [] for key in steps}
    for _ in range(WARMUP_STEPS):
        for step in steps.values():
            step()
    for _ in range(turns):
        for key, step in steps.items():
            times[key].append(processor_seconds(step))
    first = median(times["plain", FORMATS[0]])
    table = [["", "contiguous", "channels_last", "ratio", "to plain"]]
    for mode in MODES:
        contiguous, last = (median(times[mode, memory_format]) for memory_format in FORMATS)
        row = [f"{1e3 * contiguous:.1f} ms", f"{1e3 * last:.1f} ms", f"{contiguous / last:.2f}", f"{first / last:.2f}"]
        table.append([mode, *row])
    print(aligned(table))


if __name__ == "__main__":
    main()
