"""Quantized: every coordinate in few bits, in every round, with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lgc.coding import Largest, LloydMax, ValueCodec
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.codes import GatheredCodes, TwoStageCodes
from lgc.rounds.exchange import Exchange
from lgc.rounds.feedback import Feedback
from lgc.rounds.layout import Layout, Role
from lgc.rounds.schedule import Schedule, Stage
from lgc.rounds.two_stage import ReducingAggregator, Reduction
from lgc.schemes.arguments import require, require_integer, require_one_of
from lgc.schemes.scheme import RoundScheme

BITS = LloydMax.bits
GATHERED_RANKS = 3  # up to here gathering sends no more bytes, and loses nothing in a second code


@dataclass(frozen=True, kw_only=True)
class Quantized(RoundScheme):
    """Every coordinate in few bits, in every round, with error feedback; exact zeros stay exact zeros.

    The optimizer keeps its momentum, which acts on the mean.

    Args:
        bits: of a value, 1 to 8, by `LloydMax`.
        values: how values become bytes, where that is not by `bits`.
        reduction: "gather" sends every rank's code to all ranks; in "two_stage" every rank adds up a part of them and
            sends its mean, coded again, so that traffic per rank does not grow with the number of ranks. None gathers
            on up to three ranks; with `Largest`, and no `mean_values`, it is "gather".
        mean_values: how the mean becomes bytes in two stages; it should lose less than `values` do. None is a finer
            code of their kind.
    """

    name: ClassVar[str] = "quantized"
    bits: int = BITS
    values: ValueCodec | None = None
    reduction: Reduction | None = None
    mean_values: ValueCodec | None = None

    def __post_init__(self) -> None:
        require_integer(self, "bits", 1)
        require(self, "bits", "at most 8", self.bits <= 8)
        if self.values is not None:
            require(self, "values", "a value codec, such as lgc.Sign()", isinstance(self.values, ValueCodec))
            require(self, "bits", f"left at {BITS} where values are given", self.bits == BITS)
        if self.reduction is None and self.mean_values is None and isinstance(self.values, Largest):
            object.__setattr__(self, "reduction", "gather")  # as it has been measured
        if self.reduction is not None:
            require_one_of(self, "reduction", get_args(Reduction))
        if self.mean_values is not None:
            codec = "a value codec, such as lgc.LloydMax(4)"
            require(self, "mean_values", codec, isinstance(self.mean_values, ValueCodec))
            require(self, "mean_values", 'None where reduction is "gather"', self.reduction != "gather")

    @property
    def codec(self) -> ValueCodec:
        """How values become bytes."""
        return self.values or LloydMax(self.bits)

    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        return Layout(shapes, dict.fromkeys(shapes, Role.OWN), frozenset(), rate=1.0, pooled_rate=1.0)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        feedback = Feedback(layout.size, world_size=transport.world_size, device=device)
        gathers = transport.world_size <= GATHERED_RANKS if self.reduction is None else self.reduction == "gather"
        codes: Exchange = (
            GatheredCodes(transport, layout.own, self.codec)
            if gathers
            else TwoStageCodes(transport, layout.own, self.codec, self.mean_values or self.codec.finer(), device)
        )
        return QuantizedAggregator(layout, transport, Schedule(1.0), feedback, codes)


class QuantizedAggregator(ReducingAggregator):
    """The round of error feedback:

    v = v + g                    `Feedback.accumulate`
    mean of the codes of all v   `GatheredCodes` or `TwoStageCodes`
    v = v - what its code says   `Feedback.settle`
    """

    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        return [self.reduced]
