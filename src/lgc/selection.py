"""Which coordinates are sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgc.layout import Segment, entries


def top_k(values: Tensor, segments: Sequence[Segment], least_rate: float = 0.0) -> Tensor:
    """Indices of the largest magnitudes of every segment, int64, ascending, shape (sum of k,).

    Each segment sends at its own rate or `least_rate`, whichever is larger: how many indices come back does not
    depend on the values. Which of several equal magnitudes is taken is unspecified.
    """
    chosen = [
        largest(values[segment.slice], entries(segment.size, max(segment.rate, least_rate))) + segment.slice.start
        for segment in segments
    ]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=values.device)


def count(segments: Sequence[Segment], least_rate: float = 0.0) -> int:
    """How many indices `top_k` returns."""
    return sum(entries(segment.size, max(segment.rate, least_rate)) for segment in segments)


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest magnitudes, int64, ascending, shape (k,)."""
    return values.abs().topk(k, sorted=False).indices.sort().values
