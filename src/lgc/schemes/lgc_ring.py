"""Learned Gradient Compression over ring all-reduce. Source: LGC, arXiv 2103.08870."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lgc.coding import Float32, Uniform, lane_width, pack_lanes, unpack_lanes
from lgc.comm.messages import Posting, Sum
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.autoencoder import RingAutoencoder, RingLatent, replicated
from lgc.rounds.exchange import Exchanged
from lgc.rounds.feedback import Piece
from lgc.rounds.layout import Layout
from lgc.rounds.schedule import Stage
from lgc.schemes.arguments import require
from lgc.schemes.learned import LearnedExchange, LGCAggregator, LGCScheme, scaled


@dataclass(frozen=True, kw_only=True)
class LGCRing(LGCScheme):
    """Learned Gradient Compression over ring all-reduce.

    Args:
        latent: `Uniform(bits=...)`, summed as integers, or `Float32()`.
    """

    name: ClassVar[str] = "lgc-ring"
    latent: RingLatent = Uniform(bits=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        summable = isinstance(self.latent, Float32 | Uniform) and getattr(self.latent, "block", None) is None
        require(self, "latent", "float32 or uniform without blocks, which can be summed", summable)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        autoencoder = RingAutoencoder(torch.Generator().manual_seed(self.seed), self.latent)
        return LGCAggregator(self, layout, transport, device, autoencoder, RingExchange)


class RingExchange(LearnedExchange):
    """Phase compressed: all ranks encode their values at the leader's indices, and decode the mean of the latents.

    z_k = E(x_k / s)                 x_k this rank's values, s the leader's root mean square
    z   = mean of z_k                summed as floats or as integers
    y   = s D(z)                     what every rank applies
    y_k = s D(z_k)                   what this rank contributed; feedback keeps x_k - y_k
    """

    autoencoder: RingAutoencoder

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        announced = yield from self.receive(v, payload, lengths, stage)
        x, scale = v[announced.indices], announced.scale
        if x.numel() == 0:
            return Exchanged([], Piece(announced.indices, x))
        with replicated(x.device):
            z_k = self.autoencoder.encoder(scaled(x, scale)[None]).nan_to_num(0.0, 0.0, 0.0)
        z, z_k = yield from self._average(z_k)
        with replicated(x.device):
            decoder = partial(self.autoencoder.decoder, torch.cat([z, z_k]), x.numel())
            y, y_k = self.watch.decode(decoder, same=slice(1)) * scale
        if not bool(torch.isfinite(y).all()):  # known to every rank, since y is the same on all
            return (yield from self.fall_back(v, announced.indices, stage))
        y_k = torch.where(torch.isfinite(y_k), y_k, y)
        self.watch.observe(x, y_k)
        return self.exchanged(y, y_k, announced)

    def loss(self, x: Tensor, step: int) -> Tensor:
        return self.autoencoder.loss(x)

    def _average(self, z_k: Tensor) -> Posting[tuple[Tensor, Tensor]]:
        """Mean of the latents over the ranks, and this rank's as it is in there; quantised ones are summed in lanes."""
        latent, world_size = self.autoencoder.latent, self.transport.world_size
        if isinstance(latent, Float32):
            (total,) = yield Sum(content="latents", tensor=z_k)
            return total / world_size, z_k
        scale = self.autoencoder.latent_scale
        quantised = latent.quantise(z_k, scale)
        width = lane_width(2 * latent.levels, world_size)
        (words,) = yield Sum(content="latents", tensor=pack_lanes(quantised.flatten() + latent.levels, width))
        total = unpack_lanes(words, width, z_k.numel()).view_as(z_k) - world_size * latent.levels
        return latent.dequantise(total, scale, world_size), latent.dequantise(quantised, scale)
