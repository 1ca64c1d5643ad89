"""Learned Gradient Compression with a parameter server. Source: LGC, arXiv 2103.08870."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lgc.coding import Kind, Uniform, ValueCodec, pack, size_limit, unpack
from lgc.comm.messages import FromOne, Posting, nothing, to_all
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.autoencoder import ServerAutoencoder, replicated
from lgc.rounds.exchange import Exchanged, root_mean_square, sum_in_order
from lgc.rounds.feedback import Piece
from lgc.rounds.layout import Layout, entries
from lgc.rounds.schedule import Stage
from lgc.rounds.selection import largest
from lgc.rounds.topk import Announced
from lgc.schemes.arguments import require, require_number
from lgc.schemes.learned import LearnedExchange, LGCAggregator, LGCScheme, scaled


@dataclass(frozen=True, kw_only=True)
class LGCServer(LGCScheme):
    """Learned Gradient Compression with a parameter server at rank 0.

    Args:
        innovation: fraction of the values at the leader's indices that every rank sends itself, in (0, 1].
        latent: how the leader's latent becomes bytes.
    """

    name: ClassVar[str] = "lgc-ps"
    innovation: float = 0.01
    latent: ValueCodec = Uniform(bits=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "latent", "a value codec", isinstance(self.latent, ValueCodec))
        require(self, "innovation", "in (0, 1]", 0 < require_number(self, "innovation") <= 1)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        generator = torch.Generator().manual_seed(self.seed)
        autoencoder = ServerAutoencoder(transport.world_size, generator, self.latent, self.innovation)
        return ServerAggregator(self, layout, transport, device, autoencoder, ServerExchange)


class ServerExchange(LearnedExchange):
    """Phase compressed: the leader's latent, and every rank's innovation, to all ranks, which do what a server would.

    z   = E(x_leader / s)            the common part; x_k a rank's values, s the leader's root mean square
    e_k = the largest of x_k / s     the innovation
    y_k = s D_k(z, e_k)              what rank k contributed; every rank computes it of all ranks
    y   = mean of y_k                what every rank applies; feedback keeps x_k - y_k
    """

    autoencoder: ServerAutoencoder

    @property
    def _selected(self) -> int:
        """Number of values at the leader's indices."""
        return sum(self.region.element_counts())

    def prepare(self, v: Tensor, stage: Stage) -> Tensor:
        """The leader's indices, scale, zeros and latent; nothing from the other ranks."""
        if not self.leads(stage.step) or not self._selected:
            return nothing()
        positions = self.region.select(v)
        x = v[self.region.elements(positions)]
        with replicated(v.device):
            z = self.autoencoder.encoder(scaled(x, root_mean_square(x))[None]).nan_to_num(0.0, 0.0, 0.0)
        parts = [*self.announce(positions, x), self.autoencoder.encode_latent(z)]
        return pack(parts, kind=Kind.LATENT, step=stage.step)

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        if not self._selected:
            return Exchanged([], Piece(slice(0), v[:0]))
        announced, z = yield from self._common(v, payload, lengths, stage)
        x, scale = v[announced.indices], announced.scale
        innovations = yield from self._innovations(scaled(x, scale), stage.step)
        with replicated(x.device):
            y = self.watch.decode(partial(self.autoencoder.decode, z, innovations)) * scale
        if not bool(torch.isfinite(y).all()):  # known to every rank, since y is the same on all
            return (yield from self.fall_back(v, announced.indices, stage))
        self.watch.observe(x, y[self.transport.rank])
        return self.exchanged(sum_in_order(y) / self.transport.world_size, y[self.transport.rank], announced)

    def loss(self, x: Tensor, step: int) -> Tensor:
        count = entries(x.shape[1], self.autoencoder.innovation)
        codec = self.codecs.values
        innovations = torch.zeros_like(x)
        for innovation, vector in zip(innovations, x, strict=True):
            where = largest(vector, count)
            innovation[where] = codec.decode(codec.encode(vector[where], [count]), [count]).to(x.device)
        return self.autoencoder.loss(x, innovations, self.leader(step))

    def _common(
        self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage
    ) -> Posting[tuple[Announced, Tensor]]:
        """What the leader has selected, and its latent."""
        assert payload is not None
        mu, leader = self._selected, self.leader(stage.step)
        bounds = [*self.announced_bounds(stage), self.autoencoder.latent_bound(mu)]
        (packet,) = yield FromOne(
            content="indices and latents",
            payload=payload,
            source=leader,
            length=lengths[leader],
            limit=size_limit(bounds),
        )
        *parts, latent_code = unpack(packet, kind=Kind.LATENT, step=stage.step, bounds=bounds)
        z = self.autoencoder.decode_latent(latent_code, mu)
        return self.announced(parts, stage, v.device), z.to(v.device)

    def _innovations(self, x: Tensor, step: int) -> Posting[Tensor]:
        """The innovations of all ranks, shape (K, mu)."""
        positions = largest(x, entries(x.numel(), self.autoencoder.innovation))
        sizes, counts = [x.numel()], [positions.numel()]
        parts = [self.codecs.indices.encode(positions, sizes), self.codecs.values.encode(x[positions], counts)]
        payload = pack(parts, kind=Kind.INNOVATION, step=step)
        bounds = [self.codecs.indices.bound(sizes, counts), self.codecs.values.bound(counts)]
        innovations = x.new_zeros(self.transport.world_size, x.numel())
        payloads = yield from to_all(self.transport.world_size, payload, "innovations", limit=size_limit(bounds))
        for innovation, received in zip(innovations, payloads, strict=True):
            index_code, value_code = unpack(received, kind=Kind.INNOVATION, step=step, bounds=bounds)
            where = self.codecs.indices.decode(index_code, sizes, counts).to(x.device)
            innovation[where] = self.codecs.values.decode(value_code, counts).to(x.device)
        return innovations


class ServerAggregator(LGCAggregator):
    """The round of the parameter server, whose decoders belong to ranks."""

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """Keep the encoder; the decoders start anew, and phase train does from `step` on."""
        fresh = self.state_dict()
        encoder = {
            name: tensor for name, tensor in state["replicated"]["autoencoder"].items() if name.startswith("encoder.")
        }
        kept = {name: state["replicated"][name] for name in ("updates", "past") if name in state["replicated"]}
        train_steps = self.schedule.train_end - self.schedule.warmup_end
        replicated_state = {
            **fresh["replicated"],
            **kept,
            "autoencoder": fresh["replicated"]["autoencoder"] | encoder,
            "train_end": max(self.schedule.train_end, step + train_steps),
        }
        return {**state, "replicated": replicated_state, "server": fresh["server"]}
