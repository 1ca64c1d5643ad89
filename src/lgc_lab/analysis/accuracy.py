"""The estimators of mutual information against the closed form on normal variables.

    python -m lgc_lab.analysis.accuracy

prints a table and fails if an estimate is off by more than 0.02 nat and three standard errors. A second table has
what histograms without correction find in independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lgc_lab.analysis.estimators import (
    Estimate,
    Floats,
    gaussian_mutual_information,
    histogram_mutual_information,
    kraskov_mutual_information,
    plug_in_information,
)

TOLERANCE = 0.02
ERRORS = 3
CORRELATIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
COUNTS = (10_000, 100_000, 1_000_000)
PLUG_IN_COUNTS = (432, 2304, 9216, 36864)  # sizes of ResNet-20's weights
PLUG_IN_BINS = (20, 100, 256, 1000)
ESTIMATORS = {"histogram": histogram_mutual_information, "Kraskov": kraskov_mutual_information}


class Check(NamedTuple):
    """One estimate beside the true value, in nats."""

    estimator: str
    samples: int
    correlation: float
    truth: float
    estimate: Estimate

    @property
    def passed(self) -> bool:
        """Whether it is within 0.02 nat or three standard errors, whichever is larger."""
        return abs(self.estimate.value - self.truth) <= max(TOLERANCE, ERRORS * self.estimate.error)


def correlated_normals(count: int, correlation: float, generator: np.random.Generator) -> Floats:
    """Samples of two standard normal variables, shape (2, count)."""
    x, noise = generator.standard_normal((2, count))
    return np.stack([x, correlation * x + math.sqrt(1 - correlation**2) * noise])


def checks(counts: Sequence[int], correlations: Sequence[float], seed: int) -> Iterator[Check]:
    """Every estimator at every number of samples and correlation."""
    generator = np.random.default_rng(seed)
    for count in counts:
        for correlation in correlations:
            x, y = correlated_normals(count, correlation, generator)
            for name, estimator in ESTIMATORS.items():
                truth = gaussian_mutual_information(correlation)
                yield Check(name, count, correlation, truth, estimator(x, y, generator))


def main() -> None:
    """Print the table."""
    print("samples    rho   truth  estimator  estimate  off by   standard error")
    failed = 0
    for check in checks(COUNTS, CORRELATIONS, seed=0):
        value, error = check.estimate
        print(
            f"{check.samples:>7}  {check.correlation:>5.2f}  {check.truth:6.4f}  {check.estimator:<9}  {value:8.4f}  "
            f"{value - check.truth:+7.4f}  {error:.4f}{'' if check.passed else '  FAILED'}",
            flush=True,
        )
        failed += not check.passed
    print("\nindependent samples, uncorrected histograms: found information over the entropy")
    print("samples", *(f"{bins:>5} bins" for bins in PLUG_IN_BINS))
    generator = np.random.default_rng(0)
    for count in PLUG_IN_COUNTS:
        x, y = correlated_normals(count, 0.0, generator)
        found = [plug_in_information(x, y, bins) for bins in PLUG_IN_BINS]
        print(f"{count:>7}", *(f"{information / entropy:>10.2f}" for entropy, information in found))
    if failed:
        raise SystemExit(f"{failed} estimates are off by more than {TOLERANCE} nat and {ERRORS} standard errors.")


if __name__ == "__main__":
    main()
