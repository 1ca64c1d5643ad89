"""Detaching: plain DDP from then on, the same on all ranks, and another scheme after it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cases
from ddp_models import seeded
from local_runs import Run, exact
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.comm.transport import RankError

RankFactory = Callable[[int], Ranks]

LOCAL = "local:every=4:start_steps=2+quantized"
SCHEMES = {
    "dense": "dense",
    "powersgd": "powersgd:start_steps=2",
    "dgc": "dgc:rate=0.1:momentum=0",
    "lgc-ring": "lgc-ring:rate=0.1:momentum=0:dense_steps=1:warmup_steps=1:train_steps=2",
    "quantized": "quantized",
    "local": LOCAL,
    "local-overlap": "local:every=4:start_steps=0:overlap=true+dense",
    "local-start": "local:every=4:start_steps=20+dense",
}
every_scheme = cases("scheme", SCHEMES, in_suite=["dense", "dgc", "local", "local-overlap"])


class Training:
    """One rank's DDP model with batch norm, under AdamW."""

    def __init__(self) -> None:
        with seeded(0):
            self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
            self.net = nn.Sequential(self.hidden, nn.BatchNorm1d(8), nn.Tanh(), self.out)
        self.ddp = DistributedDataParallel(self.net)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.ddp.parameters(), lr=0.01)

    def attach(self, scheme: str | lgc.Scheme, **arguments: Any) -> lgc.Handle:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DDP broadcasts")
            return lgc.attach(self.ddp, scheme, self.optimizer, **arguments)

    def steps(self, rank: int, numbers: range) -> Training:
        for number in numbers:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + rank))
            self.optimizer.zero_grad()
            self.ddp(x).square().mean().backward()
            self.optimizer.step()
        return self

    def weights(self) -> Tensor:
        return torch.cat([each.detach().flatten() for each in self.net.parameters()])

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()})


def detach_and_go_on(rank: int, _: int, scheme: str) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    training = Training()
    handle = training.attach(scheme)
    training.steps(rank, range(7))
    handle.detach()
    state, summary, step = training.everything(), handle.wire_summary(), handle.step
    alike = training.weights()
    training.steps(rank, range(7, 12))
    plain = Training()
    plain.net.load_state_dict(state["model"])
    plain.optimizer.load_state_dict(state["optimizer"])
    plain.steps(rank, range(7, 12))
    return alike, training.weights(), plain.weights(), [handle.wire_summary() == summary, handle.step == step == 7]


@every_scheme
def test_what_was_detached_trains_as_plain_ddp_from_the_same_state_on_all_ranks(
    ranks: RankFactory, scheme: str
) -> None:
    results = ranks(2).run(detach_and_go_on, SCHEMES[scheme])
    for alike, after, plain, unchanged in results:
        assert torch.equal(alike, results[0][0])
        assert torch.equal(after, results[0][1])
        assert torch.equal(after, plain)
        assert unchanged == [True, True]


def attach_one_after_another(rank: int, _: int, first: str, second: str) -> tuple[Tensor, Tensor]:
    """Weights after the second scheme, and those of a model that had no other, from the same state."""
    training, fresh = Training(), Training()
    handle = training.attach(first)
    training.steps(rank, range(7))
    handle.detach()
    state = training.everything()
    training.attach(second)
    training.steps(rank, range(7, 15))
    fresh.net.load_state_dict(state["model"])
    fresh.optimizer.load_state_dict(state["optimizer"])
    fresh.attach(second)
    fresh.steps(rank, range(7, 15))
    return training.weights(), fresh.weights()


@cases(
    "schemes",
    ["dgc, local", "local, dgc", "local, local-overlap", "dense, lgc-ring", "powersgd, quantized"],
    in_suite=["dgc, local", "local, dgc"],
)
def test_another_scheme_does_after_one_what_it_does_on_a_new_model(ranks: RankFactory, schemes: str) -> None:
    for after, fresh in ranks(2).run(attach_one_after_another, *(SCHEMES[name] for name in schemes.split(", "))):
        assert torch.equal(after, fresh)


def detach_a_module(rank: int, _: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(exact(every=4)).train(rank, range(6))
    run.handle.detach()
    together = run.weights()
    return together, run.train(rank, range(6, 20)).weights()


def test_a_plain_module_is_left_to_itself(ranks: RankFactory) -> None:
    (first, alone), (second, other) = ranks(2).run(detach_a_module)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(alone["out.weight"], other["out.weight"])


def moments_after_detaching(rank: int, _: int) -> list[Any]:
    training = Training()
    handle = training.attach("local:every=4:start_steps=0+dense")
    training.steps(rank, range(6))
    weight = training.hidden.weight
    if rank == 1:  # as of a parameter that this rank alone has used
        del training.optimizer.state[training.out.bias]
    before = {name: each.clone() for name, each in training.optimizer.state[weight].items()}
    handle.detach()
    state = training.optimizer.state
    counted = handle.wire.phases["compressed"].contents["moments"]
    return [before, dict(state[weight]), dict(state[training.out.bias]), counted]


def test_moments_become_the_mean_of_the_ranks_that_have_them(ranks: RankFactory) -> None:
    results = ranks(2).run(moments_after_detaching)
    (first, after, bias, counted), (second, other, other_bias, _) = results
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(after[name], (first[name] + second[name]) / 2)
        assert torch.equal(after[name], other[name])
        assert torch.equal(bias[name], other_bias[name])
        assert bool(bias[name].any())
    assert after["step"] == other["step"] == bias["step"] == other_bias["step"] == 6
    assert counted > 0


def detach_with_a_list(rank: int, _: int) -> list[str]:
    with seeded(0):
        net = nn.Linear(4, 1)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    optimizer.state[net.weight]["directions"] = []
    handle = lgc.attach(ddp, "local:every=2:start_steps=0+dense", optimizer)
    for _step in range(2):
        ddp(torch.full((8, 4), 1.0 + rank)).square().mean().backward()
        optimizer.step()
    with pytest.raises(
        ValueError, match=r"'directions' in its state, of which the ranks \(list\) have no mean"
    ) as error:
        handle.detach()
    handle.use_optimizer(torch.optim.SGD(ddp.parameters(), lr=0.1))
    handle.detach()
    with pytest.raises(RuntimeError, match="nothing is attached any more"):
        handle.detach()
    with pytest.raises(RuntimeError, match="nothing is attached any more"):
        handle.state_dict()
    return [str(error.value)]


def test_a_state_that_has_no_mean_is_refused_with_the_way_out(ranks: RankFactory) -> None:
    for (message,) in ranks(2).run(detach_with_a_list):
        assert "make a new optimizer instead, and give it to handle.use_optimizer() before." in message


def scales_after_detaching(rank: int, _: int) -> tuple[list[float], Tensor]:
    training = Training()
    training.optimizer = torch.optim.SGD(training.ddp.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scheme = "local:every=2:start_steps=0+dense"
    handle = training.attach(scheme, grad_scaler=scaler)
    scales = []
    for step in range(8):
        if step == 4:
            scales.append(scaler.get_scale())
            handle.detach()
        training.optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = training.ddp(x).square().mean()
        scaler.scale(loss * (float("inf") if step == rank == 1 else 1.0)).backward()
        scaler.step(training.optimizer)
        scaler.update()
    return [*scales, scaler.get_scale()], training.weights()


def test_grad_scalers_have_one_scale_afterwards(ranks: RankFactory) -> None:
    (first, weights), (second, others) = ranks(2).run(scales_after_detaching)
    assert first == [1024.0, 512.0]
    assert second == [512.0, 512.0]
    assert torch.equal(weights, others)


def let_go(rank: int, _: int, scheme: str) -> list[str]:
    training = Training()
    handle = training.attach(scheme)
    training.steps(rank, range(5))
    left: dict[str, Callable[[], object]] = {
        "caller": weakref.ref(handle._caller),
        "ddp": weakref.ref(training.ddp),
        "weight": weakref.ref(training.hidden.weight),
    }
    handle.detach()
    gc.collect()
    assert left["caller"]() is None
    del training
    gc.collect()
    return [name for name, each in left.items() if each() is not None]


@every_scheme
def test_nothing_of_a_scheme_stays_after_it_is_detached(ranks: RankFactory, scheme: str) -> None:
    assert ranks(2).run(let_go, SCHEMES[scheme]) == [[]] * 2


def detach_at_different_steps(rank: int, _: int) -> str:
    training = Training()
    handle = training.attach(exact(every=4))
    training.steps(rank, range(2 + rank))
    with pytest.raises(RankError) as error:
        handle.detach()
    return str(error.value)


def test_ranks_at_different_steps_are_told_so(ranks: RankFactory) -> None:
    assert all(
        "the ranks are at different steps: [2, 3]" in message for message in ranks(2).run(detach_at_different_steps)
    )
