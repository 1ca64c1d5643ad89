"""Comparing what must be the same on every rank, and naming what differs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lgc.comm.transport import Transport

logger = logging.getLogger("lgc")

OnDifference = Literal["raise", "synchronise"]

DIGEST_WORDS = 2**22
BLIND_CHECKS = 3  # in a row, after which it is said


class ReplicaError(RuntimeError):
    """The ranks have different values of something replicated; raised on every rank."""


def require_agreement(transport: Transport, what: str, description: Mapping[str, object]) -> None:
    """Compare a flat JSON description with the other ranks', before they do `what` together; a collective.

    Raises:
        RuntimeError: on every rank, naming the first field that differs, and every rank's value.
    """
    text = json.dumps(description).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8)
    digests = transport.all_gather(digest, "agreement")
    if bool((digests == digests[0]).all()):
        return
    ranks = transport.all_gather_json(description, "agreement")
    for key in dict.fromkeys(key for rank in ranks for key in rank):
        values = [rank.get(key, "missing") for rank in ranks]
        if any(value != values[0] for value in values):
            by_rank = ", ".join(f"{transport.called(rank)}: {value}" for rank, value in enumerate(values))
            raise RuntimeError(f"{what}: the {transport.member}s differ in {key}: {by_rank}.")
    for position, keys in enumerate(zip(*ranks, strict=True)):
        if len(set(keys)) > 1:
            by_rank = ", ".join(f"{transport.called(rank)}: {key}" for rank, key in enumerate(keys))
            raise RuntimeError(
                f"{what}: the {transport.member}s differ in the order of parameters, at {position}: {by_rank}."
            )


class Difference(NamedTuple):
    """Ranks whose replica of a tensor differs from that of most, without a majority from the first one's; and a rank
    that has the latter."""

    ranks: list[int]
    source: int


class Comparison(NamedTuple):
    """The ranks that were compared, and the tensors in which they differ, by name."""

    ranks: list[int]
    differences: dict[str, Difference]


def compare(transport: Transport, digests: Mapping[str, Tensor], *, counts: bool) -> Comparison:
    """Compare the digests of the ranks that count, by name; a collective of 8 bytes a tensor, and 8 more."""
    counting = torch.tensor(int(counts), device="cpu")
    words = torch.stack([*(each.cpu() for each in digests.values()), counting])
    *by_tensor, counted = transport.all_gather(words, "replica check").T.tolist()
    ranks = [rank for rank, each in enumerate(counted) if each]
    differences = {}
    for name, of_all in zip(digests, by_tensor, strict=True):
        values = [of_all[rank] for rank in ranks]
        if others := [ranks[place] for place in unusual(values)]:
            differences[name] = Difference(others, next(rank for rank in ranks if rank not in others))
    return Comparison(ranks, differences)


def unusual(values: Sequence[object]) -> list[int]:
    """The places of the values that are not what most are; without a majority, not what the first one is."""
    usual = max(values, key=lambda value: (values.count(value), value == values[0]), default=None)
    return [place for place, value in enumerate(values) if value != usual]


class ReplicaCheck:
    """Compares, at an interval, what all ranks must have the same of.

    Args:
        transport: between the ranks.
        every: steps from one comparison to the next; 0 is never.
        on_difference: "raise" ReplicaError, or "synchronise" with a warning.
        unit: what a step is called in messages.
    """

    def __init__(self, transport: Transport, every: int, on_difference: OnDifference, unit: str = "step") -> None:
        self._transport = transport
        self._every = every
        self._on_difference = on_difference
        self._unit = unit
        self._looked: dict[str, Tensor] = {}  # digests of what is compared next
        self._without_ranks = 0  # comparisons in a row

    def is_due(self, step: int) -> bool:
        """Whether to compare before the round of `step`."""
        return self._every > 0 and step % self._every == 0 and self._transport.world_size > 1

    def look(self, step: int, replicas: Mapping[str, Tensor]) -> None:
        """Take the tensors, if they are to be compared in the round of `step`, as they are now, where weights rest."""
        if self.is_due(step):
            self._looked = {name: digest(tensor) for name, tensor in replicas.items()}

    def run(self, step: int, replicas: Mapping[str, Tensor], *, counts: bool = True) -> None:
        """Compare the tensors by name, as they were at the last `look`, or else are now; a collective.

        A rank does not count, and says so here, once its inputs have run out under `join()`: it goes on without updates
        of its own.

        Raises:
            ReplicaError: on every rank, naming the tensors and the ranks that differ.
        """
        looked, self._looked = self._looked, {}
        digests = {name: looked[name] if name in looked else digest(tensor) for name, tensor in replicas.items()}
        ranks, differences = compare(self._transport, digests, counts=counts)
        self._without_ranks = 0 if ranks else self._without_ranks + 1
        if self._without_ranks == BLIND_CHECKS and self._transport.rank == 0:
            logger.warning(
                "%s %d: at the last %d checks no rank could be compared, as no backward pass has been seen to give "
                "gradients to the parameters; compare them yourself, as nothing else would show that ranks differ.",
                self._unit,
                step,
                BLIND_CHECKS,
            )
        if not differences:
            return
        member = self._transport.member
        found = "; ".join(f"{name} on {member} {', '.join(map(str, each.ranks))}" for name, each in differences.items())
        message = f"lgc: {self._unit} {step}: the {member}s are no longer the same: {found}"
        if self._on_difference == "raise":
            raise ReplicaError(
                f"{message}. Something changes them on each rank alone, such as an optimizer that steps within the "
                "backward pass, before the exchange, with a learning rate that goes by this rank's loss, or with "
                "moments of this rank alone, as after local steps without detach() of a DDP model (make a new one); a "
                "second backward pass through one graph (retain_graph=True), which DDP does not exchange; or a moving "
                "average that is kept in a frozen parameter: make it a buffer, which attach(buffers_every=...) and "
                "local steps bring together, or move it within handle.anchored(). "
                'attach(on_difference="synchronise") takes those of most ranks, with a warning.'
            )
        disturbed = any(not torch.equal(each, digest(replicas[name])) for name, each in looked.items())
        if bool(self._transport.all_gather(torch.tensor(disturbed, device="cpu"), "replica check").any()):
            raise ReplicaError(
                f"{message}. They have been changed since the backward pass began, as SAM does between its two, so "
                'that those of another rank cannot be taken: attach(on_difference="synchronise") is for loops that '
                "leave them as they are. Go on from a checkpoint."
            )
        if self._transport.rank == 0:
            logger.warning("%s; taking those of the others.", message)
        for name, difference in differences.items():
            own = replicas[name].detach()
            own.copy_(self._transport.broadcast(own, "replica check", source=difference.source))


def digest(tensor: Tensor) -> Tensor:
    """Sum of the tensor's 32-bit words times odd numbers of their places, modulo 2^64; int64, shape ().

    Any single changed word changes it.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=octets.device)
    for start in range(0, octets.numel(), 4 * DIGEST_WORDS):  # in parts, whose copies are not in the way of training
        part = octets[start : start + 4 * DIGEST_WORDS]
        words = torch.nn.functional.pad(part, (0, -part.numel() % 4)).view(torch.int32).long()
        places = torch.arange(start // 4, start // 4 + words.numel(), device=words.device)
        total += (words * (2 * places + 1)).sum()
    return total
