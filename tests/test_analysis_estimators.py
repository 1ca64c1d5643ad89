"""Estimators of entropy and mutual information, on variables whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.feature_selection import mutual_info_regression

from lgc_lab.analysis.estimators import (
    Estimate,
    Floats,
    differential_entropy,
    discrete_entropy,
    histogram_mutual_information,
    kraskov_mutual_information,
    log_binomial,
    normal_scores,
    plug_in_information,
    quantised_entropy,
    quantised_mutual_information,
)

NORMAL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
ESTIMATORS = {"histogram": histogram_mutual_information, "Kraskov": kraskov_mutual_information}
exhaustive = pytest.mark.exhaustive


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def correlated_normals(count: int, correlation: float, generator: np.random.Generator) -> Floats:
    """Samples of two standard normal variables, shape (2, count)."""
    x, noise = generator.standard_normal((2, count))
    return np.stack([x, correlation * x + math.sqrt(1 - correlation**2) * noise])


def gaussian_mutual_information(correlation: float) -> float:
    """-1/2 log(1 - rho^2): what normal variables of this correlation share."""
    return -0.5 * math.log1p(-(correlation**2))


def within(estimate: Estimate, truth: float, tolerance: float = 0.02) -> bool:
    """Whether an estimate is off by at most the tolerance or three standard errors, whichever is larger."""
    return abs(estimate.value - truth) <= max(tolerance, 3 * estimate.error)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("count", "correlation"),
    [(10_000, correlation) for correlation in (0.0, 0.5, 0.95, 0.99)]
    + [
        pytest.param(count, correlation, marks=exhaustive)
        for count in (10_000, 100_000, 1_000_000)
        for correlation in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    ],
)
def test_mutual_information_of_normals_is_the_closed_form(
    name: str, count: int, correlation: float, generator: np.random.Generator
) -> None:
    x, y = correlated_normals(count, correlation, generator)
    estimate = ESTIMATORS[name](x, y, generator)
    truth = gaussian_mutual_information(correlation)
    off = estimate.value - truth
    print(f"{name}, {count:,} samples, rho {correlation}, {truth:.4f}: {off:+.4f} ± {estimate.error:.4f}")
    assert within(estimate, truth)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mutual_information_is_that_of_any_monotone_function_of_the_variables(
    name: str, generator: np.random.Generator
) -> None:
    x, y = correlated_normals(10_000, 0.8, generator)
    heavy = ESTIMATORS[name](np.sinh(4 * x), y**3, generator)
    assert within(heavy, gaussian_mutual_information(0.8))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mutual_information_without_correlation_is_seen(name: str, generator: np.random.Generator) -> None:
    """x = s a and y = s b with one random scale s: uncorrelated, but |x| tells something of |y|."""
    scale = np.exp(generator.standard_normal(10_000))
    x, y = scale * generator.standard_normal((2, 10_000))
    assert ESTIMATORS[name](x, y, generator).value > 0.1
    assert within(ESTIMATORS[name](x, generator.permutation(y), generator), 0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_standard_error_is_the_spread_over_repetitions(
    name: str, correlation: float, generator: np.random.Generator
) -> None:
    samples = [correlated_normals(1000, correlation, generator) for _ in range(40)]
    repeated = [ESTIMATORS[name](x, y, generator) for x, y in samples]
    spread = np.std([estimate.value for estimate in repeated])
    assert 0.6 < np.mean([estimate.error for estimate in repeated]) / spread < 1.8


def test_kraskov_is_unbiased_for_few_independent_samples(generator: np.random.Generator) -> None:
    """A neighbour counted as strictly nearer than itself would cost 0.02 nat here."""
    samples = [generator.random((2, 500)) for _ in range(100)]
    repeated = [kraskov_mutual_information(x, y, generator).value for x, y in samples]
    assert abs(np.mean(repeated)) < 3 * np.std(repeated) / math.sqrt(len(repeated))


def test_kraskov_is_that_of_scikit_learn(generator: np.random.Generator) -> None:
    x, y = (normal_scores(samples, generator) for samples in correlated_normals(1000, 0.5, generator))
    theirs = mutual_info_regression(x[:, None], y, n_neighbors=4, random_state=0)[0]
    assert kraskov_mutual_information(x, y, generator).value == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ties_add_no_information(name: str, generator: np.random.Generator) -> None:
    """Half of both variables is exactly zero, independently: as gradients behind a ReLU are."""
    x, y = generator.standard_normal((2, 5000)) * (generator.random((2, 5000)) < 0.5)
    assert within(ESTIMATORS[name](x, y, generator), 0)


def test_ties_keep_information(generator: np.random.Generator) -> None:
    """Both are zero at the same places: one binary digit is shared. Cells across the step lose some of it."""
    present = generator.random(5000) < 0.5
    x, y = generator.random((2, 5000)) * present
    assert within(kraskov_mutual_information(x, y, generator), math.log(2), 0.05)
    assert 0.4 < histogram_mutual_information(x, y, generator).value < math.log(2)


@pytest.mark.parametrize(
    ("count", "fractions"),
    {
        432: (0.09, 0.51, 0.73, 0.92),
        2_304: (0.03, 0.24, 0.49, 0.77),
        9_216: (0.01, 0.06, 0.21, 0.53),
        36_864: (0.00, 0.02, 0.08, 0.32),
    }.items(),
)
def test_uncorrected_histograms_find_information_in_independent_samples(
    count: int, fractions: tuple[float, ...], generator: np.random.Generator
) -> None:
    """The table in docs/redundancy.md: over the entropy, with 20, 100, 256 and 1000 bins."""
    x, y = generator.standard_normal((2, count))
    for bins, fraction in zip((20, 100, 256, 1000), fractions, strict=True):
        entropy, information = plug_in_information(x, y, bins)
        assert information / entropy == pytest.approx(fraction, abs=0.05)


@pytest.mark.parametrize(
    ("distribution", "scale", "truth"),
    [
        ("normal", 1, NORMAL_ENTROPY),
        ("normal", 1e-30, NORMAL_ENTROPY + math.log(1e-30)),
        ("laplace", 1, 1 + math.log(2)),
    ],
)
def test_differential_entropy(distribution: str, scale: float, truth: float, generator: np.random.Generator) -> None:
    samples: Floats = getattr(generator, distribution)(size=5000, scale=scale)
    assert within(differential_entropy(samples, generator), truth)


def test_discrete_entropy_of_many_values_seen_seldom(generator: np.random.Generator) -> None:
    """1000 samples of 400 equally likely values: counting alone is short by 0.2 nat."""
    estimate = discrete_entropy(np.bincount(generator.integers(400, size=1000)))
    assert within(estimate, math.log(400), 0.05)


def test_quantised_entropy_is_the_differential_one_minus_the_log_of_a_small_step(
    generator: np.random.Generator,
) -> None:
    estimate = quantised_entropy(generator.standard_normal(20_000), 0.1)
    assert within(estimate, NORMAL_ENTROPY - math.log(0.1))


def test_quantised_mutual_information_is_at_most_the_entropy(generator: np.random.Generator) -> None:
    x, y = correlated_normals(20_000, 0.8, generator)
    assert within(quantised_mutual_information(x, y, 0.1), gaussian_mutual_information(0.8), 0.05)
    assert within(quantised_mutual_information(x, generator.permutation(y), 0.3), 0)
    assert within(quantised_mutual_information(x, x, 0.3), quantised_entropy(x, 0.3).value)


def test_log_binomial() -> None:
    assert log_binomial(10, 3) == pytest.approx(math.log(120))


def test_too_few_samples_and_unequal_lengths_are_errors(generator: np.random.Generator) -> None:
    x = generator.standard_normal(63)
    with pytest.raises(ValueError, match="at least 64 different samples, got 63"):
        kraskov_mutual_information(x, x, generator)
    with pytest.raises(ValueError, match=r"one length, got \(63,\) and \(60,\)"):
        kraskov_mutual_information(x, x[:60], generator)
    with pytest.raises(ValueError, match="got 1"):
        differential_entropy(np.zeros(1000), generator)
