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

from lgc.analysis.estimators import (
    MINIMUM_SAMPLES,
    Estimate,
    differential_entropy,
    discrete_entropy,
    gaussian_mutual_information,
    histogram_mutual_information,
    kraskov_mutual_information,
    plug_in_information,
    quantised_entropy,
)
from lgc.analysis.indices import IndexCosts
from lgc.analysis.record import Layer, Recording

BITS = 1 / math.log(2)
PLUG_IN_BINS = 100
PLANE_ERROR = 0.01  # relative squared error at which the entropy of a gradient is stated
VALUE_ERROR = 0.1  # that of one sign a value and one magnitude for all, at the rates of interest

Row = dict[str, Any]
Floats = NDArray[np.float32]


def measure(recording: Recording, seed: int = 0) -> Iterator[Row]:
    """All rows: `kind` is layer (raw gradients and accumulators), shared (values sent) or index (where)."""
    generator = np.random.default_rng(seed)
    indices = IndexCosts(recording)
    for record, step in enumerate(recording.steps.tolist()):
        where = {"step": step, "warmup": step < recording.warmup_end}
        for quantity in ("gradient", "accumulator"):
            samples = getattr(recording, quantity)[record]
            position = 0
            for layer in recording.layers:
                part = samples[:, :, position : position + layer.sampled]
                position += layer.sampled
                if usable(part):
                    row = {"kind": "layer", "quantity": quantity, "layer": layer.name, "size": layer.size}
                    yield where | row | layer_row(part[1], part[0], generator)
        yield where | {"kind": "shared"} | shared_row(recording, record, generator)
        if step >= recording.warmup_end:
            yield where | {"kind": "index"} | indices.costs(record)


def usable(samples: Floats) -> bool:
    """Whether every worker has enough different values, at both steps, shape (2, K, n)."""
    return all(len(np.unique(row)) >= 2 * MINIMUM_SAMPLES for row in samples.reshape(-1, samples.shape[-1]))


def layer_row(now: Floats, before: Floats, generator: np.random.Generator) -> Row:
    """What one layer's values of K workers, (K, n), have in common with each other and with the step before."""
    workers = len(now)
    unit = now / root_mean_square(now)
    entropy = average(quantised_entropy(x, math.sqrt(12 * PLANE_ERROR)) for x in unit)
    row = in_bits("entropy", entropy) | in_bits("differential_entropy", average(spread(unit, generator)))
    row |= in_bits("temporal_mutual_information", average(kraskov(now, before, generator)))
    row |= {"temporal_pearson": float(np.mean([pearson(*pair) for pair in zip(now, before, strict=True)]))}
    if workers > 1:
        row |= pair_row([(now[i], now[i + 1]) for i in range(0, workers - 1, 2)], generator)
        row |= linear_row(now)
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


def linear_row(values: Floats) -> Row:
    """Pearson's correlation and the cosine over all pairs of workers, and what normal variables would share."""
    pairs = list(combinations(values, 2))
    correlations = [pearson(x, y) for x, y in pairs]
    cosines = [float(x @ y / max(math.sqrt(float(x @ x) * float(y @ y)), 1e-30)) for x, y in pairs]
    error = math.sqrt(1 / (values.shape[1] * (len(values) // 2)))
    return {
        "pearson": float(np.mean(correlations)),
        "pearson_error": error,
        "cosine": float(np.mean(cosines)),
        "gaussian_mutual_information": float(np.mean([gaussian_mutual_information(r) for r in correlations])) * BITS,
    }


def shared_row(recording: Recording, record: int, generator: np.random.Generator) -> Row:
    """The values at the leader's indices, each layer in units of the leader's root mean square there."""
    leader = recording.leader(record)
    places = recording.own[record, leader]
    layer = layer_of(recording.layers, places)
    values = recording.shared[record].astype(np.float64)
    energy = np.bincount(layer, values[leader] ** 2) / np.maximum(np.bincount(layer), 1)
    unit = values / np.sqrt(np.maximum(energy[layer], 1e-60))
    x, others = unit[leader], np.delete(unit, leader, axis=0)
    row: Row = {"entries": len(places), "overlap": overlap(recording.own[record])}
    row |= in_bits("sign_entropy", discrete_entropy(np.bincount((x > 0).astype(int))))
    magnitude = np.abs(x)
    row |= {"sign_coding_error": float(1 - magnitude.mean() ** 2 / (magnitude**2).mean())}
    if len(np.unique(magnitude)) >= 2 * MINIMUM_SAMPLES:
        row |= in_bits("magnitude_entropy", differential_entropy(magnitude, generator))
        bound = row["magnitude_entropy"] - 0.5 * math.log2(2 * math.pi * math.e * VALUE_ERROR)
        row |= {
            "magnitude_bound": max(0.0, bound),
            "magnitude_bound_error": row["magnitude_entropy_error"],
            "normal_bound": 0.5 * math.log2(1 / VALUE_ERROR),
            "laplace_bound": math.log2(2 * math.e * float(magnitude.mean()))
            - 0.5 * math.log2(2 * math.pi * math.e * VALUE_ERROR),
        }
        if len(others):
            row |= pair_row([(x, y) for y in others], generator)
            row |= in_bits("mean_mutual_information", kraskov_mutual_information(x, others.mean(axis=0), generator))
    if len(others):
        correlations = [pearson(x, y) for y in others]
        row |= {
            "pearson": float(np.mean(correlations)),
            "pearson_error": 1 / math.sqrt(len(places) * len(others)),
            "cosine": float(np.mean([x @ y / math.sqrt(max((x @ x) * (y @ y), 1e-60)) for y in others])),
            "others_energy": float((others**2).mean()),
        }
    if len(others) > 1:
        row |= {"others_pearson": float(np.mean([pearson(a, b) for a, b in combinations(others, 2)]))}
    return row


def overlap(own: NDArray[np.int64]) -> float:
    """Fraction of one worker's indices that another has too, over all pairs; NaN for a single worker."""
    fractions = [len(np.intersect1d(a, b, assume_unique=True)) / len(a) for a, b in combinations(own, 2)]
    return float(np.mean(fractions)) if fractions else math.nan


def layer_of(layers: list[Layer], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the layer that each index lies in."""
    starts = np.array([layer.start for layer in layers])
    return np.asarray(np.searchsorted(starts, places, side="right") - 1)


def sign_information(x: NDArray[np.floating], y: NDArray[np.floating]) -> Estimate:
    """I(sign x; sign y)."""
    table = np.bincount(2 * (x > 0) + (y > 0), minlength=4).reshape(2, 2)
    parts = [discrete_entropy(counts) for counts in (table.sum(axis=0), table.sum(axis=1), table.ravel())]
    agreement = np.trace(table) / table.sum()
    slope = abs(math.log((agreement + 1e-3) / (1 - agreement + 1e-3)))  # of log 2 - H(agreement)
    error = slope * math.sqrt(agreement * (1 - agreement) / table.sum()) + 0.7 / table.sum()
    return Estimate(parts[0].value + parts[1].value - parts[2].value, error)


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


def spread(rows: Floats, generator: np.random.Generator) -> Iterator[Estimate]:
    """Differential entropy of each row."""
    return (differential_entropy(row, generator) for row in rows)


def root_mean_square(rows: Floats) -> Floats:
    """Of each row, shape (K, 1)."""
    return np.asarray(np.sqrt((rows.astype(np.float64) ** 2).mean(axis=1, keepdims=True)), dtype=np.float32)


def pearson(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Correlation; 0 where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(math.sqrt(float(x @ x) * float(y @ y)), 1e-30))
