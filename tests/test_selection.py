"""The largest values of a vector."""

from __future__ import annotations

import pytest
import torch

from lgc.rounds.selection import LONG, SAMPLES, largest


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["heavy tails", "ties", "all zero", "large where the sample does not look"])
def test_the_largest_of_long_vectors_are_those_of_a_sort(kind: str, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2 * LONG + 1
    values = torch.randn(count, generator=generator) ** 5
    if kind == "ties":
        values = values.round()
    elif kind == "all zero":
        values = torch.zeros(count)
    elif kind == "large where the sample does not look":
        values[:: count // SAMPLES] = 0
    k = max(1, int(rate * count))
    indices = largest(values, k)
    assert torch.equal(indices, indices.unique())
    assert torch.equal(values[indices].abs().sort().values, values.abs().sort().values[-k:])
