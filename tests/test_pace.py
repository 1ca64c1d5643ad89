"""Rounds by time: ranks take the steps they can, count for as many, and know what each has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from local_runs import Run, differ
from ranks import Ranks
from torch import Tensor

import lgc
from lgc.pace import Progress, Work

RankFactory = Callable[[int], Ranks]

NEVER = lgc.Seconds(1000)
EXCHANGES = {
    "dense": lgc.Dense(),
    "gather": lgc.Quantized(reduction="gather"),
    "two-stage": lgc.Quantized(reduction="two_stage"),
    "topk": lgc.TopK(rate=0.1),
    "scalecom": lgc.ScaleCom(rate=0.1),
}
WORK = [(5, 1, 2), (0, 2, 5), (2, 5, 0)]  # steps of three ranks in three rounds


def by_time(every: lgc.Seconds = NEVER, **arguments: Any) -> lgc.LocalSteps:
    chosen: dict[str, Any] = {"exchange": lgc.Dense(), "start_steps": 0} | arguments
    return lgc.LocalSteps(every=every, **chosen)


class Account(NamedTuple):
    """Of one rank: what it has moved in each round, what the anchor has by the end, and what the rank owes."""

    moved: list[dict[str, Tensor]]
    by_anchor: dict[str, Tensor]
    owed: dict[str, Tensor]
    progress: Progress


def work_unequally(rank: int, _: int, exchange: Any, counts: bool) -> Account:
    run = Run(by_time(exchange=exchange, outer_momentum=0.0))
    initial, moved, done = run.weights(), [], 0
    for steps in (of_round[rank] for of_round in WORK):
        before = run.weights()
        for step in range(done, done + steps):
            if counts:
                run.handle.count(10 - steps)
            run.train(rank, range(step, step + 1))
        done += steps
        after = run.weights()
        moved.append({name: before[name] - after[name] for name, _ in run.net.named_parameters()})
        run.handle.finish()
    per_rank = run.handle.state_dict()["aggregator"]["per_rank"]["round 0"]
    owed = {name: own + per_rank.get("server_residual", {}).get(name, 0) for name, own in per_rank["residual"].items()}
    weights = run.weights()
    return Account(moved, {name: initial[name] - weights[name] for name in owed}, owed, run.handle.progress)


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_the_mean_is_weighted_by_steps_or_samples_and_what_is_owed_stays(ranks: RankFactory, exchange: Any) -> None:
    counts = exchange == lgc.Dense()
    accounts = ranks(3).run(work_unequally, exchange, counts)
    weights = [[steps * (10 - steps) if counts else steps for steps in of_round] for of_round in WORK]
    assert not differ([each.by_anchor for each in accounts])
    for name, by_anchor in accounts[0].by_anchor.items():
        expected = sum(
            weight * account.moved[number][name] / sum(of_round)
            for number, of_round in enumerate(weights)
            for weight, account in zip(of_round, accounts, strict=True)
        )
        owed = sum(each.owed[name] for each in accounts) / 3
        torch.testing.assert_close(by_anchor + owed, expected, rtol=1e-4, atol=1e-5)
    last = tuple(Work(steps, weight * counts) for steps, weight in zip(WORK[-1], weights[-1], strict=True))
    progress = Progress(pytest.approx(sum(map(sum, WORK)) / 3), sum(map(sum, weights)) * counts, last)
    assert [each.progress for each in accounts] == [progress] * 3
