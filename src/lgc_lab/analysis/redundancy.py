"""From a recording to numbers: one row a layer, quantity and step, and one a step for what is sent.

All information is in bits. Every estimate is a pair: `NAME` and its standard error `NAME_error`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgc_lab.analysis.estimators import (
    MINIMUM_SAMPLES,
    Estimate,
    differential_entropy,
    discrete_entropy,
    histogram_mutual_information,
    kraskov_mutual_information,
    plug_in_information,
    quantised_entropy,
    quantised_mutual_information,
    sign_information,
)
from lgc_lab.analysis.indices import IndexCosts
from lgc_lab.analysis.record import Layer, Recording

BITS = 1 / math.log(2)
PLUG_IN_BINS = 100
LEAST_OF_CHANNEL = 16  # samples, on average, to divide by a channel's scale
PLANE_ERROR = 0.01  # relative squared error at which the entropy of a gradient is stated
PLANE_STEP = math.sqrt(12 * PLANE_ERROR)  # of a quantiser with this error, for values of unit energy
VALUE_ERROR = 0.1  # that of one sign a value and one magnitude for all, at the rates of interest

Row = dict[str, Any]
Floats = NDArray[np.float32]


def measure_redundancy(recording: Recording, seed: int = 0) -> Iterator[Row]:
    """Measure all rows: `kind` is layer (raw gradients and accumulators), shared (values sent) or index (where)."""
    generator = np.random.default_rng(seed)
    indices = IndexCosts(recording)
    for record, step in enumerate(recording.steps.tolist()):
        where = {"step": step, "warmup": step < recording.warmup_end}
        for quantity in ("gradient", "accumulator"):
            samples = getattr(recording, quantity)[record]
            position = 0
            for layer in recording.layers:
                sampled = slice(position, position + layer.sampled)
                position += layer.sampled
                now, before = samples[1, :, sampled], samples[0, :, sampled]
                if usable(now) and usable(before):
                    row = {"kind": "layer", "quantity": quantity, "layer": layer.name, "size": layer.size}
                    unscaled = divide_by_scale(now, layer, recording.coordinates[sampled])
                    yield where | row | layer_row(now, before, unscaled, generator)
        yield where | {"kind": "shared"} | shared_row(recording, record, generator)
        if step >= recording.warmup_end:
            yield where | {"kind": "index"} | indices.costs(record)


def usable(samples: Floats) -> bool:
    """Whether every worker has enough different values, shape (K, n)."""
    return all(len(np.unique(row)) >= 2 * MINIMUM_SAMPLES for row in samples)


def divide_by_scale(values: Floats, layer: Layer, coordinates: NDArray[np.int64]) -> Floats | None:
    """Each worker's values over a scale of its own for every output times one for every input, shape (K, n).

    Channels differ in scale, and that alone makes magnitudes of two workers depend on each other: what is left
    after the division is what takes another worker to know. Small tensors are left as they are.

    None where a channel has too few samples to know its scale from: the division would take away what the workers
    share, or have them share what they do not (values alone in their channel all become 1 or -1).
    """
    if layer.row == layer.size:
        return values
    place = coordinates - layer.start
    inner = layer.block if layer.block < layer.row else 1
    output, column = place // layer.row, place % layer.row // inner
    if min(np.unique(group, return_counts=True)[1].mean() for group in (output, column)) < LEAST_OF_CHANNEL:
        return None
    result = values.astype(np.float64)
    for _ in range(3):
        for group in (output, column):
            for worker in result:
                energy = np.bincount(group, worker**2) / np.maximum(np.bincount(group), 1)
                worker /= np.sqrt(np.where(energy > 0, energy, 1))[group]
    return result.astype(np.float32)


def layer_row(now: Floats, before: Floats, unscaled: Floats | None, generator: np.random.Generator) -> Row:
    """What one layer's values of K workers, (K, n), have in common with each other and with the step before.

    `pooled` is between the mean of one half of the workers and that of the other: two workers of K/2 times the batch.
    """
    workers = len(now)
    unit = now / root_mean_square(now)
    row = in_bits("entropy", average(quantised_entropy(x, PLANE_STEP) for x in unit))
    row |= in_bits("temporal_mutual_information", average(kraskov(now, before, generator)))
    row |= {"temporal_pearson": float(np.mean([pearson(*pair) for pair in zip(now, before, strict=True)]))}
    if workers > 1:
        firsts, seconds = slice(0, workers - 1, 2), slice(1, workers, 2)
        row |= pair_row(list(zip(now[firsts], now[seconds], strict=True)), generator)
        for name, others in (("", unit[seconds]), ("shuffled_", generator.permuted(unit[seconds], axis=1))):
            quantised = [
                quantised_mutual_information(x, y, PLANE_STEP) for x, y in zip(unit[firsts], others, strict=True)
            ]
            row |= in_bits(f"quantised_{name}mutual_information", average(quantised))
        if unscaled is not None:
            shared = average(kraskov(unscaled[firsts], unscaled[seconds], generator))
            row |= in_bits("unscaled_mutual_information", shared)
        row["pearson"] = float(np.mean([pearson(x, y) for x, y in combinations(now, 2)]))
        row["pearson_error"] = math.sqrt(1 / (now.shape[1] * (workers // 2)))
    if workers > 3:
        halves = now[: workers // 2].mean(axis=0), now[workers - workers // 2 :].mean(axis=0)
        row |= {"pooled_pearson": pearson(*halves)}
        row |= in_bits("pooled_mutual_information", kraskov_mutual_information(*halves, generator))
    return row


def pair_row(pairs: list[tuple[Floats, Floats]], generator: np.random.Generator) -> Row:
    """Mutual information of pairs, averaged over them; `shuffled` is that of the same values in another order."""
    xs, ys = ([pair[side] for pair in pairs] for side in (0, 1))
    shuffled = [generator.permutation(y) for y in ys]
    row = in_bits(
        "histogram_mutual_information",
        average(histogram_mutual_information(x, y, generator) for x, y in pairs),
    )
    row |= in_bits("kraskov_mutual_information", average(kraskov(xs, ys, generator)))
    row |= in_bits("shuffled_mutual_information", average(kraskov(xs, shuffled, generator)))
    row |= in_bits("magnitude_mutual_information", average(kraskov(map(np.abs, xs), map(np.abs, ys), generator)))
    row |= in_bits("sign_mutual_information", average(sign_information(x, y) for x, y in pairs))
    for name, others in (("plug_in", ys), ("plug_in_shuffled", shuffled)):
        estimates = [plug_in_information(x, y, PLUG_IN_BINS) for x, y in zip(xs, others, strict=True)]
        entropy, information = np.mean(estimates, axis=0) * BITS
        row |= {f"{name}_entropy": float(entropy), f"{name}_mutual_information": float(information)}
    return row


def shared_row(recording: Recording, record: int, generator: np.random.Generator) -> Row:
    """The values at the leader's indices, each layer in units of the leader's root mean square there."""
    leader = recording.leader(record)
    places = recording.own[record, leader]
    layer = layer_of(recording.layers, places)
    values = recording.shared[record].astype(np.float64)
    energy = np.bincount(layer, values[leader] ** 2) / np.maximum(np.bincount(layer), 1)
    unit = values / np.sqrt(np.maximum(energy[layer], 1e-60))
    x, others = unit[leader], np.delete(unit, leader, axis=0)
    row: Row = {"entries": len(places)}
    if len(recording.own[record]) > 1:
        row["overlap"] = overlap(recording.own[record])
    row |= in_bits("sign_entropy", discrete_entropy(np.bincount((x > 0).astype(int))))
    magnitude = np.abs(x)
    row |= {"sign_coding_error": float(1 - magnitude.mean() ** 2 / (magnitude**2).mean())}
    if len(np.unique(magnitude)) >= 2 * MINIMUM_SAMPLES:
        row |= in_bits("magnitude_entropy", differential_entropy(magnitude, generator))
        bound = row["magnitude_entropy"] - 0.5 * math.log2(2 * math.pi * math.e * VALUE_ERROR)
        row |= {
            "magnitude_bound": max(0.0, bound),
            "magnitude_bound_error": row["magnitude_entropy_error"],
        }
        if len(others):
            row |= pair_row([(x, y) for y in others], generator)
    if len(others):
        correlations = [pearson(x, y) for y in others]
        row |= {
            "pearson": float(np.mean(correlations)),
            "pearson_error": 1 / math.sqrt(len(places) * len(others)),
            "alone_bound": _normal_rate(1),
            "given_leader_bound": float(np.mean([_normal_rate(1 - r**2) for r in correlations])),
        }
        row |= others_row(others, generator)
    return row


def _normal_rate(variance: float) -> float:
    """Bits for values of this variance, in units of what they have alone, at `VALUE_ERROR`.

    1/2 log2(variance / error) is exact for normal variables and enough for all others.
    """
    return max(0.0, 0.5 * math.log2(max(variance, 1e-12) / VALUE_ERROR))


def others_row(others: NDArray[np.float64], generator: np.random.Generator) -> Row:
    """Shannon's lower bound of the values that the workers have who did not choose the indices, (K - 1, k)."""
    unit = [y / math.sqrt(float((y**2).mean())) for y in others if len(np.unique(y)) >= 2 * MINIMUM_SAMPLES]
    if not unit:
        return {}
    bound = in_bits("others_bound", average(differential_entropy(y, generator) for y in unit))
    bound["others_bound"] -= 0.5 * math.log2(2 * math.pi * math.e * VALUE_ERROR)
    return bound


def overlap(own: NDArray[np.int64]) -> float:
    """Fraction of one worker's indices that another has too, over all pairs of at least two workers."""
    return float(np.mean([len(np.intersect1d(a, b, assume_unique=True)) / len(a) for a, b in combinations(own, 2)]))


def layer_of(layers: list[Layer], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the layer that each index lies in."""
    starts = np.array([layer.start for layer in layers])
    return np.asarray(np.searchsorted(starts, places, side="right") - 1)


def average(estimates: Iterable[Estimate]) -> Estimate:
    """Mean of independent estimates."""
    values, errors = np.array(list(estimates)).T
    return Estimate(float(values.mean()), float(np.sqrt((errors**2).sum())) / len(values))


def in_bits(name: str, estimate: Estimate) -> Row:
    """An estimate in nats as two columns in bits."""
    return {name: estimate.value * BITS, f"{name}_error": estimate.error * BITS}


def kraskov(
    xs: Iterable[NDArray[np.floating]], ys: Iterable[NDArray[np.floating]], generator: np.random.Generator
) -> Iterator[Estimate]:
    """Kraskov's estimate for each pair."""
    return (kraskov_mutual_information(x, y, generator) for x, y in zip(xs, ys, strict=True))


def root_mean_square(rows: Floats) -> Floats:
    """Of each row, shape (K, 1)."""
    return np.asarray(np.sqrt((rows.astype(np.float64) ** 2).mean(axis=1, keepdims=True)), dtype=np.float32)


def pearson(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Correlation; 0 where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(math.sqrt(float(x @ x) * float(y @ y)), 1e-30))
