"""The places in a data set that each of the ranks that are there takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import data


class Sampler(data.Sampler[int]):
    """Indices without end, of which every rank that is there takes others: each sample about once an epoch.

        sampler = lgc.elastic.Sampler(len(dataset))
        loader = DataLoader(dataset, batch_size, sampler=sampler)
        handle = lgc.elastic.attach(..., carried={"sampler": sampler})

    All ranks go through one sequence, the epochs one after the other, each shuffled by its number. Rank r of K takes
    the places r, r + K, r + 2 K, ... of what is left of it. After a round, what was taken by ranks that the round has
    counted is used up; what no rank has taken, or one that was lost, is what the next steps begin with. A loader with
    workers takes indices ahead of the steps; those of a rank that is lost are then not in the epoch.

    Its state has this rank's share too: ranks that all start from checkpoints of one round go on with the batches that
    they would have taken.

    Args:
        size: of the data set.
        seed: of the shuffling.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if type(size) is not int or size < 1:
            raise ValueError(f"Sampler(size=...) must be an integer of at least 1, got {size!r}.")
        self._size, self._seed = size, seed
        self._left: list[int] = []  # places before `_next` that nobody has used
        self._next = 0
        self._rank, self._world_size = 0, 1  # of those that share what is left; before the first round each has all
        self._drawn = 0  # since the last round
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def taken(self) -> int:
        """Number of samples that rounds have counted, which all ranks have alike: to end a loop by, and schedules."""
        return self._next - len(self._left)

    @property
    def epoch(self) -> int:
        """Of the first place that no rank has taken, counted from 0."""
        return self._next // self._size

    @property
    def drawn(self) -> tuple[int, int]:
        """This rank's number among those that share what is left, and how many samples it has taken of it."""
        return self._rank, self._drawn

    def __iter__(self) -> Iterator[int]:
        while True:
            place = self._place(self._rank + self._drawn * self._world_size)
            self._drawn += 1
            yield self._index(place)

    def divide(self, drawn: Iterable[tuple[int, int]], *, rank: int, world_size: int) -> None:
        """Divide what is left anew, after a round.

        Args:
            drawn: of every rank whose samples the round has counted.
            rank, world_size: this one's number from now on, and how many there are.
        """
        used = {before + self._world_size * number for before, count in drawn for number in range(count)}
        end = max(used, default=-1) + 1
        left = [self._place(number) for number in range(end) if number not in used] + self._left[end:]
        self._next += max(0, end - len(self._left))
        self._left = left
        self._rank, self._world_size, self._drawn = rank, world_size, 0

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have alike, and this one's share of what is left."""
        share = {"rank": self._rank, "world_size": self._world_size, "drawn": self._drawn}
        return {"next": self._next, "left": list(self._left), **share}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where this rank was, or where another is: which places are this one's, the next round then says."""
        left = [int(place) for place in state["left"]]
        taken, rank, world_size, drawn = (int(state[name]) for name in ("next", "rank", "world_size", "drawn"))
        if min(taken, rank, drawn, *left) < 0 or rank >= world_size:
            raise ValueError(f"Sampler: a state's counts must be at least 0, and rank below {world_size}, got {state}.")
        self._next, self._left, self._rank, self._world_size, self._drawn = taken, left, rank, world_size, drawn

    def _place(self, number: int) -> int:
        """The place that is `number` after the first that nobody has used."""
        return self._left[number] if number < len(self._left) else self._next + number - len(self._left)

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, self._size)
        if self._order[0] != epoch:
            seed = np.random.SeedSequence((self._seed, epoch)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]))
            self._order = epoch, torch.randperm(self._size, generator=generator).tolist()
        return self._order[1][within]
