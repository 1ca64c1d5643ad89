"""A small model that local steps have something to do with, and one rank's run of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc


class Net(nn.Module):
    """An embedding of which only some rows are seen, batch norm, and a layer that can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(32, 8)
        self.norm: Any = nn.BatchNorm1d(8)
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
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.0)
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


def differ(results: list[dict[str, Tensor]]) -> set[str]:
    """Names of what is not the same on all ranks."""
    return {name for name in results[0] for each in results if not torch.equal(each[name], results[0][name])}


def owed(states: list[dict[str, Any]], ahead: float = 0.0) -> dict[str, Tensor]:
    """The mean over the ranks of residual + origin - weights, where all began the round so far ahead of the anchor."""
    total: dict[str, Tensor] = {}
    for state in states:
        per_rank, anchor = state["aggregator"]["per_rank"], state["aggregator"]["replicated"]["anchor"]
        for name, weights in per_rank["weights"].items():
            residual, server = residuals(state, name)
            each = (1 - ahead) * residual + server + anchor[name] - weights
            total[name] = total.get(name, 0) + each / len(states)
    return total


def residuals(state: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """What a rank owes of a parameter, and what it does as a server."""
    rounds = (part for key, part in state["aggregator"]["per_rank"].items() if key.startswith("round "))
    (part,) = (each for each in rounds if name in each["residual"])
    own: Tensor = part["residual"][name]
    return own, part["server_residual"][name] if "server_residual" in part else torch.zeros_like(own)
