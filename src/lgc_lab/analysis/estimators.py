"""Entropy and mutual information from samples, each with its standard error. Everything is in nats.

Mutual information does not change when a variable is replaced by a strictly monotone function of it, so both
estimators of it first replace every value by the normal score of its rank: gradients have tails that no fixed
histogram fits. The standard errors take the samples to be independent. Coordinates of one gradient are not, so where
estimates are averaged the spread between them says more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln, ndtri
from scipy.stats import differential_entropy as spacing_entropy
from scipy.stats import entropy as plug_in_entropy
from scipy.stats.contingency import crosstab

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MINIMUM_SAMPLES = 64
NEIGHBOURS = 4
SHARED_NEIGHBOURS = 1.4  # terms of close samples are correlated; measured on independent normal samples
SUBSAMPLES = 10


class Estimate(NamedTuple):
    """Estimate of a number, and its standard error."""

    value: float
    error: float


def normal_scores(samples: NDArray[np.floating], generator: np.random.Generator) -> Floats:
    """Replace samples by the standard normal quantiles of their ranks, shape (n,); equal samples are ranked at random.

    Ranking ties at random keeps the mutual information: it adds to a variable what is independent of everything.
    """
    ranks = np.argsort(np.lexsort((generator.random(len(samples)), samples)))
    return np.asarray(ndtri((ranks + 0.5) / len(samples)), dtype=np.float64)


def histogram_mutual_information(
    x: NDArray[np.floating], y: NDArray[np.floating], generator: np.random.Generator
) -> Estimate:
    """Estimate I(x; y) = H(x) + H(y) - H(x, y) of normal scores in square cells, each entropy corrected for its bias.

    A cell is about half as wide as y scatters at a given x, and narrower the more samples there are: wider ones
    lose information, narrower ones hold too few samples to correct for. It is low where the density has steps, as
    that of variables that are exactly zero together. The error is that of the plug-in estimate
    (Roulston, Physica D 125, 1999), plus that of independent variables, whose first-order error is zero.
    """
    scores = _scores(x, y, generator)
    count = len(x)
    correlation = float(scores[0] @ scores[1] / (scores[0] @ scores[0]))  # they have equal norms
    spread = math.sqrt(max(1 - correlation**2, 1e-4))
    width = 0.45 * spread * (count / 10_000) ** (-1 / 6)
    joint = crosstab(*np.floor(scores / width + 0.5)).count
    row, column = np.nonzero(joint)
    seen = joint[row, column]
    local = np.log(seen * float(count) / (joint.sum(axis=1, dtype=np.float64)[row] * joint.sum(axis=0)[column]))
    occupied = min((joint.shape[0] - 1) * (joint.shape[1] - 1), len(seen))
    variance = float(np.cov(local, fweights=seen, ddof=0))
    return Estimate(_shared(joint), math.sqrt(variance / count + occupied / (2 * count**2)))


def kraskov_mutual_information(
    x: NDArray[np.floating], y: NDArray[np.floating], generator: np.random.Generator
) -> Estimate:
    """Estimate I(x; y) from distances to the nearest neighbours, of normal scores.

        I = psi(k) + psi(n) - <psi(n_x + 1) + psi(n_y + 1)>

    The error is that of the mean of the bracket, times `SHARED_NEIGHBOURS`. Source: Kraskov, Stoegbauer and
    Grassberger, Phys. Rev. E 69, 066138 (2004), equation 8. scikit-learn has the same estimator, but without an
    error and with negative estimates set to zero, which biases a mean of them.
    """
    scores = _scores(x, y, generator)
    distances = cKDTree(scores.T).query(scores.T, NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    radii = distances * (1 - 1e-6)  # n_x counts strictly nearer ones, whatever x + distance is rounded to
    local = digamma(len(x)) + digamma(NEIGHBOURS) - sum(digamma(_within(axis, radii) + 1) for axis in scores)
    return Estimate(float(local.mean()), SHARED_NEIGHBOURS * float(local.std(ddof=1)) / math.sqrt(len(x)))


def plug_in_information(x: NDArray[np.floating], y: NDArray[np.floating], bins: int) -> tuple[float, float]:
    """Entropy of x and I(x; y) by counting in `bins` equal bins between the extremes, with nothing corrected.

    Here to show what this common estimate makes of independent samples; use the others to measure.
    """
    joint = np.histogram2d(x, y, bins=bins)[0]
    marginal = float(plug_in_entropy(joint.sum(axis=1)))
    return marginal, marginal + float(plug_in_entropy(joint.sum(axis=0)) - plug_in_entropy(joint.ravel()))


def discrete_entropy(counts: NDArray[np.integer]) -> Estimate:
    """Entropy of a discrete variable from how often each of its values was seen.

    H = log n - 1/n sum_i n_i G(n_i), G(n) = psi(n) + (-1)^n / 2 (psi((n + 1) / 2) - psi(n / 2)). Bias falls faster
    with n than after Miller and Madow's correction. Source: Grassberger, arXiv physics/0307138.
    """
    seen, times = np.unique(counts[counts > 0], return_counts=True)
    samples = seen * times
    total = int(samples.sum())
    alternating = np.where(seen % 2 == 0, 0.5, -0.5) * (digamma((seen + 1) / 2) - digamma(seen / 2))
    value = math.log(total) - float(samples @ (digamma(seen) + alternating)) / total
    return Estimate(value, math.sqrt(float(np.cov(np.log(seen), fweights=samples, ddof=0)) / total))


def differential_entropy(samples: NDArray[np.floating], generator: np.random.Generator) -> Estimate:
    """Estimate h(x) of a continuous variable, from the spacings of its sorted samples; repeated samples count once.

    The error is from disjoint random subsamples. Source of the estimator: Vasicek, J. R. Statist. Soc. B 38
    (1976), in scipy.
    """
    distinct = generator.permutation(np.unique(samples.astype(np.float64)))
    _require_samples("differential_entropy", len(distinct))
    scale = float(distinct.std())  # spacings of tiny numbers vanish
    parts = [float(spacing_entropy(part / scale, method="vasicek")) for part in np.array_split(distinct, SUBSAMPLES)]
    value = float(spacing_entropy(distinct / scale, method="vasicek")) + math.log(scale)
    return Estimate(value, float(np.std(parts, ddof=1)) / math.sqrt(SUBSAMPLES))


def quantised_entropy(samples: NDArray[np.floating], step: float) -> Estimate:
    """Entropy of the samples rounded to multiples of `step`, as an ideal lossless coder after a quantiser needs."""
    return discrete_entropy(np.unique(np.round(samples.astype(np.float64) / step), return_counts=True)[1])


def quantised_mutual_information(x: NDArray[np.floating], y: NDArray[np.floating], step: float) -> Estimate:
    """Information that x and y share when both are rounded to multiples of `step`: at most either's entropy, and I.

    The error is that of the joint entropy.
    """
    joint = crosstab(*np.round(np.stack([x, y]).astype(np.float64) / step)).count
    return Estimate(_shared(joint), discrete_entropy(joint).error)


def sign_information(x: NDArray[np.floating], y: NDArray[np.floating]) -> Estimate:
    """Estimate I(sign x; sign y)."""
    table = np.bincount(2 * (x > 0) + (y > 0), minlength=4).reshape(2, 2)
    agreement = np.trace(table) / len(x)
    slope = abs(math.log((agreement + 1e-3) / (1 - agreement + 1e-3)))  # of log 2 - H(agreement)
    return Estimate(_shared(table), slope * math.sqrt(agreement * (1 - agreement) / len(x)) + 0.7 / len(x))


def log_binomial(n: NDArray[np.integer] | int, k: NDArray[np.integer] | int) -> Floats:
    """Compute log C(n, k)."""
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _shared(joint: Integers) -> float:
    """Estimate I of two discrete variables, from how often each pair of their values was seen."""
    parts = joint.sum(axis=1), joint.sum(axis=0), joint
    rows, columns, pairs = (discrete_entropy(counts).value for counts in parts)
    return rows + columns - pairs


def _scores(x: NDArray[np.floating], y: NDArray[np.floating], generator: np.random.Generator) -> Floats:
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"mutual information: x and y must be vectors of one length, got {x.shape} and {y.shape}.")
    _require_samples("mutual information", len(x))
    return np.stack([normal_scores(x, generator), normal_scores(y, generator)])


def _require_samples(of: str, count: int) -> None:
    if count < MINIMUM_SAMPLES:
        raise ValueError(f"{of}: needs at least {MINIMUM_SAMPLES} different samples, got {count}.")


def _within(axis: Floats, radii: Floats) -> Integers:
    """Count the other points that lie within its radius of each point, on a line."""
    ordered = np.sort(axis)
    return np.asarray(np.searchsorted(ordered, axis + radii, "right") - np.searchsorted(ordered, axis - radii) - 1)
