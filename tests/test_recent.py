"""Rounds whose coders know what every rank has selected: the same numbers in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from ranks import Ranks
from torch import Tensor

import lgc
from lgc.comm.transport import Transport
from lgc.rounds.layout import Role
from lgc.schemes import RoundScheme, SparseScheme

RankFactory = Callable[[int], Ranks]

SHAPES = {"a": (30, 40), "b": (20,), "c": (50, 30)}
SCHEMES: dict[str, SparseScheme] = {
    "dgc": lgc.DGC(rate=0.05, warmup_steps=4),
    "topk-two-stage": lgc.TopK(rate=0.05, reduction="two_stage"),
    "scalecom": lgc.ScaleCom(rate=0.05, warmup_steps=4, roles={"c": Role.OWN}),
    "lgc-ps": lgc.LGCServer(rate=0.05, dense_steps=1, warmup_steps=4, train_steps=1, autoencoder_updates=1),
}
STEPS = 10


class Run(NamedTuple):
    means: Tensor  # (steps, N)
    sent: int  # bytes


def make(scheme: RoundScheme) -> lgc.Synchronizer:
    group = torch.distributed.distributed_c10d._get_default_group()
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return lgc.Synchronizer(scheme, tensors, Transport(group))


def gradient(rank: int, step: int) -> dict[str, Tensor]:
    """A part that stays, and noise."""
    still = torch.Generator().manual_seed(rank)
    noise = torch.Generator().manual_seed(1000 * rank + step + 7)
    return {
        name: torch.randn(shape, generator=still) + torch.randn(shape, generator=noise)
        for name, shape in SHAPES.items()
    }


def train(synchronizer: lgc.Synchronizer, rank: int, steps: range) -> Tensor:
    rounds = [synchronizer.synchronize(gradient(rank, step), step) for step in steps]
    flat = [torch.cat([mean.flatten() for mean in means.values()]).clone() for means in rounds]
    return torch.stack(flat) if flat else torch.zeros(0)


def run(rank: int, world_size: int, scheme: RoundScheme) -> Run:
    synchronizer = make(scheme)
    means = [train(synchronizer, rank, range(step, step + 1)) for step in range(STEPS)]
    sent = sum(traffic.sent_bytes for traffic in synchronizer.transport.wire.phases.values())
    return Run(torch.cat(means), sent)


@pytest.mark.parametrize("name", SCHEMES)
def test_means_are_the_same_to_the_bit_and_bytes_are_fewer(ranks: RankFactory, name: str) -> None:
    plain, recent = (
        ranks(2).run(run, replace(SCHEMES[name], indices=coder, values=codec))
        for coder, codec in ((lgc.Rice(), lgc.Sign()), (lgc.Recent(), lgc.RecentSign()))
    )
    for known, other in zip(recent, plain, strict=True):
        assert torch.equal(known.means, other.means)
    if name in ("dgc", "scalecom"):
        assert sum(known.sent for known in recent) < sum(other.sent for other in plain)


def resumed(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Two rounds from the state of another run, by one that knows nothing, and by one that has been elsewhere."""
    scheme = lgc.DGC(rate=0.05, warmup_steps=0, indices=lgc.Recent(), values=lgc.RecentSign())
    first, fresh, other = (make(scheme) for _ in range(3))
    train(first, rank, range(4))
    train(other, rank + 5, range(2))
    state = first.state_dict()
    results = []
    for each in (fresh, other):
        each.load_state_dict(state, 4)
        results.append(train(each, rank, range(4, 6)))
    return results[0], results[1]


def test_a_state_that_is_loaded_makes_the_coders_forget(ranks: RankFactory) -> None:
    for fresh, other in ranks(2).run(resumed):
        assert torch.equal(fresh, other)
