"""The places in a data set that each of the ranks that are there takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    Args:
        size: of the data set.
        seed: of the shuffling.
        shuffle: whether an epoch is in an order of its own.
    """

    def __init__(self, size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if type(size) is not int or size < 1:
            raise ValueError(f"Sampler(size=...) must be an integer of at least 1, got {size!r}.")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._left: list[int] = []  # places before `_next` that nobody has used
        self._next = 0
        self._ranks: list[str] = []  # by name, that share what is left
        self._rank, self._world_size = 0, 1
        self.drawn = 0  # since the last round
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def taken(self) -> int:
        """Number of samples that rounds have counted, which all ranks have alike: to end a loop by, and schedules."""
        return self._next - len(self._left)

    @property
    def epoch(self) -> int:
        """Of the first place that no rank has taken, counted from 0."""
        return self._next // self._size

    def __iter__(self) -> Iterator[int]:
        while True:
            place = self._place(self._rank + self.drawn * self._world_size)
            self.drawn += 1
            yield self._index(place)

    def divide(self, drawn: Mapping[str, int], name: str) -> None:
        """Divide what is left anew, after a round.

        Args:
            drawn: by name, the ranks that are there, in order, and how many places each has used.
            name: of this rank.
        """
        ranks = self._ranks or [max(drawn, key=lambda each: drawn[each])]  # at first each of them is alone
        used = {rank + len(ranks) * place for rank, each in enumerate(ranks) for place in range(drawn.get(each, 0))}
        end = max(used, default=-1) + 1
        left = [self._place(number) for number in range(end) if number not in used] + self._left[end:]
        self._next += max(0, end - len(self._left))
        self._left = left
        self._ranks = list(drawn)
        self._rank, self._world_size, self.drawn = self._ranks.index(name), len(drawn), 0

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have alike."""
        return {"next": self._next, "left": list(self._left), "ranks": list(self._ranks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where another rank is; which places are this one's, the next round says."""
        self._next, self._left = int(state["next"]), [int(place) for place in state["left"]]
        self._ranks = [str(name) for name in state["ranks"]]

    def _place(self, number: int) -> int:
        """The place that is `number` after the first that nobody has used."""
        return self._left[number] if number < len(self._left) else self._next + number - len(self._left)

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, self._size)
        if not self._shuffle:
            return within
        if self._order[0] != epoch:
            seed = np.random.SeedSequence((self._seed, epoch)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]))
            self._order = epoch, torch.randperm(self._size, generator=generator).tolist()
        return self._order[1][within]
