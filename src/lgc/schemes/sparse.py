"""The base of the top-k schemes."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from lgc.coding import Float32, IndexCoder, RawIndices, Rice, Sign, ValueCodec, Zoned
from lgc.comm.transport import Transport
from lgc.rounds.feedback import Feedback
from lgc.rounds.layout import Layout, Role, Unit
from lgc.rounds.topk import Codecs
from lgc.schemes.arguments import Default, require, require_integer, require_number, require_role
from lgc.schemes.scheme import RoundScheme


@dataclass(frozen=True, kw_only=True)
class SparseScheme(RoundScheme, ABC):
    """The arguments of every top-k scheme.

    Args:
        rate: fraction of each weight that is sent, in (0, 1].
        pooled_rate: the same for the pool of all small tensors; by default four times `rate`, at most 1.
        momentum: of the momentum correction, in [0, 1); 0 is error feedback alone. The optimizer must then
            have none of its own.
        second_moment: Adam's second beta, in [0, 1); 0 is SGD. Every rank then makes Adam's step (with `momentum` as
            the first beta) of its own gradient, and that is what is sent; the optimizer must be SGD without momentum,
            with the learning rate and weight decay of AdamW.
        clip_norm: clip the local gradient's norm to this times K^-1/2; None is off.
        low_pass: the residual takes this part of every change, in (0, 1]: with 0.1 what has accumulated leaves over
            some ten rounds. 1 is plain error feedback, with momentum factor masking.
        warmup_steps: steps of the rate warm-up.
        unit: elements that are selected together by their norm: 1, a number (a run of a row) or "kernel" (of a
            convolution); one index then pays for all of them. Weights that do not divide into units, and the pool,
            are selected by single elements.
        indices, values: how these become bytes; what a codec of values loses stays in the residual.
        small: role of the tensors with fewer than two dimensions.
        roles: role by parameter name; shell patterns, the last match counts.
    """

    rate: float = 1e-3
    pooled_rate: float | None = None
    momentum: float = Default(0.9)
    second_moment: float = 0.0
    clip_norm: float | None = None
    low_pass: float = Default(0.1)
    warmup_steps: int = 100
    unit: Unit = 1
    indices: IndexCoder = Rice()
    values: ValueCodec = Sign()
    small: Role = Role.OWN
    roles: Mapping[str, Role] = field(default_factory=dict)

    @classmethod
    def paper(cls, **arguments: Any) -> Self:
        """Make the scheme with raw codes and plain feedback where not set otherwise: int32, float32, no filter."""
        return cls(**(cls.paper_arguments() | arguments))

    @classmethod
    def paper_arguments(cls) -> dict[str, Any]:
        """The arguments that `paper` sets."""
        return {"indices": RawIndices(), "values": Float32(), "low_pass": 1.0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "small", require_role(self, "small", self.small))
        if not isinstance(self.roles, Mapping):
            raise ValueError(f"{type(self).__name__}(roles=...) must map names to roles, got {self.roles!r}.")
        roles = {name: require_role(self, f"roles[{name!r}]", role) for name, role in self.roles.items()}
        object.__setattr__(self, "roles", roles)
        require(self, "rate", "in (0, 1]", 0 < require_number(self, "rate") <= 1)
        if self.pooled_rate is not None:
            require(self, "pooled_rate", "in (0, 1]", 0 < require_number(self, "pooled_rate") <= 1)
        for name in ("momentum", "second_moment"):
            require(self, name, "in [0, 1)", 0 <= require_number(self, name) < 1)
        if self.clip_norm is not None:
            require(self, "clip_norm", "positive", 0 < require_number(self, "clip_norm") < float("inf"))
        require(self, "low_pass", "in (0, 1]", 0 < require_number(self, "low_pass") <= 1)
        require_integer(self, "warmup_steps", 0)
        unit = self.unit
        integral = isinstance(unit, int) and not isinstance(unit, bool)
        require(
            self, "unit", 'an integer of at least 1, or "kernel"', unit == "kernel" or (integral and int(unit) >= 1)
        )
        require(self, "indices", "an index coder, such as lgc.Rice()", isinstance(self.indices, IndexCoder))
        require_sparse_codec(self, "values")

    @property
    def corrected_momentum(self) -> float:
        return 0.0 if self.makes_adams_step else self.momentum

    @property
    def makes_adams_step(self) -> bool:
        return self.second_moment > 0

    def _lay_out(self, tensors: Iterable[tuple[str, Tensor]], *, first: Role, last: Role, other: Role) -> Layout:
        """The layout with these roles of the first, the last and all other weights."""
        return Layout.of(
            tensors,
            rate=self.rate,
            pooled_rate=min(1.0, 4 * self.rate) if self.pooled_rate is None else self.pooled_rate,
            unit=self.unit,
            first=first,
            last=last,
            small=self.small,
            other=other,
            overrides=self.roles,
        )

    @property
    def codecs(self) -> Codecs:
        """How indices and values become bytes."""
        return Codecs(self.indices, self.values)

    @property
    def keeps_loss(self) -> bool:
        """Whether the loss of coding stays in the residual."""
        return True

    def new_feedback(self, layout: Layout, transport: Transport, device: torch.device) -> Feedback:
        """One rank's momentum and residual, at the start."""
        return Feedback(
            layout.size,
            momentum=self.momentum,
            second_moment=self.second_moment,
            clip_norm=self.clip_norm,
            keep_loss=self.keeps_loss,
            low_pass=self.low_pass,
            world_size=transport.world_size,
            device=device,
        )


def require_sparse_codec(scheme: object, name: str) -> None:
    """Raise ValueError unless an argument is a codec of values that have been selected."""
    codec = getattr(scheme, name)
    chooses = isinstance(codec, Zoned)  # by itself what is sent
    bound = "a value codec other than DeadZone and Largest, such as lgc.Sign()"
    require(scheme, name, bound, isinstance(codec, ValueCodec) and not chooses)
