"""A code for positions that are often those of the last time, or their neighbours. See docs/wire.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.bits import Integers, octet_count
from lgc.coding.indices import IndexCoder, Rice, Segments
from lgc.coding.payload import Octets, PayloadError

KINDS = np.array([0, 1, 2, 2, 3, 3, 3, 3], np.uint8)  # of what was last selected one, two, ... rounds ago
REACH = 4  # positions that count as neighbours, on each side
PLAIN, RELATIVE = 0, 1  # the first byte of a code


@final
@dataclass(frozen=True)
class Recent(IndexCoder):
    """Rice code that knows what its sender has selected in the last 8 rounds.

    What was last selected one, two, 3 to 4 and 5 to 8 rounds ago, what is at most 4 positions from there, and the rest
    are coded apart, each as positions among all that there are of its kind: with a low-pass filter, a coordinate is
    selected in several rounds, and often its neighbours are too. Where that is not shorter, the plain Rice code is
    sent, with one byte more.
    """

    _known: Integers = field(default_factory=lambda: np.zeros(0, np.int64), init=False, repr=False, compare=False)
    _ages: Octets = field(default_factory=lambda: np.zeros(0, np.uint8), init=False, repr=False, compare=False)

    def after(self, positions: Tensor) -> Recent:
        selected = positions.detach().cpu().numpy().astype(np.int64)
        again = np.append(selected, -1)[np.searchsorted(selected, self._known)] == self._known
        older = ~again & (self._ages < KINDS.size - 1)
        known = np.concatenate([selected, self._known[older]])
        order = np.argsort(known, kind="stable")  # merges the two
        coder = Recent()
        object.__setattr__(coder, "_known", known[order])
        ages = np.concatenate([np.zeros(selected.size, np.uint8), self._ages[older] + np.uint8(1)])
        object.__setattr__(coder, "_ages", ages[order])
        return coder

    def _encode(self, positions: Integers, segments: Segments) -> Octets:
        plain = Rice()._encode(positions, segments)
        relative = self._encode_relative(positions, segments) if self._known.size else plain
        model, code = (RELATIVE, relative) if relative.size < plain.size else (PLAIN, plain)
        return np.concatenate([np.array([model], np.uint8), code])

    def _decode(self, data: Octets, segments: Segments) -> Integers:
        model = data[:1].tolist()
        if model == [RELATIVE] and self._known.size:
            return self._decode_relative(data[1:], segments)
        if model != [PLAIN]:
            bound = f"{PLAIN} or {RELATIVE}" if self._known.size else f"{PLAIN}, as nothing was selected before"
            raise PayloadError("indices.model", bound, model)
        return Rice()._decode(data[1:], segments)

    def _bound(self, segments: Segments) -> int:
        return 1 + Rice()._bound(segments)

    def _encode_relative(self, positions: Integers, segments: Segments) -> Octets:
        space = _Space(self._known, KINDS[self._ages], segments)
        again, near, far = space.split(positions)
        counts, ranks = space.mark(again)
        first = (
            Rice()
            .encode(torch.from_numpy(np.append(ranks, near + self._known.size)), [*space.kind_sizes, space.near_size])
            .numpy()
        )
        others = Rice().encode(torch.from_numpy(far), space.far_sizes.tolist()).numpy()
        width = _width(segments)
        if first.size >= 256**width:  # longer than the plain code already
            return first
        numbers = b"".join(number.to_bytes(width, "little") for number in (*counts.tolist(), near.size, first.size))
        return np.concatenate([np.frombuffer(numbers, np.uint8), first, others])

    def _decode_relative(self, data: Octets, segments: Segments) -> Integers:
        space, width = _Space(self._known, KINDS[self._ages], segments), _width(segments)
        start = width * (space.kind_sizes.size + 2)
        if data.size < start:
            raise PayloadError("indices.numbers", f"{start} bytes", data.size)
        octets = data[:start].tobytes()
        *again, near, length = (int.from_bytes(octets[at : at + width], "little") for at in range(0, start, width))
        limits = [*space.kind_sizes.tolist(), space.near_size, data.size - start]
        for number, most in zip([*again, near, length], limits, strict=True):
            if number > most:
                raise PayloadError("indices.numbers", f"at most {most}", number)
        if sum(again) + near > segments.count:
            raise PayloadError("indices.numbers", f"of at most {segments.count} entries", sum(again) + near)
        first, others = data[start : start + length].tobytes(), data[start + length :].tobytes()
        counts = np.array(again, np.int64)
        marked = np.where(2 * counts > space.kind_sizes, space.kind_sizes - counts, counts)
        sizes = [*space.kind_sizes.tolist(), space.near_size]
        ranks = Rice().decode(first, sizes, [*marked.tolist(), near]).numpy()
        again_ranks, near_ranks = np.split(ranks, [marked.sum()])
        known = np.concatenate([space.marked(again_ranks, counts), space.near(near_ranks - self._known.size)])
        known.sort(kind="stable")
        rest = segments.counts - space.by_segment(known)
        if rest.sum() != segments.count - known.size or (rest < 0).any() or (rest > space.far_sizes).any():
            raise PayloadError("indices.known", "as many as its segments have at most", known.size)
        far = Rice().decode(others, space.far_sizes.tolist(), rest.tolist()).numpy()
        positions = np.concatenate([known, space.far(far, rest)])
        positions.sort(kind="stable")
        return positions


class _Space:
    """The positions of some segments by kind, given those that were selected in the last rounds, the known ones.

    Gap i is what lies before the i-th of these, and one more gap follows them. It has neighbours of the one before it,
    then far positions, then neighbours of the one after it. A *rank* counts the positions of a kind from 0 on; those of
    the known ones go through all of their kinds, the newest first.

    Attributes:
        kind_sizes: number of known positions of every kind.
        near_size: number of neighbours.
        far_sizes: number of far positions of every segment that has entries.
    """

    def __init__(self, known: Integers, kinds: Octets, segments: Segments) -> None:
        self._known, self._kinds = known, kinds
        self._order = np.argsort(kinds, kind="stable")
        self.kind_sizes: Integers = np.bincount(kinds, minlength=int(KINDS[-1]) + 1)
        self._bounds = np.stack([segments.starts, segments.starts + segments.sizes])
        end = max(int(self._bounds.max(initial=0)), int(known[-1]) + 1)
        self._starts = np.concatenate([[0], known + 1])
        lengths = np.concatenate([known, [end]]) - self._starts
        self._left = np.minimum(lengths, REACH)
        self._left[0] = 0
        right = np.minimum(lengths - self._left, REACH)
        right[-1] = 0
        self._far = lengths - self._left - right
        self._near_before, self.near_size = _before(self._left + right)
        self._far_before, _ = _before(self._far)
        gaps, offsets = self._place(self._bounds)
        firsts, ends = self._far_before[gaps] + np.clip(offsets, 0, self._far[gaps])
        self.far_sizes: Integers = ends - firsts
        self._elsewhere = firsts - _before(self.far_sizes)[0]  # far positions before a segment that are in none

    def split(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Which of the known are among ascending positions, and the ranks of their neighbours and far ones."""
        gaps, offsets = self._place(positions)
        again = np.append(self._known, -1)[gaps] == positions
        far = ~again & (offsets >= 0) & (offsets < self._far[gaps])
        near = ~(again | far)
        near_gaps, near_offsets, far_gaps = gaps[near], offsets[near], gaps[far]
        beyond = np.where(near_offsets < 0, 0, self._far[near_gaps])
        neighbours = (self._near_before + self._left)[near_gaps] + near_offsets - beyond
        counts = np.bincount(np.searchsorted(self._bounds[1], positions[far], "right"), minlength=len(self.far_sizes))
        return gaps[again], neighbours, self._far_before[far_gaps] + offsets[far] - np.repeat(self._elsewhere, counts)

    def mark(self, places: Integers) -> tuple[Integers, Integers]:
        """How many of the known positions at these places each kind has, and the ranks that say which."""
        mask = np.zeros(self._known.size, np.bool_)
        mask[places] = True
        counts: Integers = np.bincount(self._kinds[places], minlength=self.kind_sizes.size)
        return counts, np.flatnonzero(self._toggled(mask[self._order], counts))

    def marked(self, ranks: Integers, counts: Integers) -> Integers:
        """The known positions that these ranks say are there, so many of each kind."""
        mask = np.zeros(self._known.size, np.bool_)
        mask[ranks] = True
        positions: Integers = self._known[self._order[self._toggled(mask, counts)]]
        return positions

    def _toggled(self, mask: npt.NDArray[np.bool_], counts: Integers) -> npt.NDArray[np.bool_]:
        """The mask by rank, or its opposite in kinds of which more than half are counted."""
        return mask ^ np.repeat(2 * counts > self.kind_sizes, self.kind_sizes)

    def near(self, ranks: Integers) -> Integers:
        """The neighbours of these ranks."""
        gaps = np.searchsorted(self._near_before, ranks, "right") - 1
        offsets = ranks - self._near_before[gaps]
        beyond = np.where(offsets < self._left[gaps], 0, self._far[gaps])
        positions: Integers = self._starts[gaps] + offsets + beyond
        return positions

    def far(self, ranks: Integers, counts: Integers) -> Integers:
        """The far positions of these ranks, of which every segment has so many."""
        ranks = ranks + np.repeat(self._elsewhere, counts)
        gaps = np.searchsorted(self._far_before, ranks, "right") - 1
        positions: Integers = self._starts[gaps] + self._left[gaps] + ranks - self._far_before[gaps]
        return positions

    def by_segment(self, positions: Integers) -> Integers:
        """How many of these ascending positions each segment has."""
        firsts, ends = np.searchsorted(positions, self._bounds)
        counts: Integers = ends - firsts
        return counts

    def _place(self, positions: Integers) -> tuple[Integers, Integers]:
        """The gaps of positions, and their offsets from the first far position there."""
        gaps = np.searchsorted(self._known, positions)
        return gaps, positions - self._starts[gaps] - self._left[gaps]


def _before(sizes: Integers) -> tuple[Integers, int]:
    """The sums of all sizes before each, and the sum of all."""
    sums = np.cumsum(sizes)
    return sums - sizes, int(sums[-1]) if sums.size else 0


def _width(segments: Segments) -> int:
    """Bytes of each number at the start of a relative code: enough for the bits of the longest plain code."""
    return max(1, octet_count((8 * Rice()._bound(segments)).bit_length()))
