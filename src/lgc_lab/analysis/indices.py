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

from lgc_lab.analysis.estimators import MINIMUM_SAMPLES, log_binomial, sign_information
from lgc_lab.analysis.record import Recording

Integers = NDArray[np.int64]

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

    `sign_last` and `sign_row` are bits that the sign of a leader's entry shares with the sign of what was last sent
    there, and with the sum of what was last sent in the same kernel or row.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        size = sum(layer.size for layer in recording.layers)
        self.last = np.full(size, -1)
        self.value = np.zeros(size, dtype=np.float32)
        self.layer = np.repeat(np.arange(len(recording.layers)), [layer.size for layer in recording.layers])
        blocks = [-(-layer.size // layer.block) for layer in recording.layers]
        self.block = np.concatenate(
            [
                first + np.arange(layer.size) // layer.block
                for first, layer in zip(np.cumsum(blocks) - blocks, recording.layers, strict=True)
            ]
        )
        self.block_size = np.bincount(self.block)
        outputs = [layer.size // layer.row for layer in recording.layers]
        self.output = np.concatenate(
            [
                first + np.arange(layer.size) // layer.row
                for first, layer in zip(np.cumsum(outputs) - outputs, recording.layers, strict=True)
            ]
        )
        selected = np.unique(self.layer[recording.own[:1, 0]])
        self.searched = np.flatnonzero(np.isin(self.layer, selected))
        counts = np.bincount(self.layer[recording.own[:1, 0].ravel()], minlength=len(recording.layers))
        densities = np.round(np.log2(np.maximum(counts, 1) / np.bincount(self.layer))).astype(np.int64)
        self.group = (densities.max() - densities)[self.layer]
        self.done = recording.warmup_end
        self.tables: dict[str, NDArray[np.float64]] = {}

    def costs(self, record: int) -> dict[str, float]:
        """Bits per entry of the workers' own selections at a recorded step; later ones must follow."""
        self._replay(int(self.recording.steps[record]))
        own = self.recording.own[record]
        workers, entries = own.shape
        universe = len(self.searched)
        layers = np.bincount(self.layer[own[0]], minlength=len(self.recording.layers))
        sizes = np.bincount(self.layer[self.searched], minlength=len(layers))
        row = {
            "entries": float(entries),
            "uniform": float(log_binomial(universe, entries)) / math.log(2) / entries,
            "layer": float(log_binomial(sizes, layers).sum()) / math.log(2) / entries,
        }
        hits = np.zeros(len(self.last), dtype=np.int64)
        np.add.at(hits, own.ravel(), 1)
        knowledge = {
            "independent": np.zeros_like(self.group),
            "recency": self._recency(),
            "magnitude": self._magnitude(),
            "row": self._density(self.block),
            "output": self._density(self.output),
        }
        knowledge["past"] = (knowledge["recency"] * (LEVELS + 2) + knowledge["row"]) * (LEVELS + 2) + knowledge[
            "output"
        ]
        for name, classes in knowledge.items():
            grouped = classes * (self.group.max() + 1) + self.group
            row |= self._cost(name, grouped[self.searched], hits[self.searched], workers)
        if workers > 1:
            row |= self._cost_given_worker(own)
        return row | self._cost_of_kernels(own) | self._signs(record)

    def _replay(self, step: int) -> None:
        """Take in everything sent before `step`."""
        for earlier in range(self.done, step):
            where, values = self.recording.sent[earlier - self.recording.warmup_end]
            self.last[where] = earlier
            self.value[where] = values
        self.done = step

    def _recency(self) -> Integers:
        age = self.done - self.last
        return np.where(self.last < 0, 0, np.minimum(1 + np.log2(age).astype(np.int64), AGES))

    def _magnitude(self) -> Integers:
        """Of the last value sent, in factors of two about the layer's mean."""
        known = self.last >= 0
        layers = len(self.recording.layers)
        value = np.abs(self.value)
        total = np.bincount(self.layer[known], value[known], minlength=layers)
        mean = total / np.maximum(np.bincount(self.layer[known], minlength=layers), 1)
        ratio = value / np.maximum(mean[self.layer], 1e-30)
        level = np.clip(np.floor(np.log2(np.maximum(ratio, 1e-9))).astype(np.int64), -LEVELS // 2, LEVELS // 2)
        return np.where(known, level + LEVELS // 2 + 1, 0)

    def _density(self, part: Integers) -> Integers:
        """Of what was recently sent in the same part, in factors of the square root of two about the layer's."""
        recent = ((self.last >= 0) & (self.done - self.last <= RECENT)).astype(np.float64)
        share = np.bincount(part, recent) / np.bincount(part)
        layers = np.bincount(self.layer, recent) / np.bincount(self.layer)
        ratio = share[part] / np.maximum(layers[self.layer], 1e-30)
        level = np.clip(np.floor(2 * np.log2(np.maximum(ratio, 1e-9))).astype(np.int64), -LEVELS // 2, LEVELS // 2)
        return np.where(ratio > 0, level + LEVELS // 2 + 1, 0)

    def _cost(self, name: str, classes: Integers, hits: Integers, workers: int) -> dict[str, float]:
        sizes = workers * np.bincount(classes)
        return self._lengths(name, sizes, np.bincount(classes, hits).astype(np.int64))

    def _cost_given_worker(self, own: Integers) -> dict[str, float]:
        """Of one worker's selection, given another's; all ordered pairs."""
        groups = int(self.group.max()) + 1
        pairs = len(own) * (len(own) - 1)
        size = np.bincount(self.group[self.searched], minlength=groups)
        count = np.bincount(self.group[own[0]], minlength=groups)  # the same for every worker
        both = sum(
            np.bincount(self.group[np.intersect1d(a, b, assume_unique=True)], minlength=groups)
            for a, b in permutations(own, 2)
        )
        sizes = pairs * np.concatenate([size - count, count])
        return self._lengths("worker", sizes, np.concatenate([pairs * count - both, both]))

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
        """First how many entries every block has, then which; blocks of one size share one distribution."""
        searched = np.unique(self.block[self.searched])
        size = self.block_size[searched]
        plug_in = predictive = 0.0
        for selection in own:
            count = np.bincount(self.block[selection], minlength=len(self.block_size))[searched]
            inside = float(log_binomial(size, count).sum()) / math.log(2)
            plug_in, predictive = plug_in + inside, predictive + inside
            for block in np.unique(size):
                counts = np.bincount(count[size == block], minlength=block + 1).astype(np.float64)
                present = counts[counts > 0]
                plug_in -= float((present * np.log2(present / present.sum())).sum())
                table = self.tables.setdefault(f"kernel {block}", self._prior_of_kernels(int(block), selection))
                predictive -= float((counts * np.log2(table / table.sum())).sum())
                table += counts
        return {"kernel_plug_in": plug_in / own.size, "kernel": predictive / own.size}

    def _prior_of_kernels(self, block: int, selection: Integers) -> NDArray[np.float64]:
        """Entries that fall independently."""
        rate = len(selection) / len(self.searched)
        count = np.arange(block + 1)
        logs = log_binomial(np.full(block + 1, block), count) + count * math.log(rate)
        probability = np.exp(logs + (block - count) * math.log1p(-rate))
        return np.asarray(PRIOR / rate / block * probability + 1e-9)

    def _lengths(self, name: str, sizes: Integers, hits: Integers) -> dict[str, float]:
        entries = int(hits.sum())
        rate = entries / int(sizes.sum())
        known = self.tables.get(name, np.zeros((2, 0)))
        missing = max(0, len(sizes) - known.shape[1])
        known = np.pad(known, ((0, 0), (0, missing)))
        width = known.shape[1]
        sizes, hits = np.pad(sizes, (0, width - len(sizes))), np.pad(hits, (0, width - len(hits)))
        density = (known[1] + PRIOR) / (known[0] + PRIOR / rate)
        nats = -(hits * np.log(density) + (sizes - hits) * np.log1p(-density)).sum()
        self.tables[name] = known + np.stack([sizes, hits])
        plug_in = float(log_binomial(sizes, hits).sum())
        return {f"{name}_plug_in": plug_in / math.log(2) / entries, name: float(nats) / math.log(2) / entries}
