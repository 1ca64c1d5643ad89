"""A rank as a launcher starts it, for frameworks that read torchrun's variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """What torchrun tells a process, for as long as the `with` block lasts."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    numbers |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": 0}
    of_torchrun = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "1"}
    with mock.patch.dict(os.environ, {name: str(number) for name, number in numbers.items()} | of_torchrun):
        yield


@contextlib.contextmanager
def launched_by_accelerate(rank: int, world_size: int) -> Iterator[None]:
    """The same, and the state that Accelerate keeps of its process ends with it."""
    from accelerate.state import AcceleratorState, GradientState

    with launched(rank, world_size):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
