"""The phases of a run."""

from enum import StrEnum


class Phase(StrEnum):
    """The phases of a run, in order. The LGC paper counts warmup and train as one."""

    DENSE = "dense"  # uncompressed
    WARMUP = "warmup"  # top-k at a falling rate
    TRAIN = "train"  # top-k at the final rate while the autoencoder is trained
    COMPRESSED = "compressed"
