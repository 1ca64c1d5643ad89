"""Learned Gradient Compression, ring all-reduce and parameter server.

Source: Abrahamyan, Chen, Bekoulis, Deligiannis, IEEE TNNLS 33(12), 2021, arXiv 2103.08870. `LGCAggregator.aggregate` is
the algorithm in the order of the paper, `_exchange_compressed` what is each variant's own; docs/algorithm.md has the
same in formulas.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lgc.coding import Float32, Kind, lane_width, pack, pack_lanes, size_limit, unpack, unpack_lanes
from lgc.comm.replicas import digest
from lgc.comm.transport import SERVER, Transport
from lgc.phase import Phase
from lgc.rounds.aggregators import (
    Aggregator,
    Codecs,
    Exchange,
    Offer,
    OwnTopK,
    Round,
    SharedTopK,
    root_mean_square,
    sum_in_order,
)
from lgc.rounds.autoencoder import (
    Optimizer,
    RingAutoencoder,
    ServerAutoencoder,
    make_optimizer,
    pack_weights,
    replicated,
    trainable,
    unpack_weights,
)
from lgc.rounds.feedback import Feedback, Piece
from lgc.rounds.layout import Layout, entries
from lgc.rounds.schedule import Schedule
from lgc.rounds.selection import Region, largest

logger = logging.getLogger("lgc")

EXPLAINED_DECAY = 0.9  # of the running mean of the explained fraction
LARGEST_ERROR = 1e9  # relative; the difference may overflow
LARGEST_SCALED = 1e30  # so that sums of it are finite
SETTLE_STEPS = 10  # compressed steps after which its value is taken as that of the fresh autoencoder


@dataclass(frozen=True)
class Refresh:
    """When the autoencoder is trained again, for `steps` steps.

    Attributes:
        every: after this many compressed steps; 0 is never.
        below: when the fraction of x's energy that the autoencoder explains, 1 - |x - y|^2 / |x|^2, has fallen below
            this fraction of what it was when frozen, on most ranks; 0 is never.
        steps: length of the repeated phase train.
    """

    every: int
    below: float
    steps: int


@dataclass(frozen=True)
class Training:
    """How rank 0 trains the autoencoder: its optimizer's `updates` per step of phase train."""

    optimizer: Optimizer
    learning_rate: float
    updates: int
    refresh: Refresh


class LGCAggregator(Aggregator):
    """The round of both variants; training at rank 0, freezing, and refreshing."""

    def __init__(
        self,
        layout: Layout,
        transport: Transport,
        schedule: Schedule,
        feedback: Feedback,
        autoencoder: RingAutoencoder | ServerAutoencoder,
        codecs: Codecs,
        training: Training,
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = OwnTopK(transport, Region(layout.own), codecs)
        self.shared = SharedTopK(transport, Region(layout.shared), codecs)
        self.autoencoder = autoencoder.to(feedback.residual.device)
        self.optimizer = make_optimizer(autoencoder, training.optimizer, training.learning_rate)
        self.updates = training.updates
        self.refresh = training.refresh
        self._initial_weights = pack_weights(self.autoencoder)
        self._explained = 0.0  # running mean over the compressed steps since the last freezing
        self._explained_fresh = 0.0
        self._compressed_steps = 0
        self._failed = False  # in this round the autoencoder gave NaN or Inf, on every rank
        self._exact: bool | None = None  # how to decode; None before it has been agreed on
        self._frozen = schedule.train_end == schedule.warmup_end  # never trained: all ranks have the same start

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        phase, least_rate = self._begin(step)
        v = self.feedback.accumulate(gradient)  # u = m u + g;  v = v + u
        of_leader = self._offer_compressed if phase is Phase.COMPRESSED else self.shared.offer
        offers = [] if phase is Phase.DENSE else [self.own.offer, of_leader]
        opened = self._open(v, step, *(partial(offer, v, least_rate, step) for offer in offers), vote=self._stale())
        if opened.nonfinite_ranks:
            self._finish(step, [])
            return self._abandon(opened)

        if phase is Phase.DENSE:
            exchanges = [self._exchange_everything(v)]
        else:
            (own, leader), (own_lengths, leader_lengths) = opened.offers, opened.lengths
            first = self._exchange_dense(v, self.layout.dense)  # the first layer
            last = self.own.exchange(own, own_lengths, least_rate, step)  # the last layer and the small tensors
            if phase is Phase.COMPRESSED:  # all others
                learned = self._exchange_compressed(v, leader, leader_lengths, step)
            else:
                indices, scale = self.shared.receive(leader, leader_lengths, least_rate, step)
                if phase is Phase.WARMUP:
                    learned = self.shared.exchange_values(v, indices, least_rate, step)
                else:
                    learned = self._exchange_and_train(v, indices, scale, step)
            exchanges = [first, last, learned]

        result = self._close(*exchanges)
        self._finish(step, opened.votes)
        return result

    @abstractmethod
    def _offer_compressed(self, v: Tensor, least_rate: float, step: int) -> Offer:
        """What the leader sends in phase compressed; nothing from the other ranks."""

    @abstractmethod
    def _exchange_compressed(self, v: Tensor, offer: Offer, lengths: list[int], step: int) -> Exchange:
        """The learned parameters' exchange in phase compressed."""

    @abstractmethod
    def _loss(self, x: Tensor, step: int) -> Tensor:
        """The autoencoder's loss on the scaled vectors of all ranks, shape (K, mu)."""

    def _exchange_and_train(self, v: Tensor, indices: Tensor, scale: Tensor, step: int) -> Exchange:
        """The mean of all vectors, by way of rank 0, which trains the autoencoder on them."""
        x = v[indices]
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        vectors = self.transport.gather(x, "values")
        mean = torch.empty_like(x) if vectors is None else vectors.mean(dim=0)
        mean = self.transport.broadcast(mean, "values", source=SERVER)
        if vectors is not None:
            with trainable(x.device):
                for _ in range(self.updates):
                    loss = self._loss(_divide(vectors, scale), step)
                    if not bool(torch.isfinite(loss)):
                        break
                    self.metrics.setdefault("autoencoder_loss", loss.item())
                    self.optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    self.optimizer.step()
        return Exchange([Piece(indices, mean)], Piece(indices, x))

    def _freeze(self) -> None:
        """Give all ranks the autoencoder of rank 0; a collective."""
        weights = self.transport.broadcast(pack_weights(self.autoencoder), "weights", source=SERVER)
        unpack_weights(self.autoencoder, weights)
        self._frozen = True
        self._exact = None
        self._compressed_steps = 0

    def _decodes_exactly(self, decode: Callable[[], Tensor]) -> bool:
        """Whether to decode exactly, which is slower: unless the usual way gives all ranks the same bits; a collective.

        It does on the same hardware with the same number of threads. Found out in the first round of a frozen
        autoencoder, by what it decodes there the usual way.
        """
        if not self._frozen:
            return False
        if self._exact is None:  # not counted, so that a run that was interrupted has sent what it would have
            uncounted = Transport(self.transport.group, self.transport.device)
            digests = uncounted.all_gather(digest(decode()), "agreement")
            self._exact = bool((digests != digests[0]).any())
            if self._exact and self.transport.rank == SERVER:
                logger.info("the ranks' hardware or numbers of threads differ; decoding exactly, which takes longer.")
        return self._exact

    def _finish(self, step: int, votes: list[bool]) -> None:
        """Freeze at the end of phase train, and go back to it when the autoencoder is due for a refresh."""
        phase = self.schedule.at(step).phase
        if phase is Phase.TRAIN:
            self._frozen = False
        if self.schedule.at(step + 1).phase is Phase.COMPRESSED and not self._frozen:
            self._freeze()
        if phase is Phase.COMPRESSED and votes:  # none in a round that was abandoned
            self._compressed_steps += 1
            due = self.refresh.every > 0 and self._compressed_steps >= self.refresh.every
            stale = 2 * sum(votes) > len(votes)
            if due or stale or self._failed:
                self.schedule.retrain(step + 1, self.refresh.steps)
            if stale and self.transport.rank == SERVER:
                logger.warning(
                    "step %d: the autoencoder explains %.0f %% of the values' energy, %.0f %% when it was frozen; "
                    "training it again for %d steps.",
                    step,
                    100 * self._explained,
                    100 * self._explained_fresh,
                    self.refresh.steps,
                )
            self._failed = False

    def _observe(self, x: Tensor, y: Tensor) -> None:
        """Keep track of how much of this rank's x the autoencoder explains."""
        energy, lost = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in (x, x - y))
        error = min(lost / energy, LARGEST_ERROR) if energy else 0.0
        self.metrics["reconstruction_error"] = error
        decay = EXPLAINED_DECAY if self._compressed_steps else 0.0
        self._explained = decay * self._explained + (1 - decay) * (1 - error)
        if self._compressed_steps <= SETTLE_STEPS:
            self._explained_fresh = self._explained

    def _stale(self) -> bool:
        """This rank's vote to train again: the autoencoder is stale, or worse than sending nothing."""
        settled = self.refresh.below > 0 and self._frozen and self._compressed_steps > SETTLE_STEPS
        return settled and self._explained < max(0.0, self.refresh.below * self._explained_fresh)

    def _fall_back(self, v: Tensor, indices: Tensor, step: int) -> Exchange:
        """The values, in place of an autoencoder whose result is not finite; it is trained again from the start."""
        self._failed = True
        unpack_weights(self.autoencoder, self._initial_weights)
        for moments in self.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()
        if self.transport.rank == SERVER:
            logger.warning("step %d: the autoencoder's result is not finite; sending values, and training it.", step)
        return self.shared.exchange_values(v, indices, 0.0, step)

    def replicas(self) -> dict[str, Tensor]:
        """The autoencoder, while it is frozen; in phase train only rank 0 has it."""
        return {f"autoencoder {name}": t for name, t in self.autoencoder.state_dict().items()} if self._frozen else {}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["per_rank"] |= {"explained": self._explained, "explained_fresh": self._explained_fresh}
        state["replicated"] |= {
            "autoencoder": {name: tensor.clone() for name, tensor in self.autoencoder.state_dict().items()},
            "frozen": self._frozen,
            "compressed_steps": self._compressed_steps,
        }
        if self.transport.rank == SERVER:
            state["server"]["autoencoder_optimizer"] = {
                name: {key: tensor.clone() for key, tensor in self.optimizer.state[parameter].items()}
                for name, parameter in self.autoencoder.named_parameters()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        replicated_state = state["replicated"]
        self.autoencoder.load_state_dict(replicated_state["autoencoder"])
        self._frozen = replicated_state["frozen"]
        self._exact = None
        self._compressed_steps = replicated_state["compressed_steps"]
        self._explained = state["per_rank"]["explained"]
        self._explained_fresh = state["per_rank"]["explained_fresh"]
        if self.transport.rank == SERVER:
            for name, parameter in self.autoencoder.named_parameters():
                for key, tensor in state["server"]["autoencoder_optimizer"][name].items():
                    self.optimizer.state[parameter][key].copy_(tensor)


class RingAggregator(LGCAggregator):
    """LGC over ring all-reduce: the mean of the latents is decoded by everyone."""

    autoencoder: RingAutoencoder

    def _offer_compressed(self, v: Tensor, least_rate: float, step: int) -> Offer:
        return self.shared.offer(v, least_rate, step)  # indices and scale, as before

    def _exchange_compressed(self, v: Tensor, offer: Offer, lengths: list[int], step: int) -> Exchange:
        """The mean as D(mean_k E(x_k)), this rank's contribution as D(E(x_k))."""
        indices, scale = self.shared.receive(offer, lengths, 0.0, step)
        x = v[indices]
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        with replicated(x.device):
            z_k = self.autoencoder.encoder(_divide(x, scale)[None]).nan_to_num(0.0, 0.0, 0.0)
            z, z_k = self._average(z_k)
            decode = partial(self.autoencoder.decoder, torch.cat([z, z_k]), x.numel())
            y, y_k = decode(exact=self._decodes_exactly(lambda: decode()[0])) * scale
        if not bool(torch.isfinite(y).all()):  # known to every rank, since y is the same on all
            return self._fall_back(v, indices, step)
        y_k = torch.where(torch.isfinite(y_k), y_k, y)
        self._observe(x, y_k)
        return Exchange([Piece(indices, y)], Piece(indices, y_k))

    def _average(self, z_k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the latents over the ranks, and this rank's as it is in there; quantised ones are summed in lanes."""
        latent, world_size = self.autoencoder.latent, self.transport.world_size
        if isinstance(latent, Float32):
            return self.transport.all_reduce(z_k, "latents") / world_size, z_k
        scale = self.autoencoder.latent_scale
        quantised = latent.quantise(z_k, scale)
        width = lane_width(2 * latent.levels, world_size)
        words = self.transport.all_reduce(pack_lanes(quantised.flatten() + latent.levels, width), "latents")
        total = unpack_lanes(words, width, z_k.numel()).view_as(z_k) - world_size * latent.levels
        return latent.dequantise(total, scale, world_size), latent.dequantise(quantised, scale)

    def _loss(self, x: Tensor, step: int) -> Tensor:
        return self.autoencoder.loss(x)


class ServerAggregator(LGCAggregator):
    """LGC with a parameter server at rank 0: the leader's latent, and every rank's innovation.

    The server relays both, so that every rank computes what it decodes of all ranks, and of itself.
    """

    autoencoder: ServerAutoencoder

    def adapt_state(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """Keep the encoder; the decoders belong to ranks, so they start anew, and phase train does from `step` on."""
        fresh = self.state_dict()
        encoder = {
            name: tensor for name, tensor in state["replicated"]["autoencoder"].items() if name.startswith("encoder.")
        }
        train_steps = self.schedule.train_end - self.schedule.warmup_end
        replicated_state = fresh["replicated"] | {
            "autoencoder": fresh["replicated"]["autoencoder"] | encoder,
            "train_end": max(self.schedule.train_end, step + train_steps),
            "updates": state["replicated"]["updates"],
        }
        return {**state, "replicated": replicated_state, "server": fresh["server"]}

    def _offer_compressed(self, v: Tensor, least_rate: float, step: int) -> Offer:
        """The leader's indices, scale and latent z = E(x_leader); nothing from the other ranks."""
        if not self.shared.leads(step) or not self.shared.region.segments:
            return self.shared.offer(v, least_rate, step)
        positions = self.shared.region.select(v)
        indices = self.shared.region.elements(positions)
        x = v[indices]
        scale = root_mean_square(x)
        with replicated(v.device):
            z = self.autoencoder.encoder(_divide(x, scale)[None]).nan_to_num(0.0, 0.0, 0.0)
        parts = [
            self.shared.codecs.indices.encode(positions, self.shared.region.sizes),
            Float32().encode(scale, [1]),
            self.autoencoder.encode_latent(z),
        ]
        return Offer(Piece(indices, x), pack(parts, kind=Kind.LATENT, step=step))

    def _relay_common(self, offer: Offer, lengths: list[int], step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same at every rank, by way of the server."""
        device = offer.piece.values.device
        mu = sum(self.shared.region.element_counts())
        if mu == 0:
            empty = torch.empty(0, device=device)
            return empty.long(), empty, empty
        leader = self.shared.leader(step)
        bounds = [self.shared.index_bound(0.0), Float32().size([1]), self.autoencoder.latent_size(mu)]
        packet = self.transport.relay_bytes(
            offer.payload, "indices and latents", source=leader, length=lengths[leader], limit=size_limit(bounds)
        )
        index_code, scale_code, latent_code = unpack(packet, kind=Kind.LATENT, step=step, bounds=bounds)
        indices = self.shared.decode_indices(index_code, 0.0, device)
        z = self.autoencoder.decode_latent(latent_code, mu)
        return indices, Float32().decode(scale_code, [1]).to(device), z.to(device)

    def _exchange_compressed(self, v: Tensor, offer: Offer, lengths: list[int], step: int) -> Exchange:
        """Every rank's y_k = D_k(z, innovation_k); their mean, and this rank's own."""
        indices, scale, z = self._relay_common(offer, lengths, step)
        x = v[indices]
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        scaled = _divide(x, scale)
        positions = largest(scaled, entries(scaled.numel(), self.autoencoder.innovation))
        codecs, counts = self.shared.codecs, [positions.numel()]
        parts = [codecs.indices.encode(positions, [x.numel()]), codecs.values.encode(scaled[positions], counts)]
        payload = pack(parts, kind=Kind.INNOVATION, step=step)
        bounds = [codecs.indices.bound([x.numel()], counts), codecs.values.size(counts)]
        payloads = self._relay_all(payload, size_limit(bounds))
        innovations = torch.zeros(len(payloads), x.numel(), dtype=x.dtype, device=x.device)
        for innovation, received in zip(innovations, payloads, strict=True):
            index_code, value_code = unpack(received, kind=Kind.INNOVATION, step=step, bounds=bounds)
            where = codecs.indices.decode(index_code, [x.numel()], counts).to(x.device)
            innovation[where] = codecs.values.decode(value_code, counts).to(x.device)
        with replicated(x.device):
            decode = partial(self.autoencoder.decode, z, innovations)
            y = decode(exact=self._decodes_exactly(decode)) * scale
        if not bool(torch.isfinite(y).all()):  # known to every rank, since y is the same on all
            return self._fall_back(v, indices, step)
        self._observe(x, y[self.transport.rank])
        mean = sum_in_order(y) / self.transport.world_size
        return Exchange([Piece(indices, mean)], Piece(indices, y[self.transport.rank]))

    def _relay_all(self, payload: Tensor, limit: int) -> list[Tensor]:
        """The payloads of all ranks, none longer than `limit`, by way of the server."""
        own_length = torch.tensor([payload.numel()], device="cpu")
        lengths = self.transport.all_gather(own_length, "innovations").flatten().tolist()
        gathered = self.transport.gather_bytes(payload, "innovations", lengths, limit=limit)
        together = torch.cat(gathered) if gathered is not None else payload
        together = self.transport.broadcast_bytes(
            together, "innovations", source=SERVER, length=sum(lengths), limit=limit * len(lengths)
        )
        return list(together.split(lengths))

    def _loss(self, x: Tensor, step: int) -> Tensor:
        count = entries(x.shape[1], self.autoencoder.innovation)
        innovations = torch.zeros_like(x)
        for innovation, vector in zip(innovations, x, strict=True):
            where = largest(vector, count)
            innovation[where] = self._sent_values(vector[where])
        return self.autoencoder.loss(x, innovations, self.shared.leader(step))

    def _sent_values(self, values: Tensor) -> Tensor:
        codec, counts = self.shared.codecs.values, [values.numel()]
        return codec.decode(codec.encode(values, counts), counts).to(values.device)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, or x where the scale is zero; what is decoded is multiplied by the scale, and then is zero.

    A rank's values may be larger than the leader's by more than float32 has room for; what is cut off is owed.
    """
    return (x / torch.where(scale > 0, scale, 1.0)).clamp(-LARGEST_SCALED, LARGEST_SCALED)
