"""Learned Gradient Compression, ring all-reduce and parameter server.

Source: Abrahamyan, Chen, Bekoulis, Deligiannis, IEEE TNNLS 33(12), 2021, arXiv 2103.08870. Each variant's `aggregate`
is the algorithm of the paper in its order; docs/algorithm.md has the same in formulas.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgc.aggregators import (
    Aggregator,
    Exchange,
    OwnTopK,
    Round,
    SharedTopK,
    pack_entries,
    root_mean_square,
    unpack_entries,
)
from lgc.autoencoder import (
    Optimizer,
    RingAutoencoder,
    ServerAutoencoder,
    latent_shape,
    make_optimizer,
    pack_weights,
    replicated,
    trainable,
    unpack_weights,
)
from lgc.feedback import Feedback, Piece
from lgc.layout import Layout, entries
from lgc.schedule import Phase, Schedule
from lgc.selection import largest, top_k
from lgc.transport import SERVER, Transport

EXPLAINED_DECAY = 0.9  # of the running mean of the explained fraction
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


class LGCAggregator(Aggregator):
    """What both variants share: training at rank 0, freezing, and refreshing."""

    def __init__(
        self,
        layout: Layout,
        transport: Transport,
        schedule: Schedule,
        feedback: Feedback,
        autoencoder: RingAutoencoder | ServerAutoencoder,
        *,
        optimizer: Optimizer,
        learning_rate: float,
        updates: int,
        refresh: Refresh,
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.own = OwnTopK(transport, layout.own)
        self.shared = SharedTopK(transport, layout.shared)
        self.autoencoder = autoencoder.to(feedback.residual.device)
        self.optimizer = make_optimizer(autoencoder, optimizer, learning_rate)
        self.updates = updates
        self.refresh = refresh
        self._explained = 0.0  # running mean over the compressed steps since the last freezing
        self._explained_fresh = 0.0
        self._compressed_steps = 0
        self._frozen = schedule.train_end == schedule.warmup_end  # never trained: all ranks have the same start

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
        self._compressed_steps = 0

    def _finish(self, step: int, votes: list[bool]) -> None:
        """Freeze at the end of phase train, and go back to it when the autoencoder is due for a refresh."""
        phase = self.schedule.at(step).phase
        if phase is Phase.TRAIN:
            self._frozen = False
        if self.schedule.at(step + 1).phase is Phase.COMPRESSED and not self._frozen:
            self._freeze()
        if phase is Phase.COMPRESSED:
            self._compressed_steps += 1
            due = self.refresh.every > 0 and self._compressed_steps >= self.refresh.every
            if due or 2 * sum(votes) > len(votes):
                self.schedule.retrain(step + 1, self.refresh.steps)

    def _observe(self, x: Tensor, y: Tensor) -> None:
        """Keep track of how much of this rank's x the autoencoder explains."""
        energy = float(x.square().sum())
        error = float((x - y).square().sum()) / energy if energy else 0.0
        self.metrics["reconstruction_error"] = error
        decay = EXPLAINED_DECAY if self._compressed_steps else 0.0
        self._explained = decay * self._explained + (1 - decay) * (1 - error)
        if self._compressed_steps <= SETTLE_STEPS:
            self._explained_fresh = self._explained

    def _stale(self) -> bool:
        """This rank's vote to train again."""
        settled = self._frozen and self._compressed_steps > SETTLE_STEPS and self._explained_fresh > 0
        return settled and self._explained < self.refresh.below * self._explained_fresh

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

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        phase, least_rate = self._begin(step)
        v = self.feedback.accumulate(gradient)  # u = m u + g;  v = v + u
        votes = self._open(v, step, vote=self._stale())
        if votes is None:
            self._finish(step, [])
            return self._non_finite()

        if phase is Phase.DENSE:
            exchanges = [self._exchange_everything(v)]
        else:
            first = self._exchange_dense(v, self.layout.dense)  # the first layer
            last = self.own.exchange(v, least_rate)  # the last layer and the small tensors
            indices, scale = self.shared.select(v, least_rate, step)  # all others: one leader's indices
            if phase is Phase.WARMUP:
                learned = self.shared.exchange_values(v, indices)
            elif phase is Phase.TRAIN:
                learned = self._exchange_and_train(v, indices, scale, step)
            else:
                learned = self._exchange_latents(v[indices], indices, scale)
            exchanges = [first, last, learned]

        result = self._close(*exchanges)
        self._finish(step, votes)
        return result

    def _exchange_latents(self, x: Tensor, indices: Tensor, scale: Tensor) -> Exchange:
        """The mean as D(mean_k E(x_k)), this rank's contribution as D(E(x_k))."""
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        with replicated(x.device):
            z_k = encoder(_divide(x, scale)[None])
            z = self.transport.all_reduce(z_k, "latents") / self.transport.world_size
            y, y_k = decoder(torch.cat([z, z_k]), x.numel()) * scale
        self._observe(x, y_k)
        return Exchange([Piece(indices, y)], Piece(indices, y_k))

    def _loss(self, x: Tensor, step: int) -> Tensor:
        return self.autoencoder.loss(x)


class ServerAggregator(LGCAggregator):
    """LGC with a parameter server at rank 0: the leader's latent, and every rank's innovation.

    The server relays both, so that every rank computes what it decodes of all ranks, and of itself.
    """

    autoencoder: ServerAutoencoder

    def __init__(self, *args: Any, innovation: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.innovation = innovation

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
        }
        return {**state, "replicated": replicated_state, "server": fresh["server"]}

    def aggregate(self, gradient: Tensor, step: int) -> Round:
        phase, least_rate = self._begin(step)
        v = self.feedback.accumulate(gradient)  # u = m u + g;  v = v + u
        votes = self._open(v, step, vote=self._stale())
        if votes is None:
            self._finish(step, [])
            return self._non_finite()

        if phase is Phase.DENSE:
            exchanges = [self._exchange_everything(v)]
        else:
            first = self._exchange_dense(v, self.layout.dense)  # the first layer
            last = self.own.exchange(v, least_rate)  # the last layer and the small tensors
            if phase is Phase.COMPRESSED:
                indices, scale, z = self._relay_common(v, step)  # the leader's indices and latent
                learned = self._exchange_innovations(v[indices], indices, scale, z)
            else:
                indices, scale = self.shared.select(v, least_rate, step)
                if phase is Phase.WARMUP:
                    learned = self.shared.exchange_values(v, indices)
                else:
                    learned = self._exchange_and_train(v, indices, scale, step)
            exchanges = [first, last, learned]

        result = self._close(*exchanges)
        self._finish(step, votes)
        return result

    def _relay_common(self, v: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leader's indices, scale and latent z = E(x_leader), by way of the server."""
        leader, mu = self.shared.leader(step), self.shared.count(0.0)
        shape = (1, *latent_shape(mu))
        if self.transport.rank == leader and mu:
            indices = top_k(v, self.shared.segments)
            scale = root_mean_square(v[indices])
            with replicated(v.device):
                z = self.autoencoder.encoder(_divide(v[indices], scale)[None])
            packet = pack_entries(Piece(indices, torch.cat([scale, z.flatten()])))
        else:
            packet = torch.zeros(mu + 1 + shape[1] * shape[2], dtype=torch.int32, device=v.device)
        packet = self.transport.relay(packet, "indices and latents", source=leader)
        values = packet[mu:].view(torch.float32)
        return packet[:mu].long(), values[:1], values[1:].view(shape)

    def _exchange_innovations(self, x: Tensor, indices: Tensor, scale: Tensor, z: Tensor) -> Exchange:
        """Every rank's y_k = D_k(z, innovation_k); their mean, and this rank's own."""
        if x.numel() == 0:
            return Exchange([], Piece(indices, x))
        scaled = _divide(x, scale)
        positions = largest(scaled, entries(scaled.numel(), self.innovation))
        packet = pack_entries(Piece(positions, scaled[positions]))
        gathered = self.transport.gather(packet, "innovations")
        if gathered is None:
            gathered = packet.new_empty(self.transport.world_size, packet.numel())
        gathered = self.transport.broadcast(gathered, "innovations", source=SERVER)
        innovations = torch.stack([_scatter(unpack_entries(row), x.numel()) for row in gathered])
        with replicated(x.device):
            y = self.autoencoder.decode(z, innovations) * scale
        self._observe(x, y[self.transport.rank])
        return Exchange([Piece(indices, y.mean(dim=0))], Piece(indices, y[self.transport.rank]))

    def _loss(self, x: Tensor, step: int) -> Tensor:
        count = entries(x.shape[1], self.innovation)
        positions = [largest(vector, count) for vector in x]
        innovations = [
            _scatter(Piece(where, vector[where]), x.shape[1]) for where, vector in zip(positions, x, strict=True)
        ]
        return self.autoencoder.loss(x, torch.stack(innovations), self.shared.leader(step))


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, or x where the scale is zero; what is decoded is multiplied by the scale, and then is zero."""
    return x / torch.where(scale > 0, scale, 1.0)


def _scatter(entries: Piece, size: int) -> Tensor:
    """The entries as a vector of `size`, zero elsewhere."""
    dense = entries.values.new_zeros(size)
    dense[entries.where] = entries.values
    return dense
