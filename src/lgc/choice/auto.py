"""`scheme="auto"`: watch dense steps, rehearse the candidates on the same link, and choose."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from lgc.choice.cost import TOLERANCE, Link, Prediction, Profile, SchemeCost, choose, predict
from lgc.choice.rehearsal import Bucket, NonfiniteError, agree, before_end, rehearse, rehearse_dense
from lgc.comm.traffic import SETUP
from lgc.comm.transport import SERVER, Transport, clock
from lgc.schemes import Auto, Dense, Scheme, SparseScheme

logger = logging.getLogger("lgc")

SETTLING_STEPS = 3  # DDP orders its buckets anew after the first
LEAST_SECONDS = 1e-9  # of computation
PATIENCE = 2.0  # a first round that takes so many times what there is to win ends a candidate's rehearsal


class _Step(NamedTuple):
    """Seconds from the end of the last step's communication to that of this one's, and what of it was waiting."""

    whole: float
    waiting: float


class Choice:
    """One rank's side of the decision.

    Attributes:
        scheme: whose candidates are to be chosen from.
    """

    def __init__(self, scheme: Auto, transport: Transport, device: torch.device) -> None:
        self.scheme = scheme
        self._transport = transport
        self._device = device
        self._buckets: list[Bucket] = []
        self._exchanges: list[torch.futures.Future[Tensor]] = []
        self._ended = math.nan
        self._steps: list[_Step] = []

    @property
    def is_due(self) -> bool:
        """Whether enough steps have been seen; on all ranks alike."""
        return len(self._steps) >= self.scheme.after

    def observe(self, buffer: Tensor, exchanged: torch.futures.Future[Tensor], *, last: bool) -> None:
        """Note a bucket whose all-reduce has started; with the last one, wait for all of them, as DDP would now do."""
        if not self._exchanges:
            self._buckets = []
        self._buckets.append(Bucket(clock(self._device), buffer.numel(), buffer.dtype))
        self._exchanges.append(exchanged)
        if not last:
            return
        for future in self._exchanges:
            future.wait()
        self._exchanges = []
        ended = clock(self._device)
        self._steps.append(_Step(ended - self._ended, ended - self._buckets[-1].time))
        self._ended = ended

    def choose(self, gradients: Mapping[str, Tensor]) -> Scheme | None:
        """The scheme to go on with, the same on every rank; a collective.

        Args:
            gradients: of this step and rank, by parameter name, in the model's order; not changed.

        Returns:
            Dense or a candidate; None if a gradient is not finite, so that nothing can be tried with it.
        """
        self._transport.begin(SETUP, steps=0)
        whole, waiting = self._watched()
        buckets = before_end(self._buckets, self._transport)
        dense = rehearse_dense(Dense(), gradients, buckets, waiting, self._transport)
        profile = Profile(self._transport.world_size, max(whole - waiting, LEAST_SECONDS), [dense])
        link = self._link()
        alone = self._transport.world_size == 1  # then what an exchange took is no transfer
        to_win = 0.0 if alone else predict(profile, link)[0].communication
        schemes: dict[str, Scheme] = {dense.scheme: Dense()}
        for candidate in self.scheme.candidates if to_win > TOLERANCE * profile.compute else ():
            try:
                arm = self._rehearse(candidate, gradients, buckets, waiting, limit=PATIENCE * to_win)
            except NonfiniteError:
                return None
            if arm is not None:
                profile.arms.append(arm)
                schemes[arm.scheme] = candidate
        predictions = predict(profile, link)
        chosen = choose(predictions)
        if self._transport.rank == SERVER:
            self._log(chosen, predictions)
        return schemes[chosen.scheme]

    def _watched(self) -> tuple[float, float]:
        """Seconds of a dense step, and of those that it waited for the link; a collective."""
        steps = self._steps[SETTLING_STEPS:]
        by_rank = agree(self._transport, [seconds for step in steps for seconds in step])
        columns = list(zip(*by_rank, strict=True))
        whole = median([fmean(column) for column in columns[::2]])
        waiting = median([min(column) for column in columns[1::2]])  # the others wait for the last rank as well
        return whole, waiting

    def _link(self) -> Link:
        """As given; else one that adds nothing to what is measured."""
        if self.scheme.bandwidth is None:
            return Link(math.inf)
        return Link.parse(self.scheme.bandwidth, self.scheme.latency)

    def _rehearse(
        self,
        candidate: Scheme,
        gradients: Mapping[str, Tensor],
        buckets: Sequence[Bucket],
        waiting: float,
        *,
        limit: float,
    ) -> SchemeCost | None:
        if isinstance(candidate, SparseScheme):
            world_size = self._transport.world_size
            return rehearse(candidate, gradients, self._transport, world_size, early=False, limit=limit)
        assert isinstance(candidate, Dense)
        return rehearse_dense(candidate, gradients, buckets, waiting, self._transport)

    def _log(self, chosen: Prediction, predictions: list[Prediction]) -> None:
        dense = predictions[0]
        reason = "per step: " + ", ".join(f"{one.scheme} {one.step:.3g} s" for one in predictions)
        if len(predictions) == 1:
            reason = "no candidate can win that back"
        elif len(predictions) <= len(self.scheme.candidates):
            reason += "; the others were slower at once"
        logger.info(
            "auto: %s from here on. A dense step takes %.3g s, %.3g s of it for the exchange; %s.",
            chosen.scheme,
            dense.step,
            dense.communication,
            reason,
        )
