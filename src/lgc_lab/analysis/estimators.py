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

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MINIMUM_SAMPLES = 64
NEIGHBOURS = 4
SHARED_NEIGHBOURS = 1.4  # terms of close samples are correlated; measured on independent normal samples
SUBSAMPLES = 10


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def normal_scores(samples: NDArray[np.floating], generator: np.random.Generator) -> Floats:
    """The standard normal quantiles of the ranks, shape (n,); equal samples are ranked at random.

    Ranking ties at random keeps the mutual information: it adds to a variable what is independent of everything.
    """
    order = np.lexsort((generator.random(len(samples)), samples))
    ranks = np.empty(len(samples))
    ranks[order] = np.arange(len(samples))
    return np.asarray(ndtri((ranks + 0.5) / len(samples)), dtype=np.float64)


def histogram_mutual_information(
    x: NDArray[np.floating], y: NDArray[np.floating], generator: np.random.Generator
) -> Estimate:
    """I(x; y) = H(x) + H(y) - H(x, y) of normal scores in square cells, each entropy corrected for its bias.

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
    row, column = (np.floor(axis / width + 0.5).astype(np.int64) for axis in scores)
    row, column = row - row.min(), column - column.min()
    columns = int(column.max()) + 1
    joint = np.bincount(row * columns + column, minlength=(int(row.max()) + 1) * columns).reshape(-1, columns)
    rows, cols = joint.sum(axis=1), joint.sum(axis=0)
    value = discrete_entropy(rows).value + discrete_entropy(cols).value - discrete_entropy(joint.ravel()).value
    local = np.log(joint[row, column] * float(count) / (rows[row].astype(np.float64) * cols[column]))
    freedom = (np.count_nonzero(rows) - 1) * (np.count_nonzero(cols) - 1)
    occupied = min(freedom, np.count_nonzero(joint))
    return Estimate(value, math.sqrt(float(local.var()) / count + occupied / (2 * count**2)))


def kraskov_mutual_information(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    generator: np.random.Generator,
) -> Estimate:
    """I(x; y) from distances to the nearest neighbours, of normal scores.

        I = psi(k) + psi(n) - <psi(n_x + 1) + psi(n_y + 1)>

    The error is that of the mean of the bracket, times `SHARED_NEIGHBOURS`. Source: Kraskov, Stoegbauer and
    Grassberger, Phys. Rev. E 69, 066138 (2004), equation 8. scikit-learn has the same estimator, but without an
    error and with negative estimates set to zero, which biases a mean of them.
    """
    scores = _scores(x, y, generator)
    points = scores.T
    distances = cKDTree(points).query(points, NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    radii = distances * (1 - 1e-6)  # n_x counts strictly nearer ones, whatever x + distance is rounded to
    local = digamma(len(x)) + digamma(NEIGHBOURS) - sum(digamma(_within(axis, radii) + 1) for axis in scores)
    return Estimate(float(local.mean()), SHARED_NEIGHBOURS * float(local.std(ddof=1)) / math.sqrt(len(x)))


def gaussian_mutual_information(correlation: float) -> float:
    """-1/2 log(1 - rho^2): what normal variables of this correlation share."""
    return -0.5 * math.log1p(-min(correlation**2, 1 - 1e-12))


def plug_in_information(x: NDArray[np.floating], y: NDArray[np.floating], bins: int) -> tuple[float, float]:
    """Entropy of x and I(x; y) by counting in `bins` equal bins between the extremes, with nothing corrected.

    Here to show what this common estimate makes of independent samples; use the others to measure.
    """
    joint = np.histogram2d(x, y, bins=bins)[0] / len(x)

    def entropy(p: Floats) -> float:
        return -float((p[p > 0] * np.log(p[p > 0])).sum())

    marginal = entropy(joint.sum(axis=1))
    return marginal, marginal + entropy(joint.sum(axis=0)) - entropy(joint.ravel())


def discrete_entropy(counts: NDArray[np.integer]) -> Estimate:
    """Entropy of a discrete variable from how often each of its values was seen.

    H = log n - 1/n sum_i n_i G(n_i), G(n) = psi(n) + (-1)^n / 2 (psi((n + 1) / 2) - psi(n / 2)). Bias falls faster
    with n than after Miller and Madow's correction. Source: Grassberger, arXiv physics/0307138.
    """
    seen, times = np.unique(counts[counts > 0], return_counts=True)
    total = int((seen * times).sum())
    alternating = np.where(seen % 2 == 0, 0.5, -0.5) * (digamma((seen + 1) / 2) - digamma(seen / 2))
    value = math.log(total) - float((times * seen * (digamma(seen) + alternating)).sum()) / total
    surprise = -np.log(seen / total)
    mean = float((times * seen * surprise).sum()) / total
    variance = float((times * seen * (surprise - mean) ** 2).sum()) / total
    return Estimate(value, math.sqrt(variance / total))


def differential_entropy(samples: NDArray[np.floating], generator: np.random.Generator) -> Estimate:
    """h(x) of a continuous variable, from the spacings of its sorted samples; repeated samples count once.

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
    cells = np.round(samples.astype(np.float64) / step).astype(np.int64)
    return discrete_entropy(np.unique(cells, return_counts=True)[1])


def quantised_mutual_information(x: NDArray[np.floating], y: NDArray[np.floating], step: float) -> Estimate:
    """What x and y share when both are rounded to multiples of `step`: at most the entropy of either, and at most I.

    The error is that of the joint entropy.
    """
    cells = np.round(np.stack([x, y]).astype(np.float64) / step).astype(np.int64)
    joint = discrete_entropy(np.unique(cells, axis=1, return_counts=True)[1])
    value = quantised_entropy(x, step).value + quantised_entropy(y, step).value - joint.value
    return Estimate(value, joint.error)


def sign_information(x: NDArray[np.floating], y: NDArray[np.floating]) -> Estimate:
    """I(sign x; sign y)."""
    table = np.bincount(2 * (x > 0) + (y > 0), minlength=4).reshape(2, 2)
    parts = [discrete_entropy(counts) for counts in (table.sum(axis=0), table.sum(axis=1), table.ravel())]
    agreement = np.trace(table) / table.sum()
    slope = abs(math.log((agreement + 1e-3) / (1 - agreement + 1e-3)))  # of log 2 - H(agreement)
    error = slope * math.sqrt(agreement * (1 - agreement) / table.sum()) + 0.7 / table.sum()
    return Estimate(parts[0].value + parts[1].value - parts[2].value, error)


def log_binomial(n: NDArray[np.integer] | int, k: NDArray[np.integer] | int) -> Floats:
    """log C(n, k)."""
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _scores(x: NDArray[np.floating], y: NDArray[np.floating], generator: np.random.Generator) -> Floats:
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"mutual information: x and y must be vectors of one length, got {x.shape} and {y.shape}.")
    _require_samples("mutual information", len(x))
    return np.stack([normal_scores(x, generator), normal_scores(y, generator)])


def _require_samples(of: str, count: int) -> None:
    if count < MINIMUM_SAMPLES:
        raise ValueError(f"{of}: needs at least {MINIMUM_SAMPLES} different samples, got {count}.")


def _within(axis: Floats, radii: Floats) -> Integers:
    """How many other points lie within its radius of each point, on a line."""
    ordered = np.sort(axis)
    return np.asarray(np.searchsorted(ordered, axis + radii, "right") - np.searchsorted(ordered, axis - radii) - 1)
