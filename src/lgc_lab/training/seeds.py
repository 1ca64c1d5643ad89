"""Random streams of a run, all derived from its one seed."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for. The values are part of what a seed means: new streams go to the end."""

    MODEL = 0  # dropout and the like: of a rank, and after a change of their number of a step too
    SHUFFLE = 1  # the order of the training data: of an epoch
    AUGMENTATION = 2  # what is done to the samples of a batch: of a step and a rank


def derive(seed: int, stream: Stream, *key: int) -> int:
    """Derive the seed of one generator, in 0 .. 2^64 - 1, from the run's and what the generator is for.

    Different streams and keys give independent generators, the same on every machine and in every release: numpy
    documents `SeedSequence`, https://numpy.org/doc/stable/reference/random/bit_generators/, as stable.

    Args:
        seed: of the run, at least 0.
        stream: what it is for.
        key: which of that stream, such as a step and a rank; each in 0 .. 2^32 - 1.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *key))
    return int(sequence.generate_state(1, np.uint64)[0])
