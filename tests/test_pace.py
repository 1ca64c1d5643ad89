"""Rounds by time: ranks take the steps they can, count for as many, and know what each has done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from local_runs import Net, Run, batch, differ, owed
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.checkpoint.state import reshard
from lgc.comm.transport import RankError
from lgc.pace import Progress, Work, counted, scale_of, weights_of
from lgc_lab.training.settings import Settings

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
    """Of one rank: what it has moved in each round, what the anchor has by the end, and what the rank owes.

    `means` are batch norm's, before and after each round.
    """

    moved: list[dict[str, Tensor]]
    means: list[tuple[Tensor, Tensor]]
    by_anchor: dict[str, Tensor]
    owed: dict[str, Tensor]
    progress: Progress


def work_unequally(rank: int, _: int, exchange: Any, counts: bool) -> Account:
    run = Run(by_time(exchange=exchange, outer_momentum=0.0))
    initial, moved, means, done = run.weights(), [], [], 0
    for steps in (of_round[rank] for of_round in WORK):
        before = run.weights()
        for step in range(done, done + steps):
            if counts:
                run.handle.count(10 - steps)
            run.train(rank, range(step, step + 1))
        done += steps
        after = run.weights()
        moved.append({name: before[name] - after[name] for name, _ in run.net.named_parameters()})
        mean = run.net.norm.running_mean.clone()
        run.handle.finish()
        means.append((mean, run.net.norm.running_mean.clone()))
    per_rank = run.handle.state_dict()["aggregator"]["per_rank"]["round 0"]
    owed = {name: own + per_rank.get("server_residual", {}).get(name, 0) for name, own in per_rank["residual"].items()}
    weights = run.weights()
    return Account(moved, means, {name: initial[name] - weights[name] for name in owed}, owed, run.handle.progress)


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
    for steps, samples, work in (each.progress for each in accounts):
        assert steps == pytest.approx(sum(map(sum, WORK)) / 3)
        assert (samples, work) == (sum(map(sum, weights)) * counts, last)


def test_buffers_are_the_mean_of_the_ranks_that_have_made_a_step(ranks: RankFactory) -> None:
    accounts = ranks(3).run(work_unequally, lgc.Dense(), False)
    for number, of_round in enumerate(WORK):
        before = [account.means[number][0] for account, steps in zip(accounts, of_round, strict=True) if steps]
        for account in accounts:
            torch.testing.assert_close(account.means[number][1], torch.stack(before).mean(0))


def test_what_ranks_multiply_by_is_one_on_average_and_nothing_where_there_is_no_work_or_no_number() -> None:
    def scales(weights: Sequence[int], finite: Sequence[bool]) -> list[float]:
        return [scale_of(rank, counted(weights, finite)) for rank in range(len(weights))]

    assert scales([5, 0, 15], [True] * 3) == [0.75, 0, 2.25]
    assert scales([5, 0, 15], [True, True, False]) == [3, 0, 0]
    assert scales([0, 0, 15], [True, True, False]) == [1.5, 1.5, 0]
    assert scales([0, 0, 0], [True] * 3) == [1, 1, 1]


@pytest.mark.parametrize("samples", [(8, 0), (-1, 8)], ids=["uncounted", "negative"])
def test_samples_that_not_all_ranks_count_are_an_error(samples: tuple[int, int]) -> None:
    with pytest.raises(RankError, match=r"on every rank|at least 0"):
        weights_of([Work(3, each) for each in samples], "rank")
    assert weights_of([Work(3, 8), Work(0, 0), Work(0, 4)], "rank") == [8, 0, 0]


def train_by_time(rank: int, world_size: int, ddp: bool) -> tuple[list[Any], dict[str, Tensor]]:
    """Train for two rounds with one rank that is slow: it sleeps for longer than a round before each of its steps."""
    run = Run(by_time(lgc.Seconds(0.3), start_steps=2, exchange=lgc.Quantized()), ddp=ddp)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1 - run.handle.progress.steps / 1000)
    seen: list[Progress] = []
    while len(seen) < 2:
        if rank == 0 and run.handle.step >= 2:
            time.sleep(0.35)
        run.handle.count(8)
        run.train(rank, range(run.handle.step, run.handle.step + 1))
        schedule.step()
        if run.handle.progress.work and seen[-1:] != [run.handle.progress]:
            seen.append(run.handle.progress)
        assert run.handle.step > 2 or run.handle.progress.steps == run.handle.step  # at the start all step together
    run.handle.finish()
    assert run.handle.progress == seen[-1]  # all had stopped after the same round
    rate, own = run.optimizer.param_groups[0]["lr"], run.handle.step
    summary: Any = run.handle.wire_summary()
    return [seen, rate, own, summary["phases"][-1]["steps"]], run.weights()


@pytest.mark.parametrize("ddp", [False, True], ids=["module", "ddp"])
def test_each_rank_takes_the_steps_it_can_and_all_know_how_many(ranks: RankFactory, ddp: bool) -> None:
    results = ranks(3).run(train_by_time, ddp)
    assert not differ([weights for _, weights in results])
    (progress, rate, *_), *others = [account for account, _ in results]
    assert all(each[:2] == [progress, rate] for each in others)
    own = [account[2] for account, _ in results]
    assert progress[-1].steps == pytest.approx(sum(own) / 3)
    assert progress[-1].samples == 8 * sum(own)
    assert own[0] <= 5 < min(own[1:])
    assert all(work.samples == 8 * work.steps for each in progress for work in each.work)
    assert {account[3] for account, _ in results} == {sum(own) // 3 - 2}


def go_apart(rank: int, _: int, what: str) -> str:
    run = Run(by_time(lgc.Seconds(0.05)), timeout=1.0 if what == "leave" else 10.0)
    try:
        for step in range(1000):
            if what == "leave" and rank == 0 and run.handle.progress.steps:
                return "a rank of the group"
            if what == "count" and rank == 0:
                run.handle.count(8)
            run.train(rank, range(step, step + 1))
            if what == "late":
                run.handle.count(8)
            if what == "finish" and rank == 0 and run.handle.progress.steps:
                run.handle.finish()
    except RuntimeError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("finish", "rank 0 in handle.finish, rank 1 in a round of training"),
        ("count", "must be called on every rank"),
        ("late", "step 2 has been made with it, those before without it"),
        pytest.param("leave", "rank", marks=pytest.mark.exhaustive),  # for longer than the timeout nobody waits
    ],
)
def test_ranks_that_do_not_agree_are_an_error_on_every_rank(ranks: RankFactory, what: str, message: str) -> None:
    results = ranks(2).run(go_apart, what)
    assert all(message in each for each in results), results


def skip_every_step(rank: int, _: int) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    handle = lgc.attach(net, by_time(lgc.Seconds(0.05)), optimizer, grad_scaler=scaler)
    while handle.progress.steps < 20:
        x, y = batch(rank, handle.step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if rank == 1:
            net.out.bias.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
    return handle.progress, {name: each.detach().clone() for name, each in net.named_parameters()}


def test_a_rank_whose_steps_a_grad_scaler_skips_opens_its_rounds_too(ranks: RankFactory) -> None:
    results = ranks(2).run(skip_every_step)
    assert not differ([weights for _, weights in results])
    assert results[0][0] == results[1][0]


def interrupt(rank: int, _: int) -> Any:
    run = Run(by_time(exchange=lgc.Quantized()))
    for steps in (range(3 + rank), range(4, 6)):
        run.handle.finish()
        for step in steps:
            run.handle.count(8)
            run.train(rank, range(step, step + 1))
    return run.handle.state_dict(), run.handle.progress, run.weights()


def resume(rank: int, world_size: int, states: list[Any]) -> Any:
    run = Run(by_time(exchange=lgc.Quantized()))
    run.handle.load_state_dict(reshard(states, rank=rank, world_size=world_size) if world_size > 2 else states[rank])
    before = run.handle.progress, run.weights(), run.handle.state_dict()
    run.handle.finish()
    return *before, run.handle.progress, run.weights()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_has_the_progress_and_what_was_moved_but_not_the_time(ranks: RankFactory, world_size: int) -> None:
    saved = ranks(2).run(interrupt)
    states = [state for state, *_ in saved]
    resumed = ranks(world_size).run(resume, states)
    for rank, (progress, weights, _, last, _) in enumerate(resumed):
        assert progress[:2] == saved[0][1][:2] == (3.5, 56)
        assert world_size > 2 or not differ([weights, saved[rank][2]])
        assert (last.steps, last.samples) == (5.5, 56 + 16 * world_size)
    assert not differ([weights for *_, weights in resumed])
    before, after = owed(states), owed([state for _, _, state, *_ in resumed])
    for name, each in before.items():
        torch.testing.assert_close(after[name], each)


def test_the_text_form_is_a_number_and_an_s() -> None:
    scheme = lgc.parse_scheme("local:every=30s+quantized")
    assert scheme == lgc.LocalSteps(every=lgc.Seconds(30))
    for number in (30, 30.0, 0.25, 1e-7):
        scheme = lgc.LocalSteps(every=lgc.Seconds(number))
        assert lgc.parse_scheme(str(scheme)) == scheme
    for text, message in {"30m": "or a time such as 30s", "0s": "must be positive", "nans": "must be positive"}.items():
        with pytest.raises(ValueError, match=message):
            lgc.parse_scheme(f"local:every={text}")


@pytest.mark.parametrize("arguments", [{"overlap": True}, {"fragments": 2}], ids=["overlap", "fragments"])
def test_rounds_by_time_are_of_everything_and_waited_for(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*with every=1000s"):
        by_time(**arguments)


def ask_for_what_counts_steps(_: int, __: int) -> list[str]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    group = torch.distributed.group.WORLD

    def counted() -> None:
        lgc.attach(net, lgc.LocalSteps(), optimizer).count(8)

    def saved() -> None:
        model = Net()
        handle = lgc.attach(model, by_time(), torch.optim.SGD(model.parameters(), lr=0.1))
        lgc.checkpoint.distributed_state(handle)

    calls: list[Callable[[], Any]] = [
        lambda: lgc.attach(net, by_time(), optimizer, between=group),
        lambda: lgc.attach(DistributedDataParallel(net), by_time(start_steps=1), optimizer),
        lambda: lgc.choose(net, lambda model: model(batch(0, 0)[0]).sum(), [by_time()]),
        lambda: Settings(recipe="digits", scheme="local:every=30s+quantized", world_size=2, seed=0),
        counted,
        saved,
    ]
    messages = []
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_what_counts_steps_is_refused_by_name(ranks: RankFactory) -> None:
    for between, ddp, choose, recipe, count, saved in ranks(1).run(ask_for_what_counts_steps):
        assert "attach(between=...)" in between
        assert "start_steps=2 or more" in ddp
        assert "choose(candidates=...)" in choose
        assert "the training of a recipe" in recipe
        assert "handle.count()" in count
        assert "lgc.checkpoint.distributed_state has one number of steps for all ranks" in saved
        assert all("every=" in each for each in (between, ddp, choose, recipe, count, saved))
