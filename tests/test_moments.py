"""Moments under local steps: the momentum of all ranks, from what they have moved, and Adam's second moments of the
mean gradient, estimated by each rank from its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from local_runs import Net, Run, batch, differ, exact
from ranks import Ranks
from torch import Tensor

import lgc
from lgc.moments import SecondMoments

RankFactory = Callable[[int], Ranks]

BETA = 0.95


def step_with(
    ranks: int, gradients: Tensor, start: int, steps: int | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Adam's steps with these gradients, the first `start` of them plain; the parameter, and what v stands for."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    usual: dict[str, Any] = {"lr": 0.1, "betas": (0.9, BETA)}
    optimizer = torch.optim.AdamW([parameter], **usual | arguments)
    moments = SecondMoments(ranks, [parameter])
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        if step >= start:
            moments.before_step(optimizer)
        optimizer.step()
        if step >= start:
            moments.after_step(optimizer, steps)
    return parameter.detach(), optimizer.state[parameter]["exp_avg_sq"] / (1 - BETA ** len(gradients))


@pytest.mark.parametrize("arguments", [{"foreach": True}, {"maximize": True}, {"fused": True}, {}], ids=str)
def test_a_step_divides_by_them(arguments: dict[str, Any]) -> None:
    gradients = torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    before, _ = step_with(4, gradients[:100], 50, weight_decay=0.5, **arguments)
    after, v = step_with(4, gradients, 50, weight_decay=0.5, **arguments)
    m = sum(0.1 * 0.9 ** (100 - step) * gradient for step, gradient in enumerate(gradients)) / (1 - 0.9**101)
    sign = 1 if "maximize" in arguments else -1
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) + sign * 0.1 * m / (v.sqrt() + 1e-8))


@pytest.mark.parametrize("steps", [None, 2])
def test_the_optimizers_numbers_may_be_tensors(steps: int | None) -> None:
    gradients = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    tensors = {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.9), torch.tensor(BETA)), "foreach": False}
    of_tensors = step_with(4, gradients, 0, steps, **tensors)
    for ours, plain in zip(of_tensors, step_with(4, gradients, 0, steps), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_of_one_rank_they_are_its_own(foreach: bool) -> None:
    gradients = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    for ours, plain in zip(
        step_with(1, gradients, 0, foreach=foreach), step_with(1, gradients, 30, foreach=foreach), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_where_gradients_agree_they_are_their_square() -> None:
    gradients = torch.linspace(-1, 1, 8).expand(300, 8)
    for ranks in (2, 4, 16, 64):
        _, v = step_with(ranks, gradients, 0)
        torch.testing.assert_close(v, gradients[0].square())


@pytest.mark.parametrize("signal", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_they_end_where_those_of_the_mean_do(ranks: int, signal: float) -> None:
    noise = torch.randn(1000, ranks, 256, generator=torch.Generator().manual_seed(0))
    _, of_mean = step_with(1, signal + noise.mean(1), 1000)
    _, of_rank = step_with(ranks, signal + noise[:, 0], 0)
    assert of_rank.mean().item() == pytest.approx(signal**2 + 1 / ranks, rel=0.1)
    assert of_rank.std() < of_mean.std()  # as from more steps


def test_parameters_of_another_model_in_the_optimizer_are_left_alone() -> None:
    own, other, alone = (torch.nn.Parameter(torch.zeros(8)) for _ in range(3))
    optimizer, plain = torch.optim.AdamW([own, other]), torch.optim.AdamW([alone])
    moments = SecondMoments(4, [own])
    for gradient in torch.randn(5, 8, generator=torch.Generator().manual_seed(0)):
        own.grad, other.grad, alone.grad = gradient.clone(), gradient.clone(), gradient.clone()
        moments.before_step(optimizer)
        optimizer.step()
        moments.after_step(optimizer, 2)
        plain.step()
    assert torch.equal(other, alone)
    assert torch.equal(optimizer.state[other]["exp_avg_sq"], plain.state[alone]["exp_avg_sq"])
    assert not torch.equal(own, alone)


@pytest.mark.parametrize("signal", [0.0, 0.5])
@pytest.mark.parametrize("every", [1, 2, 20])
@pytest.mark.parametrize("ranks", [4, 16])
def test_they_do_too_where_rounds_make_the_momentum_common(ranks: int, every: int, signal: float) -> None:
    gradients = signal + torch.randn(600, ranks, 256, generator=torch.Generator().manual_seed(0))
    parameters = [torch.nn.Parameter(torch.zeros(256)) for _ in range(ranks)]
    optimizers = [torch.optim.Adam([each], betas=(0.9, BETA)) for each in parameters]
    moments = [SecondMoments(ranks, [each]) for each in parameters]
    momentum, in_round = [one.state[each] for one, each in zip(optimizers, parameters, strict=True)], []
    for step in range(600):
        for each, optimizer, correction, gradient in zip(parameters, optimizers, moments, gradients[step], strict=True):
            each.grad = gradient.clone()
            correction.before_step(optimizer)
            optimizer.step()
            correction.after_step(optimizer, every)
        in_round.append(torch.stack([each["exp_avg"].clone() for each in momentum]))
        if len(in_round) == every:
            own = torch.stack(in_round).mean(0)
            for rank, each in enumerate(momentum):
                each["exp_avg"] += own.mean(0) - own[rank]
            in_round.clear()
    found = torch.stack([each["exp_avg_sq"] for each in momentum]).mean() / (1 - BETA**600)
    assert found.item() == pytest.approx(signal**2 + 1 / ranks, rel=0.1)


def by_one_process(rank: int, world_size: int, nesterov: bool) -> list[dict[str, Tensor]]:
    """Weights and momentum of local steps of one, and of the same training by the mean gradient."""
    torch.manual_seed(0)  # with some weights a rank would take more than four times what it has moved
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, plain = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov) for each in nets]
    handle = lgc.attach(nets[0], exact(1, first_moments="all"), ours)
    nets[1].load_state_dict(nets[0].state_dict())
    for step in range(6):
        x, y = batch(rank, step)
        for net, optimizer in zip(nets, (ours, plain), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            if optimizer is plain:
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad.div_(world_size))
            optimizer.step()
    handle.finish()
    return [
        dict(net.named_parameters())
        | {f"momentum of {name}": each["momentum_buffer"] for name, each in momentum_of(net, one).items()}
        for net, one in zip(nets, (ours, plain), strict=True)
    ]


def momentum_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: optimizer.state[each] for name, each in net.named_parameters()}


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_the_momentum_of_all_ranks_rounds_after_every_step_are_training_by_the_mean_gradient(
    ranks: RankFactory, nesterov: bool
) -> None:
    for ours, plain in ranks(3).run(by_one_process, nesterov):
        for name, each in plain.items():
            torch.testing.assert_close(ours[name], each, rtol=1e-3, atol=1e-5)


RATES = (0.03, 0.02, 0.01)


def momentum_after_a_round(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Adam's momentum after a round of three steps, as it is and as it should be; and the rank's own before."""
    run, alone = Run(exact(3, first_moments="all")), Run(exact(100))
    before = alone.weights()
    for step, rate in enumerate(RATES):
        for one in (run, alone):
            one.optimizer.param_groups[0]["lr"] = rate
            one.train(rank, range(step, step + 1))
    expected, own = {}, {}
    for name, each in alone.net.named_parameters():
        state = alone.optimizer.state[each]
        moved = (before[name] - each).detach()
        dist.all_reduce(mean := moved / world_size)
        denominator = (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
        own[name] = state["exp_avg"].clone()
        expected[name] = own[name] + (mean - moved) * denominator * (1 - 0.9**3) / sum(RATES)
    return [{name: each["exp_avg"] for name, each in momentum_of(run.net, run.optimizer).items()}, expected, own]


def test_the_momentum_of_a_round_becomes_that_of_all_ranks(ranks: RankFactory) -> None:
    results = ranks(2).run(momentum_after_a_round)
    for found, expected, _ in results:
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-5)
    (one, _, own), (other, _, others) = results
    apart = (one["out.weight"] - other["out.weight"]).norm() / (own["out.weight"] - others["out.weight"]).norm()
    assert apart < 1


def momentum_of_what_one_rank_trains(rank: int, _: int) -> list[Tensor]:
    """A layer's momentum after each of some rounds, whose gradients are missing on rank 1 but for the first."""
    run, found = Run(exact(2, first_moments="all")), []
    for step in range(12):
        x, y = batch(rank, step)
        run.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run.model(x), y).backward()
        if rank == 1 and step >= 2:
            run.net.out.weight.grad = None
        run.optimizer.step()
        found.append(run.optimizer.state[run.net.out.weight]["exp_avg"].clone())
    return found[1::2]


def test_the_momentum_of_what_a_rank_has_not_trained_rests(ranks: RankFactory) -> None:
    first, *others = ranks(2).run(momentum_of_what_one_rank_trains)[1]
    assert all(torch.equal(each, first) for each in others)


def restarts(rank: int, _: int, moments: Any, adam: bool) -> float:
    """The longest momentum under a learning rate that falls to nearly 0 and rises again."""
    torch.manual_seed(0)
    net = Net()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    lgc.attach(net, exact(10, first_moments=moments), optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50)
    longest = 0.0
    for step in range(150):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
        m = optimizer.state[net.hidden.weight]["exp_avg" if adam else "momentum_buffer"]
        longest = max(longest, m.norm().item())
    return longest


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_learning_rates_may_fall_and_rise_again(ranks: RankFactory, adam: bool) -> None:
    own, every = ranks(2).run(restarts, "own", adam), ranks(2).run(restarts, "all", adam)
    for usual, found in zip(own, every, strict=True):
        assert found < 2 * usual


def falls(rank: int, _: int, adam: bool) -> tuple[float, float, bool]:
    """How long steps are for their learning rate, on average before it falls to a tenth and at most after it; and
    whether a run that goes on from its state after that has the same weights."""
    few = lgc.Quantized(values=lgc.Largest(0.02), reduction="gather")
    scheme = lgc.LocalSteps(every=2, exchange=few, start_steps=0, first_moments=0.5, ahead=0.5, outer_lr=1.4)

    def start() -> Run:
        run = Run(scheme)
        if not adam:
            run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.01, momentum=0.9)
            run.handle.use_optimizer(run.optimizer)
        return run

    def go_on(run: Run, steps: range) -> list[float]:
        lengths = []
        for step in steps:
            rate = (0.01 if adam else 0.03) * (0.1 if step >= 200 else 1)
            run.optimizer.param_groups[0]["lr"] = rate
            before = run.weights()
            run.train(rank, range(step, step + 1))
            moved = [before[name] - each.detach() for name, each in run.net.named_parameters()]
            if step % 2 == 0:  # without a round
                lengths.append(torch.cat([each.flatten() for each in moved]).norm().item() / rate)
        return lengths

    run = start()
    before = go_on(run, range(200))[50:]
    after = go_on(run, range(200, 211))
    saved = run.state()
    after += go_on(run, range(211, 280))
    resumed = start().load(saved)
    go_on(resumed, range(211, 280))
    same = all(torch.equal(each, resumed.weights()[name]) for name, each in run.weights().items())
    return sum(before) / len(before), max(after), same


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_steps_become_as_short_as_the_learning_rate_does(ranks: RankFactory, adam: bool) -> None:
    """Though what is sent then was moved at a higher one, and would be a momentum many times as long."""
    for before, after, same in ranks(2).run(falls, adam):
        assert after < 2.5 * before
        assert same


def skip_at_first(rank: int, _: int) -> dict[str, Tensor]:
    """Weights after a run whose first two steps a GradScaler skips on rank 1, with state made for them already."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    handle = lgc.attach(net, exact(2, first_moments="all"), optimizer, grad_scaler=scaler, on_nonfinite="raise")
    for step in range(8):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y) * (torch.inf if rank == 1 and step < 2 else 1)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    handle.finish()
    return dict(net.named_parameters())


def test_a_rank_whose_first_steps_are_skipped_has_no_momentum_yet(ranks: RankFactory) -> None:
    results = ranks(2).run(skip_at_first)
    assert not differ(results)
    assert all(each.isfinite().all() for each in results[0].values())


ALL = lgc.LocalSteps(every=4, start_steps=2, first_moments="all", second_moments="all")


def train(rank: int, _: int, ddp: bool) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Second moments after the start and at the end; weights of an undisturbed run and of one that is resumed."""
    run = Run(ALL, ddp=ddp).train(rank, range(2))
    start = second_moments(run)
    run.train(rank, range(2, 7))
    saved = run.state()
    run.train(rank, range(7, 12)).handle.finish()
    resumed = Run(ALL, ddp=ddp).load(saved).train(rank, range(7, 12))
    resumed.handle.finish()
    return [start, second_moments(run)], [run.weights(), resumed.weights()]


def second_moments(run: Run) -> dict[str, Tensor]:
    return {
        name: run.optimizer.state[each]["exp_avg_sq"].clone()
        for name, each in run.net.named_parameters()
        if each in run.optimizer.state
    }


@pytest.mark.parametrize("ddp", [False, True], ids=["module", "ddp"])
def test_a_run_begins_with_the_moments_of_the_start_and_resumes_bit_for_bit(ranks: RankFactory, ddp: bool) -> None:
    results = ranks(2).run(train, ddp)
    assert not differ([start for (start, _), _ in results])
    assert differ([end for (_, end), _ in results])  # each rank estimates them by itself
    assert not differ([weights for _, both in results for weights in both])


def ask(_: int, __: int, which: str) -> list[str]:
    net, messages = Net(), []
    scheme = lgc.parse_scheme(f"local:{which}=all+quantized")
    for optimizer in (
        torch.optim.RMSprop(net.parameters(), momentum=0.9),
        torch.optim.SGD(net.parameters(), lr=0.1),
        torch.optim.Adam(net.parameters(), amsgrad=True),
    ):
        with pytest.raises(ValueError, match=r"attach|LocalSteps") as caught:
            lgc.attach(net, scheme, optimizer)
        messages.append(str(caught.value))
    handle = lgc.attach(net, scheme, torch.optim.Adam(net.parameters()))
    with pytest.raises(ValueError, match="LocalSteps") as caught:
        handle.use_optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    return [*messages, str(caught.value)]


@pytest.mark.parametrize("which", ["first_moments", "second_moments"])
def test_other_optimizers_are_refused_by_name(ranks: RankFactory, which: str) -> None:
    kinds = ("RMSprop(momentum=0.9)", "SGD(momentum=0)", "Adam(amsgrad=True)", "SGD(momentum=0)")
    for kind, message in zip(kinds, ranks(1).run(ask, which)[0], strict=True):
        assert f"got {kind}" in message
        assert f'{which}="own"' in message


def load_amsgrad(rank: int, _: int, which: str) -> str:
    moments: dict[str, Any] = {which: "all"}
    run = Run(lgc.LocalSteps(every=2, start_steps=0, **moments)).train(rank, range(3))
    run.optimizer.param_groups[0]["amsgrad"] = True  # as load_state_dict of such an optimizer's state leaves it
    try:
        run.train(rank, range(3, 4))
    except ValueError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("which", ["first_moments", "second_moments"])
def test_an_optimizer_that_becomes_one_of_the_others_is_refused_too(ranks: RankFactory, which: str) -> None:
    for message in ranks(2).run(load_amsgrad, which):
        assert "got AdamW(amsgrad=True)" in message


@pytest.mark.parametrize("arguments", [{"every": lgc.Seconds(30)}, {"overlap": True}], ids=str)
def test_the_momentum_of_all_ranks_needs_rounds_by_count_that_are_waited_for(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="first_moments"):
        lgc.LocalSteps(first_moments="all", **arguments)


def take_a_share(rank: int, _: int) -> list[Tensor]:
    """The momentum after a round: a rank's own, that of all, and a third of the way from one to the other."""
    found = []
    for share in (0, 1, 1 / 3):
        run = Run(exact(2, first_moments=share)).train(rank, range(2))
        found.append(run.optimizer.state[run.net.out.weight]["exp_avg"].clone())
    return found


def test_a_share_of_it_lies_between(ranks: RankFactory) -> None:
    for own, of_all, between in ranks(2).run(take_a_share):
        assert not torch.equal(own, of_all)
        torch.testing.assert_close(between, own + (of_all - own) / 3)


@pytest.mark.parametrize(
    ("share", "message"), [(1.5, r"in \[0, 1\], got 1.5"), (True, "a number"), ("some", "own, all")]
)
def test_other_shares_are_refused(share: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lgc.LocalSteps(first_moments=share)


def test_the_text_form_has_them() -> None:
    for share in (0, 1, 0.3, 1e-5):
        scheme = lgc.LocalSteps(first_moments=share)
        assert str(lgc.parse_scheme(str(scheme))) == str(scheme)
    with pytest.raises(ValueError, match="first_moments, if not own or all, must be a number, got 'some'"):
        lgc.parse_scheme("local:first_moments=some")
    assert lgc.parse_scheme("local:every=4:first_moments=all:second_moments=all:start_steps=2+quantized") == ALL
    assert lgc.parse_scheme(str(ALL)) == ALL
    with pytest.raises(ValueError, match="second_moments"):
        lgc.parse_scheme("local:second_moments=mean")
