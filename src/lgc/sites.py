"""Sites: ranks that are close together, which hold one copy of the model and take part in a round as one."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lgc.buffers import Buffers
from lgc.comm.replicas import require_agreement
from lgc.comm.traffic import SETUP
from lgc.comm.transport import ROUND, RankError, Transport

MEMBER = "site"  # of a group that joins sites: what it is called in messages


class Site:
    """The ranks of this site, and the part of every tensor that this rank codes and exchanges with its peers elsewhere.

    Peers are the ranks at the same place of other sites. Between sites travels one coded copy of the model, whatever
    the number of ranks inside. This class is of a site of one rank, which codes everything, and with which a round is
    what it is between single ranks.

    Args:
        inside: between the ranks of this site, counted apart; None where there is only this one.

    Attributes:
        places: number of ranks of this site.
        place: number of this rank among them.
        cut: what the parts of a tensor are.
    """

    cut: ClassVar[str] = "all of it"

    def __init__(self, inside: Transport | None = None) -> None:
        self.inside = inside
        self.places, self.place = (1, 0) if inside is None else (inside.world_size, inside.rank)

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of tensors that the site's ranks have together, by name; it may be empty.

        Together the parts of all ranks are the tensors. It shares their memory where their layout allows.
        """
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Set tensors to what the parts of all ranks make together; a collective inside.

        Args:
            tensors: by name, on every rank the same names.
            parts: this rank's, of the shapes that `part` gives; of any type of floats.
        """
        for name, tensor in tensors.items():
            tensor.copy_(parts[name])

    def whole(self, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the parts of all ranks make together, in new tensors placed as others are; a collective inside.

        Args:
            tensors: by name, the same on every rank, which say how the new ones are cut and placed.
            parts: this rank's, of the shapes that `part` gives; they say the types.
        """
        made = {name: torch.empty_like(tensor, dtype=parts[name].dtype) for name, tensor in tensors.items()}
        self.fill(made, parts)
        return made

    def rest(self, model: nn.Module) -> None:
        """Have every parameter of the model in the form in which it is kept, before parts of it are taken or set."""

    def common(self, names: Collection[str], among: Iterable[str]) -> set[str]:
        """Those of the names that all ranks of the site give; a collective inside.

        Args:
            names: this rank's.
            among: all that there may be, on every rank the same.
        """
        if self.inside is None:
            return set(names)
        everything = list(among)
        given = torch.tensor([name in names for name in everything], dtype=torch.uint8, device="cpu")
        by_all = self.inside.all_gather(given, "agreement").all(0).tolist()
        return {name for name, each in zip(everything, by_all, strict=True) if each}

    def begin(self, phase: str, *, steps: int = 1) -> None:
        """Count what follows inside under `phase`."""
        if self.inside is not None:
            self.inside.begin(phase, steps=steps)

    def agree(
        self,
        transport: Transport,
        step: int,
        *,
        finite: bool = True,
        vote: bool = False,
        error: Exception | None = None,
        operation: str = ROUND,
    ) -> tuple[bool, bool]:
        """Whether this rank's site is finite, and if it votes for something, before a round opens between the sites.

        Args:
            transport: between the sites.
            step, finite, vote, error, operation: of this rank, as `Transport.open_round` takes them.

        Raises:
            RankError: on every rank of every site, if a rank passes an error, or those of a site are at different
                steps or operations.
        """
        if self.inside is not None:
            try:
                opening = self.inside.open_round(step, finite=finite, vote=vote, error=error, operation=operation)
                return all(opening.finite), any(opening.votes)
            except RankError as failure:  # the other sites wait for this one
                error = failure
        if error is not None:
            transport.open_round(step, finite=finite, error=error, operation=operation)
        return finite, vote

    def join(
        self, transport: Transport, description: dict[str, object], tensors: Mapping[str, Tensor], timeout: float | None
    ) -> None:
        """Have all ranks begin to attach, with the same `description` and parts of `tensors` as peers; a collective.

        Raises:
            RuntimeError: on every rank, if the ranks differ in them, or in how many sites they see.
        """
        error = None
        if self.inside is not None:
            description |= {"ranks of a site": self.places, "place in its site": self.place}
            description |= {f"part of {name}": [*part.shape] for name, part in self.part(tensors).items()}
            if timeout is not None:
                self.inside.set_timeout(timeout)
            try:
                self.inside.meet("lgc.attach")
                here = {"number of sites": transport.world_size, "number of its site": transport.rank}
                require_agreement(self.inside, "attach(between=...)", here)
            except RuntimeError as failure:
                error = failure
        self.agree(transport, 0, error=error, operation="lgc.attach")
        transport.meet("lgc.attach")
        with self.together(0, "lgc.attach"):
            require_agreement(transport, "attach", description)

    def meet(self, transport: Transport, operation: str) -> None:
        """Have all ranks of all sites begin the same operation, as `Transport.meet`; a collective."""
        self.agree(transport, 0, operation=operation)
        transport.meet(operation)

    def together(self, step: int, operation: str = ROUND) -> AbstractContextManager[None]:
        """Raise an error in here on every rank of the site: its own where a rank has one, else RankError."""
        return contextlib.nullcontext() if self.inside is None else self.inside.failing_together(step, operation)

    @contextlib.contextmanager
    def announcing(self, transport: Transport, *known: type[Exception]) -> Iterator[None]:
        """Announce an error in here to the peers, but those of types that all ranks raise, and any inside the site.

        With several ranks a site also those that all peers raise: the others of their sites do not.
        """
        if self.inside is None:
            with transport.announcing(*known):
                yield
        else:
            with transport.announcing(), self.inside.announcing():
                yield

    def take_first(self, tensors: Iterable[Tensor], transport: Transport) -> None:
        """Give all sites what the first one has of some tensors; a collective."""
        for tensor in tensors:
            own, whole = local(tensor), not is_sharded(tensor)
            if self.place == 0 or not whole:
                own = transport.broadcast(own, "weights", source=0)
            if self.inside is not None and whole:
                own = self.inside.broadcast(own, "weights", source=0)
            with torch.no_grad():
                local(tensor).copy_(own)

    def combine(
        self,
        buffers: Buffers,
        own: Mapping[str, Tensor],
        states: Sequence[int],
        transport: Transport,
        counts: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """As `Buffers.combine`, between the ranks of all sites that count, of which one a site sends; a collective."""
        if self.inside is None:
            return buffers.combine(own, states, transport, counts)
        of_site = {**own, **buffers.combine(own, states, self.inside)}
        combined = buffers.combine(of_site, buffers.states(of_site), transport, counts) if self.place == 0 else {}
        names = self.inside.all_gather_json(list(combined), "buffers")[0]
        return {
            name: self.inside.broadcast(combined.get(name, buffers.shared[name]).clone(), "buffers", source=0)
            for name in names
        }

    def of_all(self, transport: Transport, value: object, content: str) -> list[Any]:
        """The JSON values of all ranks, site after site; a collective."""
        of_peers = transport.all_gather_json(value, content)
        of_places = [of_peers] if self.inside is None else self.inside.all_gather_json(of_peers, content)
        return [of_place[site] for site in range(len(of_peers)) for of_place in of_places]

    def of_new_group(self) -> Site:
        """The same site and its counts, whose ranks talk in a group of their own; a collective inside."""
        if self.inside is None:
            return self
        inside, wire = self.inside.of_new_group(), self.inside.wire
        inside.wire = wire
        inside.begin(SETUP, steps=0)
        return self._talking_by(inside)

    def uncounted(self) -> Site:
        """The same site, whose bytes inside nobody looks at."""
        return self if self.inside is None else self._talking_by(self.inside.uncounted())

    def _talking_by(self, inside: Transport) -> Site:
        other = copy.copy(self)
        other.inside = inside
        return other


class ReplicatedSite(Site):
    """A site whose ranks all have the whole model, as under DDP: each codes a slice, which are gathered inside after.

    The slices are of all tensors, flat and one after the other, and of equal size but for the last.
    """

    cut = "slices"

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts, before, length = {}, 0, self._length(tensors)
        for name, tensor in tensors.items():
            edges = (length * (self.place + end) - before for end in (0, 1))
            start, stop = (min(max(edge, 0), tensor.numel()) for edge in edges)
            piece = tensor.detach().reshape(-1)[start:stop]
            cut = (stop - start, *[1] * (tensor.dim() - 1))  # a weight's has as many dimensions as a weight
            parts[name] = piece.view(cut if len(piece) < tensor.numel() else tensor.shape)
            before += tensor.numel()
        return parts

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        assert self.inside is not None
        dtype = functools.reduce(torch.promote_types, (parts[name].dtype for name in tensors))
        device = next(iter(tensors.values())).device
        own = torch.cat([parts[name].to(device, dtype).flatten() for name in tensors])
        own = nn.functional.pad(own, (0, self._length(tensors) - own.numel()))
        whole, before = self.inside.all_gather(own, "parts").view(-1), 0
        for tensor in tensors.values():
            tensor.copy_(whole[before : before + tensor.numel()].view(tensor.shape))
            before += tensor.numel()

    def _length(self, tensors: Mapping[str, Tensor]) -> int:
        """Number of elements of a slice of all of them."""
        return -(-sum(tensor.numel() for tensor in tensors.values()) // self.places)


class ShardedSite(Site):
    """A site whose ranks each have a shard of every parameter, as under `fully_shard`, and code that."""

    cut = "shards"

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: local(tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            local(tensor).copy_(parts[name])

    def rest(self, model: nn.Module) -> None:
        reshard(model)


def site_of(model: nn.Module, between: object) -> tuple[Site, dist.ProcessGroup | None]:
    """The site of this rank, by how the model is made, and the group that joins it to its peers.

    Args:
        model: in DDP, given to `fully_shard`, or neither.
        between: as given to `attach`; None is no sites, and so no such group.

    Raises:
        TypeError, ValueError: `between` is no group of this rank, or does not fit the model's own.
    """
    if between is None:
        return Site(), None
    group = _group_between(between)
    reshard(model)
    if isinstance(model, DistributedDataParallel):
        _require_fitting(group, model.process_group, "DistributedDataParallel(process_group=...)")
        return ReplicatedSite(Transport(model.process_group, next(model.parameters()).device)), group
    sharded = {name: each for name, each in model.named_parameters() if is_sharded(each)}
    if not sharded:
        return Site(), group
    whole = [name for name, each in model.named_parameters() if each.requires_grad and name not in sharded]
    if whole:
        raise ValueError(
            f"attach(model=...) has {whole[0]} on every rank of the site, and {next(iter(sharded))} sharded: nothing "
            "makes the mean gradient of the former. Give the whole model to fully_shard, without trained "
            "ignored_params."
        )
    first: Any = next(iter(sharded.values()))
    each: Any
    for name, each in sharded.items():
        mesh, placements = each.device_mesh, each.placements
        if mesh.ndim != 1 or mesh != first.device_mesh or not placements[0].is_shard():
            raise ValueError(
                f"attach(model=...) has {name} placed as {placements} on {mesh}, and every parameter must be sharded "
                "over the one dimension of the site: fully_shard(model, mesh=mesh['shard']), and between=mesh['site']."
            )
    inside = first.device_mesh.get_group()
    _require_fitting(group, inside, "fully_shard(mesh=...)")
    return ShardedSite(Transport(inside, first.device)), group


def _group_between(between: object) -> dist.ProcessGroup:
    if isinstance(between, DeviceMesh):
        if between.ndim != 1:
            raise ValueError(
                f"attach(between=...) must have one dimension, got {between}; give it that of the sites, such as "
                "mesh['site']."
            )
        between = between.get_group()
    if not isinstance(between, dist.ProcessGroup):
        raise TypeError(
            "attach(between=...) must be a process group that this rank is in, or a DeviceMesh of one dimension, got "
            f"{between!r}; torch.distributed.new_group gives {dist.GroupMember.NON_GROUP_MEMBER} to ranks that are not "
            "in it: every rank gives that of its peers."
        )
    return between


def _require_fitting(between: dist.ProcessGroup, inside: dist.ProcessGroup, where: str) -> None:
    peers, own = dist.get_process_group_ranks(between), dist.get_process_group_ranks(inside)
    if set(peers) & set(own) != {dist.get_rank()}:
        raise ValueError(
            f"attach(between=...) joins the ranks {peers}, and {where} those {own}: they must have rank "
            f"{dist.get_rank()}, which this is, and no other in common. The latter is for the ranks of one site, "
            "between for one rank of every site, at the same place of each."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and loaded where there is one
    return module is not None and isinstance(tensor, module.DTensor)


def reshard(model: nn.Module) -> None:
    """Have every parameter that was given to `fully_shard` as its shards.

    A forward pass without a backward one may leave them gathered, and the next one uses them as they were.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: of a DTensor its shard."""
    detached: Any = tensor.detach()
    own: Tensor = detached.to_local() if is_sharded(tensor) else detached
    return own
