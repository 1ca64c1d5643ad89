"""One training run: what every rank does, and what it leaves in the run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lgc.ddp import Handle, attach
from lgc.recipes import Data, Recipe, find_recipe
from lgc.schemes import Scheme, parse_scheme
from lgc.version import __version__

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
ADAM_SECOND_BETA = 0.95  # as for GPT-3: Brown et al., arXiv 2005.14165, appendix B


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's result; plain values, so that they can be compared and passed on.

    Args:
        recipe: name of a recipe.
        scheme: text form of a scheme; arguments it does not set come from the recipe.
        world_size: number of ranks, at least 1.
        seed: of the model, the shuffling and the augmentation, at least 0.
        epochs: at least 1; None is the recipe's.
        steps: stop after this many, at least 1; None is at the end of the epochs.
        batch_size: per rank, at least 1; None is the recipe's.
        data: folder or name of the data set; None is the recipe's own.
        limit_train: train on this many samples only, at least 1; None is all.
        backbone: one of the recipe's; None is its first.
    """

    recipe: str
    scheme: str
    world_size: int
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    data: str | None = None
    limit_train: int | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "seed", "epochs", "steps", "batch_size", "limit_train"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        backbones = find_recipe(self.recipe).backbones
        if self.backbone is not None and self.backbone not in backbones:
            options = ", ".join(backbones) or "unset for this recipe"
            raise ValueError(f"{self.recipe}: backbone must be {options}, got {self.backbone!r}.")
        self.resolve_scheme()

    def resolve_recipe(self) -> Recipe:
        """The recipe with these settings in place of its own."""
        recipe = find_recipe(self.recipe)
        model = partial(recipe.model, self.backbone or recipe.backbones[0]) if recipe.backbones else recipe.model
        return replace(
            recipe,
            model=model,
            epochs=self.epochs or recipe.epochs,
            batch_size=self.batch_size or recipe.batch_size,
        )

    def load_data(self) -> Data:
        """The data set. The first call decodes it into the cache; let one process do that before the ranks start.

        Raises:
            ValueError, OSError: if it is missing or malformed, or too small for the batches.
        """
        recipe = self.resolve_recipe()
        data = recipe.data(self.data, self.limit_train)
        steps_per_epoch(recipe, data, self)
        return data

    def resolve_scheme(self) -> Scheme:
        """The scheme with the recipe's arguments where none are set."""
        return parse_scheme(self.scheme, find_recipe(self.recipe).scheme_defaults)

    def configuration(self) -> dict[str, Any]:
        """What must be equal for two runs to be the same run, as JSON values."""
        recipe = self.resolve_recipe()
        backbone = self.backbone or next(iter(recipe.backbones), None)
        resolved = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "backbone": backbone}
        return asdict(self) | resolved | {"scheme": str(self.resolve_scheme()), "version": __version__}


def train(settings: Settings, out: Path, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the run folder `out`.

    `out` gets metrics.jsonl while it trains and summary.json, last and at once, when it is done.
    """
    started = time.monotonic()
    recipe, scheme = settings.resolve_recipe(), settings.resolve_scheme()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = recipe.model().to(device)
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # rank 0's are broadcast before every evaluation instead
    optimizer = make_optimizer(recipe, model, scheme)
    handle = attach(ddp, scheme, optimizer)
    data = Data(*(split.to(device) for split in settings.load_data()))
    per_epoch = steps_per_epoch(recipe, data, settings)
    total = min(settings.steps or recipe.epochs * per_epoch, recipe.epochs * per_epoch)

    recorder = Recorder(out, handle, total, f"{scheme.name} seed {settings.seed}") if dist.get_rank() == 0 else None
    value = float("nan")
    for step, (inputs, targets) in enumerate(batches(recipe, data, settings, total, device)):
        learning_rate = recipe.learning_rate * recipe.learning_rate_factor(step / total)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        ddp.train()
        loss = recipe.loss(ddp(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        epoch = step / per_epoch
        if recorder:
            recorder.step(step, epoch, loss.item(), learning_rate)
        if (step + 1) % per_epoch == 0 or step + 1 == total:
            value = evaluate(recipe, model, data, device)
            wire = handle.wire_summary()
            if recorder:
                recorder.evaluation(step, epoch, {recipe.metric.name: value}, wire)

    wire = handle.wire_summary()
    if recorder:
        recorder.close()
        summary = {
            "recipe": recipe.name,
            "scheme": scheme.name,
            "label": settings.scheme,
            "world_size": settings.world_size,
            "seed": settings.seed,
            "steps": total,
            "metric": {"name": recipe.metric.name, "value": value},
            "wire": wire,
            "time": {"wall_s": round(time.monotonic() - started, 3)},
            "parameters": handle.parameters,
            "versions": {"lgc": __version__, "torch": torch.__version__},
            "configuration": settings.configuration(),
        }
        write_json(out / SUMMARY, summary)


def make_optimizer(recipe: Recipe, model: nn.Module, scheme: Scheme) -> torch.optim.Optimizer:
    """The recipe's; where the scheme has SGD's momentum, the weight decay makes up for acting without one."""
    if recipe.optimizer == "adamw":
        decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, ADAM_SECOND_BETA))
    scheme_momentum = getattr(scheme, "momentum", 0.0)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=0.0 if scheme_momentum else recipe.momentum,
        weight_decay=recipe.weight_decay / (1 - scheme_momentum),
    )


def steps_per_epoch(recipe: Recipe, data: Data, settings: Settings) -> int:
    """Whole batches that every rank has of the training data.

    Raises:
        ValueError: if that is none.
    """
    steps = len(data.train) // (recipe.batch_size * settings.world_size)
    if steps == 0:
        raise ValueError(
            f"batch_size must be at most {len(data.train) // settings.world_size} for "
            f"{len(data.train)} samples on {settings.world_size} ranks, got {recipe.batch_size}."
        )
    return steps


def batches(
    recipe: Recipe, data: Data, settings: Settings, total: int, device: torch.device, *, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of the steps from `start` to `total`, one ahead of what has been asked for.

    Every epoch is one shuffle, dealt out to the ranks. A batch is a function of seed, step and rank alone.
    """
    rank = dist.get_rank()
    per_epoch = steps_per_epoch(recipe, data, settings)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        shuffler = torch.Generator().manual_seed(hash((settings.seed, epoch)))
        return torch.randperm(len(data.train), generator=shuffler)[rank :: settings.world_size]

    def load(step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, per_epoch)
        indices = order(epoch)[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        generator = torch.Generator().manual_seed(hash((settings.seed, step, rank)))
        inputs, targets = data.train.batch(indices, generator)
        return inputs.to(device), targets.to(device)

    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(load, start)
        for step in range(start, total):
            batch = upcoming.result()
            if step + 1 < total:
                upcoming = loader.submit(load, step + 1)
            yield batch


@torch.no_grad()
def evaluate(recipe: Recipe, model: nn.Module, data: Data, device: torch.device) -> float:
    """The metric on the test data, each rank its share, with rank 0's batch-norm statistics on all."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    model.eval()
    share = torch.arange(dist.get_rank(), len(data.test), dist.get_world_size())
    parts = []
    for first in range(0, len(share), recipe.evaluation_batch):
        indices = share[first : first + recipe.evaluation_batch]
        inputs, targets = (tensor.to(device) for tensor in data.test.batch(indices, None))
        parts.append(recipe.metric.sums(model(inputs), targets))
    sums = torch.stack(parts).sum(dim=0)
    dist.all_reduce(sums)
    return recipe.metric.value(sums.cpu())


class Recorder:
    """Rank 0's view of a run: metrics.jsonl, and a progress bar where there is a terminal."""

    def __init__(self, out: Path, handle: Handle, total: int, title: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.handle = handle
        self.started = time.monotonic()
        self.file = (out / METRICS).open("w", encoding="utf-8")
        self.bar = tqdm(total=total, desc=title, unit="step", disable=None, leave=False, dynamic_ncols=True)

    def step(self, step: int, epoch: float, loss: float, learning_rate: float) -> None:
        """Record one training step, with the bytes of rank 0."""
        phases = self.handle.wire.phases.values()
        sent = sum(traffic.sent_bytes for traffic in phases)
        received = sum(traffic.received_bytes for traffic in phases)
        row = {"loss": loss, "lr": learning_rate, "phase": self.handle.phase.value} | self.handle.metrics
        self._write(step, epoch, row | {"rank0_sent_bytes": sent, "rank0_received_bytes": received})
        self.bar.set_postfix_str(f"{self.handle.phase.value} loss {loss:.3f} {(sent + received) / 1e6:.1f} MB")
        self.bar.update()

    def evaluation(self, step: int, epoch: float, metric: dict[str, float], wire: dict[str, Any]) -> None:
        """Record an evaluation, with the bytes of all ranks so far."""
        self._write(step, epoch, metric | {name: wire[name] for name in ("sent_bytes", "received_bytes")})

    def close(self) -> None:
        """Finish the files."""
        self.bar.close()
        self.file.close()

    def _write(self, step: int, epoch: float, row: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.started, 3)
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), "seconds": seconds} | row) + "\n")
        self.file.flush()


def write_json(path: Path, content: object) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
