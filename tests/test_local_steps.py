"""Local steps: what a loop can rely on when the ranks go their own ways between rounds."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from local_runs import Net, Run, batch, differ, exact, owed
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.checkpoint.state import reshard
from lgc.comm.transport import RankError

RankFactory = Callable[[int], Ranks]


EXCHANGES = {
    "dense": lgc.Dense(),
    "gather": lgc.Quantized(reduction="gather"),
    "two-stage": lgc.Quantized(reduction="two_stage"),
    "largest": lgc.Quantized(values=lgc.Largest(0.1)),
    "topk": lgc.TopK(rate=0.1),
    "scalecom": lgc.ScaleCom(rate=0.1, warmup_steps=2),
}
every_exchange = pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)


def train_to(rank: int, _: int, scheme: lgc.LocalSteps, steps: int, ddp: bool = False) -> dict[str, Tensor]:
    return Run(scheme, ddp=ddp).train(rank, range(steps)).weights()


@pytest.mark.grid
@pytest.mark.parametrize("ddp", [False, True], ids=["module", "ddp"])
@every_exchange
def test_all_ranks_have_the_same_weights_and_buffers_after_a_round(
    ranks: RankFactory, exchange: Any, ddp: bool
) -> None:
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=3)
    assert not differ(ranks(3).run(train_to, scheme, 11, ddp))


def test_between_rounds_every_rank_has_weights_of_its_own(ranks: RankFactory) -> None:
    assert "hidden.weight" in differ(ranks(2).run(train_to, exact(), 6))


def start_apart(rank: int, _: int) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    net = Net()
    net.norm.running_mean.fill_(rank)
    lgc.attach(net, exact(), torch.optim.SGD(net.parameters(), lr=0.1))
    return dict(net.state_dict())


def test_a_plain_module_starts_from_rank_0s_weights_and_buffers(ranks: RankFactory) -> None:
    results = ranks(2).run(start_apart)
    assert not differ(results)
    assert results[1]["norm.running_mean"].eq(0).all()


def mean_by_hand(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    alone = Net()
    before = {name: each.clone() for name, each in alone.state_dict().items()}
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(4):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(alone(x), y).backward()
        optimizer.step()
    expected = {}
    for name, each in alone.named_parameters():
        moved = before[name] - each.detach()
        dist.all_reduce(moved)
        d = moved / world_size
        m = d
        expected[name] = before[name] - 0.7 * (d + 0.9 * m)
    scheme = exact(outer_lr=0.7, outer_momentum=0.9)
    return expected, Run(scheme).train(rank, range(4)).weights()


def test_a_round_is_the_outer_optimizers_nesterov_step_on_the_mean_of_what_was_moved(ranks: RankFactory) -> None:
    for expected, weights in ranks(2).run(mean_by_hand):
        for name, each in expected.items():
            torch.testing.assert_close(weights[name], each, rtol=1e-5, atol=1e-6)


@every_exchange
def test_an_embedding_row_that_no_rank_has_seen_does_not_move(ranks: RankFactory, exchange: Any) -> None:
    torch.manual_seed(0)
    initial = Net().rows.weight[16:].detach()
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=4)
    for weights in ranks(2).run(train_to, scheme, 16):
        assert torch.equal(weights["rows.weight"][16:], initial)


def interrupted(rank: int, _: int, scheme: lgc.LocalSteps, ddp: bool, stop: int) -> tuple[Any, Any]:
    whole = Run(scheme, ddp=ddp).train(rank, range(20))
    first = Run(scheme, ddp=ddp).train(rank, range(stop))
    second = Run(scheme, ddp=ddp).load(first.state()).train(rank, range(stop, 20))
    return (
        (whole.weights(), whole.handle.state_dict()["wire"], whole.handle.step),
        (second.weights(), second.handle.state_dict()["wire"], second.handle.step),
    )


RECENT = lgc.TopK(rate=0.1, indices=lgc.Recent(), values=lgc.RecentSign())
FEW = lgc.Quantized(reduction="two_stage", values=lgc.Largest(0.1), mean_values=lgc.Largest(0.2))
OF_ALL: Any = {"first_moments": "all", "second_moments": "all", "ahead": 0.5}
INTERRUPTED = {
    "dense": exact(),
    "start": lgc.LocalSteps(every=4, start_steps=6),
    "two-stage": lgc.LocalSteps(every=4, exchange=lgc.Quantized(reduction="two_stage"), start_steps=2),
    "topk": lgc.LocalSteps(every=4, exchange=lgc.TopK(rate=0.1), start_steps=2, decay=0.9),
    "overlap": lgc.LocalSteps(every=4, start_steps=2, overlap=True),
    "fragments": lgc.LocalSteps(every=4, start_steps=2, fragments=2, overlap=True),
    "ahead": lgc.LocalSteps(every=4, exchange=lgc.TopK(rate=0.1), start_steps=2, fragments=2, ahead=0.5),
    "recent": lgc.LocalSteps(every=4, exchange=RECENT, start_steps=2, fragments=2, overlap=True),
    "moments": lgc.LocalSteps(every=4, exchange=FEW, start_steps=2, **OF_ALL),
}


@pytest.mark.grid
@pytest.mark.parametrize("stop", [1, 7, 10, 13])
@pytest.mark.parametrize("scheme", INTERRUPTED.values(), ids=INTERRUPTED)
def test_a_run_goes_on_from_its_state_with_the_same_bits(ranks: RankFactory, scheme: lgc.LocalSteps, stop: int) -> None:
    for whole, resumed in ranks(2).run(interrupted, scheme, stop % 2 == 0, stop):
        assert whole[1:] == resumed[1:]
        for name, each in whole[0].items():
            assert torch.equal(each, resumed[0][name]), name


def finished_anywhere(rank: int, _: int, scheme: lgc.LocalSteps) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
    run = Run(scheme).train(rank, range(11))
    run.handle.finish()
    first, rounds = run.weights(), run.handle.wire.phases["compressed"].steps
    run.handle.finish()  # nothing has moved since
    return first, rounds, run.train(rank, range(11, 16)).weights()


def finish_in_the_start(rank: int, _: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lgc").addHandler(handler)
    run = Run(exact(start_steps=5))
    run.handle.finish()  # nothing has been done, so there is nothing to say
    run.train(rank, range(3)).handle.finish()
    logging.getLogger("lgc").removeHandler(handler)
    return said


def test_a_run_that_ends_before_local_steps_begin_is_told(ranks: RankFactory) -> None:
    (first,), others = ranks(2).run(finish_in_the_start)
    assert "all 3 steps were of the start" in first
    assert "LocalSteps(start_steps=5)" in first
    assert not others


AHEAD = lgc.LocalSteps(every=4, exchange=lgc.TopK(rate=0.1), start_steps=0, ahead=0.5)
FINISHED = {"": exact(), "fragments": exact(fragments=2), "overlap": exact(overlap=True), "ahead": AHEAD}


@pytest.mark.parametrize("scheme", FINISHED.values(), ids=FINISHED)
def test_finish_makes_the_last_round_at_any_step_and_training_may_go_on(
    ranks: RankFactory, scheme: lgc.LocalSteps
) -> None:
    results = ranks(2).run(finished_anywhere, scheme)
    assert not differ([first for first, _, _ in results])
    assert [steps for _, steps, _ in results] == [11, 11]
    assert scheme.overlap or scheme.ahead or scheme.fragments > 1 or not differ([last for _, _, last in results])


class Ahead(NamedTuple):
    """By name: weights after a round, and where they should be; and the number of warnings."""

    begun: dict[str, Tensor]
    expected: dict[str, Tensor]
    warned: int


def begin_ahead(rank: int, _: int) -> Ahead:
    run = Run(AHEAD).train(rank, range(8))
    state = run.handle.state_dict()["aggregator"]
    residual, anchor = state["per_rank"]["round 0"]["residual"], state["replicated"]["anchor"]
    expected = {name: each - 0.5 * residual[name] for name, each in anchor.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.net.state_dict()
    return Ahead({name: run.weights()[name] for name in anchor}, expected, len(caught))


def test_ahead_a_rank_begins_a_round_with_some_of_what_it_still_owes_in_its_weights(ranks: RankFactory) -> None:
    results = ranks(2).run(begin_ahead)
    for begun, expected, warned in results:
        assert not differ([begun, expected])
        assert warned == 1  # the weights are its own from the first step of a round on
    assert differ([each.begun for each in results])


class Finish(NamedTuple):
    """By name: a rank's weights, the anchor, and what it owes."""

    weights: dict[str, Tensor]
    anchor: dict[str, Tensor]
    owed: dict[str, Tensor]
    steps: int


def finish_ahead(rank: int, _: int, scheme: lgc.LocalSteps) -> tuple[Finish, Finish]:
    run = Run(scheme).train(rank, range(8))

    def look() -> Finish:
        state = run.handle.state_dict()["aggregator"]
        part, anchor = state["per_rank"]["round 0"], state["replicated"]["anchor"]
        owed = {name: each + part["server_residual"][name] for name, each in part["residual"].items()}
        return Finish(run.weights(), anchor, owed, run.handle.wire.phases["compressed"].steps)

    before = look()
    run.handle.finish()
    return before, look()


def begin_again(rank: int, _: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Weights after a round of one fragment where rank 1's were not finite, where they should be, and what is ahead."""
    run = Run(replace(AHEAD, fragments=2), on_nonfinite="propagate").train(rank, range(4))
    if rank == 1:
        with torch.no_grad():
            for parameter in run.net.parameters():
                parameter.fill_(torch.nan)
    run.train(rank, range(4, 6))
    state = run.handle.state_dict()["aggregator"]
    owed = state["per_rank"]["round 0"]["residual"] | state["per_rank"]["round 1"]["residual"]
    replicated = state["replicated"]
    expected = {name: each - 0.5 * owed[name] for name, each in replicated["anchor"].items()}
    return {name: run.weights()[name] for name in expected}, expected, replicated["ahead"]


def test_ahead_a_rank_that_was_not_finite_begins_again_where_it_had_begun(ranks: RankFactory) -> None:
    """In the fragments of other rounds too, so that all ranks are ahead with the same, as checkpoints have it."""
    (_, _, ahead), (weights, expected, ahead_too) = ranks(2).run(begin_again)
    assert ahead == ahead_too
    assert set(ahead.values()) == {1}
    assert not differ([weights, expected])


@pytest.mark.parametrize("start", [lgc.LloydMax(4), lgc.Float32()], ids=repr)
def test_finish_brings_ranks_that_are_ahead_together_at_their_mean(ranks: RankFactory, start: Any) -> None:
    """Even right after a round; what moves the anchor leaves the residual, and counts as no step."""
    exchange = lgc.Quantized(bits=1, reduction="two_stage")
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start=start, start_steps=0, ahead=0.5)
    results = ranks(4).run(finish_ahead, scheme)
    assert not differ([after.weights for _, after in results])
    assert [(before.steps, after.steps) for before, after in results] == [(8, 8)] * 4
    for name, anchor in results[0][0].anchor.items():
        mean = sum(before.weights[name] for before, _ in results) / 4
        after = results[0][1].weights[name]
        assert float((after - mean).norm()) <= (0.25 if start == lgc.LloydMax(4) else 1e-4) * float(
            (mean - anchor).norm()
        )
        taken = sum(before.owed[name] - after.owed[name] for before, after in results) / 4
        torch.testing.assert_close(anchor - after, taken, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"every": lgc.Seconds(30)}, {"overlap": True}], ids=str)
def test_ahead_needs_rounds_by_count_that_are_waited_for(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ahead"):
        lgc.LocalSteps(ahead=0.5, **arguments)


def look_at_the_anchor(rank: int, _: int) -> tuple[bool, dict[str, Tensor], dict[str, Tensor], bool]:
    run = Run(exact())
    at_round = run.train(rank, range(8)).weights()
    own = run.train(rank, range(8, 10)).weights()
    with run.handle.anchored():
        anchored, exported = run.weights(), copy.deepcopy(run.net.state_dict())
    same = all(torch.equal(each, run.weights()[name]) for name, each in own.items())
    assert all(torch.equal(each, exported[name]) for name, each in anchored.items())
    return same, anchored, at_round, torch.is_grad_enabled()


def test_anchored_shows_the_last_rounds_weights_and_buffers_and_puts_the_own_ones_back(ranks: RankFactory) -> None:
    for same, anchored, at_round, grad_enabled in ranks(2).run(look_at_the_anchor):
        assert same
        assert grad_enabled
        assert all(torch.equal(each, at_round[name]) for name, each in anchored.items())


def say_what_is_saved(rank: int, _: int) -> list[int]:
    run, counts = Run(exact()), []
    for steps in (range(4), range(4, 6), range(6, 7)):  # at a round, amid one, and again
        run.train(rank, steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.net.state_dict()
        counts.append(len(caught))
    return counts


def test_a_state_dict_between_rounds_warns_once(ranks: RankFactory) -> None:
    assert ranks(2).run(say_what_is_saved) == [[0, 1, 0]] * 2


def copy_and_train(rank: int, _: int) -> tuple[bool, bool]:
    run = Run(exact())
    average: Any = torch.optim.swa_utils.AveragedModel(run.net)
    run.train(rank, range(6))
    average.update_parameters(run.net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.module.state_dict()
    return torch.equal(average.module.out.weight, run.net.out.weight), run.handle.step == 6


def test_a_copy_of_the_model_is_a_plain_model(ranks: RankFactory) -> None:
    assert ranks(2).run(copy_and_train) == [(True, True)] * 2


def load_at_the_end(run: Run) -> None:
    run.net.load_state_dict(Net().state_dict())
    run.handle.finish()


MISUSES: dict[str, tuple[Callable[[Run], Any], str]] = {
    "loaded": (lambda run: run.net.load_state_dict(Net().state_dict()), "weights were loaded"),
    "loaded at the end": (load_at_the_end, "call handle.finish() before loading"),
    "unfrozen": (lambda run: run.net.out.bias.requires_grad_(True), "out.bias is trained now and was frozen"),
}


def misused(rank: int, _: int, misuse: str) -> str:
    torch.manual_seed(0)
    run = Run.__new__(Run)
    run.net = run.model = Net()
    run.net.out.bias.requires_grad_(False)
    run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.1)
    run.handle = lgc.attach(run.net, exact(), run.optimizer)
    run.train(rank, range(6))
    try:
        MISUSES[misuse][0](run)
        run.train(rank, range(6, 9))
    except RuntimeError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_a_round_would_get_wrong_is_an_error_on_every_rank(ranks: RankFactory, misuse: str) -> None:
    for message in ranks(2).run(misused, misuse):
        assert MISUSES[misuse][1] in message


def freeze(rank: int, _: int, scheme: lgc.LocalSteps) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    run = Run(scheme)
    run.train(rank, range(6)).net.hidden.requires_grad_(False)
    at_round = run.train(rank, range(6, 8)).net.hidden.weight.detach().clone()
    run.train(rank, range(8, 20)).handle.finish()
    return run.weights(), at_round, run.train(rank, range(20, 24)).net.hidden.weight.detach().clone()


@pytest.mark.parametrize("scheme", [exact(outer_momentum=0.9), AHEAD], ids=["", "ahead"])
def test_what_is_frozen_comes_together_at_the_next_round_and_rests(ranks: RankFactory, scheme: lgc.LocalSteps) -> None:
    results = ranks(2).run(freeze, scheme)
    assert not differ([weights for weights, _, _ in results])
    for _, at_round, at_end in results:
        assert torch.equal(at_round, at_end)


def poison(rank: int, _: int, on_nonfinite: Any, scheme: lgc.LocalSteps | None = None) -> tuple[str, dict[str, Tensor]]:
    run = Run(scheme or exact(), on_nonfinite=on_nonfinite).train(rank, range(6))
    run.net.norm.eval()  # which leaves its statistics as they are
    run.net.norm.running_mean.fill_(1 + rank)
    if rank == 1:
        with torch.no_grad():
            run.net.hidden.weight[0, 0] = torch.nan
    try:
        run.train(rank, range(6, 12)).handle.finish()
    except FloatingPointError as error:
        return str(error), {}
    return "", run.weights() | {"running_mean": run.net.norm.running_mean}


@pytest.mark.parametrize("scheme", [exact(), exact(fragments=2), replace(AHEAD, fragments=2)], ids=str)
def test_a_rank_whose_weights_are_not_finite_counts_for_nothing_and_goes_on(
    ranks: RankFactory, scheme: lgc.LocalSteps
) -> None:
    results = ranks(2).run(poison, "propagate", scheme)
    assert not differ([weights for _, weights in results])
    assert all(each.isfinite().all() for each in results[0][1].values())
    if scheme.fragments == 1:  # else a round of another fragment may have been finite
        assert (results[0][1]["running_mean"] == 1).all()  # nor do its buffers


def restart(rank: int, _: int) -> list[tuple[float, bool]]:
    run = Run(exact(), on_nonfinite="propagate").train(rank, range(6))
    if rank == 1:
        with torch.no_grad():
            run.net.hidden.weight[0, 0] = torch.nan
    states = run.train(rank, range(6, 8)).optimizer.state.values()
    return [(float(each["step"]), bool(each["exp_avg_sq"].any())) for each in states]


def test_its_optimizer_begins_anew(ranks: RankFactory) -> None:
    """Or Adam would take moments of zero for those of many steps, and make the next ones many times too long."""
    others, poisoned = ranks(2).run(restart)
    assert set(others) == {(8.0, True)}
    assert set(poisoned) == {(0.0, False)}


def test_or_all_ranks_raise(ranks: RankFactory) -> None:
    for message, _ in ranks(2).run(poison, "raise"):
        assert "not finite on rank 1" in message
        assert 'on_nonfinite="propagate"' in message


def poison_the_start(rank: int, _: int) -> tuple[bool, dict[str, Tensor]]:
    run = Run(exact(start_steps=6), on_nonfinite="propagate").train(rank, range(3))
    before = run.weights()
    x, y = batch(rank, 3)
    run.optimizer.zero_grad()
    loss = nn.functional.cross_entropy(run.model(x), y)
    (loss * torch.nan if rank else loss).backward()
    run.optimizer.step()
    own = dict(run.net.named_parameters())
    rests = all(torch.equal(before[name], each) for name, each in own.items())
    run.train(rank, range(4, 10))
    return rests, run.weights()


def test_a_gradient_that_is_not_finite_is_a_step_that_a_plain_module_leaves_out_in_the_start(
    ranks: RankFactory,
) -> None:
    results = ranks(2).run(poison_the_start)
    assert all(rests for rests, _ in results)
    assert not differ([weights for _, weights in results])
    assert all(each.isfinite().all() for each in results[0][1].values())


def finish_within_an_evaluation(rank: int, _: int, scheme: lgc.LocalSteps) -> list[dict[str, Tensor]]:
    run, apart = Run(scheme).train(rank, range(5)), Run(scheme).train(rank, range(5))
    with torch.inference_mode():
        run.handle.finish()
    apart.handle.finish()
    return [each.train(rank, range(5, 12)).weights() for each in (run, apart)]


@pytest.mark.parametrize("exchange", ["two-stage", "largest"])
def test_a_run_may_be_finished_where_tensors_are_for_inference(ranks: RankFactory, exchange: str) -> None:
    scheme = lgc.LocalSteps(every=2, exchange=EXCHANGES[exchange], start_steps=2)
    for results in ranks(2).run(finish_within_an_evaluation, scheme):
        assert not differ(results)


def skip_steps(rank: int, _: int) -> tuple[int, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    handle = lgc.attach(net, exact(), optimizer, grad_scaler=scaler)
    for step in range(8):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if (rank, step) in ((1, 2), (0, 6)):
            assert net.out.weight.grad is not None
            net.out.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return handle.step, {name: each.detach().clone() for name, each in net.named_parameters()}


def test_a_step_that_a_grad_scaler_skips_on_one_rank_counts(ranks: RankFactory) -> None:
    results = ranks(2).run(skip_steps)
    assert [steps for steps, _ in results] == [8, 8]
    assert not differ([weights for _, weights in results])


def fewer_batches(rank: int, _: int, overlap: bool) -> str:
    run = Run(exact(overlap=overlap))
    try:
        run.train(rank, range(10 - 3 * rank)).handle.finish()
    except RankError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("overlap", [False, True])
def test_fewer_batches_on_one_rank_are_an_error_by_count(ranks: RankFactory, overlap: bool) -> None:
    for message in ranks(2).run(fewer_batches, overlap):
        assert "different steps" in message


def make_steps_by_closure(rank: int, _: int, start_steps: int) -> str:
    run = Run(exact(start_steps=start_steps))
    x, y = batch(rank, 0)

    def closure() -> float:
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        return loss.item()

    try:
        run.optimizer.step(closure)
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_a_closure_makes_gradients_too_late_for_the_start(ranks: RankFactory) -> None:
    assert all("closure" in message for message in ranks(2).run(make_steps_by_closure, 2))
    assert ranks(2).run(make_steps_by_closure, 0) == ["went on"] * 2


def take_state(rank: int, _: int, scheme: lgc.LocalSteps) -> dict[str, Any]:
    return Run(scheme).train(rank, range(10)).handle.state_dict()


def go_on_with(rank: int, world_size: int, scheme: lgc.LocalSteps, states: list[Any]) -> tuple[Any, dict[str, Tensor]]:
    run = Run(scheme)
    run.handle.load_state_dict(reshard(states, rank=rank, world_size=world_size))
    state = run.handle.state_dict()
    return state, run.train(rank, range(10, 12)).weights()


RESHARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "two-stage": ("two-stage", {}),
    "topk": ("topk", {}),
    "two-stage-ahead": ("two-stage", {"ahead": 0.5}),
    "topk-ahead": ("topk", {"ahead": 0.5}),
    "fragments": ("gather", {"fragments": 2}),
    "largest": ("largest", {**OF_ALL, "outer_lr": 1.4, "first_moments": 0.5}),
}


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("case", RESHARDED)
def test_on_another_number_of_ranks_what_is_owed_stays(ranks: RankFactory, case: str, world_size: int) -> None:
    exchange, arguments = RESHARDED[case]
    scheme = lgc.LocalSteps(every=4, exchange=EXCHANGES[exchange], start_steps=0, **arguments)
    states = ranks(2).run(take_state, scheme)
    results = ranks(world_size).run(go_on_with, scheme, states)
    before, after = owed(states, scheme.ahead), owed([state for state, _ in results], scheme.ahead)
    for name, each in before.items():
        torch.testing.assert_close(after[name], each)
    assert scheme.ahead or scheme.fragments > 1 or not differ([weights for _, weights in results])


def with_table(scheme: lgc.LocalSteps) -> Run:
    """With a table of integers, a counter, a mask and a phase, none of which has a mean."""
    run = Run(scheme)
    run.net.register_buffer("table", torch.arange(64), persistent=False)
    run.net.register_buffer("seen", torch.zeros(1, dtype=torch.int32))
    run.net.register_buffer("mask", torch.arange(64) % 3 == 0)
    run.net.register_buffer("phase", torch.full((4,), 1 + 2j))
    run.handle.detach()
    run.handle = lgc.attach(run.net, scheme, run.optimizer)
    return run


def count_batches(rank: int, _: int, scheme: lgc.LocalSteps) -> dict[str, Any]:
    run = with_table(scheme).train(rank, range(5))
    run.net.get_buffer("seen").add_(rank)
    return run.handle.state_dict()


def buffers_from(rank: int, world_size: int, scheme: lgc.LocalSteps, states: list[Any]) -> dict[str, Tensor]:
    run = with_table(scheme)
    run.handle.load_state_dict(reshard(states, rank=rank, world_size=world_size))
    return run.weights()


@pytest.mark.parametrize("world_size", [1, 2])
def test_on_another_number_of_ranks_only_floats_have_a_mean(ranks: RankFactory, world_size: int) -> None:
    """Thirds of equal integers may add up to less."""
    scheme = exact()
    states = ranks(3).run(count_batches, scheme)
    most = {1: [2], 2: [1, 2]}[world_size]  # of the ranks whose place each takes
    for seen, found in zip(most, ranks(world_size).run(buffers_from, scheme, states), strict=True):
        assert torch.equal(found["table"], torch.arange(64))
        assert found["seen"].item() == seen
        assert torch.equal(found["mask"], torch.arange(64) % 3 == 0)
        assert torch.equal(found["phase"], torch.full((4,), 1 + 2j))
        assert found["norm.num_batches_tracked"].item() == 5


def attach_what_cannot_be(_: int, __: int, what: str) -> str:
    net: Any = Net()
    arguments: dict[str, Any] = {}
    scheme = exact(start_steps=2)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if what == "SyncBatchNorm":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if what == "ZeroRedundancyOptimizer":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the import uses itself
            from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
    if what == "find_unused_parameters":
        net = DistributedDataParallel(net, find_unused_parameters=True)
    if what == "grad_scaler":
        arguments = {"grad_scaler": torch.amp.GradScaler("cpu")}
    if what == "fragments":
        scheme = exact(every=40, fragments=40)
    try:
        lgc.attach(net, scheme, None if what == "optimizer" else optimizer, **arguments)
    except ValueError as error:
        return str(error)
    return "attached"


@pytest.mark.parametrize(
    "what",
    ["SyncBatchNorm", "ZeroRedundancyOptimizer", "find_unused_parameters", "grad_scaler", "optimizer", "fragments"],
)
def test_what_local_steps_cannot_do_is_refused_by_name(ranks: RankFactory, what: str) -> None:
    assert all(what in message for message in ranks(2).run(attach_what_cannot_be, what))


def join(rank: int, _: int) -> str:
    run = Run(exact(), ddp=True)
    assert isinstance(run.model, DistributedDataParallel)
    try:
        with run.model.join():
            run.train(rank, range(2))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_join_is_refused(ranks: RankFactory) -> None:
    assert all("join()" in message for message in ranks(2).run(join))


def test_an_exchange_with_a_momentum_or_a_filter_is_refused_where_they_are_set() -> None:
    with pytest.raises(ValueError, match=r"ScaleCom\(momentum=0.9\)"):
        lgc.LocalSteps(exchange=lgc.ScaleCom(momentum=0.9))
    with pytest.raises(ValueError, match=r"TopK\(low_pass=0.5\)"):
        lgc.LocalSteps(exchange=lgc.TopK(low_pass=0.5))
    exchange: Any = lgc.LocalSteps(exchange=lgc.ScaleCom()).exchange
    assert (exchange.momentum, exchange.low_pass) == (0.0, 1.0)


@pytest.mark.parametrize("exchange", [lgc.DGC(momentum=0.0), lgc.LGCRing(), lgc.PowerSGD(), lgc.DenseBF16()])
def test_other_exchanges_are_refused_by_name(exchange: Any) -> None:
    with pytest.raises(
        ValueError, match=f"must be one of Dense, Quantized, TopK, ScaleCom, got {type(exchange).__name__}"
    ):
        lgc.LocalSteps(exchange=exchange)


@pytest.mark.parametrize(
    "text",
    [
        "local+quantized",
        "local:every=50:start_steps=100:start=float32+quantized:bits=1",
        "local:every=4:outer_momentum=0.0:overlap=True:fragments=2+dense",
        "local+topk:rate=0.03:momentum=0.0:low_pass=1.0",
    ],
)
def test_the_text_form_has_the_exchange_after_a_plus_sign(text: str) -> None:
    scheme = lgc.parse_scheme(text)
    assert lgc.parse_scheme(str(scheme)) == scheme
    assert isinstance(scheme, lgc.LocalSteps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local+quantized+dense", "quantized has no exchange"),
        ("local+local+quantized", "must be one of Dense, Quantized, TopK, ScaleCom, got LocalSteps"),
        ("local+", "unknown scheme ''"),
    ],
)
def test_what_else_follows_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lgc.parse_scheme(text)


def test_only_local_steps_have_an_exchange() -> None:
    with pytest.raises(ValueError, match="only local has after a plus sign"):
        lgc.parse_scheme("dgc+quantized")


def moved_bytes(rank: int, world_size: int) -> tuple[int, int]:
    run = Run(exact()).train(rank, range(8))
    parameters = sum(each.numel() for each in run.net.parameters())
    wire = run.handle.wire.phases["compressed"]
    assert wire.steps == 8
    return wire.contents["values"], 2 * (2 * (world_size - 1) * 4 * parameters // world_size)


def test_the_steps_of_a_round_count_and_so_do_its_bytes(ranks: RankFactory) -> None:
    for counted, expected in ranks(3).run(moved_bytes):
        assert counted == expected
