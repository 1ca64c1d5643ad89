"""Checkpoints on disk and resuming from them, at the same and at another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_models import MODELS, batch, optimizer_of, parameters, seeded
from ranks import Ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc import checkpoint

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {
    "rate": 0.02,
    "dense_steps": 3,
    "warmup_steps": 5,
    "train_steps": 6,
    "refresh_below": 0.0,
}
SCHEMES: dict[str, Any] = {
    "dense": lgc.Dense(),
    "topk": lgc.TopK(rate=0.02, warmup_steps=4),
    "dgc": lgc.DGC(rate=0.02, warmup_steps=6, clip_norm=1.0),
    "dgc-server": lgc.DGC(rate=0.02, warmup_steps=6, server=True),
    "scalecom": lgc.ScaleCom(rate=0.02, momentum=0.9, warmup_steps=6),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ring-sgd": lgc.LGCRing(**LEARNED, autoencoder_optimizer="sgd"),
    "lgc-ps": lgc.LGCServer(**LEARNED),
}
PHASES = {"dense": 2, "warmup": 6, "train": 11, "compressed": 16}
STEPS = 18


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Run:
    """A model with its optimizer and its handle, trained step by step."""

    def __init__(self, scheme: Any, seed: int = 0) -> None:
        with seeded(seed):
            self.ddp = DistributedDataParallel(MODELS["convolutional"]())
        self.ddp.broadcast_buffers = False
        self.optimizer = optimizer_of(self.ddp, scheme)
        self.handle = lgc.attach(self.ddp, scheme, self.optimizer)

    def train(self, rank: int, until: int) -> None:
        for step in range(self.handle.step, until):
            x, y = batch(rank, step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.ddp(x), y).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.ddp.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.ddp.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])


def flatten(state: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a nested state by their path."""
    if isinstance(state, dict):
        return {key: leaf for k, v in state.items() for key, leaf in flatten(v, f"{name}/{k}").items()}
    if isinstance(state, list | tuple):
        return flatten(dict(enumerate(state)), f"{name}:{type(state).__name__}")
    return {name: state}


def assert_same(actual: Any, expected: Any) -> None:
    """Two nested states have the same form and the same bits."""
    one, other = flatten(actual), flatten(expected)
    assert list(one) == list(other)
    for name, value in other.items():
        if isinstance(value, Tensor):
            assert one[name].dtype == value.dtype, name
            assert torch.equal(one[name], value), name
        else:
            assert type(one[name]) is type(value), name
            assert one[name] == value or value != value, name


# --- resuming at the same world size ---


def interrupted(rank: int, world_size: int, scheme: Any, stop: int | None, directory: Path) -> dict[str, Any]:
    run = Run(scheme)
    if stop is not None:
        run.train(rank, stop)
        checkpoint.save(directory, run.state(), step=stop, group=world())
        run = Run(scheme, seed=1)
        path = checkpoint.latest(directory)
        assert path is not None
        run.load(checkpoint.load(path, group=world()))
        assert run.handle.step == stop
    run.train(rank, STEPS)
    return run.state()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_goes_on_from_its_checkpoint_as_if_never_interrupted(
    ranks: RankFactory, scheme: str, tmp_path: Path
) -> None:
    straight = ranks(2).run(interrupted, SCHEMES[scheme], None, tmp_path)
    for phase, stop in PHASES.items():
        resumed = ranks(2).run(interrupted, SCHEMES[scheme], stop, tmp_path / phase)
        assert_same(resumed, straight)


# --- resuming at another world size ---


def save_at(rank: int, world_size: int, scheme: Any, stop: int, directory: Path) -> dict[str, Any]:
    run = Run(scheme)
    run.train(rank, stop)
    checkpoint.save(directory, run.state(), step=stop, group=world())
    return run.state()


def load_and_go_on(rank: int, world_size: int, scheme: Any, path: Path, steps: int) -> tuple[Any, Any, list[str]]:
    run = Run(scheme, seed=1)
    run.load(checkpoint.load(path, group=world()))
    loaded = run.state()
    phases = []
    for step in range(run.handle.step, run.handle.step + steps):
        run.train(rank, step + 1)
        phases.append(str(run.handle.phase))
    return loaded, parameters(run.ddp), phases


def per_rank(states: list[dict[str, Any]], kind: str) -> list[dict[str, Tensor]]:
    """Residual or momentum of every rank."""
    return [state["handle"]["aggregator"]["per_rank"][kind] for state in states]


def owed(states: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """Mean over the ranks of residual or momentum."""
    ranks = per_rank(states, kind)
    return {name: torch.stack([rank[name].double() for rank in ranks]).mean(dim=0) for name in ranks[0]}


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 4), (4, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("scheme", ["dgc-server", "lgc-ring", "lgc-ps"])
def test_at_another_world_size_the_owed_update_stays(
    ranks: RankFactory, scheme: str, before: int, after: int, tmp_path: Path
) -> None:
    saved = ranks(before).run(save_at, SCHEMES[scheme], PHASES["compressed"], tmp_path)
    results = ranks(after).run(load_and_go_on, SCHEMES[scheme], checkpoint.latest(tmp_path), 2)
    loaded = [state for state, _, _ in results]
    for kind in ("residual", "momentum"):
        expected = owed(saved, kind)
        for name, mean in owed(loaded, kind).items():
            largest = max(float(rank[name].abs().max()) for rank in per_rank(loaded, kind))
            torch.testing.assert_close(mean, expected[name], rtol=0, atol=1e-7 * largest)  # float32 rounding
    for _, trained, _ in results:
        assert_same(trained, results[0][1])
