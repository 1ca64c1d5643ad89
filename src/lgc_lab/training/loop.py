"""Training loop: one rank of a run, the model, what trains it, and how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgc import Dense, PowerSGD, Scheme, __version__, attach
from lgc.schemes.powersgd import one_bucket_mb
from lgc_lab.folder import require_same
from lgc_lab.recipes import Data, Recipe, source_digest
from lgc_lab.terminal import notify
from lgc_lab.training.batches import Stream, batches, derive
from lgc_lab.training.settings import Settings

MOVED = ("sent_bytes", "received_bytes")
ADAM_SECOND_BETA = 0.95  # as for GPT-3: Brown et al., arXiv 2005.14165, appendix B


class Training:
    """Rank of a run: the model, what trains it, and how far it is. Made by all ranks together.

    A scheme may be given in place of the settings' own, and trains with the same recipe.

    Attributes:
        step: updates done.
        batch_number: of the next batch, from 0; the same as `step` unless the number of ranks has changed.
        last, best: values of the metric at evaluations, None before the first.
        started: when the run was, in UTC.
        seconds: wall_s, train_s (the updates) and evaluate_s up to the last checkpoint that was loaded, and since.
        world_sizes: [step, number of ranks] from the start and from each change on.
    """

    def __init__(
        self, settings: Settings, device: torch.device, *, scheme: Scheme | None = None, check_every: int = 100
    ) -> None:
        self._started = time.monotonic()
        self.started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.settings = settings
        self.device = device
        self.recipe, self.scheme = settings.resolve_recipe(), scheme or settings.resolve_scheme()
        if source_digest(settings.recipe) != settings.source:
            raise ValueError(f"the file of {settings.recipe} has changed since the run was asked for; start it again.")
        torch.manual_seed(settings.seed)
        self.model = self.recipe.make_model(device)
        torch.manual_seed(derive(settings.seed, Stream.MODEL, dist.get_rank()))
        bucket_cap_mb = one_bucket_mb(self.model) if isinstance(self.scheme, PowerSGD) else None
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=bucket_cap_mb)
        self.ddp.broadcast_buffers = False  # rank 0's are broadcast before every evaluation instead
        self.group = self.ddp.process_group
        self.optimizer = make_optimizer(self.recipe, self.model, self.scheme)
        self.data = Data(*(split.to(device) for split in settings.load_data()))
        if isinstance(self.scheme, Dense) and settings.world_size > 2:
            self._settle_buckets()
        logging.getLogger("lgc.advice").setLevel(logging.ERROR)  # make_optimizer has followed it
        self.handle = attach(
            self.ddp,
            self.scheme,
            self.optimizer,
            timeout=None,  # the launcher has set it
            check_every=check_every,
            on_nonfinite="propagate",  # a run that diverges is a result
        )
        self.forward = torch.compile(self.ddp) if settings.compile else self.ddp
        self.per_epoch = settings.steps_per_epoch(self.data)
        self.step = 0
        self.batch_number = 0
        self.samples = 0
        self.last: float | None = None
        self.best: float | None = None
        self.seconds = {"wall_s": 0.0, "train_s": 0.0, "evaluate_s": 0.0}
        self.world_sizes = [[0, settings.world_size]]

    def _settle_buckets(self) -> None:
        """Make a backward pass for nothing, after which DDP lays out the buckets that it keeps.

        From three ranks on, the order in which gloo adds up depends on a gradient's place in its bucket, and the first
        step of a resumed run would else differ in rounding.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            indices = torch.arange(self.recipe.batch_size)
            inputs, targets = self.recipe.make_batch(self.data.train, indices, torch.Generator(), self.device)
            with self._autocast():
                loss = self.recipe.loss(self.ddp(inputs), targets)
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
    def ends_epoch(self) -> bool:
        """Tells whether the last update was the last one of a pass over the data."""
        return self.batch_number % self.per_epoch == 0

    @property
    def is_done(self) -> bool:
        """Tells whether there is nothing left to train."""
        return self.step >= self.total

    @property
    def progress(self) -> float:
        """Part of the run that is done, in [0, 1]: of the steps where they are limited, else of the epochs."""
        if self.settings.steps:
            return self.step / self.total
        return self.batch_number / (self.recipe.epochs * self.per_epoch)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is left of this rank's batches."""
        if self.is_done:
            return iter(())
        last = self.batch_number + self.total - self.step
        return batches(self.settings, self.data, last, self.device, start=self.batch_number)

    def update(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Train on one batch; returns this rank's row of metrics.jsonl."""
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
        if self.is_done:
            self.handle.finish()
        self.samples += self.recipe.batch_size * self.settings.world_size
        row: dict[str, Any] = {"loss": loss.item(), "lr": learning_rate, "phase": self.handle.phase.value}
        phases = self.handle.wire.phases.values()
        moved = {f"rank0_{name}": sum(getattr(traffic, name) for traffic in phases) for name in MOVED}
        self.seconds["train_s"] += time.monotonic() - started
        return row | self.handle.metrics | moved

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Measure the metric on the test data, each rank its share; a collective.

        Under local steps it is that of the last round; else all have rank 0's buffers then (batch norm's statistics).
        Returns the row of metrics.jsonl, with the bytes of all ranks.
        """
        started = time.monotonic()
        with self.handle.anchored():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
            metric, test = self.recipe.metric, self.data.test
            count = min(self.settings.limit_test or len(test), len(test))
            share = torch.arange(dist.get_rank(), count, dist.get_world_size())
            with self._autocast():
                sums = self.recipe.evaluate(self.model, test, share, self.device)
        dist.all_reduce(sums)
        self.last = float(metric.value(sums.cpu()))
        pick = max if metric.better == "higher" else min
        self.best = self.last if self.best is None else pick(self.best, self.last)
        self.seconds["evaluate_s"] += time.monotonic() - started
        wire = self.handle.wire_summary()
        return {metric.name: self.last} | {name: wire[name] for name in MOVED}

    def state_dict(self) -> dict[str, Any]:
        """Collect all that this rank needs to go on from here with the same numbers."""
        epoch, number = divmod(self.batch_number, self.per_epoch)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        position = {
            "step": self.step,
            "epoch": epoch,
            "samples_of_epoch": number * self.recipe.batch_size * self.settings.world_size,
            "samples": self.samples,
            "world_sizes": self.world_sizes,
        }
        return {
            "configuration": self.settings.configuration(),
            "position": position,
            "metric": {"last": self.last, "best": self.best},
            "started": self.started,
            "seconds": self.seconds_now(),
            "random": random,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the same rank, or one that `lgc.checkpoint.load` made for this number of ranks.

        On another number of ranks, training goes on with the sample of the epoch's shuffle that comes next, or up to
        one batch before it, and the random generators start from the seed, the step and the rank. Raises OtherRunError
        if the state is of a run with other settings.
        """
        configuration, position = self.settings.configuration(), state["position"]
        require_same(state["configuration"], configuration, "the checkpoint is of a run", but=("world_size",))
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
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
            torch.manual_seed(derive(self.settings.seed, Stream.MODEL, dist.get_rank(), self.step))

    def summary(self) -> dict[str, Any]:
        """Sum up the run, as in summary.json; a collective."""
        metric, seconds = self.recipe.metric, self.seconds_now()
        speed = {"samples_per_s": round(self.samples / seconds["train_s"], 1)}
        return {
            "recipe": self.recipe.name,
            "scheme": self.scheme.name,
            "label": self.settings.scheme,
            "world_size": self.settings.world_size,
            "world_sizes": self.world_sizes,
            "seed": self.settings.seed,
            "steps": self.step,
            "metric": {"name": metric.name, "value": self.last, "best": self.best, "better": metric.better},
            "wire": self.handle.wire_summary(),
            "time": {"started": self.started, **{name: round(value, 3) for name, value in seconds.items()}, **speed},
            "parameters": self.handle.parameters,
            "versions": {"lgc": __version__, "torch": torch.__version__},
            "configuration": self.settings.configuration(),
        }

    def seconds_now(self) -> dict[str, float]:
        """Read the clock: `seconds` of the run so far, without what was lost in interruptions."""
        return self.seconds | {"wall_s": self.seconds["wall_s"] + time.monotonic() - self._started}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16)


def make_optimizer(recipe: Recipe, model: nn.Module, scheme: Scheme) -> torch.optim.Optimizer:
    """Make the recipe's; where the scheme has SGD's momentum, the weight decay makes up for acting without one.

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


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state whose tensors are contiguous, as in checkpoints, and lay them out as their parameters are.

    Where the two differ, as in channels_last, an update takes several times as long.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, of_parameter in optimizer.state.items():
        for name, value in of_parameter.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                of_parameter[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
