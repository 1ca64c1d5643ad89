"""Small models and training loops that run on every rank, for the tests of DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc

CLASSES = 6
FEATURES = 32
SEVERAL_BUCKETS: dict[str, Any] = {"bucket_cap_mb": 0.1}  # of the wide model


class Convolutional(nn.Module):
    """Convolutions, batch normalisation (with buffers), a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(-1, 1, 4, FEATURES // 4)
        h = F.relu(self.norm1(self.conv1(h)))
        h = F.relu(self.norm2(self.conv2(h)))
        logits: Tensor = self.head(h.flatten(1))
        return logits


class Wide(nn.Module):
    """Several layers of one size, which `SEVERAL_BUCKETS` spreads over as many buckets."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        widths = [FEATURES, *[width] * 5, CLASSES]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits


class Transformer(nn.Module):
    """Embedding, a transformer layer, and an output layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 10, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, CLASSES + 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, :8] * 3).long().remainder(CLASSES + 10)
        h = self.block(self.embedding(tokens))
        logits: Tensor = self.out(h.mean(dim=1))[:, :CLASSES]
        return logits


class PartlyFrozen(nn.Module):
    """The first layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, 24).requires_grad_(False)
        self.middle = nn.Linear(24, 24)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.middle(self.frozen(x))))
        return logits


class Bfloat16(nn.Module):
    """Parameters, and with them gradients, in bfloat16; the normalisation stays float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 24, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(24)
        self.out = nn.Linear(24, CLASSES, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.bfloat16()))
        logits: Tensor = self.out(self.norm(h.float()).bfloat16()).float()
        return logits


class SingleLayer(nn.Module):
    """One weight, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(FEATURES, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.only(x)
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": Convolutional,
    "wide": Wide,
    "wider": partial(Wide, 384),  # 2.4 MB; torch.compile takes no buckets of less than 1 MB
    "transformer": Transformer,
    "partly-frozen": PartlyFrozen,
    "bfloat16": Bfloat16,
    "single-layer": SingleLayer,
}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator at `seed` inside, as it was afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build(
    model: str, seed: int = 0, *, device: str = "cpu", broadcast_buffers: bool = False, **ddp_arguments: Any
) -> DistributedDataParallel:
    """A DDP model, the same on every rank."""
    with seeded(seed):
        module = MODELS[model]().to(device)
    ddp = DistributedDataParallel(module, **ddp_arguments)
    ddp.broadcast_buffers = broadcast_buffers  # the constructor's argument has another name since torch 2.13
    return ddp


def batch(rank: int, step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one rank and step; the labels can be learned from the inputs."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, FEATURES, generator=generator)
    return x, x[:, :CLASSES].argmax(dim=1)


class Trained(NamedTuple):
    """What a training run left on one rank."""

    parameters: dict[str, Tensor]
    losses: list[float]
    phases: list[str]
    bytes_by_phase: dict[str, tuple[int, int, int]]  # steps, sent, received


def traffic(handle: Any) -> dict[str, tuple[int, int, int]]:
    """Steps and bytes of the rounds by phase."""
    return {
        str(name): (phase.steps, phase.sent_bytes, phase.received_bytes) for name, phase in handle.wire.phases.items()
    }


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters of a DDP model, by the names of the module inside, on the CPU."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: parameter.detach().clone().cpu() for name, parameter in module.named_parameters()}


def optimizer_of(model: nn.Module, scheme: Any, lr: float = 0.05) -> torch.optim.SGD:
    """SGD without the momentum that the scheme has."""
    momentum = 0.0 if getattr(scheme, "momentum", 0) else 0.9
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def train(
    rank: int,
    world_size: int,
    model: str,
    scheme: Any,
    steps: int,
    ddp_arguments: dict[str, Any] | None = None,
    micro_batches: int = 1,
    compile_backend: str | None = None,
    device: str = "cpu",
) -> Trained:
    """Train a model with a scheme, or with plain DDP where it is None.

    With `micro_batches`, the batch of a step comes in so many parts, all but the last under `no_sync`.
    """
    ddp = build(model, device=device, **(ddp_arguments or {}))
    optimizer = optimizer_of(ddp, scheme)
    handle = None if scheme is None else lgc.attach(ddp, scheme, optimizer)
    called: Any = ddp if compile_backend is None else torch.compile(ddp, backend=compile_backend)
    losses, phases = [], []
    for step in range(steps):
        x, y = (tensor.to(device) for tensor in batch(rank, step))
        optimizer.zero_grad()
        total = 0.0
        for i, (part_x, part_y) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)):
            last = i == micro_batches - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                loss = F.cross_entropy(called(part_x), part_y) / micro_batches
                loss.backward()
                total += loss.item()
        optimizer.step()
        losses.append(total)
        if handle is not None:
            phases.append(str(handle.phase))
            assert handle.step == step + 1
    return Trained(parameters(ddp), losses, phases, {} if handle is None else traffic(handle))
