"""Adam's second moments under local steps: those of the mean gradient, estimated by each rank from its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from local_runs import Net, Run, differ
from ranks import Ranks
from torch import Tensor

import lgc
from lgc.moments import MomentsOfAll

RankFactory = Callable[[int], Ranks]

BETA = 0.95


def step_with(ranks: int, gradients: Tensor, start: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Adam's steps with these gradients, the first `start` of them plain; the parameter, and what v stands for."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, BETA), **arguments)
    moments = MomentsOfAll(ranks)
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        if step >= start:
            moments.before_step(optimizer)
        optimizer.step()
        if step >= start:
            moments.after_step(optimizer)
    return parameter.detach(), optimizer.state[parameter]["exp_avg_sq"] / (1 - BETA ** len(gradients))


@pytest.mark.parametrize("arguments", [{"foreach": True}, {"maximize": True}, {"fused": True}, {}], ids=str)
def test_a_step_divides_by_them(arguments: dict[str, Any]) -> None:
    gradients = torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    before, _ = step_with(4, gradients[:100], 50, weight_decay=0.5, **arguments)
    after, v = step_with(4, gradients, 50, weight_decay=0.5, **arguments)
    m = sum(0.1 * 0.9 ** (100 - step) * gradient for step, gradient in enumerate(gradients)) / (1 - 0.9**101)
    sign = 1 if "maximize" in arguments else -1
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) + sign * 0.1 * m / (v.sqrt() + 1e-8))


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


ALL = lgc.LocalSteps(every=4, start_steps=2, second_moments="all")


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


def ask(_: int, __: int) -> list[str]:
    net, messages = Net(), []
    for optimizer in (
        torch.optim.SGD(net.parameters(), lr=0.1),
        torch.optim.Adam(net.parameters(), amsgrad=True),
    ):
        with pytest.raises(ValueError, match=r"attach|LocalSteps") as caught:
            lgc.attach(net, ALL, optimizer)
        messages.append(str(caught.value))
    handle = lgc.attach(net, ALL, torch.optim.Adam(net.parameters()))
    with pytest.raises(ValueError, match="LocalSteps") as caught:
        handle.use_optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    return [*messages, str(caught.value)]


def test_other_optimizers_are_refused_by_name(ranks: RankFactory) -> None:
    for kind, message in zip(("SGD", r"Adam(amsgrad=True)", "SGD"), ranks(1).run(ask)[0], strict=True):
        assert f"got {kind}" in message
        assert 'second_moments="own"' in message


def test_the_text_form_has_them() -> None:
    assert lgc.parse_scheme("local:every=4:second_moments=all:start_steps=2+quantized") == ALL
    assert lgc.parse_scheme(str(ALL)) == ALL
    with pytest.raises(ValueError, match="second_moments"):
        lgc.parse_scheme("local:second_moments=mean")
