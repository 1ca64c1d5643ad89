"""What the exchanges of a round send each other in the same messages, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from lgc.coding import PayloadError
from lgc.comm.messages import FromOne, Posting, Sum, ToAll, lockstep, parts_of, to_all, to_all_usual, to_each
from lgc.comm.transport import Transport

RankFactory = Callable[[int], Ranks]

SOURCE = 1


def world() -> Transport:
    assert dist.group.WORLD is not None
    return Transport(dist.group.WORLD)


def text(*parts: object) -> Tensor:
    """Bytes of another length on every rank."""
    return torch.tensor(list("-".join(map(str, parts)).encode()), dtype=torch.uint8)


class Got(NamedTuple):
    texts: list[list[str]]
    total: Tensor
    sent: dict[str, int]
    messages: int


def send_together(rank: int, world_size: int) -> Got:
    transport = world()
    deliver, delivered = transport._deliver, []

    def counting(messages: list[object]) -> object:
        delivered.append(len(messages))
        return deliver(messages)  # type: ignore[arg-type]

    transport._deliver = counting  # type: ignore[assignment]
    own = text("all", "x" * rank)

    def one() -> Posting[list[Tensor]]:
        payload = text("from one")
        return (yield FromOne(content="one", payload=payload, source=SOURCE, length=payload.numel(), limit=99))

    def numbers() -> Posting[list[Tensor]]:
        return (yield Sum(content="sum", tensor=torch.full((3, 3), float(rank + 1))))

    def everyone() -> Posting[list[Tensor]]:
        lengths = [4 + sender for sender in range(world_size)]
        return (yield ToAll(content="all", payload=own, lengths=lengths, limit=99))

    each = to_each([text(rank, to, "y" * to) for to in range(world_size)], "each", limit=99)
    usual = to_all_usual(world_size, text("usual", "z" * (rank == 0)), "usual", usual=6, limit=99)
    running = [one(), numbers(), everyone(), each, to_all(world_size, own, "unknown", limit=99), usual]
    results = lockstep(running, transport.together)
    (total,) = results.pop(1)
    traffic = transport.wire.phases["setup"]
    texts = [[bytes(payload.tolist()).decode() for payload in result] for result in results]
    return Got(texts, total, traffic.contents, len(delivered))


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_waits_for_nothing_travels_in_the_same_messages(ranks: RankFactory, world_size: int) -> None:
    for rank, got in enumerate(ranks(world_size).run(send_together)):
        everyone = ["all-" + "x" * sender for sender in range(world_size)]
        assert got.texts == [
            ["from one"],
            everyone,
            [f"{sender}-{rank}-" + "y" * rank for sender in range(world_size)],
            everyone,
            ["usual-z", *["usual-"] * (world_size - 1)],
        ]
        assert got.total.tolist() == [[sum(range(world_size + 1))] * 3] * 3
        assert got.messages == 3  # two, and what exchanges had to ask for first


def test_a_payload_from_one_rank_is_carried_once_to_each(ranks: RankFactory) -> None:
    got = ranks(4).run(send_together)
    assert [rank.sent["one"] for rank in got] == [4, 2 + 2 + 2 + 6, 4, 4]  # in parts of two bytes
    assert sum(rank.sent["one"] for rank in got) == 3 * len("from one")
    assert sum(rank.sent["sum"] for rank in got) == 2 * 3 * 36


def test_parts_are_equal_but_for_the_last_ones() -> None:
    assert parts_of(10, 4) == [3, 3, 3, 1]
    assert parts_of(5, 4) == [2, 2, 1, 0]
    assert parts_of(0, 2) == [0, 0]


def test_a_length_that_cannot_be_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(PayloadError, match=r"length must be 0 to 9 bytes, as announced, got 10\."):
        FromOne(content="one", payload=text("x"), source=0, length=10, limit=9)
