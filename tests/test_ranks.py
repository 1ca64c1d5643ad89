"""The harness itself: real ranks, their results and exceptions, and what a dead or hanging rank leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks

RankFactory = Callable[[int], Ranks]


def sum_of_ranks(rank: int, world_size: int, offset: int) -> torch.Tensor:
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value


def fail_on_rank(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def die_on_rank(rank: int, world_size: int, dying: int) -> None:
    if rank == dying:
        os._exit(7)
    dist.barrier()


def sleep_on_rank(rank: int, world_size: int, sleeping: int) -> None:
    if rank == sleeping:
        time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_by_rank_from_real_collectives(ranks: RankFactory, world_size: int) -> None:
    results = ranks(world_size).run(sum_of_ranks, 1)
    assert [result.item() for result in results] == [world_size * (world_size + 1) / 2] * world_size


def test_an_exception_is_raised_in_the_parent_with_the_rank_and_its_traceback(ranks: RankFactory) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3:\n(.*\n)*.*fail_on_rank(.*\n)*ValueError: no luck on 1"):
        ranks(3).run(fail_on_rank, 1)


def test_every_rank_reports_its_own_exception_without_waiting_for_a_timeout(ranks: RankFactory) -> None:
    start = time.monotonic()
    failures = ranks(3).exceptions(fail_on_rank, 2)
    assert isinstance(failures[2], ValueError)
    assert isinstance(failures[0], RuntimeError)
    assert isinstance(failures[1], RuntimeError)
    assert time.monotonic() - start < 10


def test_a_dead_rank_is_named_and_the_next_call_works(ranks: RankFactory) -> None:
    with pytest.raises(RankError, match=r"rank 2 died \(exit code 7\)"):
        ranks(4).run(die_on_rank, 2)
    assert ranks(2).run(sum_of_ranks, 0)[0].item() == 1


def test_a_hanging_rank_is_named_and_the_next_call_works(ranks: RankFactory) -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] did not answer within 1 s\n(.*\n)*.*sleep_on_rank"):
        ranks(2).run(sleep_on_rank, 1, limit_s=1)
    assert ranks(2).run(sum_of_ranks, 0)[1].item() == 1
