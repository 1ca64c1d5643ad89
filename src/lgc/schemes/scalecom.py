"""ScaleCom: values at a rotating leader's indices. Source: Chen et al., NeurIPS 2020, arXiv 2104.11125."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.exchange import DenseExchange, Exchange
from lgc.rounds.feedback import Feedback
from lgc.rounds.layout import Layout, Role
from lgc.rounds.schedule import Schedule, Stage
from lgc.rounds.selection import Region
from lgc.rounds.topk import Codecs, OwnTopK, SharedTopK
from lgc.schemes.sparse import SparseScheme


@dataclass(frozen=True, kw_only=True)
class ScaleCom(SparseScheme):
    """A rotating leader's indices for all ranks, values all-reduced.

    Its source has the filter `low_pass` too; the momentum correction is added here.
    """

    name: ClassVar[str] = "scalecom"
    small: Role = Role.SHARED

    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._lay_out(tensors, first=Role.SHARED, last=Role.SHARED, other=Role.SHARED)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        schedule = Schedule(self.rate, warmup_steps=self.warmup_steps)
        feedback = self.new_feedback(layout, transport, device)
        return SharedAggregator(layout, transport, schedule, feedback, self.codecs)


class SharedAggregator(Aggregator):
    """The round of ScaleCom, in the order of the paper's algorithm 1:

        v = v + u                        error feedback, `Feedback.accumulate`
        the largest |v| of the leader    cyclic local top-k, `SharedTopK.prepare`
        the mean of all values there     `SharedTopK.exchange`
        v = v - low_pass * what is new   low-pass filtering, `Feedback.commit`

    Parameters with the roles dense and own are exchanged as such.
    """

    def __init__(
        self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback, codecs: Codecs
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.dense = DenseExchange(transport, layout.dense, beside=True)
        self.own = OwnTopK(transport, Region(layout.own), codecs)
        self.shared = SharedTopK(transport, Region(layout.shared), codecs)
        self.pasts = {"own": self.own.past, "shared": self.shared.past}

    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        return [self.dense, self.own, self.shared]
