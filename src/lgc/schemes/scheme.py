"""The base of all schemes: immutable values, with arguments that are checked and have a text form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Aggregator
from lgc.rounds.layout import Layout
from lgc.schemes.arguments import to_text


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to exchange gradients. An immutable value: the same on every rank."""

    name: ClassVar[str]

    @property
    def corrected_momentum(self) -> float:
        """SGD's, which acts before the exchange, so that the optimizer must have none; 0 is none."""
        return 0.0

    @property
    def makes_adams_step(self) -> bool:
        """Whether it is made before the exchange, so that the optimizer must be SGD without momentum."""
        return False

    def arguments(self) -> dict[str, str]:
        """All arguments as text."""
        return {item.name: to_text(getattr(self, item.name)) for item in fields(self)}

    def __str__(self) -> str:
        """The name and the arguments that are not at their default, in the form that `parse_scheme` reads.

        For roles it has no form; they are there to be read.
        """
        changed = [item.name for item in fields(self) if getattr(self, item.name) != _default(item)]
        return ":".join([self.name, *(f"{name}={text}" for name, text in self.arguments().items() if name in changed)])


@dataclass(frozen=True, kw_only=True)
class RoundScheme(Scheme, ABC):
    """A scheme that exchanges named tensors in rounds, whoever they come from."""

    @abstractmethod
    def layout(self, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        """Lay these tensors out as one flat vector, and say how each part of it is exchanged."""

    @abstractmethod
    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        """One rank's aggregator, with its state at the start."""


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
