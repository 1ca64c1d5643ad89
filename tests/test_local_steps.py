"""Local steps: what a loop can rely on when the ranks go their own ways between rounds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.checkpoint.state import reshard
from lgc.local_steps import LocalRounds

RankFactory = Callable[[int], Ranks]


class Net(nn.Module):
    """An embedding of which only some rows are seen, batch norm, and a layer that can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(32, 8)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.out(self.hidden(self.norm(self.rows(x))).relu())
        return hidden


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randint(16, (8,), generator=generator)  # rows 16 to 31 are never seen
    return x, x % 4


class Run:
    """One rank's model, optimizer and handle."""

    def __init__(self, scheme: lgc.LocalSteps, *, ddp: bool = False, lr: float = 0.01, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.model = DistributedDataParallel(self.net) if ddp else self.net
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.0)
        self.handle = lgc.attach(self.model, scheme, self.optimizer, **arguments)

    def train(self, rank: int, steps: range) -> Run:
        for step in steps:
            x, y = batch(rank, step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's own weights and buffers."""
        own = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        return {name: each.detach().clone() for name, each in own.items()}

    def state(self) -> dict[str, Any]:
        with self.handle.anchored():
            model = copy.deepcopy(self.net.state_dict())
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return {"model": model, "optimizer": optimizer, "handle": self.handle.state_dict()}

    def load(self, state: dict[str, Any]) -> Run:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])
        return self


def exact(every: int = 4, **arguments: Any) -> lgc.LocalSteps:
    return lgc.LocalSteps(every=every, exchange=lgc.Dense(), **({"start_steps": 0} | arguments))


EXCHANGES = {
    "dense": lgc.Dense(),
    "gather": lgc.Quantized(reduction="gather"),
    "two-stage": lgc.Quantized(reduction="two_stage"),
    "topk": lgc.TopK(rate=0.1),
    "scalecom": lgc.ScaleCom(rate=0.1, warmup_steps=2),
}
every_exchange = pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)


def differ(results: list[dict[str, Tensor]]) -> set[str]:
    """Names of what is not the same on all ranks."""
    return {name for name in results[0] for each in results if not torch.equal(each[name], results[0][name])}


def train_to(rank: int, _: int, scheme: lgc.LocalSteps, steps: int, ddp: bool = False) -> dict[str, Tensor]:
    return Run(scheme, ddp=ddp).train(rank, range(steps)).weights()


@pytest.mark.parametrize("ddp", [False, True], ids=["module", "ddp"])
@every_exchange
def test_all_ranks_have_the_same_weights_and_buffers_after_a_round(
    ranks: RankFactory, exchange: Any, ddp: bool
) -> None:
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=3)
    assert not differ(ranks(3).run(train_to, scheme, 11, ddp))


def test_between_rounds_every_rank_has_weights_of_its_own(ranks: RankFactory) -> None:
    assert "hidden.weight" in differ(ranks(2).run(train_to, exact(), 6))


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


INTERRUPTED = {
    "dense": exact(),
    "start": lgc.LocalSteps(every=4, start_steps=6),
    "two-stage": lgc.LocalSteps(every=4, exchange=lgc.Quantized(reduction="two_stage"), start_steps=2),
    "topk": lgc.LocalSteps(every=4, exchange=lgc.TopK(rate=0.1), start_steps=2, decay=0.9),
    "overlap": lgc.LocalSteps(every=4, start_steps=2, overlap=True),
    "fragments": lgc.LocalSteps(every=4, start_steps=2, fragments=2, overlap=True),
}


@pytest.mark.parametrize("stop", [1, 7, 10, 13])
@pytest.mark.parametrize("scheme", INTERRUPTED.values(), ids=INTERRUPTED)
def test_a_run_goes_on_from_its_state_with_the_same_bits(
    ranks: RankFactory, scheme: lgc.LocalSteps, stop: int
) -> None:
    for whole, resumed in ranks(2).run(interrupted, scheme, stop % 2 == 0, stop):
        assert whole[1:] == resumed[1:]
        for name, each in whole[0].items():
            assert torch.equal(each, resumed[0][name]), name
