"""Synthetic gradients, and a scheme run on them by real ranks below DDP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from reference import Config
from torch import Tensor

import lgc
from lgc.comm.transport import Transport

CODECS: dict[str, Any] = {
    "float32": lgc.Float32(),
    "bfloat16": lgc.BFloat16(),
    "sign": lgc.Sign(),
    "lloyd2": lgc.LloydMax(bits=2),
    "uniform4": lgc.Uniform(bits=4),
    "uniform8": lgc.Uniform(bits=8),
}

Shapes = dict[str, tuple[int, ...]]

SHAPES: Shapes = {
    "stem.weight": (8, 1, 3, 3),
    "stem.bias": (8,),
    "norm1.weight": (8,),
    "norm1.bias": (8,),
    "body1.weight": (16, 8, 3, 3),
    "norm2.weight": (16,),
    "norm2.bias": (16,),
    "body2.weight": (16, 16, 3, 3),
    "body2.bias": (16,),
    "head.weight": (10, 16),
    "head.bias": (10,),
}


def gradient(shapes: Shapes, rank: int, step: int) -> dict[str, Tensor]:
    """A heavy-tailed gradient, partly common to all ranks, with layers of different scales."""
    common = torch.Generator().manual_seed(1_000_003 + step)
    private = torch.Generator().manual_seed(7919 * (rank + 1) + step)
    parts = {}
    for layer, (name, shape) in enumerate(shapes.items()):
        both = torch.randn(shape, generator=common) + torch.randn(shape, generator=private)
        parts[name] = 10.0 ** -(1 + layer % 3) * both * both.abs()
    return parts


def joined(parts: Mapping[str, Tensor]) -> Tensor:
    """The vectors of all parameters, in registration order, as one."""
    return torch.cat([part.reshape(-1) for part in parts.values()])


class Step(NamedTuple):
    """What one rank saw of one round, every vector in registration order."""

    mean: Tensor
    sent: Tensor
    residual: Tensor  # after the round
    momentum: Tensor | None  # after the round
    loss: float | None  # of the autoencoder, at rank 0
    reconstruction_error: float | None  # in phase compressed


class Run(NamedTuple):
    """What one rank saw of a run."""

    steps: list[Step]
    order: list[str]  # the parameters in the order of the flat vector
    initial: dict[str, Tensor] | None  # the autoencoder before the first step
    frozen: dict[str, Tensor] | None  # and after the last
    server_residual: Tensor | None  # K times what this rank owes as a server, after the last step


def scheme_of(config: Config) -> Any:
    """The scheme of lgc that `config` describes."""
    common: dict[str, Any] = {
        "rate": config.rate,
        "momentum": config.momentum,
        "low_pass": config.low_pass,
        "second_moment": config.second_moment,
        "warmup_steps": config.warmup_steps,
        "unit": config.unit,
        "values": CODECS[config.values],
    }
    common["pooled_rate"] = config.pooled_rate
    common["roles"] = dict(config.roles)
    for argument in ("first", "last", "small"):
        if getattr(config, argument) is not None:
            common[argument] = getattr(config, argument)
    if config.scheme in ("topk", "dgc"):
        common["reduction"] = config.reduction
        common["mean_values"] = CODECS[config.mean_values] if config.mean_values else None
    if config.scheme == "topk":
        return lgc.TopK(**common)
    if config.scheme == "dgc":
        return lgc.DGC(**common, clip_norm=config.clip_norm)
    if config.scheme == "scalecom":
        return lgc.ScaleCom(**common)
    common |= {
        "clip_norm": config.clip_norm,
        "dense_steps": config.dense_steps,
        "train_steps": config.train_steps,
        "feedback": config.feedback,
        "autoencoder_lr": config.autoencoder_lr,
        "autoencoder_optimizer": config.autoencoder_optimizer,
        "autoencoder_updates": config.autoencoder_updates,
        "refresh_below": 0.0,
        "latent": CODECS[config.latent],
    }
    if config.scheme == "lgc-ring":
        return lgc.LGCRing(**common)
    return lgc.LGCServer(**common, innovation=config.innovation)


def run_rounds(
    rank: int, world_size: int, scheme: Any, shapes: Shapes, gradients: Sequence[Any], kind: str = "cpu"
) -> Run:
    """`aggregate` once per element of `gradients`: the step of `gradient`, or a gradient for every rank.

    On the CPU or, with `kind` "cuda", on a GPU, where convolutions keep all bits then.
    """
    device = torch.device(kind)
    torch.backends.cudnn.allow_tf32 = False
    layout = scheme.layout([(name, torch.zeros(shape)) for name, shape in shapes.items()])
    assert layout.size == sum(math.prod(shape) for shape in shapes.values())
    aggregator = scheme.build(layout, Transport(dist.distributed_c10d._get_default_group(), device), device=device)

    def in_order(flat: Tensor) -> Tensor:
        flat = flat.cpu()
        return torch.cat([flat[layout.slices[name]] for name in shapes]) if shapes else flat.clone()

    def weights() -> dict[str, Tensor] | None:
        autoencoder = getattr(aggregator, "autoencoder", None)
        return None if autoencoder is None else {k: v.clone().cpu() for k, v in autoencoder.state_dict().items()}

    initial = weights()
    steps = []
    for t, given in enumerate(gradients):
        parts = gradient(shapes, rank, given) if isinstance(given, int) else given[rank]
        flat = torch.zeros(layout.size, device=device)
        for name in shapes:
            flat[layout.slices[name]] = parts[name].reshape(-1).to(device)
        before = flat.clone()
        result = aggregator.aggregate(flat, t)
        assert torch.equal(flat.nan_to_num(), before.nan_to_num()), "aggregate changed the gradient it was given"
        momentum = aggregator.feedback.momentum_buffer
        sent = torch.zeros(layout.size, device=device)
        for where, values in result.sent:
            sent[where] += values
        steps.append(
            Step(
                in_order(result.mean),
                in_order(sent),
                in_order(aggregator.feedback.residual),
                None if momentum is None else in_order(momentum),
                aggregator.metrics.get("autoencoder_loss"),
                aggregator.metrics.get("reconstruction_error"),
            )
        )
    order = sorted(shapes, key=lambda name: (layout.slices[name].start, layout.slices[name].stop))
    server_residual = getattr(aggregator, "server_residual", None)
    server_residual = None if server_residual is None else in_order(server_residual)
    return Run(steps, order, initial, weights(), server_residual)
