"""A rank as a launcher of Hugging Face's frameworks starts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """What `accelerate launch` and torchrun tell a process; the frameworks' own state ends with it."""
    from accelerate.state import AcceleratorState, GradientState

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with mock.patch.dict(os.environ, {name: str(number) for name, number in numbers.items()}):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
