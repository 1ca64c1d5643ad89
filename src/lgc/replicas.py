"""What must be the same on every rank, and how a difference is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lgc.transport import Transport


class ReplicaError(RuntimeError):
    """The ranks have different values of something replicated; raised on every rank."""


def require_agreement(transport: Transport, description: Mapping[str, object]) -> None:
    """Compare a flat JSON description with the other ranks'; a collective.

    Raises:
        RuntimeError: on every rank, naming the first field that differs, and every rank's value.
    """
    text = json.dumps(description).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8)
    digests = transport.all_gather(digest, "agreement")
    if bool((digests == digests[0]).all()):
        return
    payload = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    ranks = [json.loads(bytes(row.tolist())) for row in transport.all_gather_bytes(payload, "agreement")]
    for key in dict.fromkeys(key for rank in ranks for key in rank):
        values = [rank.get(key, "missing") for rank in ranks]
        if any(value != values[0] for value in values):
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise RuntimeError(f"attach: the ranks differ in {key}: {by_rank}.")


def find_differences(transport: Transport, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The ranks whose tensors differ from most ranks', by the tensor's name; a collective of 8 bytes a tensor.

    Without a majority, all ranks that differ from rank 0.
    """
    digests = torch.stack([_digest(tensor) for tensor in tensors.values()]).cpu()
    by_rank = transport.all_gather(digests, "replica check")
    differences = {}
    for name, values in zip(tensors, by_rank.T.tolist(), strict=True):
        usual = max(values, key=lambda value: (values.count(value), value == values[0]))
        if values.count(usual) < len(values):
            differences[name] = [rank for rank, value in enumerate(values) if value != usual]
    return differences


def synchronise(transport: Transport, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the tensors with rank 0's; a collective."""
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(transport.broadcast(tensor.detach(), "replica check", source=0))


def _digest(tensor: Tensor) -> Tensor:
    """Sum of the tensor's 32-bit words times odd numbers of their places, modulo 2^64; int64, shape ().

    Any single changed word changes it.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(octets, (0, -octets.numel() % 4)).view(torch.int32).long()
    return (words * (2 * torch.arange(words.numel(), device=words.device) + 1)).sum()
