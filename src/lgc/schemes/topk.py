"""Every rank's own largest values: sparse gradient descent, and Deep Gradient Compression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lgc.coding import ValueCodec
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.exchange import DenseExchange, Exchange
from lgc.rounds.feedback import Feedback
from lgc.rounds.layout import Layout, Role
from lgc.rounds.schedule import Schedule, Stage
from lgc.rounds.selection import Region
from lgc.rounds.topk import OwnTopK, TwoStageTopK
from lgc.rounds.two_stage import ReducingAggregator, Reduction
from lgc.schemes.arguments import require, require_one_of
from lgc.schemes.sparse import SparseScheme, require_sparse_codec


@dataclass(frozen=True, kw_only=True)
class TopK(SparseScheme):
    """Sparse gradient descent: each rank's own top-k with error feedback.

    Args:
        reduction: "gather" sends every rank's selection to all ranks; in "two_stage" every rank adds up what falls into
            a part of the model, selects again from that and keeps a residual of its own, so that traffic per rank
            does not grow with the number of ranks.
        mean_values: how values of the mean become bytes in two stages. None is a finer code of the kind of `values`.
    """

    name: ClassVar[str] = "topk"
    momentum: float = 0.0
    warmup_steps: int = 0
    reduction: Reduction = "gather"
    mean_values: ValueCodec | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, "reduction", get_args(Reduction))
        if self.mean_values is not None:
            require_sparse_codec(self, "mean_values")
            require(self, "mean_values", 'None where reduction is "gather"', self.reduction == "two_stage")
        if Role.SHARED in {self.small, *self.roles.values()}:
            raise ValueError(f"{type(self).__name__} has no leader: roles must be dense or own, got shared.")

    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._lay_out(tensors, first=Role.OWN, last=Role.OWN, other=Role.OWN)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        region = Region(layout.own)
        own: Exchange = (
            OwnTopK(transport, region, self.codecs)
            if self.reduction == "gather"
            else TwoStageTopK(transport, region, self.codecs, self.mean_values or self.values.finer(), device)
        )
        schedule = Schedule(self.rate, warmup_steps=self.warmup_steps)
        return OwnAggregator(layout, transport, schedule, self.new_feedback(layout, transport, device), own)


@dataclass(frozen=True, kw_only=True)
class DGC(TopK):
    """Deep Gradient Compression: own top-k with momentum correction, clipping and rate warm-up.

    With `low_pass=1` also momentum factor masking, as in its paper. Source: Lin et al., ICLR 2018, arXiv 1712.01887.
    """

    name: ClassVar[str] = "dgc"
    momentum: float = 0.9
    warmup_steps: int = 100


class OwnAggregator(ReducingAggregator):
    """The round of both. In the order of DGC's algorithm 4:

    u = m u + g;  v = v + u          momentum correction and local accumulation, `Feedback.accumulate`
    the largest |v| of every layer   `OwnTopK.prepare`, at the rate of the warm-up's stage (section 3.3)
    their mean over the ranks        `OwnTopK.exchange`, or that of `TwoStageTopK`
    v = 0 (and u = 0) where sent     `Feedback.settle`; what a codec lost stays
    """

    def __init__(
        self, layout: Layout, transport: Transport, schedule: Schedule, feedback: Feedback, own: Exchange
    ) -> None:
        super().__init__(layout, transport, schedule, feedback, own)
        self.dense = DenseExchange(transport, layout.dense, beside=True)
        if isinstance(own, OwnTopK):
            self.pasts = {"own": own.past}

    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        return [self.dense, self.reduced]
