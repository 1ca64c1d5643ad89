"""Random streams of a run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lgc_lab.training.batches import Stream, derive


def test_what_a_seed_means_does_not_change() -> None:
    """What has been measured with a seed can be measured again."""
    assert derive(0, Stream.MODEL, 0) == 2635072618980576772
    assert derive(0, Stream.SHUFFLE, 3) == 16224471298123723791
    assert derive(2**63 - 1, Stream.AUGMENTATION, 12, 3) == 9248567393552396286


def test_streams_are_independent() -> None:
    """No two are the same, though SeedSequence takes (1,) and (1, 0) for one entropy."""
    keys = [(), (0,), (1,), (0, 0), (1, 0), (0, 1)]
    seeds = [derive(seed, stream, *key) for seed in (0, 1, 2**32) for stream in Stream for key in keys]
    assert len(set(seeds)) == len(seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds])
    assert abs(bits.mean() - 0.5) < 0.05
    distances = [np.count_nonzero(one != other) for one, other in itertools.combinations(bits, 2)]
    assert np.mean(distances) == pytest.approx(32, abs=1)
