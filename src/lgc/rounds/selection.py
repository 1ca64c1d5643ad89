"""Which coordinates are sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lgc.rounds.layout import Segment, entries

LONG = 100_000  # from here on a pass with a threshold is faster than torch.topk of everything, on a CPU
SAMPLES = 16_384
PART = 65_536


class Region:
    """Consecutive segments that are selected from in the same way.

    What is selected are units: single elements, or blocks of `unit` consecutive ones. Their positions count through the
    region, the first segment's units from 0 on, then the next one's; this is the index space of the index coders.

    Attributes:
        sizes: number of units of every segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.sizes = [segment.size // segment.unit for segment in segments]

    def counts(self, least_rate: float = 0.0) -> list[int]:
        """Units selected of every segment, at its own rate or `least_rate`, whichever is larger."""
        return [
            entries(size, max(segment.rate, least_rate))
            for segment, size in zip(self.segments, self.sizes, strict=True)
        ]

    def element_counts(self, least_rate: float = 0.0) -> list[int]:
        """The same in elements: how many values every segment sends."""
        return self.in_elements(self.counts(least_rate))

    def in_elements(self, counts: Sequence[int]) -> list[int]:
        """Numbers of units by segment as numbers of elements."""
        return [count * segment.unit for segment, count in zip(self.segments, counts, strict=True)]

    def select(self, v: Tensor, least_rate: float = 0.0) -> Tensor:
        """Positions of the units of largest norm in every segment, int64, ascending.

        How many come back does not depend on the values. Which of several equal norms is taken is unspecified.
        """
        chosen = []
        offset = 0
        for segment, size, count in zip(self.segments, self.sizes, self.counts(least_rate), strict=True):
            norms = v[segment.slice]
            if segment.unit > 1:
                norms = torch.linalg.vector_norm(norms.view(size, segment.unit), dim=1)
            chosen.append(largest(norms, count) + offset)
            offset += size
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=v.device)

    def elements(self, positions: Tensor) -> Tensor:
        """Places of the elements of these units, ascending, in the flat vector: int64, ascending."""
        indices = []
        offset = 0
        ends = torch.tensor(self.sizes, dtype=torch.int64, device=positions.device).cumsum(0)
        parts = positions.tensor_split(torch.searchsorted(positions, ends).tolist())[:-1]
        for segment, size, part in zip(self.segments, self.sizes, parts, strict=True):
            starts = (part - offset) * segment.unit + segment.slice.start
            within = torch.arange(segment.unit, device=positions.device)
            indices.append((starts[:, None] + within).flatten())
            offset += size
        return torch.cat(indices) if indices else positions


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest magnitudes, int64, ascending, shape (k,)."""
    if values.device.type == "cpu" and values.numel() >= LONG:
        candidates = _likely_candidates(values, k)
        if len(candidates) >= k:
            return candidates[values[candidates].abs().topk(k, sorted=False).indices].sort().values
    return values.abs().topk(k, sorted=False).indices.sort().values


def _likely_candidates(values: Tensor, k: int) -> Tensor:
    """Indices of all magnitudes above a threshold that somewhat more than `k` of them should pass, by a sample."""
    sample = values[:: values.numel() // SAMPLES].abs()
    expected = k * len(sample) / values.numel()
    passing = min(len(sample), math.ceil(1.2 * expected + 4 * math.sqrt(expected) + 8))
    threshold = sample.topk(passing, sorted=False).values.min().numpy()
    parts = values.numpy()  # by parts that stay in the processor's cache: a new large tensor takes longer than the rest
    found = [
        np.flatnonzero(np.abs(parts[start : start + PART]) >= threshold) + start for start in range(0, len(parts), PART)
    ]
    return torch.from_numpy(np.concatenate(found))
