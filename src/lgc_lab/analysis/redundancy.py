"""Turns a recording into numbers: one row a layer, quantity and step, and one a step for what is sent.

All information is in bits. Every estimate is a pair: `NAME` and its standard error `NAME_error`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgc_lab.analysis.estimators import (
    MINIMUM_SAMPLES,
    Estimate,
    Integers,
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
NORMAL_ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * VALUE_ERROR)  # of normal values with that variance

Row = dict[str, Any]
Samples = NDArray[np.float32]
Vectors = Sequence[NDArray[np.floating]] | NDArray[np.floating]


def measure_redundancy(recording: Recording) -> Iterator[Row]:
    """Measure all rows: `kind` is layer (raw gradients and accumulators), shared (values sent) or index (where)."""
    generator = np.random.default_rng(0)
    indices = IndexCosts(recording)
    starts = np.cumsum([layer.sampled for layer in recording.layers])[:-1]
    coordinates = np.split(recording.coordinates, starts)
    for record, step in enumerate(recording.steps.tolist()):
        where = {"step": step, "warmup": step < recording.warmup_end}
        for quantity in ("gradient", "accumulator"):
            samples = np.split(getattr(recording, quantity)[record], starts, axis=2)
            momenta = np.split(recording.momentum[record], starts)
            for layer, (before, now), momentum, places in zip(
                recording.layers, samples, momenta, coordinates, strict=True
            ):
                if all(map(has_variety, [*before, *now])):
                    row = {"kind": "layer", "quantity": quantity, "layer": layer.name, "size": layer.size}
                    unscaled = divide_by_scale(now, layer, places)
                    known = {"momentum_pearson": float(np.mean([pearson(x, momentum) for x in now]))}
                    yield where | row | known | layer_row(now, before, unscaled, generator)
        yield where | {"kind": "shared"} | shared_row(recording, record, generator)
        if step >= recording.warmup_end:
            yield where | {"kind": "index"} | indices.costs(record)


def has_variety(values: NDArray[np.floating]) -> bool:
    """Tell whether these are enough different values to estimate from."""
    return len(np.unique(values)) >= 2 * MINIMUM_SAMPLES


def divide_by_scale(values: Samples, layer: Layer, coordinates: Integers) -> Samples | None:
    """Divide each worker's values by a scale of its own for every output times one for every input, shape (K, n).

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


def layer_row(now: Samples, before: Samples, unscaled: Samples | None, generator: np.random.Generator) -> Row:
    """Measure what one layer's values of K workers, (K, n), have in common with each other and with the step before.

    `pooled` is between the mean of one half of the workers and that of the other: two workers of K/2 times the batch.
    """
    workers = len(now)
    kraskov = partial(kraskov_mutual_information, generator=generator)
    quantised = partial(quantised_mutual_information, step=PLANE_STEP)
    unit = now / np.sqrt((now.astype(np.float64) ** 2).mean(axis=1, keepdims=True)).astype(np.float32)
    row = in_bits("entropy", average(quantised_entropy(x, PLANE_STEP) for x in unit))
    row |= mutual_information("temporal", kraskov, now, before)
    row |= {"temporal_pearson": float(np.mean(list(map(pearson, now, before))))}
    if workers > 1:
        firsts, seconds = slice(0, workers - 1, 2), slice(1, workers, 2)
        row |= pair_row(now[firsts], now[seconds], generator)
        row |= mutual_information("quantised", quantised, unit[firsts], unit[seconds])
        shuffled = generator.permuted(unit[seconds], axis=1)
        row |= mutual_information("quantised_shuffled", quantised, unit[firsts], shuffled)
        if unscaled is not None:
            row |= mutual_information("unscaled", kraskov, unscaled[firsts], unscaled[seconds])
        row["pearson"] = float(np.mean([pearson(x, y) for x, y in combinations(now, 2)]))
        row["pearson_error"] = math.sqrt(1 / (now.shape[1] * (workers // 2)))
        row["sign_agreement"] = float(np.mean([(x > 0) == (y > 0) for x, y in combinations(now, 2)]))
    if workers > 3:
        halves = now[: workers // 2].mean(axis=0), now[workers - workers // 2 :].mean(axis=0)
        row |= {"pooled_pearson": pearson(*halves)}
        row |= mutual_information("pooled", kraskov, halves[:1], halves[1:])
    return row


def pair_row(xs: Vectors, ys: Vectors, generator: np.random.Generator) -> Row:
    """Measure the mutual information of pairs, on average; `shuffled` is that of the same values in another order."""
    kraskov = partial(kraskov_mutual_information, generator=generator)
    shuffled = [generator.permutation(y) for y in ys]
    row = mutual_information("histogram", partial(histogram_mutual_information, generator=generator), xs, ys)
    row |= mutual_information("kraskov", kraskov, xs, ys) | mutual_information("shuffled", kraskov, xs, shuffled)
    row |= mutual_information("magnitude", kraskov, [*map(np.abs, xs)], [*map(np.abs, ys)])
    row |= mutual_information("sign", sign_information, xs, ys)
    for name, others in (("plug_in", ys), ("plug_in_shuffled", shuffled)):
        estimates = [plug_in_information(x, y, PLUG_IN_BINS) for x, y in zip(xs, others, strict=True)]
        entropy, information = np.mean(estimates, axis=0) * BITS
        row |= {f"{name}_entropy": float(entropy), f"{name}_mutual_information": float(information)}
    return row


def shared_row(recording: Recording, record: int, generator: np.random.Generator) -> Row:
    """Measure the values at the leader's indices, each layer in units of the leader's root mean square there."""
    leader = recording.leader(record)
    places = recording.own[record, leader]
    layer = np.searchsorted([each.start for each in recording.layers], places, side="right") - 1
    values = recording.shared[record].astype(np.float64)
    energy = np.bincount(layer, values[leader] ** 2) / np.maximum(np.bincount(layer), 1)
    unit = values / np.sqrt(np.maximum(energy[layer], 1e-60))
    x, others = unit[leader], np.delete(unit, leader, axis=0)
    row: Row = {"entries": len(places)}
    if len(others):
        row["overlap"] = overlap(recording.own[record])
    row |= in_bits("sign_entropy", discrete_entropy(np.bincount(x > 0)))
    magnitude = np.abs(x)
    row |= {"sign_coding_error": float(1 - magnitude.mean() ** 2 / (magnitude**2).mean())}
    if has_variety(magnitude):
        row |= in_bits("magnitude_entropy", differential_entropy(magnitude, generator))
        bound = max(0.0, row["magnitude_entropy"] - NORMAL_ENTROPY)
        row |= {"magnitude_bound": bound, "magnitude_bound_error": row["magnitude_entropy_error"]}
        if len(others):
            row |= pair_row([x] * len(others), others, generator)
    if len(others):
        correlations = np.array([pearson(x, y) for y in others])
        # 1/2 log2(variance / error) is exact for normal variables and enough for all others.
        given_leader = 0.5 * np.log2(np.maximum((1 - correlations**2) / VALUE_ERROR, 1))
        row |= {
            "pearson": float(correlations.mean()),
            "pearson_error": 1 / math.sqrt(len(places) * len(others)),
            "alone_bound": 0.5 * math.log2(1 / VALUE_ERROR),
            "given_leader_bound": float(given_leader.mean()),
        }
        varied = [y / math.sqrt(float((y**2).mean())) for y in others if has_variety(y)]
        if varied:
            row |= in_bits("others_bound", average(differential_entropy(y, generator) for y in varied))
            row["others_bound"] -= NORMAL_ENTROPY
    return row


def overlap(own: Integers) -> float:
    """Fraction of one worker's indices that another has too, over all pairs of at least two workers."""
    return float(np.mean([len(np.intersect1d(a, b, assume_unique=True)) / len(a) for a, b in combinations(own, 2)]))


def average(estimates: Iterable[Estimate]) -> Estimate:
    """Average independent estimates."""
    values, errors = np.array(list(estimates)).T
    return Estimate(float(values.mean()), float(np.sqrt((errors**2).sum())) / len(values))


def in_bits(name: str, estimate: Estimate) -> Row:
    """Convert an estimate in nats to two columns in bits."""
    return {name: estimate.value * BITS, f"{name}_error": estimate.error * BITS}


def mutual_information(name: str, estimator: Callable[..., Estimate], xs: Vectors, ys: Vectors) -> Row:
    """Average an estimator of mutual information over pairs of vectors, in bits."""
    return in_bits(f"{name}_mutual_information", average(map(estimator, xs, ys)))


def pearson(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Correlation; 0 where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(math.sqrt(float(x @ x) * float(y @ y)), 1e-30))
