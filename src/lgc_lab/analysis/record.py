"""Train with a sparse scheme and keep, at rank 0, samples of what every worker would send."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lgc.comm.transport import SERVER, Transport, clock
from lgc.rounds.aggregator import Aggregator, Round
from lgc.rounds.layout import POOL, Layout
from lgc.rounds.selection import Region
from lgc.schemes import LocalSteps
from lgc_lab.analysis.lengths import CodeLengths
from lgc_lab.training.loop import Training
from lgc_lab.training.settings import Settings

RECORDING = "recording.safetensors"


class Layer(NamedTuple):
    """Weight, or pool of neighbouring small tensors, and its place in the flat vector."""

    name: str
    start: int
    size: int
    row: int  # how many neighbouring coordinates belong to one output; all, for small tensors
    block: int  # how many are a kernel (of a convolution) or a row (of a matrix)
    sampled: int  # how many of its coordinates are sampled


@dataclass(frozen=True)
class Recording:
    """Record of one training run: T recorded steps, K workers, M sampled coordinates, k selected ones.

    `gradient` and `accumulator` are g and v before sending, of the step before and of the recorded one. `sent` is by
    step from `warmup_end` on: where something was sent, and the mean that everyone got of it. Without an outer
    momentum, `momentum` is the mean of the step before.
    """

    settings: dict[str, Any]  # what was recorded
    layers: list[Layer]  # in the order of the flat vector
    coordinates: NDArray[np.int64]  # the sampled ones, layer after layer: (M,)
    steps: NDArray[np.int64]  # the recorded ones: (T,)
    gradient: NDArray[np.float32]  # (T, 2, K, M)
    accumulator: NDArray[np.float32]  # (T, 2, K, M)
    own: NDArray[np.int64]  # every worker's own top-k of v at the final rate, ascending: (T, K, k)
    shared: NDArray[np.float32]  # every worker's v at the indices of the leader: (T, K, k)
    momentum: NDArray[np.float32]  # the outer optimizer's, which all know, before the recorded step: (T, M)
    lengths: NDArray[np.float64]  # bits an entry in each of `CODES`, of all rounds since the last record: (T, K, 4)
    sent: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
    seconds: dict[str, float]  # of training, and of recording beside it
    warmup_end: int  # the first step at the final rate
    total_steps: int  # of the training

    @property
    def workers(self) -> int:
        """Number of workers, K."""
        return int(self.gradient.shape[2])

    def leader(self, record: int) -> int:
        """Find the worker whose indices all others would use at a recorded step."""
        return int(self.steps[record]) % self.workers

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read what `record` wrote."""
        with safe_open(file, framework="np") as stored:
            header = json.loads(stored.metadata()["lgc"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        counts, where, values = (arrays.pop(f"sent_{name}") for name in ("count", "where", "values"))
        ends = np.cumsum(counts)
        sent = list(zip(np.split(where.astype(np.int64), ends), np.split(values, ends), strict=True))[:-1]
        own = arrays.pop("own").astype(np.int64)
        layers = [Layer(**layer) for layer in header.pop("layers")]
        return cls(layers=layers, sent=sent, own=own, **arrays, **header)


class Recorder:
    """Observes one rank's rounds. Rank 0 is sent the samples; what it gathers counts as analysis, not as training."""

    def __init__(
        self,
        aggregator: Aggregator,
        transport: Transport,
        *,
        every: int,
        samples: int,
        seed: int,
        outer_momentum: float,
    ) -> None:
        self.aggregator = aggregator
        self.transport = transport
        self.every = every
        self.region = Region([*aggregator.layout.own, *aggregator.layout.shared])
        self.layers = find_layers(aggregator.layout, samples)
        generator = torch.Generator().manual_seed(seed)
        coordinates = [
            layer.start + torch.randperm(layer.size, generator=generator)[: layer.sampled].sort().values
            for layer in self.layers
        ]
        self.coordinates = torch.cat(coordinates).to(aggregator.feedback.residual.device)
        self.seconds = 0.0
        self.steps: list[int] = []
        self.outer_momentum = outer_momentum
        self.lengths = CodeLengths(self.region, aggregator.feedback.residual.numel())
        self._before: Tensor | None = None  # samples of the last step
        self._momentum = torch.zeros(len(self.coordinates), device=self.coordinates.device)
        self._kept: dict[str, list[Tensor]] = {name: [] for name in ("samples", "own", "shared", "lengths", "momentum")}
        self._sent: list[tuple[Tensor, Tensor]] = []

    def before_round(self, step: int, gradient: Tensor) -> None:
        """Sample what a round is about to take in; a collective at every recorded step."""
        started = clock(gradient.device)
        before, self._before = self._before, None
        given = gradient.clone()
        v = self.aggregator.feedback.accumulate(given)  # changes no state, as the round does it again
        self.lengths.count(v, self.aggregator.schedule.at(step))
        if (step + 1) % self.every == 0 or step % self.every == 0:
            samples = torch.stack([given[self.coordinates], v[self.coordinates]])
            if step % self.every == 0 and before is not None:
                self._record(step, torch.stack([before, samples]), v)
            self._before = samples
        gradient.copy_(given)  # whose memory was taken
        self.seconds += clock(gradient.device) - started

    def after_round(self, step: int, result: Round) -> None:
        """Keep what a round has given."""
        started = clock(result.mean.device)
        self._momentum.mul_(self.outer_momentum).add_(result.mean[self.coordinates])
        if self.transport.rank == SERVER and step >= self.aggregator.schedule.warmup_end:
            where = result.mean.nonzero().flatten()
            self._sent.append((where.to(torch.int32).cpu(), result.mean[where].cpu()))
        self.seconds += clock(result.mean.device) - started

    def save(self, file: Path, settings: dict[str, Any], total_steps: int, seconds: float) -> None:
        """Write everything; at rank 0."""
        samples = torch.stack(self._kept["samples"])  # (T, K, 2 steps, 2 quantities, M)
        gradient, accumulator = samples.permute(3, 0, 2, 1, 4).unbind()
        tensors = {
            "coordinates": self.coordinates.cpu(),
            "steps": torch.tensor(self.steps),
            "gradient": gradient.contiguous(),
            "accumulator": accumulator.contiguous(),
            "own": torch.stack(self._kept["own"]),
            "shared": torch.stack(self._kept["shared"]),
            "lengths": torch.stack(self._kept["lengths"]),
            "momentum": torch.stack(self._kept["momentum"]),
            "sent_count": torch.tensor([len(where) for where, _ in self._sent], dtype=torch.int64),
            "sent_where": torch.cat([torch.empty(0, dtype=torch.int32), *(where for where, _ in self._sent)]),
            "sent_values": torch.cat([torch.empty(0), *(values for _, values in self._sent)]),
        }
        header = {
            "settings": settings,
            "layers": [layer._asdict() for layer in self.layers],
            "seconds": {"training": seconds - self.seconds, "recording": self.seconds},
            "warmup_end": self.aggregator.schedule.warmup_end,
            "total_steps": total_steps,
        }
        save_file(tensors, file, metadata={"lgc": json.dumps(header)})

    def _record(self, step: int, samples: Tensor, v: Tensor) -> None:
        own = self.region.elements(self.region.select(v)).to(torch.int32)
        leader = step % self.transport.world_size
        leaders = self.transport.broadcast(own.clone(), "indices", source=leader).long()
        lengths = self.lengths.take().to(v.device)
        for name, tensor in (("samples", samples), ("own", own), ("shared", v[leaders]), ("lengths", lengths)):
            gathered = self.transport.gather(tensor, name)
            if gathered is not None:
                self._kept[name].append(gathered.cpu())
        self._kept["momentum"].append(self._momentum.to("cpu", copy=True))
        self.steps.append(step)


def record(settings: Settings, out: Path, every: int, samples: int, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes `out`/recording.safetensors."""
    run = Training(settings, device)
    synchronizer, transport = run.handle.synchronizer, Transport(run.group, device)
    assert synchronizer is not None  # schemes that can be recorded have rounds
    scheme = settings.resolve_scheme()
    recorder = Recorder(
        synchronizer.aggregator,
        transport,
        every=every,
        samples=samples,
        seed=settings.seed,
        outer_momentum=scheme.outer[1] if isinstance(scheme, LocalSteps) else 0.0,
    )
    synchronizer.observers.append(recorder)
    started = time.perf_counter()
    hidden = transport.rank != SERVER
    for batch in tqdm(run.batches(), total=run.total, unit="step", disable=hidden or None):
        loss = run.update(*batch)["loss"]
        if not math.isfinite(loss):
            raise RuntimeError(f"the training diverged: the loss of step {run.step - 1} is {loss}.")
    if not hidden:
        configuration = settings.configuration() | {"every": every, "samples": samples}
        recorder.save(out / RECORDING, configuration, run.step, time.perf_counter() - started)


def find_layers(layout: Layout, samples: int) -> list[Layer]:
    """List every weight, and neighbouring small tensors together as one layer, in the order of the flat vector."""
    layers: list[Layer] = []
    for name, place in sorted(layout.slices.items(), key=lambda item: item[1].start):
        shape, start, size = layout.shapes[name], place.start, place.stop - place.start
        if len(shape) >= 2:
            row, kernel = math.prod(shape[1:]), math.prod(shape[2:])
            layers.append(Layer(name, start, size, row, kernel if kernel > 1 else row, min(size, samples)))
            continue
        if layers and layers[-1].name == POOL:
            before = layers.pop()
            start, size = before.start, before.size + size
        layers.append(Layer(POOL, start, size, size, size, min(size, samples)))
    return layers
