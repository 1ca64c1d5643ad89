"""One training run: what every rank does, and what it leaves in the run folder."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_mem_efficient_sdp
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lgc import checkpoint
from lgc.comm.replicas import require_agreement
from lgc.comm.transport import Transport
from lgc.ddp import attach
from lgc.phase import Phase
from lgc.powersgd import one_bucket_mb
from lgc.schemes import Auto, Dense, PowerSGD, Scheme, parse_scheme
from lgc.version import __version__
from lgc_lab.recipes import Data, Recipe, find_recipe, source_digest
from lgc_lab.training.run_folder import CHECKPOINTS, METRICS, SUMMARY, Recorder, require_same, write_json

MOST_SEED = 2**63 - 1  # torch.manual_seed
EARLY_PHASES = ("dense_steps", "warmup_steps", "train_steps")
ADAM_SECOND_BETA = 0.95  # as for GPT-3: Brown et al., arXiv 2005.14165, appendix B


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's result; plain values, so that they can be compared and passed on.

    Args:
        recipe: name of a recipe.
        scheme: text form of a scheme; arguments it does not set come from the recipe.
        world_size: number of ranks, at least 1.
        seed: of the model, the shuffling and the augmentation, in 0 .. 2^63 - 1.
        epochs: at least 1; None is the recipe's.
        steps: stop after this many, at least 1; None is at the end of the epochs.
        batch_size: per rank, at least 1; None is the recipe's.
        learning_rate: before the schedule's factor, above 0; None is the recipe's.
        data: folder or name of the data set; None is the recipe's own.
        limit_train: train on this many samples only, at least 1; None is all.
        limit_test: evaluate on this many samples only, at least one a rank; None is all.
        backbone: one of the recipe's; None is its first.
        bf16: whether the model computes in bfloat16 where autocast has it do so.
        compile: whether the model is compiled for training, by torch.compile.

    Attributes:
        source: digest of the file that has a user's own recipe, as it was when these settings were made.
    """

    recipe: str
    scheme: str
    world_size: int
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    data: str | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    backbone: str | None = None
    bf16: bool = False
    compile: bool = False
    source: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for name in ("world_size", "seed", "epochs", "steps", "batch_size", "limit_train"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if self.seed > MOST_SEED:
            raise ValueError(f"seed must be at most {MOST_SEED}, got {self.seed}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}.")
        if self.limit_test is not None and self.limit_test < self.world_size:
            raise ValueError(f"limit_test must be at least {self.world_size}, one a rank, got {self.limit_test}.")
        recipe = find_recipe(self.recipe)
        if self.batch_size is not None and self.batch_size < recipe.least_batch_size:
            raise ValueError(
                f"{self.recipe}: batch_size must be at least {recipe.least_batch_size}, got {self.batch_size}."
            )
        backbones = recipe.backbones
        if self.backbone is not None and self.backbone not in backbones:
            options = ", ".join(backbones) or "unset for this recipe"
            raise ValueError(f"{self.recipe}: backbone must be {options}, got {self.backbone!r}.")
        self.resolve_scheme()
        object.__setattr__(self, "source", source_digest(self.recipe))

    def resolve_recipe(self) -> Recipe:
        """The recipe with these settings in place of its own."""
        recipe = find_recipe(self.recipe)
        model = partial(recipe.model, self.backbone or recipe.backbones[0]) if recipe.backbones else recipe.model
        return replace(
            recipe,
            model=model,
            epochs=self.epochs or recipe.epochs,
            batch_size=self.batch_size or recipe.batch_size,
            learning_rate=self.learning_rate or recipe.learning_rate,
        )

    def load_data(self) -> Data:
        """The data set. The first call decodes it into the cache; let one process do that before the ranks start.

        Raises:
            ValueError, OSError: if it is missing or malformed, or too small for the batches.
        """
        recipe = self.resolve_recipe()
        data = recipe.data(self.data, self.limit_train)
        steps_per_epoch(recipe, data, self)
        if len(data.test) < self.world_size:
            raise ValueError(
                f"{self.recipe}: the test data must have at least {self.world_size} samples, one a rank, got "
                f"{len(data.test)}."
            )
        return data

    def resolve_scheme(self) -> Scheme:
        """The scheme with the recipe's arguments where none are set."""
        return parse_scheme(self.scheme, find_recipe(self.recipe).scheme_defaults)

    def configuration(self) -> dict[str, Any]:
        """What must be equal for two runs to be the same run, as JSON values."""
        recipe = self.resolve_recipe()
        backbone = self.backbone or next(iter(recipe.backbones), None)
        resolved = {name: getattr(recipe, name) for name in ("epochs", "batch_size", "learning_rate")}
        resolved["backbone"] = backbone
        if self.data and "://" not in self.data:
            resolved["data"] = str(PurePath(self.data))  # without a slash at its end
        settings = {name: value for name, value in asdict(self).items() if name != "source" or value is not None}
        return settings | resolved | {"scheme": str(self.resolve_scheme()), "version": __version__}


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run leaves, apart from its settings: nothing here changes its result.

    Args:
        folder: of the run, one for all ranks.
        checkpoint_every: steps from one checkpoint to the next, at least 0; None is an epoch, 0 is never.
        tensorboard: whether to write TensorBoard events.
    """

    folder: Path
    checkpoint_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be at least 0, got {self.checkpoint_every}.")


def train(settings: Settings, output: Output, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the run folder, all of them checkpoints.

    Goes on from the newest checkpoint that can be loaded, if the folder has one.
    """
    if dist.get_rank() == 0:
        logging.getLogger("lgc").addHandler(_NOTICES)
        logging.getLogger("lgc").setLevel(logging.INFO)
    _use_deterministic_kernels(device)
    run = Training(settings, device)
    _require_same_run(run, output)
    resume(run, output.folder / CHECKPOINTS)
    recorder = None
    if dist.get_rank() == 0:
        _warn_of_short_run(run)
        recorder = Recorder(
            output.folder,
            step=run.step,
            seconds=run.wall_seconds,
            total=run.total,
            title=f"{run.scheme.name} seed {settings.seed}",
            tensorboard=output.tensorboard,
        )
    for inputs, targets in run.batches():
        row = run.update(inputs, targets)
        if recorder:
            recorder.row(run.step - 1, run.epoch, row)
            recorder.progress(f"{row['phase']} loss {row['loss']:.3f} {row['rank0_sent_bytes'] / 1e6:.1f} MB sent")
        if run.ends_epoch or run.is_done:
            row = run.evaluate()
            if recorder:
                recorder.row(run.step - 1, run.epoch, row)
        if _checkpoint_is_due(run, output.checkpoint_every):
            if recorder:
                recorder.sync()
            path = output.folder / CHECKPOINTS
            checkpoint.save(path, run.state_dict(), step=run.step, group=run.group, keep=1 if run.is_done else 2)
    summary = run.summary()
    if recorder:
        recorder.close()
        write_json(output.folder / SUMMARY, summary)


def _require_same_run(run: Training, output: Output) -> None:
    """All ranks have the same settings and as much data; a collective. Raises RuntimeError on all, naming the field."""
    asked = {name: value for name, value in asdict(run.settings).items() if name != "data"}  # a folder of each machine
    lengths = {"training samples": len(run.data.train), "test samples": len(run.data.test)}
    everything = asked | lengths | {"checkpoint_every": output.checkpoint_every}
    require_agreement(Transport(run.group, run.device), "lgc train", everything)


def _use_deterministic_kernels(device: torch.device) -> None:
    """On a GPU, where an interrupted run would else go on with other numbers.

    torch warns of what it has no deterministic kernel for. Filling new memory is for debugging only.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for enable in (enable_flash_sdp, enable_mem_efficient_sdp, enable_cudnn_sdp):  # where torch only warns
            enable(False)


def _warn_of_short_run(run: Training) -> None:
    if run.step or run.handle.aggregator is None:
        return
    schedule = run.handle.aggregator.schedule
    last = schedule.at(run.total - 1).phase
    if last is not Phase.COMPRESSED:
        names = [name for name in EARLY_PHASES if hasattr(run.scheme, name)]
        notify(
            f"WARNING: with {run.total} steps the run ends in phase {last}, before {run.scheme.name} sends what it is "
            f"for, from step {schedule.train_end} on; set {', '.join(names)} of the scheme."
        )


def resume(run: Training, directory: Path) -> None:
    """Load the newest checkpoint that is not refused; a collective."""
    state = checkpoint.resume(directory, group=run.group)
    if state is not None:
        run.load_state_dict(state)
    if dist.get_rank() != 0:
        return
    if state is not None and isinstance(run.scheme, PowerSGD):
        notify("NOTICE: torch's PowerSGD hook keeps no state; it starts again with uncompressed steps.")
    if state is None and (directory.parent / METRICS).exists():
        notify(f"{directory.parent}: starts anew, there is no checkpoint to go on from")


def notify(text: str) -> None:
    """Tell the user, on stderr, around a progress bar."""
    tqdm.write(text, file=sys.stderr)


class _Notices(logging.Handler):
    """Tells the user what lgc logs."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "WARNING: " if record.levelno >= logging.WARNING else ""
        notify(prefix + record.getMessage())


_NOTICES = _Notices()


def _checkpoint_is_due(run: Training, every: int | None) -> bool:
    if every == 0:
        return False
    return run.is_done or (run.ends_epoch if every is None else run.step % every == 0)


class Training:
    """One rank of a run: the model, what trains it, and how far it is. Made by all ranks together.

    Attributes:
        step: updates done.
        batch_number: of the next batch, from 0; the same as `step` unless the number of ranks has changed.
        last, best: values of the metric at evaluations, None before the first.
        started: when the run was, in UTC.
        seconds: wall_s, train_s (the updates) and evaluate_s up to the last checkpoint that was loaded, and since.
        world_sizes: [step, number of ranks] from the start and from each change on.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._started = time.monotonic()
        self.started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.settings = settings
        self.device = device
        self.recipe, self.scheme = settings.resolve_recipe(), settings.resolve_scheme()
        if source_digest(settings.recipe) != settings.source:
            raise ValueError(f"the file of {settings.recipe} has changed since the run was asked for; start it again.")
        torch.manual_seed(settings.seed)
        self.model = self.recipe.model().to(device)
        torch.manual_seed(hash((settings.seed, dist.get_rank())))  # of dropout, of its own in every rank
        bucket_cap_mb = one_bucket_mb(self.model) if isinstance(self.scheme, PowerSGD) else None
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=bucket_cap_mb)
        self.ddp.broadcast_buffers = False  # rank 0's are broadcast before every evaluation instead
        self.group = self.ddp.process_group
        self.optimizer = make_optimizer(self.recipe, self.model, self.scheme)
        self.data = Data(*(split.to(device) for split in settings.load_data()))
        if isinstance(self.scheme, Dense | Auto) and settings.world_size > 2:
            self._settle_buckets()
        logging.getLogger("lgc.advice").setLevel(logging.ERROR)  # make_optimizer has followed it
        self.handle = attach(
            self.ddp,
            self.scheme,
            self.optimizer,
            timeout=None,  # the launcher has set it
            on_nonfinite="propagate",  # a run that diverges is a result
        )
        self.forward = torch.compile(self.ddp) if settings.compile else self.ddp
        self.per_epoch = steps_per_epoch(self.recipe, self.data, settings)
        self.step = 0
        self.batch_number = 0
        self.samples = 0
        self.last: float | None = None
        self.best: float | None = None
        self.seconds = {"wall_s": 0.0, "train_s": 0.0, "evaluate_s": 0.0}
        self.world_sizes = [[0, settings.world_size]]

    def _settle_buckets(self) -> None:
        """One backward pass for nothing, after which DDP lays out the buckets that it keeps.

        From three ranks on, the order in which gloo adds up depends on a gradient's place in its bucket, and the first
        step of a resumed run would else differ in rounding.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            inputs, targets = self.data.train.batch(torch.arange(self.recipe.batch_size), torch.Generator())
            with self._autocast():
                loss = self.recipe.loss(self.ddp(inputs.to(self.device)), targets.to(self.device))
            torch.autograd.backward(loss)
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        of_epochs = self.step + self.recipe.epochs * self.per_epoch - self.batch_number
        return min(self.settings.steps or of_epochs, of_epochs)

    @property
    def epoch(self) -> float:
        """Passes over the training data before the last update."""
        return (self.batch_number - 1) / self.per_epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether the last update was the last one of a pass over the data."""
        return self.batch_number % self.per_epoch == 0

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.total

    @property
    def progress(self) -> float:
        """The part of the run that is done, in [0, 1]: of the steps where they are limited, else of the epochs."""
        return (
            self.step / self.total if self.settings.steps else self.batch_number / (self.recipe.epochs * self.per_epoch)
        )

    @property
    def wall_seconds(self) -> float:
        """Time of the run so far, but for what was lost in interruptions."""
        return self.seconds["wall_s"] + time.monotonic() - self._started

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of this rank's batches."""
        if self.is_done:
            return iter(())
        last = self.batch_number + self.total - self.step
        return batches(self.recipe, self.data, self.settings, last, self.device, start=self.batch_number)

    def update(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Train on one batch; this rank's row of metrics.jsonl."""
        started = time.monotonic()
        learning_rate = self.recipe.learning_rate * self.recipe.learning_rate_factor(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.ddp.train()
        with self._autocast():
            loss = self.recipe.loss(self.forward(inputs), targets)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        self.batch_number += 1
        self.samples += self.recipe.batch_size * self.settings.world_size
        phases = self.handle.wire.phases.values()
        row = {
            "loss": loss.item(),
            "lr": learning_rate,
            "phase": self.handle.phase.value,
            **self.handle.metrics,
            "rank0_sent_bytes": sum(traffic.sent_bytes for traffic in phases),
            "rank0_received_bytes": sum(traffic.received_bytes for traffic in phases),
        }
        self.seconds["train_s"] += time.monotonic() - started
        return row

    def evaluate(self) -> dict[str, Any]:
        """Measure the metric on the test data; a collective. The row of metrics.jsonl, with the bytes of all ranks."""
        started = time.monotonic()
        with self._autocast():
            self.last = evaluate(self.recipe, self.model, self.data, self.device, self.settings.limit_test)
        pick = max if self.recipe.metric.better == "higher" else min
        self.best = self.last if self.best is None else pick(self.best, self.last)
        self.seconds["evaluate_s"] += time.monotonic() - started
        wire = self.handle.wire_summary()
        return {self.recipe.metric.name: self.last} | {key: wire[key] for key in ("sent_bytes", "received_bytes")}

    def state_dict(self) -> dict[str, Any]:
        """Everything that this rank needs to go on from here with the same numbers."""
        epoch, number = divmod(self.batch_number, self.per_epoch)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "configuration": self.settings.configuration(),
            "position": {
                "step": self.step,
                "epoch": epoch,
                "samples_of_epoch": number * self.recipe.batch_size * self.settings.world_size,
                "samples": self.samples,
                "world_sizes": self.world_sizes,
            },
            "metric": {"last": self.last, "best": self.best},
            "started": self.started,
            "seconds": self._seconds_now(),
            "random": random,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the same rank, or one that `lgc.checkpoint.load` made for this number of ranks.

        On another number of ranks, training goes on with the sample of the epoch's shuffle that comes next, or up to
        one batch before it, and the random generators start from the seed, the step and the rank.

        Raises:
            OtherRunError: the state is of a run with other settings.
        """
        configuration, position = self.settings.configuration(), state["position"]
        require_same(state["configuration"], configuration, "the checkpoint is of a run", but=("world_size",))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])
        self.step, self.samples = position["step"], position["samples"]
        number = position["samples_of_epoch"] // (self.recipe.batch_size * self.settings.world_size)
        self.batch_number = position["epoch"] * self.per_epoch + min(number, self.per_epoch - 1)
        self.last, self.best = state["metric"]["last"], state["metric"]["best"]
        self.started, self.seconds = state["started"], dict(state["seconds"])
        self.world_sizes = list(position["world_sizes"])
        if self.world_sizes[-1][1] == self.settings.world_size:
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        else:
            if dist.get_rank() == 0:
                notify(f"NOTICE: from {self.world_sizes[-1][1]} to {self.settings.world_size} ranks, see docs/usage.md")
            self.world_sizes.append([self.step, self.settings.world_size])
            torch.manual_seed(hash((self.settings.seed, dist.get_rank(), self.step)))

    def summary(self) -> dict[str, Any]:
        """The content of summary.json; a collective."""
        seconds = self._seconds_now()
        return {
            "recipe": self.recipe.name,
            "scheme": self.scheme.name,
            "label": self.settings.scheme,
            "chosen": str(self.handle.scheme),
            "world_size": self.settings.world_size,
            "world_sizes": self.world_sizes,
            "seed": self.settings.seed,
            "steps": self.step,
            "metric": {
                "name": self.recipe.metric.name,
                "value": self.last,
                "best": self.best,
                "better": self.recipe.metric.better,
            },
            "wire": self.handle.wire_summary(),
            "time": {
                "started": self.started,
                **{name: round(value, 3) for name, value in seconds.items()},
                "samples_per_s": round(self.samples / seconds["train_s"], 1),
            },
            "parameters": self.handle.parameters,
            "versions": {"lgc": __version__, "torch": torch.__version__},
            "configuration": self.settings.configuration(),
        }

    def _seconds_now(self) -> dict[str, float]:
        return self.seconds | {"wall_s": self.wall_seconds}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16)


def make_optimizer(recipe: Recipe, model: nn.Module, scheme: Scheme) -> torch.optim.Optimizer:
    """The recipe's; where the scheme has SGD's momentum, the weight decay makes up for acting without one.

    Where the scheme makes Adam's step, what is left of it is SGD.
    """
    if recipe.optimizer == "adamw":
        decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if scheme.makes_adams_step:
            return torch.optim.SGD(groups, lr=recipe.learning_rate)
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, ADAM_SECOND_BETA))
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=0.0 if scheme.corrected_momentum or scheme.makes_adams_step else recipe.momentum,
        weight_decay=recipe.weight_decay / (1 - scheme.corrected_momentum),
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
def evaluate(recipe: Recipe, model: nn.Module, data: Data, device: torch.device, limit: int | None = None) -> float:
    """The metric on the first `limit` test samples, each rank its share, with rank 0's batch-norm statistics on all."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    model.eval()
    count = len(data.test) if limit is None else min(limit, len(data.test))
    share = torch.arange(dist.get_rank(), count, dist.get_world_size())
    parts = []
    for first in range(0, len(share), recipe.evaluation_batch):
        indices = share[first : first + recipe.evaluation_batch]
        inputs, targets = (tensor.to(device) for tensor in data.test.batch(indices, None))
        parts.append(recipe.metric.sums(model(inputs).float(), targets))
    sums = torch.stack(parts).sum(dim=0)
    dist.all_reduce(sums)
    return float(recipe.metric.value(sums.cpu()))
