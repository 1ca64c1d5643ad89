"""Watching over an autoencoder in use: freezing, staleness and votes, exact decoding, failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgc.comm.replicas import digest
from lgc.comm.transport import SERVER, Transport
from lgc.phase import Phase
from lgc.rounds.autoencoder import Autoencoder, pack_weights, unpack_weights
from lgc.rounds.schedule import Schedule

logger = logging.getLogger("lgc")

EXPLAINED_DECAY = 0.9  # of the running mean of the explained fraction
LARGEST_ERROR = 1e9  # relative; the difference may overflow
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


class Watch:
    """One rank's watch over the autoencoder: when all ranks get it, whether it still serves, and how it decodes.

    Args:
        autoencoder: with its initial weights, on its device.
        optimizer: that trains it.
        refresh: when it is trained again.
        schedule: of the phases; a refresh goes back to phase train.
        transport: between the ranks.
        metrics: gets `reconstruction_error`.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        optimizer: torch.optim.Optimizer,
        refresh: Refresh,
        schedule: Schedule,
        transport: Transport,
        metrics: dict[str, float],
    ) -> None:
        self.autoencoder = autoencoder
        self.optimizer = optimizer
        self.refresh = refresh
        self.schedule = schedule
        self.transport = transport
        self.metrics = metrics
        self.frozen = schedule.train_end == schedule.warmup_end  # never trained: all ranks have the same start
        self.exact: bool | None = None  # how to decode; None before it has been agreed on
        self._initial_weights = pack_weights(autoencoder)
        self._explained = 0.0  # running mean over the compressed steps since the last freezing
        self._explained_fresh = 0.0
        self._compressed_steps = 0
        self._failed = False  # in this round, on every rank

    def decode(self, decoder: Callable[..., Tensor], same: slice = slice(None)) -> Tensor:
        """Call `decoder(exact=...)` so that all ranks get the same bits; a collective in the first round of its use.

        Exact decoding is slower, and needed only where the usual way does not give all ranks the same bits: it does on
        the same hardware with the same number of threads. That is found out by what is decoded in the first round.

        Args:
            decoder: makes one row after the other, shape (rows, mu).
            same: the rows that all ranks must have the same of.
        """
        if self.exact is None and self.frozen:
            usual = decoder(exact=False)
            # Not counted, so that a run that was interrupted has sent what it would have.
            digests = self.transport.uncounted().all_gather(digest(usual[same]), "agreement")
            self.exact = bool((digests != digests[0]).any())
            if not self.exact:
                return usual
            if self.transport.rank == SERVER:
                logger.info("the ranks' hardware or numbers of threads differ; decoding exactly, which takes longer.")
        return decoder(exact=self.frozen and bool(self.exact))

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Keep track of how much of this rank's x is in y, what the autoencoder makes of it."""
        energy, lost = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in (x, x - y))
        error = min(lost / energy, LARGEST_ERROR) if energy else 0.0
        self.metrics["reconstruction_error"] = error
        decay = EXPLAINED_DECAY if self._compressed_steps else 0.0
        self._explained = decay * self._explained + (1 - decay) * (1 - error)
        if self._compressed_steps <= SETTLE_STEPS:
            self._explained_fresh = self._explained

    def is_stale(self) -> bool:
        """Whether this rank votes to train again: the autoencoder is stale, or worse than sending nothing."""
        settled = self.refresh.below > 0 and self.frozen and self._compressed_steps > SETTLE_STEPS
        return settled and self._explained < max(0.0, self.refresh.below * self._explained_fresh)

    def fail(self, step: int) -> None:
        """Start the autoencoder anew: what it decodes is not finite, on every rank alike."""
        self._failed = True
        unpack_weights(self.autoencoder, self._initial_weights)
        for moments in self.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()
        if self.transport.rank == SERVER:
            logger.warning("step %d: the autoencoder's result is not finite; sending values, and training it.", step)

    def finish(self, step: int, votes: list[bool]) -> None:
        """Freeze at the end of phase train, and go back to it when a refresh is due; a collective.

        No votes are given for a round that was abandoned.
        """
        phase = self.schedule.at(step).phase
        if phase is Phase.TRAIN:
            self.frozen = False
        if self.schedule.at(step + 1).phase is Phase.COMPRESSED and not self.frozen:
            self._freeze()
        if phase is Phase.COMPRESSED and votes:
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

    def _freeze(self) -> None:
        """Give all ranks the autoencoder of rank 0; a collective."""
        weights = self.transport.broadcast(pack_weights(self.autoencoder), "weights", source=SERVER)
        unpack_weights(self.autoencoder, weights)
        self.frozen = True
        self.exact = None
        self._compressed_steps = 0

    def replicas(self) -> dict[str, Tensor]:
        """The autoencoder, while it is frozen; in phase train only rank 0 has it."""
        return {f"autoencoder {name}": t for name, t in self.autoencoder.state_dict().items()} if self.frozen else {}

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the autoencoder, its optimizer's moments and what is known of its use to an aggregator's state."""
        state["per_rank"] |= {"explained": self._explained, "explained_fresh": self._explained_fresh}
        state["replicated"] |= {
            "autoencoder": {name: tensor.clone() for name, tensor in self.autoencoder.state_dict().items()},
            "frozen": self.frozen,
            "compressed_steps": self._compressed_steps,
        }
        if self.transport.rank == SERVER:
            state["server"]["autoencoder_optimizer"] = {
                name: {key: tensor.clone() for key, tensor in self.optimizer.state[parameter].items()}
                for name, parameter in self.autoencoder.named_parameters()
            }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Set all that from an aggregator's state."""
        self.autoencoder.load_state_dict(state["replicated"]["autoencoder"])
        self.frozen = state["replicated"]["frozen"]
        self.exact = None
        self._compressed_steps = state["replicated"]["compressed_steps"]
        self._explained = state["per_rank"]["explained"]
        self._explained_fresh = state["per_rank"]["explained_fresh"]
        if self.transport.rank == SERVER:
            for name, parameter in self.autoencoder.named_parameters():
                for key, tensor in state["server"]["autoencoder_optimizer"][name].items():
                    self.optimizer.state[parameter][key].copy_(tensor)
