"""How one region of the flat vector is exchanged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lgc.comm.messages import Posting, Sum
from lgc.comm.transport import Transport
from lgc.rounds.feedback import Piece
from lgc.rounds.schedule import Stage


class Exchanged(NamedTuple):
    """The parts of the mean that an exchange gives, to be added up, and what this rank sent, as decoded by others."""

    mean: list[Piece]
    sent: Piece


class Exchange(ABC):
    """One region of the pending residual v, shape (N,), exchanged in one way.

    A round first prepares all its exchanges, so that its opening can tell every rank how long the payloads are, or that
    a rank has failed; then it performs them, side by side.
    """

    def prepare(self, v: Tensor, stage: Stage) -> Tensor | None:
        """The payload that this rank is about to send, uint8, shape (bytes,); None if this kind announces none.

        Does not communicate.
        """
        return None

    @abstractmethod
    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        """Exchange this region of v; a collective, which yields what it sends and is given what comes.

        What several exchanges of a round yield at once travels in the same messages. All ranks yield the same posts.

        Args:
            v: the pending residual, shape (N,); not changed.
            payload: what `prepare` returned.
            lengths: of the payloads, by rank, in bytes.
            stage: step and least rate of the round.
        """

    def commit(self) -> None:  # noqa: B027 - most exchanges keep nothing
        """Make what this round has changed in the exchange its state; not called for one that was abandoned."""


class DenseExchange(Exchange):
    """All-reduce of a whole region.

    Args:
        transport: between the ranks.
        where: the region.
        dtype: in which it is summed; None is float32.
        beside: whether it goes beside what is compressed: then few messages in sequence count.
    """

    def __init__(
        self, transport: Transport, where: slice, dtype: torch.dtype | None = None, *, beside: bool = False
    ) -> None:
        self.where = where
        self.dtype = dtype
        self.beside = beside
        self.transport = transport

    def exchange(self, v: Tensor, payload: Tensor | None, lengths: list[int], stage: Stage) -> Posting[Exchanged]:
        sent = v[self.where].clone()
        if sent.numel() == 0:
            return Exchanged([], Piece(self.where, sent))
        if self.beside:
            (total,) = yield Sum(content="values", tensor=sent)
            mean = total / self.transport.world_size
        elif self.dtype is None:
            mean = self.transport.all_reduce(sent, "values") / self.transport.world_size
        else:
            mean = self.transport.all_reduce(sent.to(self.dtype) / self.transport.world_size, "values").float()
        return Exchanged([Piece(self.where, mean)], Piece(self.where, sent))


def root_mean_square(x: Tensor) -> Tensor:
    """The root mean square of all elements, shape (1,)."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)  # squares of float32 may vanish
    mean: Tensor = norm / math.sqrt(max(x.numel(), 1))
    return mean.float().view(1)


def sum_in_order(rows: Tensor) -> Tensor:
    """Sum over the first dimension, the same bits on any hardware."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
