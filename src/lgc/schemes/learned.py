"""Learned Gradient Compression: the arguments and the phases of a round that both variants have.

Source: Abrahamyan, Chen, Bekoulis, Deligiannis, IEEE TNNLS 33(12), 2021, arXiv 2103.08870.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lgc.coding import Float32
from lgc.comm.messages import Posting
from lgc.comm.transport import SERVER, Transport
from lgc.phase import Phase
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.autoencoder import Autoencoder, Optimizer, make_optimizer, trainable
from lgc.rounds.exchange import DenseExchange, Exchange, Exchanged
from lgc.rounds.feedback import Piece
from lgc.rounds.layout import Layout, Role
from lgc.rounds.schedule import Schedule, Stage
from lgc.rounds.selection import Region
from lgc.rounds.topk import Announced, Codecs, OwnTopK, SharedTopK
from lgc.rounds.watch import Refresh, Watch
from lgc.schemes.arguments import require, require_integer, require_number, require_one_of, require_role
from lgc.schemes.sparse import SparseScheme

FeedbackMode = Literal["reconstruction", "paper"]

LARGEST_SCALED = 1e30  # so that sums of it are finite


@dataclass(frozen=True, kw_only=True)
class LGCScheme(SparseScheme, ABC):
    """Arguments that both variants of Learned Gradient Compression add.

    Args:
        dense_steps, train_steps: lengths of these phases; the paper's are 200 and 300.
        feedback: "reconstruction" keeps what the autoencoder loses for later, "paper" drops it.
        first, last: roles of the first and the last weight.
        autoencoder_optimizer, autoencoder_lr: of the autoencoder's own training.
        autoencoder_updates: its optimizer's steps per step of phase train, at least 1, which is the paper's.
        refresh_every: train the autoencoder again after this many compressed steps; 0 is never.
        refresh_below: ... when the fraction of the values' energy that it explains falls below this fraction of
            what it was when frozen, or below zero; 0 is never, None is 0.5 with feedback="reconstruction", else 0.
        refresh_steps: length of such a repeated phase.
        seed: of the autoencoder's initial weights.
    """

    dense_steps: int = 200
    train_steps: int = 300
    feedback: FeedbackMode = "reconstruction"
    first: Role = Role.DENSE
    last: Role = Role.OWN
    autoencoder_optimizer: Optimizer = "adam"
    autoencoder_lr: float = 1e-3
    autoencoder_updates: int = 4
    refresh_every: int = 0
    refresh_below: float | None = None
    refresh_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            object.__setattr__(self, name, require_role(self, name, getattr(self, name)))
        for name in ("dense_steps", "train_steps", "refresh_every", "seed"):
            require_integer(self, name, 0)
        require_one_of(self, "feedback", get_args(FeedbackMode))
        require_one_of(self, "autoencoder_optimizer", get_args(Optimizer))
        require(self, "autoencoder_lr", "positive", 0 < require_number(self, "autoencoder_lr") < float("inf"))
        if self.refresh_below is not None:
            require(self, "refresh_below", "in [0, 1)", 0 <= require_number(self, "refresh_below") < 1)
        for name in ("autoencoder_updates", "refresh_steps"):
            require_integer(self, name, 1)

    @property
    def keeps_loss(self) -> bool:
        return self.feedback == "reconstruction"

    @property
    def refresh(self) -> Refresh:
        """When the autoencoder is trained again."""
        below = 0.5 if self.keeps_loss else 0.0
        return Refresh(
            self.refresh_every, below if self.refresh_below is None else self.refresh_below, self.refresh_steps
        )

    @classmethod
    def paper_arguments(cls) -> dict[str, Any]:
        return super().paper_arguments() | {"feedback": "paper", "autoencoder_updates": 1, "latent": Float32()}

    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._lay_out(tensors, first=self.first, last=self.last, other=Role.SHARED)


class LearnedExchange(SharedTopK, ABC):
    """All other layers in phase compressed: what the autoencoder makes of the values at the leader's indices."""

    def __init__(
        self, transport: Transport, region: Region, codecs: Codecs, autoencoder: Autoencoder, watch: Watch
    ) -> None:
        super().__init__(transport, region, codecs)
        self.autoencoder = autoencoder
        self.watch = watch

    @abstractmethod
    def loss(self, x: Tensor, step: int) -> Tensor:
        """The autoencoder's loss on the scaled vectors of all ranks, shape (K, mu)."""

    def exchanged(self, y: Tensor, y_k: Tensor, announced: Announced) -> Exchanged:
        """The mean y, and this rank's y_k in it, without what was zero at the leader: nobody sends that.

        A decoder gives other numbers for zeros; so a coordinate that is zero on every rank stays where it is.
        """
        indices = announced.indices[announced.nonzero]
        return Exchanged([Piece(indices, y[announced.nonzero])], Piece(indices, y_k[announced.nonzero]))

    def fall_back(self, v: Tensor, indices: Tensor, stage: Stage) -> Posting[Exchanged]:
        """The values, in place of an autoencoder whose result is not finite; it is trained again from the start."""
        self.watch.fail(stage.step)
        return (yield from self.exchange_values(v, indices, stage))


class TrainingExchange(SharedTopK):
    """All other layers in phase train: the mean of all vectors, by way of rank 0, which trains the autoencoder."""

    def __init__(self, learned: LearnedExchange, scheme: LGCScheme, metrics: dict[str, float]) -> None:
        super().__init__(learned.transport, learned.region, learned.codecs, learned.past)
        self.loss = learned.loss
        self.optimizer = learned.watch.optimizer
        self.updates = scheme.autoencoder_updates
        self.metrics = metrics

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        indices, scale, _ = yield from self.receive(v, payload, lengths, stage)
        x = v[indices]
        if x.numel() == 0:
            return Exchanged([], Piece(indices, x))
        vectors = self.transport.gather(x, "values")
        mean = torch.empty_like(x) if vectors is None else vectors.mean(dim=0)
        mean = self.transport.broadcast(mean, "values", source=SERVER)
        if vectors is not None:
            self._train(scaled(vectors, scale), stage.step)
        return Exchanged([Piece(indices, mean)], Piece(indices, x))

    def _train(self, x: Tensor, step: int) -> None:
        with trainable(x.device):
            for _ in range(self.updates):
                loss = self.loss(x, step)
                if not bool(torch.isfinite(loss)):
                    break
                self.metrics.setdefault("autoencoder_loss", loss.item())
                self.optimizer.zero_grad()
                torch.autograd.backward(loss)
                self.optimizer.step()


class LGCAggregator(Aggregator):
    """The round of both variants, by phases.

    | phase      | first layer  | last layer, small tensors | all other layers                                         |
    |------------|--------------|---------------------------|----------------------------------------------------------|
    | dense      | uncompressed | uncompressed              | uncompressed                                             |
    | warmup     | uncompressed | own top-k                 | values at the leader's indices                          |
    | train      | uncompressed | own top-k                 | the same by way of rank 0, which trains the autoencoder  |
    | compressed | uncompressed | own top-k                 | what the autoencoder makes of them                       |
    """

    def __init__(
        self,
        scheme: LGCScheme,
        layout: Layout,
        transport: Transport,
        device: torch.device,
        autoencoder: Autoencoder,
        learned: type[LearnedExchange],
    ) -> None:
        schedule = Schedule(
            scheme.rate,
            dense_steps=scheme.dense_steps,
            warmup_steps=scheme.warmup_steps,
            train_steps=scheme.train_steps,
        )
        super().__init__(layout, transport, schedule, scheme.new_feedback(layout, transport, device))
        self.autoencoder = autoencoder.to(device)
        optimizer = make_optimizer(autoencoder, scheme.autoencoder_optimizer, scheme.autoencoder_lr)
        self.watch = Watch(autoencoder, optimizer, scheme.refresh, schedule, transport, self.metrics)
        shared = transport, Region(layout.shared), scheme.codecs
        self.everything = DenseExchange(transport, slice(0, layout.size))
        self.first = DenseExchange(transport, layout.dense, beside=True)
        self.own = OwnTopK(transport, Region(layout.own), scheme.codecs)
        self.compressed = learned(*shared, self.autoencoder, self.watch)
        self.others = {
            Phase.WARMUP: SharedTopK(*shared, self.compressed.past),
            Phase.TRAIN: TrainingExchange(self.compressed, scheme, self.metrics),
            Phase.COMPRESSED: self.compressed,
        }
        self.pasts = {"own": self.own.past, "shared": self.compressed.past}

    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        if stage.phase is Phase.DENSE:
            return [self.everything]
        return [self.first, self.own, self.others[stage.phase]]

    def vote(self) -> bool:
        return self.watch.is_stale()

    def finish(self, step: int, votes: list[bool]) -> None:
        self.watch.finish(step, votes)

    def replicas(self) -> dict[str, Tensor]:
        return super().replicas() | self.watch.replicas()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        self.watch.add_state(state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.watch.load_state(state)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, or x where the scale is zero; what is decoded is multiplied by the scale, and then is zero.

    A rank's values may be larger than the leader's by more than float32 has room for; what is cut off is owed.
    """
    return (x / torch.where(scale > 0, scale, 1.0)).clamp(-LARGEST_SCALED, LARGEST_SCALED)
