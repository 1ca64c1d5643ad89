"""Bits per entry for saying which coordinates are sent, given what the receivers know already.

Every kind of knowledge puts the coordinates into classes; a coder that knows the density of each class needs

    plug-in     sum_s log2 C(n_s, k_s) / k, with this step's own k_s: too low, by up to (classes / 2k) log2 k
    predictive  the code length with the densities of all recorded steps before: reachable, thus an upper bound
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, entropy

from lgc_lab.analysis.estimators import MINIMUM_SAMPLES, Integers, log_binomial, sign_information
from lgc_lab.analysis.lengths import CODES
from lgc_lab.analysis.record import Recording

AGES = 12
LEVELS = 8
RECENT = 64  # steps of history that count for the density of a block
PRIOR = 0.5  # entries that a class starts with, at the overall rate


class IndexCosts:
    """Goes through a recording once, in order, with what all workers know at each step.

    Knowledge from the past is of what everyone was sent since the warm-up: when a coordinate last was (`recency`),
    how large it was (`magnitude`), how many of its kernel or row (`row`) and of its output (`output`) were in the last
    64 steps, and all but the magnitude (`past`). In the same step there is another worker's own selection
    (`worker`), and how many of the same kernel or row are sent (`kernel`). All of these know the density of every
    layer, and are to be compared with `independent`, which knows nothing else. With the exact number of entries of
    every layer, but nothing else, a coder needs `layer`, and `uniform` with only the total.

    `rice` and `sign` are the lengths of plain codes as they are, `recent` and `recent_sign` of those that know what the
    same worker has sent, over all rounds since the last record.

    `sign_last` and `sign_row` are bits that the sign of a leader's entry shares with the sign of what was last sent
    there, and with the sum of what was last sent in the same kernel or row.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        sizes = [layer.size for layer in recording.layers]
        self.last = np.full(sum(sizes), -1)
        self.value = np.zeros(sum(sizes), dtype=np.float32)
        self.layer = np.repeat(np.arange(len(sizes)), sizes)
        self.block = _parts(sizes, [layer.block for layer in recording.layers])
        self.block_size = np.bincount(self.block)
        self.output = _parts(sizes, [layer.row for layer in recording.layers])
        counts = self._by_layer(recording.own[0, 0])
        self.searched = np.flatnonzero(counts[self.layer])
        densities = np.round(np.log2(np.maximum(counts, 1) / sizes)).astype(np.int64)
        self.group = (densities.max() - densities)[self.layer]
        self.done = recording.warmup_end
        self.tables: dict[str, NDArray[np.float64]] = {}

    def costs(self, record: int) -> dict[str, float]:
        """Count the bits per entry of the workers' own selections at a recorded step; later ones must follow."""
        self._replay(int(self.recording.steps[record]))
        own = self.recording.own[record]
        workers, entries = own.shape
        by_layer, sizes = self._by_layer(own[0]), self._by_layer(self.searched)
        row = {
            "entries": float(entries),
            "uniform": float(log_binomial(len(self.searched), entries)) / math.log(2) / entries,
            "layer": float(log_binomial(sizes, by_layer).sum()) / math.log(2) / entries,
        }
        hits = np.bincount(own.ravel(), minlength=len(self.last))[self.searched]
        age = np.minimum(1 + np.log2(self.done - self.last).astype(np.int64), AGES)
        recency = np.where(self.last < 0, 0, age)
        density, of_output = self._density(self.block), self._density(self.output)
        knowledge = {
            "independent": np.zeros_like(self.group),
            "recency": recency,
            "magnitude": self._magnitude(),
            "row": density,
            "output": of_output,
            "past": (recency * (LEVELS + 2) + density) * (LEVELS + 2) + of_output,
        }
        for name, classes in knowledge.items():
            grouped = (classes * (self.group.max() + 1) + self.group)[self.searched]
            row |= self._lengths(name, workers * np.bincount(grouped), np.bincount(grouped, hits).astype(np.int64))
        if workers > 1:
            row |= self._cost_given_worker(own)
        coded = dict(zip(CODES, self.recording.lengths[record].mean(axis=0).tolist(), strict=True))
        return row | coded | self._cost_of_kernels(own) | self._signs(record)

    def _by_layer(self, indices: Integers) -> Integers:
        """Count how many of these are in each layer."""
        return np.bincount(self.layer[indices], minlength=len(self.recording.layers))

    def _replay(self, step: int) -> None:
        """Take in everything sent before `step`."""
        for earlier in range(self.done, step):
            where, values = self.recording.sent[earlier - self.recording.warmup_end]
            self.last[where] = earlier
            self.value[where] = values
        self.done = step

    def _magnitude(self) -> Integers:
        """Classify by the last value sent, in factors of two about the layer's mean."""
        known = self.last >= 0
        value = np.abs(self.value)  # 0 where it is not known
        mean = np.bincount(self.layer, value) / np.maximum(np.bincount(self.layer, known), 1)
        return _level(value / np.maximum(mean[self.layer], 1e-30), 1, known)

    def _density(self, part: Integers) -> Integers:
        """Classify by how much was recently sent in the same part, in factors of 2^(1/2) about the layer's."""
        recent = ((self.last >= 0) & (self.done - self.last <= RECENT)).astype(np.float64)
        share = np.bincount(part, recent) / np.bincount(part)
        layers = np.bincount(self.layer, recent) / np.bincount(self.layer)
        return _level(share[part] / np.maximum(layers[self.layer], 1e-30), 2, share[part] > 0)

    def _cost_given_worker(self, own: Integers) -> dict[str, float]:
        """Count the bits of one worker's selection, given another's; all ordered pairs."""
        groups = int(self.group.max()) + 1
        common = [np.intersect1d(a, b, assume_unique=True) for a, b in permutations(own, 2)]
        size, count, both = (  # the count is the same for every worker
            np.bincount(self.group[some], minlength=groups) for some in (self.searched, own[0], np.concatenate(common))
        )
        sizes = len(common) * np.concatenate([size - count, count])
        return self._lengths("worker", sizes, np.concatenate([len(common) * count - both, both]))

    def _signs(self, record: int) -> dict[str, float]:
        leader = self.recording.leader(record)
        places, values = self.recording.own[record, leader], self.recording.shared[record, leader]
        rows = np.bincount(self.block, self.value, minlength=len(self.block_size))[self.block[places]]
        shared = {}
        for name, reference in (("sign_last", self.value[places]), ("sign_row", rows)):
            known = reference != 0
            enough = int(known.sum()) > MINIMUM_SAMPLES
            information = sign_information(values[known], reference[known]).value if enough else 0.0
            shared[name] = float(known.mean()) * information / math.log(2)
        return shared

    def _cost_of_kernels(self, own: Integers) -> dict[str, float]:
        """Count the bits for how many entries a block has, then which; blocks of one size share one distribution."""
        searched = np.unique(self.block[self.searched])
        size, rate = self.block_size[searched], own.shape[1] / len(self.searched)
        plug_in = predictive = 0.0
        for selection in own:
            count = np.bincount(self.block[selection], minlength=len(self.block_size))[searched]
            inside = float(log_binomial(size, count).sum()) / math.log(2)
            plug_in, predictive = plug_in + inside, predictive + inside
            for block in np.unique(size):
                counts = np.bincount(count[size == block], minlength=block + 1).astype(np.float64)
                plug_in += float(counts.sum() * entropy(counts, base=2))
                independent = binom.pmf(np.arange(block + 1), block, rate)  # entries that fall independently
                table = self.tables.setdefault(f"kernel {block}", PRIOR / rate / block * independent + 1e-9)
                predictive -= float(counts @ np.log2(table / table.sum()))
                table += counts
        return {"kernel_plug_in": plug_in / own.size, "kernel": predictive / own.size}

    def _lengths(self, name: str, sizes: Integers, hits: Integers) -> dict[str, float]:
        """Compute both code lengths, of the coordinates and entries of every class; adds them to what is known."""
        entries = int(hits.sum())
        rate = entries / int(sizes.sum())
        table = np.stack([sizes, hits]).astype(np.float64)
        known = self.tables.get(name, np.zeros((2, 0)))
        width = max(table.shape[1], known.shape[1])
        table, known = (np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in (table, known))
        density = (known[1] + PRIOR) / (known[0] + PRIOR / rate)
        nats = -(table[1] @ np.log(density) + (table[0] - table[1]) @ np.log1p(-density))
        self.tables[name] = known + table
        plug_in = float(log_binomial(sizes, hits).sum())
        return {f"{name}_plug_in": plug_in / math.log(2) / entries, name: float(nats) / math.log(2) / entries}


def _parts(sizes: list[int], lengths: list[int]) -> Integers:
    """Number the part that each coordinate lies in; every layer is cut into parts of its own length."""
    counts = [-(-size // length) for size, length in zip(sizes, lengths, strict=True)]
    firsts = np.cumsum(counts) - counts
    layers = zip(firsts, sizes, lengths, strict=True)
    return np.concatenate([first + np.arange(size) // length for first, size, length in layers])


def _level(ratio: NDArray[np.floating], steps: int, known: NDArray[np.bool_]) -> Integers:
    """Classify by factors of two, divided into so many steps, from 1 to LEVELS + 1; 0 where it is not known."""
    level = np.floor(steps * np.log2(np.maximum(ratio, 1e-9))).astype(np.int64)
    return np.where(known, np.clip(level, -LEVELS // 2, LEVELS // 2) + LEVELS // 2 + 1, 0)
