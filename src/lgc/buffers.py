"""The buffers of a module whose ranks go their own ways between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lgc.comm.transport import Transport

UNCHANGED, CHANGED, NOT_FINITE = range(3)


class Buffers:
    """Brings together again what the ranks have changed: batch norm's statistics, counters, masks.

    Floats become their mean over the ranks that count and whose own are finite, integers their maximum over these
    ranks, everything else that of the first of them. What no rank has changed is not sent; what is new, or has another
    shape than at first, stays each rank's own.

    Attributes:
        shared: what all ranks had after the last round, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.shared = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def current(self) -> dict[str, Tensor]:
        """This rank's own, of those that can be brought together."""
        found = dict(self._module.named_buffers())
        return {
            name: found[name] if name in found and _form(found[name]) == _form(shared) else shared
            for name, shared in self.shared.items()
        }

    def states(self, buffers: Mapping[str, Tensor]) -> list[int]:
        """What has become of each of them: unchanged, changed, or changed and not finite."""
        return [_state(buffers[name], shared) for name, shared in self.shared.items()]

    def combine(
        self,
        buffers: Mapping[str, Tensor],
        states: Sequence[int],
        transport: Transport,
        counts: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """What all ranks have from now on of those that some rank has changed, by name; a collective.

        Args:
            buffers: this rank's, all of them.
            states: of these.
            transport: between the ranks.
            counts: by rank, whether its own do; None if those of all.
        """
        rows = transport.all_gather(torch.tensor(states, dtype=torch.uint8, device="cpu"), "buffers").T.tolist()
        ranks = {
            name: _counting(row, counts or [True] * len(row))
            for name, row in zip(self.shared, rows, strict=True)
            if any(row)
        }
        floats = {name: buffers[name] for name in ranks if buffers[name].is_floating_point()}
        integers = {name: buffers[name] for name in ranks if is_integer(buffers[name])}
        combined: dict[str, Tensor] = {}
        if floats:
            counted = [x if transport.rank in ranks[name] else torch.zeros_like(x) for name, x in floats.items()]
            totals = transport.all_reduce(_flat(counted).to(_sum_dtype(counted)), "buffers")
            parts = totals.split([x.numel() for x in counted])
            combined |= {name: part / len(ranks[name]) for name, part in zip(floats, parts, strict=True)}
        if integers:
            columns = transport.all_gather(_flat(list(integers.values())).long(), "buffers")
            parts = columns.split([x.numel() for x in integers.values()], dim=1)
            combined |= {name: part[ranks[name]].amax(0) for name, part in zip(integers, parts, strict=True)}
        for name in [name for name in ranks if name not in combined]:  # in the same order on every rank
            combined[name] = transport.broadcast(buffers[name].clone(), "buffers", source=ranks[name][0])
        return {
            name: value.view(self.shared[name].shape).to(self.shared[name].dtype) for name, value in combined.items()
        }

    @torch.no_grad()
    def apply(self, combined: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Set what was combined, with what this rank has added since it was as in `before`."""
        current = self.current()
        for name, value in combined.items():
            self.shared[name] = value
            adds = value.dtype != torch.bool and bool(before[name].isfinite().all())
            current[name].copy_(value + (current[name] - before[name]) if adds else value)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def is_integer(tensor: Tensor) -> bool:
    """Whether it has integers, which booleans are not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _state(buffer: Tensor, shared: Tensor) -> int:
    if torch.equal(buffer, shared):
        return UNCHANGED
    return CHANGED if bool(buffer.isfinite().all()) else NOT_FINITE


def _counting(states: Sequence[int], counts: Sequence[bool]) -> list[int]:
    """The ranks whose own count: of those that may, the ones where it is finite; all of them where none is."""
    ranks = [rank for rank, each in enumerate(counts) if each]
    return [rank for rank in ranks if states[rank] != NOT_FINITE] or ranks


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _sum_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32
