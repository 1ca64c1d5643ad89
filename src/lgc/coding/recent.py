"""A code for positions that are often those of the last time, or their neighbours. See docs/wire.md."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.bits import Integers, octet_count
from lgc.coding.indices import IndexCoder, Rice, Segments
from lgc.coding.payload import Octets, PayloadError, octets

AGE_BITS = 3
AGES = 2**AGE_BITS  # rounds for which a position is known
KINDS = (range(1), range(1, 2), range(2, 4), range(4, AGES))  # by the rounds since a position was last selected
REACH = 4  # positions that count as neighbours, on each side
PLAIN, RELATIVE = 0, 1  # the first byte of a code
COUNT_BYTES = 8  # of each number in what is saved of a coder


Bools = npt.NDArray[np.bool_]
Narrow = npt.NDArray[np.signedinteger[Any]]  # int32 where that holds all positions, else int64


@final
@dataclass(frozen=True)
class Recent(IndexCoder):
    """Rice code that knows what its sender has selected in the last 8 rounds.

    What was last selected one, two, 3 to 4 and 5 to 8 rounds ago, what is at most 4 positions from there, and the rest
    are coded apart, each as positions among all that there are of its kind: with a low-pass filter, a coordinate is
    selected in several rounds, and often its neighbours are too. Where that is not shorter, the plain Rice code is
    sent, with one byte more.
    """

    remembers: ClassVar[bool] = True
    # ascending: 8 times every known position, and its age, the rounds since it was last selected
    _known: Integers = field(default_factory=lambda: np.zeros(0, np.int64), init=False, repr=False, compare=False)

    def after(self, positions: Tensor) -> Recent:
        selected = positions.detach().cpu().numpy().astype(np.int64) << AGE_BITS
        older = np.compress(_ages(self._known) < AGES - 1, self._known) + 1
        known = np.concatenate([selected, older])
        known.sort(kind="stable")  # merges the two; of a position that both have, the younger is first
        return _knowing(np.compress(_is_first(known), known))

    def digest(self) -> int:
        return zlib.crc32(self._known.astype("<i8", copy=False).data)

    def known(self, size: int) -> bytes:
        ages = _ages(self._known)
        positions = [np.compress(ages == age, self._known) >> AGE_BITS for age in range(AGES)]
        places = np.concatenate([of_age + age * size for age, of_age in enumerate(positions)])
        numbers = np.array([of_age.size for of_age in positions], f"<u{COUNT_BYTES}")
        return numbers.tobytes() + Rice().encode(torch.from_numpy(places), [size] * AGES).numpy().tobytes()

    def knowing(self, known: bytes, size: int) -> Recent:
        start = COUNT_BYTES * AGES
        if len(known) < start:
            raise PayloadError("known.numbers", f"{start} bytes", len(known))
        numbers = np.frombuffer(known[:start], f"<u{COUNT_BYTES}").tolist()
        most = min(size, 8 * (len(known) - start))  # each takes a bit at least
        if sum(numbers) > most:
            raise PayloadError("known.numbers", f"of at most {most} positions", sum(numbers))
        places = Rice().decode(known[start:], [size] * AGES, numbers).numpy()
        ages, positions = np.divmod(places, max(size, 1))
        entries = (positions << AGE_BITS) + ages
        entries.sort()
        if not _is_first(entries).all():
            raise PayloadError("known.positions", "of one age each", "one of two")
        return _knowing(entries)

    def _encode(self, positions: Integers, segments: Segments) -> Octets:
        if self._known.size:
            relative = self._encode_relative(positions, segments)
            if Rice().exceeds(relative.size, positions, segments):
                return np.concatenate([np.array([RELATIVE], np.uint8), relative])
        return np.concatenate([np.array([PLAIN], np.uint8), Rice()._encode(positions, segments)])

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
        space = _Space(self._known, segments)
        again, near, far = space.split(positions)
        counts, ranks = space.mark(again)
        marks = torch.from_numpy(np.concatenate([ranks, near + self._known.size]))
        first = octets(Rice().encode(marks, [*space.kind_sizes, space.near_size]))
        others = octets(Rice().encode(torch.from_numpy(far), space.far_sizes.tolist()))
        width = _width(segments)
        if first.size >= 256**width:  # longer than the plain code already
            return first
        numbers = b"".join(number.to_bytes(width, "little") for number in (*counts, near.size, first.size))
        return np.concatenate([np.frombuffer(numbers, np.uint8), first, others])

    def _decode_relative(self, data: Octets, segments: Segments) -> Integers:
        space, width = _Space(self._known, segments), _width(segments)
        start = width * (len(KINDS) + 2)
        if data.size < start:
            raise PayloadError("indices.numbers", f"{start} bytes", data.size)
        numbers = data[:start].tobytes()
        *again, near, length = (int.from_bytes(numbers[at : at + width], "little") for at in range(0, start, width))
        sizes = [*space.kind_sizes, space.near_size]
        for number, most in zip([*again, near, length], [*sizes, data.size - start], strict=True):
            if number > most:
                raise PayloadError("indices.numbers", f"at most {most}", number)
        if sum(again) + near > segments.count:
            raise PayloadError("indices.numbers", f"of at most {segments.count} entries", sum(again) + near)
        first, others = data[start : start + length].tobytes(), data[start + length :].tobytes()
        marked = [min(count, size - count) for count, size in zip(again, space.kind_sizes, strict=True)]
        ranks = Rice().decode(first, sizes, [*marked, near]).numpy()
        again_ranks, near_ranks = np.split(ranks, [sum(marked)])
        known = np.concatenate([space.marked(again_ranks, again), space.near(near_ranks - self._known.size)])
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

    def __init__(self, known: Integers, segments: Segments) -> None:
        self._bounds = np.stack([segments.starts, segments.starts + segments.sizes])
        self._ages = _ages(known)
        self.kind_sizes = [int(np.count_nonzero(self._is_of(kind))) for kind in KINDS]
        # large arrays are small numbers, made once and computed in: new memory takes longer than what is computed
        end = max(int(self._bounds.max(initial=0)), (int(known[-1]) >> AGE_BITS) + 1)
        form = np.int32 if end < 2**31 - 1 else np.int64
        self._edges: Narrow = np.empty(known.size + 2, form)  # of all gaps: a position before, the known ones, the end
        self._known: Narrow = np.right_shift(known, AGE_BITS, out=self._edges[1:-1], casting="unsafe")
        self._edges[0], self._edges[-1] = -1, end
        self._near_before: Narrow = np.zeros(known.size + 2, form)  # of every gap, and all
        near = self._near_before[1:]
        np.subtract(self._edges[1:], self._edges[:-1], out=near)
        near -= 1
        first, last = np.minimum(near[[0, -1]], REACH)
        np.minimum(near, 2 * REACH, out=near)
        near[0], near[-1] = first, last
        np.cumsum(near, out=near)
        self.near_size = int(near[-1])
        gaps = np.searchsorted(self._known, self._bounds)
        firsts, ends = self._far_before(gaps) + np.clip(
            self._bounds - self._first_far(gaps), 0, self._far_before(gaps + 1) - self._far_before(gaps)
        )
        self.far_sizes: Integers = ends - firsts
        self._elsewhere = firsts - (np.cumsum(self.far_sizes) - self.far_sizes)  # far before a segment, and in none

    def split(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """The places among the known ones of ascending positions that are, and the ranks of near and far ones."""
        gaps = _search(self._known, positions, "left")
        since, until = positions - self._edges.take(gaps), self._edges.take(gaps + 1) - positions
        inner = slice(*np.searchsorted(gaps, [1, self._known.size]))
        since[: inner.start] = until[inner.stop :] = REACH + 1  # nothing known is there
        others = np.flatnonzero(until)
        is_near = np.minimum(since, until).take(others) <= REACH
        near, far = np.compress(is_near, others), np.compress(~is_near, others)
        near_gaps, far_gaps, far_positions = gaps.take(near), gaps.take(far), positions.take(far)
        neighbours = np.where(
            since.take(near) <= REACH,
            self._near_before.take(near_gaps) + since.take(near) - 1,
            self._near_before.take(near_gaps + 1) - until.take(near),
        )
        ranks = self._far_before(far_gaps) + far_positions - self._first_far(far_gaps)
        counts = np.diff(np.searchsorted(far_positions, self._bounds[1]), prepend=0)
        return np.compress(until == 0, gaps), neighbours, ranks - np.repeat(self._elsewhere, counts)

    def mark(self, places: Integers) -> tuple[list[int], Integers]:
        """How many of the known positions at these places each kind has, and the ranks that say which."""
        mask = np.zeros(self._known.size, np.bool_)
        mask[places] = True
        counts, ranks, before = [], [], 0
        for members in self._members():
            marks = mask.take(members)
            counts.append(int(np.count_nonzero(marks)))
            ranks.append(np.flatnonzero(_fewer(marks, counts[-1])) + before)
            before += members.size
        return counts, np.concatenate(ranks)

    def marked(self, ranks: Integers, counts: Sequence[int]) -> Integers:
        """The known positions that these ranks say are there, so many of each kind."""
        mask = np.zeros(self._known.size, np.bool_)
        mask[ranks] = True
        marks = np.split(mask, np.cumsum(self.kind_sizes)[:-1])
        places = [
            np.compress(_fewer(of_kind, count), members)
            for of_kind, count, members in zip(marks, counts, self._members(), strict=True)
        ]
        return self._known.take(np.concatenate(places))

    def _members(self) -> Iterator[Integers]:
        """The places among the known positions of those of each kind."""
        for kind in KINDS:
            yield np.flatnonzero(self._is_of(kind))

    def _is_of(self, kind: range) -> Bools:
        """Which of the known positions are of a kind."""
        return (self._ages >= kind.start) & (self._ages < kind.stop)

    def near(self, ranks: Integers) -> Integers:
        """The neighbours of these ranks."""
        gaps = np.searchsorted(self._near_before, ranks, "right") - 1
        offsets = ranks - self._near_before.take(gaps)
        follow = (offsets < REACH) & (gaps > 0)
        until = self._near_before.take(gaps + 1) - ranks
        return np.where(follow, self._edges.take(gaps) + 1 + offsets, self._edges.take(gaps + 1) - until)

    def far(self, ranks: Integers, counts: Integers) -> Integers:
        """The far positions of these ranks, of which every segment has so many."""
        ranks = ranks + np.repeat(self._elsewhere, counts)
        before = self._edges[:-1] - self._near_before[:-1]  # far positions before all gaps, as in `_far_before`
        before -= np.arange(-1, self._known.size, dtype=before.dtype)
        gaps = _search(before, ranks, "right") - 1
        return ranks - self._far_before(gaps) + self._first_far(gaps)

    def by_segment(self, positions: Integers) -> Integers:
        """How many of these ascending positions each segment has."""
        firsts, ends = np.searchsorted(positions, self._bounds)
        counts: Integers = ends - firsts
        return counts

    def _far_before(self, gaps: Integers) -> Integers:
        """How many far positions there are before these gaps: all that are neither known nor neighbours."""
        before: Integers = self._edges.take(gaps) + 1 - gaps - self._near_before.take(gaps)
        return before

    def _first_far(self, gaps: Integers) -> Integers:
        """The first far position of these gaps, if they have one."""
        return self._edges.take(gaps) + 1 + REACH * (gaps > 0)


def _knowing(known: Integers) -> Recent:
    coder = Recent()
    object.__setattr__(coder, "_known", known)
    return coder


def _ages(known: Integers) -> Octets:
    return known.astype(np.uint8) & np.uint8(AGES - 1)


def _is_first(known: Integers) -> Bools:
    """Which of ascending entries have another position than the one before."""
    positions, first = known >> AGE_BITS, np.ones(known.size, np.bool_)
    np.not_equal(positions[1:], positions[:-1], out=first[1:])
    return first


def _fewer(marks: Bools, count: int) -> Bools:
    """The marks, or their opposite in a kind of which more than half are entries; the same again undoes it."""
    return ~marks if 2 * count > marks.size else marks


def _search(among: Narrow, ascending: Integers, side: Literal["left", "right"]) -> Integers:
    """`np.searchsorted` of many ascending values, by merging, which takes two thirds of the time."""
    wanted = ascending.astype(among.dtype, copy=False)
    parts = (wanted, among) if side == "left" else (among, wanted)
    order = np.argsort(np.concatenate(parts), kind="stable")
    found = order < ascending.size if side == "left" else order >= among.size
    return np.flatnonzero(found) - np.arange(ascending.size)


def _width(segments: Segments) -> int:
    """Bytes of each number at the start of a relative code: enough for the bits of the longest plain code."""
    return max(1, octet_count((8 * Rice()._bound(segments)).bit_length()))
