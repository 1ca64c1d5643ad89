"""What the exchanges of a round send each other, so that those that wait for nothing travel in the same messages.

An exchange yields a `Post` and gets its result back. `lockstep` runs several exchanges side by side, and the transport
delivers what all of them have yielded at once: a post is one message in sequence, or two, however many there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lgc.coding import PayloadError

DIRECT_RANKS = 3  # up to here one rank's payload goes to all in one message, with no more bytes in sequence than in two

Asked = TypeVar("Asked")
Given = TypeVar("Given")
Result = TypeVar("Result")


class Message(NamedTuple):
    """What one rank sends at once, uint8: to every rank a payload, by receiver, and how long they are, by sender.

    What is for itself stays where it is. What comes is brought to the device of the payloads.
    """

    content: str
    payloads: Sequence[Tensor]
    lengths: Sequence[int]


Delivery = Generator[Message, list[Tensor], list[Tensor]]  # gives by sender


@dataclass(frozen=True, kw_only=True)
class Post(ABC):
    """Something that all ranks send each other, with a result.

    Args:
        content: what its bytes are counted as.
    """

    content: str

    @abstractmethod
    def messages(self, rank: int, world_size: int) -> Delivery:
        """Make the messages of `rank`, one after the other, and the result of what came."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of a rank's buffer, as `lgc.choice.cost.Collective` counts them."""

    def upload(self, rank: int) -> int:
        """Bytes that this rank contributes, each counted once."""
        return self.size()


@dataclass(frozen=True, kw_only=True)
class ToAll(Post):
    """A payload from every rank to all: one message. The result has them by sender.

    Args:
        payload: uint8, shape (bytes,).
        lengths: by sender.
        limit: the greatest length that is possible; PayloadError on every rank if one announces more.
    """

    payload: Tensor
    lengths: Sequence[int]
    limit: int

    def __post_init__(self) -> None:
        require_possible(self.lengths, self.limit)

    def messages(self, rank: int, world_size: int) -> Delivery:
        return (yield Message(self.content, [self.payload] * world_size, self.lengths))

    def size(self) -> int:
        return self.payload.numel()


@dataclass(frozen=True, kw_only=True)
class ToEach(Post):
    """A payload from every rank to every other: one message. The result has them by sender, its own included.

    Args:
        payloads: uint8, by receiver.
        lengths: by sender.
        limit: the greatest length that this rank can receive; PayloadError if it is told of more.
    """

    payloads: Sequence[Tensor]
    lengths: Sequence[int]
    limit: int

    def __post_init__(self) -> None:
        require_possible(self.lengths, self.limit)

    def messages(self, rank: int, world_size: int) -> Delivery:
        return (yield Message(self.content, self.payloads, self.lengths))

    def size(self) -> int:
        return sum(payload.numel() for payload in self.payloads)

    def upload(self, rank: int) -> int:
        return self.size() - self.payloads[rank].numel()


@dataclass(frozen=True, kw_only=True)
class FromOne(Post):
    """The payload of one rank to all, which is the one result.

    In two messages, of which the first one gives every rank a piece, and the second one each piece to all, so that
    every link carries it about once, on any number of ranks. On up to three it goes directly.

    Args:
        payload: of the source, uint8, shape (bytes,); the others' is not looked at.
        source: the rank.
        length: of its payload, known to all.
        limit: the greatest length that is possible; PayloadError on every rank if it announces more.
    """

    payload: Tensor
    source: int
    length: int
    limit: int

    def __post_init__(self) -> None:
        require_possible([self.length], self.limit)

    def messages(self, rank: int, world_size: int) -> Delivery:
        is_source = rank == self.source
        whole = self.payload if is_source else nothing()
        if world_size <= DIRECT_RANKS:
            lengths = [self.length if sender == self.source else 0 for sender in range(world_size)]
            received = yield Message(self.content, [whole] * world_size, lengths)
            return [received[self.source]]
        sizes = parts_of(self.length, world_size)
        first = whole.split(sizes) if is_source else [nothing()] * world_size
        pieces = yield Message(
            self.content, first, [sizes[rank] if sender == self.source else 0 for sender in range(world_size)]
        )
        piece = pieces[self.source]
        second = [nothing() if receiver == self.source else piece for receiver in range(world_size)]
        pieces = yield Message(self.content, second, [0] * world_size if is_source else sizes)
        return [whole if is_source else torch.cat(pieces)]

    def size(self) -> int:
        return self.length

    def upload(self, rank: int) -> int:
        return self.length if rank == self.source else 0


@dataclass(frozen=True, kw_only=True)
class Sum(Post):
    """The sum over the ranks, in their order, the same bits on each: two messages. It is the one result.

    Every rank adds up a part and sends the sum to all: as many bytes as a ring has, in 2 (K-1) messages.

    Args:
        tensor: of one shape and dtype on all ranks; not changed.
    """

    tensor: Tensor

    def messages(self, rank: int, world_size: int) -> Delivery:
        flat = self.tensor.contiguous().flatten()
        sizes = parts_of(flat.numel(), world_size)
        lengths = [size * flat.element_size() for size in sizes]
        shares = yield Message(
            self.content, [part.view(torch.uint8) for part in flat.split(sizes)], [lengths[rank]] * world_size
        )
        total, *others = (_numbers(share, flat.dtype) for share in shares)
        for part in others:
            total += part
        sums = yield Message(self.content, [total.view(torch.uint8)] * world_size, lengths)
        return [torch.cat(sums).view(flat.dtype).view(self.tensor.shape).to(self.tensor.device)]

    def size(self) -> int:
        return self.tensor.nbytes


Posting = Generator[Post, list[Tensor], Result]  # an exchange, or a part of one


def to_all(world_size: int, payload: Tensor, content: str, *, limit: int) -> Posting[list[Tensor]]:
    """The payloads of all ranks, by sender, whose lengths are exchanged first; as `ToAll`."""
    own = _as_bytes(payload.numel())
    told = yield ToAll(content=content, payload=own, lengths=[own.numel()] * world_size, limit=own.numel())
    return (yield ToAll(content=content, payload=payload, lengths=[_as_number(each) for each in told], limit=limit))


def to_each(payloads: Sequence[Tensor], content: str, *, limit: int) -> Posting[list[Tensor]]:
    """The payloads of all ranks for this one, by sender, whose lengths are exchanged first; as `ToEach`."""
    own = [_as_bytes(payload.numel()) for payload in payloads]
    size = own[0].numel()
    told = yield ToEach(content=content, payloads=own, lengths=[size] * len(own), limit=size)
    return (yield ToEach(content=content, payloads=payloads, lengths=[_as_number(each) for each in told], limit=limit))


def to_all_usual(world_size: int, payload: Tensor, content: str, *, usual: int, limit: int) -> Posting[list[Tensor]]:
    """As `to_all`, of payloads that most often have one length: what is longer follows in a second message.

    Args:
        world_size: number of ranks.
        payload: this rank's, uint8, shape (bytes,).
        content: what its bytes are counted as.
        usual: that length.
        limit: the greatest length that is possible; where it is the usual one, all have it.
    """
    if limit == usual:
        return (yield ToAll(content=content, payload=payload, lengths=[usual] * world_size, limit=limit))
    first = torch.cat([_as_bytes(payload.numel()), payload[:usual]])
    first = torch.cat([first, first.new_zeros(usual - payload[:usual].numel())])
    size = first.numel()
    rows = yield ToAll(content=content, payload=first, lengths=[size] * world_size, limit=size)
    start = size - usual
    lengths = [_as_number(row[:start]) for row in rows]
    require_possible(lengths, limit)
    received = [row[start : start + length] for row, length in zip(rows, lengths, strict=True)]
    rests = [max(0, length - usual) for length in lengths]
    if any(rests):
        more = yield ToAll(content=content, payload=payload[usual:], lengths=rests, limit=limit)
        received = [torch.cat(both) for both in zip(received, more, strict=True)]
    return received


def lockstep(
    running: Sequence[Generator[Asked, Given, Result]], deliver: Callable[[list[Asked]], list[Given]]
) -> list[Result]:
    """Run generators side by side: what those that go on have yielded is delivered at once, to each its own.

    Returns:
        Their results, in their order.
    """
    results: dict[int, Result] = {}
    given: dict[int, Given] = {}
    while len(results) < len(running):
        asked: dict[int, Asked] = {}
        for number, each in enumerate(running):
            if number not in results:
                try:
                    asked[number] = each.send(given[number]) if number in given else next(each)
                except StopIteration as end:
                    results[number] = end.value
        given = dict(zip(asked, deliver(list(asked.values())), strict=True)) if asked else {}
    return [results[number] for number in range(len(running))]


def parts_of(count: int, parts: int) -> list[int]:
    """Sizes of so many parts, equal but for the last ones, which may be shorter or empty."""
    size = -(-count // parts)
    return [max(0, min(size, count - number * size)) for number in range(parts)]


def require_possible(lengths: Sequence[int], limit: int) -> None:
    """Raise PayloadError where a length cannot be, before memory for it is taken."""
    for length in lengths:
        if not 0 <= length <= limit:
            raise PayloadError("length", f"0 to {limit} bytes, as announced", length)


def nothing() -> Tensor:
    """The empty payload, of a rank that sends none where others do."""
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def _as_bytes(number: int) -> Tensor:
    return torch.tensor([number], device="cpu").view(torch.uint8)


def _as_number(received: Tensor) -> int:
    return int(received.clone().view(torch.int64))


def _numbers(received: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since what was received need not stand where such numbers may."""
    return received.clone().view(dtype)
