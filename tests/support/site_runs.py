"""One rank of several sites: its groups, its model in DDP or sharded, and its run."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lgc

Inside = Literal["plain", "ddp", "fsdp"]


class Net(nn.Module):
    """An embedding of which only some rows are seen, and layers whose sizes no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(33, 12)
        self.hidden = nn.Linear(12, 35)
        self.norm: Any = nn.LayerNorm(35)
        self.out = nn.Linear(35, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(self.hidden(self.rows(x)).relu()))
        return logits


class NetWithStatistics(Net):
    """With batch norm, whose statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: Any = nn.BatchNorm1d(35)


def batch(site: int, place: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * (10 * site + place) + step)
    x = torch.randint(16, (8,), generator=generator)  # rows 16 to 32 are never seen
    return x, x % 5


class Place:
    """Where a rank is: ranks 0 and 1 are the first site of two, and so on.

    Attributes:
        everyone: the group of all ranks.
        mesh: sites times ranks of a site.
    """

    def __init__(self, rank: int, world_size: int, places: int) -> None:
        assert dist.group.WORLD is not None
        self.everyone = dist.group.WORLD
        self.places = places
        self.site, self.place = divmod(rank, places)
        self.mesh = init_device_mesh("cpu", (world_size // places, places), mesh_dim_names=("site", "shard"))


class SiteRun:
    """One rank's model, optimizer and handle.

    A plain one is a site of one rank, whose batch is that of all the places of a site.
    """

    def __init__(
        self,
        where: Place,
        scheme: lgc.LocalSteps,
        inside: Inside,
        *,
        net: type[nn.Module] = Net,
        adam: bool = False,
        between: bool = True,
        **arguments: Any,
    ) -> None:
        torch.manual_seed(where.site)  # attaching gives every site the first one's
        self.where = where
        self.net: Any = net()
        self.model: nn.Module = self.net
        if inside == "ddp":
            self.model = DistributedDataParallel(self.net, process_group=where.mesh["shard"].get_group())
        if inside == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=where.mesh["shard"])
        parameters = (
            self.model.parameters()
        )  # where a gradient is nearly zero, Adam would make much of how it was rounded
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
        if adam:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.0)
        if between:
            arguments["between"] = where.mesh["site"]
        self.handle = lgc.attach(self.model, scheme, self.optimizer, **arguments)
        self.losses: list[float] = []

    def gradients(self, step: int) -> None:
        """Make a step's gradients."""
        places = [self.where.place] if self.where.places > 1 else range(2)
        xs, ys = zip(*(batch(self.where.site, place, step) for place in places), strict=True)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(torch.cat(xs)), torch.cat(ys))
        loss.backward()
        self.losses.append(loss.item())

    def train(self, steps: range) -> SiteRun:
        for step in steps:
            self.gradients(step)
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights of this rank's site, and its buffers; a collective inside the site."""
        own = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        return {name: whole(each) for name, each in own.items()}

    def state(self) -> dict[str, Any]:
        with self.handle.anchored():
            model = copy.deepcopy(self.net.state_dict())
        return {
            "model": model,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "handle": self.handle.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> SiteRun:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])
        return self


def whole(tensor: Any) -> Tensor:
    """A copy of all of a tensor, which may be sharded."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()
