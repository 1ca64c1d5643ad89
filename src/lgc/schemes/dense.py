"""Everything, uncompressed or in 16 bits."""

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
from lgc.rounds.schedule import FOREVER, Schedule, Stage
from lgc.schemes.scheme import RoundScheme


@dataclass(frozen=True, kw_only=True)
class Dense(RoundScheme):
    """Uncompressed: DDP's own all-reduce, bucket by bucket while the backward pass goes on."""

    name: ClassVar[str] = "dense"
    dtype: ClassVar[torch.dtype | None] = None  # of what is sent; None is the gradients' own

    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        return Layout(shapes, dict.fromkeys(shapes, Role.DENSE), frozenset(), rate=1.0, pooled_rate=1.0)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        feedback = Feedback(layout.size, world_size=transport.world_size, device=device)
        schedule = Schedule(1.0, dense_steps=FOREVER)
        return DenseAggregator(layout, transport, schedule, feedback, self.dtype)


@dataclass(frozen=True, kw_only=True)
class DenseFP16(Dense):
    """All-reduce in float16, as torch's `fp16_compress_hook`: cast, divided by K, summed, cast back; no residual."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype | None] = torch.float16


@dataclass(frozen=True, kw_only=True)
class DenseBF16(Dense):
    """All-reduce in bfloat16, as torch's `bf16_compress_hook`, also where DDP refuses that: on builds without CUDA."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype | None] = torch.bfloat16


class DenseAggregator(Aggregator):
    """One all-reduce of everything, for callers that have tensors and no DDP."""

    def __init__(
        self,
        layout: Layout,
        transport: Transport,
        schedule: Schedule,
        feedback: Feedback,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(layout, transport, schedule, feedback)
        self.everything = DenseExchange(transport, slice(0, layout.size), dtype)

    def exchanges(self, stage: Stage) -> Sequence[Exchange]:
        return [self.everything]
