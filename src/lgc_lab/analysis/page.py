"""Table of the measured rows, and page of their figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lgc_lab.analysis.estimators import Estimate
from lgc_lab.analysis.record import Recording
from lgc_lab.analysis.redundancy import PLANE_ERROR, VALUE_ERROR, Row
from lgc_lab.report.figures import draw, write_page
from lgc_lab.terminal import aligned

CLAIMED_SHARE = 0.8
SHARE = "its part of the entropy"
QUANTITIES = {"gradient": "gradient", "accumulator": "accumulator v"}
SIZE = (5.6, 4.6)  # inches
LAYER_COLUMNS = {  # label and column, or the ratio of two
    f"entropy at {PLANE_ERROR:.0%} error": "entropy",
    "shared by two workers at that": "quantised_mutual_information",
    "the same, shuffled": "quantised_shuffled_mutual_information",
    "shared by two workers (Kraskov)": "kraskov_mutual_information",
    "the same, histogram": "histogram_mutual_information",
    "Kraskov, shuffled": "shuffled_mutual_information",
    "Kraskov, over channel scales": "unscaled_mutual_information",
    "shared by the signs": "sign_mutual_information",
    "shared by the magnitudes": "magnitude_mutual_information",
    "correlation of two workers": "pearson",
    "equal signs of two workers": "sign_agreement",
    "correlation of two halves of the workers": "pooled_pearson",
    "shared by two halves of the workers": "pooled_mutual_information",
    "shared with the step before": "temporal_mutual_information",
    "correlation with the step before": "temporal_pearson",
    "correlation with the last mean, or the outer momentum": "momentum_pearson",
    SHARE: "quantised_mutual_information / entropy",
    f"{SHARE}, uncorrected histograms": "plug_in_mutual_information / plug_in_entropy",
    f"{SHARE}, uncorrected histograms, shuffled": "plug_in_shuffled_mutual_information / plug_in_shuffled_entropy",
}
SHARED_COLUMNS = {
    "top-k: overlap of two workers": "overlap",
    "sent: correlation with the leader": "pearson",
    "sent: leader and another share (Kraskov)": "kraskov_mutual_information",
    "sent: leader and another share, shuffled": "shuffled_mutual_information",
    "sign: entropy": "sign_entropy",
    "sign: shared with another worker": "sign_mutual_information",
    "magnitude: shared with another worker": "magnitude_mutual_information",
    f"others: enough for {VALUE_ERROR:.0%} error, alone": "alone_bound",
    f"others: enough for {VALUE_ERROR:.0%} error, given the leader": "given_leader_bound",
    f"others: Shannon lower bound at {VALUE_ERROR:.0%} error": "others_bound",
    f"magnitude: Shannon lower bound at {VALUE_ERROR:.0%} error": "magnitude_bound",
    "magnitude: error of one for all": "sign_coding_error",
}
INDEX_COLUMNS = {
    "index: uniform": "uniform",
    "index: Rice code": "rice",
    "index: code that knows the earlier selections": "recent",
    "index: exact counts per layer": "layer",
    "index: independent, by layer": "independent",
    "index: time since last sent": "recency",
    "index: magnitude last sent": "magnitude",
    "index: recent density of kernel or row": "row",
    "index: recent density of output": "output",
    "index: time and both densities": "past",
    "index: others in the kernel or row, same step": "kernel",
    "index: another worker's selection, same step": "worker",
    "sign: plain code, with magnitudes": "sign",
    "sign: code that knows the earlier signs, with magnitudes": "recent_sign",
    "sign: shared with the sign last sent there": "sign_last",
    "sign: shared with the sum last sent in the kernel or row": "sign_row",
}


class Analysis:
    """Rows of a recording, by kind.

    Means are over the records of a window, their errors from the spread between records: it holds what the
    estimators' own errors leave out, but records of one run are not independent either.
    """

    def __init__(self, recording: Recording, rows: Sequence[Row]) -> None:
        self.recording = recording
        self.rows: dict[str, list[Row]] = {kind: [] for kind in ("gradient", "accumulator", "shared", "index")}
        for row in rows:
            self.rows[row["quantity" if "quantity" in row else "kind"]].append(row)
        steps = [row["step"] for row in self.rows["shared"] if not row["warmup"]]
        self.windows = (set(steps[: (len(steps) + 1) // 2]), set(steps[len(steps) // 2 :]))

    @property
    def title(self) -> str:
        """Names what was run."""
        settings = self.recording.settings
        return (
            f"{settings['recipe']}, {settings['world_size']} workers, batches of {settings['batch_size']}, "
            f"{settings['scheme']}, {self.recording.total_steps} steps"
        )

    def summary(self) -> str:
        """Format the table as aligned text."""
        return f"{self.title}\n{aligned([('', 'first half', 'second half'), *self.lines()])}"

    def write_page(self, page: Path) -> None:
        """Write one HTML page that holds everything it shows; it opens without a network."""
        figures = []
        for title, caption, plot in FIGURES:
            svg = draw(title, SIZE, lambda figure, plot=plot: plot(figure.subplots(), self))  # type: ignore[misc]
            figures.append({"title": title, "caption": caption, "svg": svg})
        content = {"title": self.title, "lines": list(self.lines()), "version": self.recording.settings["version"]}
        write_page(page, "analysis/redundancy.html.jinja", figures=figures, **content)

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Yield the table: every quantity that was measured, its mean in both windows, in bits or a plain number."""
        tables = [(kind, f"{name}: ", LAYER_COLUMNS) for kind, name in QUANTITIES.items()]
        for kind, prefix, columns in [*tables, ("shared", "", SHARED_COLUMNS), ("index", "", INDEX_COLUMNS)]:
            for label, column in columns.items():
                early, late = (self.over(window, self.rows[kind], column) for window in (0, 1))
                if not math.isnan(early.value):
                    yield prefix + label, _format(early), _format(late)

    def over(self, window: int, rows: Iterable[Row], column: str) -> Estimate:
        """Average over the records of a window, 0 the first, with a standard error by their spread; NaN without any."""
        values = [mean.value for step, mean in by_step(rows, column).items() if step in self.windows[window]]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Estimate(statistics.mean(values) if values else math.nan, error)


def by_step(rows: Iterable[Row], column: str) -> dict[int, Estimate]:
    """Average a column over the layers, weighted by size, at every step; or take the ratio of two such means, "a / b".

    The standard error is that of the first column's estimator.
    """
    column, _, over = column.partition(" / ")
    sums: dict[int, NDArray[np.float64]] = {}
    for row in (row for row in rows if column in row):
        weight = float(row.get("size", 1))
        error = weight * row.get(f"{column}_error", 0.0)
        total = sums.setdefault(row["step"], np.zeros(3))
        total += (weight * row[column], error**2, weight * (row[over] if over else 1.0))
    return {step: Estimate(value / size, math.sqrt(square) / size) for step, (value, square, size) in sums.items()}


def _plot_curve(axes: Axes, rows: list[Row], column: str, style: str, label: str | None) -> None:
    """Draw a column's mean against the step, with the estimator's error where it has one."""
    series = by_step(rows, column)
    values, errors = np.array(list(series.values())).reshape(-1, 2).T
    axes.errorbar(list(series), values, errors, fmt=style, linewidth=1.3, label=label)


def _plot_plane(axes: Axes, analysis: Analysis) -> None:
    for number, (quantity, name) in enumerate(QUANTITIES.items()):
        layers: dict[str, list[Row]] = {}
        for row in analysis.rows[quantity]:
            layers.setdefault(row["layer"], []).append(row)
        for window, marker in enumerate("ov" if layers else ""):
            means = [
                [analysis.over(window, own, column) for own in layers.values()]
                for column in ("entropy", "quantised_mutual_information")
            ]
            (x, x_error), (y, y_error) = np.array(means).transpose(0, 2, 1)
            style: dict[str, Any] = {"fmt": marker, "markersize": 4, "linewidth": 0.8, "color": f"C{number}"}
            style |= {"alpha": 0.5 + 0.5 * window, "label": f"{name}, {('first', 'second')[window]} half"}
            axes.errorbar(x, y, np.nan_to_num(y_error), np.nan_to_num(x_error), **style)
    limit = axes.get_xlim()[1]
    axes.plot([0, limit], [0, CLAIMED_SHARE * limit], color="black", linewidth=0.8, linestyle="--", label="four fifths")
    axes.set(xlabel="entropy of one worker, bits", ylabel="shared by two workers, bits", xlim=(0, None))
    axes.legend()


def _plot_over_training(axes: Axes, analysis: Analysis) -> None:
    for number, (kind, name) in enumerate({**QUANTITIES, "shared": "values at the leader's indices"}.items()):
        _plot_curve(axes, analysis.rows[kind], "kraskov_mutual_information", f"C{number}-", name)
        _plot_curve(axes, analysis.rows[kind], "shuffled_mutual_information", f"C{number}:", None)
    axes.axvspan(0, analysis.recording.warmup_end, color="black", alpha=0.06, linewidth=0)
    axes.set(xlabel="step", ylabel="shared by two workers, bits")
    axes.legend()


def _plot_correlations(axes: Axes, analysis: Analysis) -> None:
    for number, (quantity, name) in enumerate(QUANTITIES.items()):
        _plot_curve(axes, analysis.rows[quantity], "pearson", f"C{number}-", f"{name}, two workers")
        _plot_curve(axes, analysis.rows[quantity], "temporal_pearson", f"C{number}:", f"{name}, two steps")
    _plot_curve(axes, analysis.rows["shared"], "pearson", "C2-", "sent, leader and another")
    _plot_curve(axes, analysis.rows["shared"], "overlap", "C3-", "top-k overlap")
    axes.set(xlabel="step", ylabel="correlation, or overlap")
    axes.legend()


def _plot_heat_map(quantity: str, axes: Axes, analysis: Analysis) -> None:
    rows = analysis.rows[quantity]
    layers, steps = (list(dict.fromkeys(row[name] for row in rows)) for name in ("layer", "step"))
    grid = np.full((len(layers), len(steps)), np.nan)
    for row in rows:
        information = row.get("kraskov_mutual_information", math.nan)
        grid[layers.index(row["layer"]), steps.index(row["step"])] = information
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.grid(False)
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    shown = slice(None, None, max(1, len(steps) // 6))
    axes.set_xticks(range(len(steps))[shown], map(str, steps[shown]))
    axes.set(xlabel="step")
    axes.figure.colorbar(image, ax=axes, label="bits")


def _plot_budget(axes: Axes, analysis: Analysis) -> None:
    of = partial(analysis.over, 1)
    sent, indices = analysis.rows["shared"], analysis.rows["index"]
    bars = [(name, of(indices, column), "C0") for name, column in INDEX_COLUMNS.items() if name.startswith("index")]
    for name, column, kind, color in (
        ("leader's sign", "sign_entropy", "sign", "C1"),
        ("leader's magnitude", "magnitude_bound", "magnitude", "C2"),
    ):
        whole, saved = of(sent, column), of(sent, f"{kind}_mutual_information")
        error = float(np.hypot(np.nan_to_num(whole.error), np.nan_to_num(saved.error)))
        rest = Estimate(max(0.0, whole.value - saved.value), error)
        bars += [(name, whole, color), (f"{name}, given one more worker's", rest, color)]
    bars.append(("another's value", of(sent, "alone_bound"), "C3"))
    bars.append(("another's value, given the leader's", of(sent, "given_leader_bound"), "C3"))
    bars = [bar for bar in reversed(bars) if not math.isnan(bar[1].value)]
    labels, estimates, colors = zip(*bars, strict=True)
    values, errors = np.nan_to_num(np.array(estimates)).T
    axes.barh(labels, values, xerr=errors, color=colors, height=0.7)
    for place, value in enumerate(values):
        axes.text(value + 0.15, place, f"{value:.2f}", va="center", fontsize=9)
    axes.tick_params(axis="y", labelsize=9)
    axes.margins(x=0.12)
    axes.set(xlabel="bits per entry")


FIGURES: list[tuple[str, str, Callable[[Axes, Analysis], None]]] = [
    (
        "Information plane",
        f"A point is a layer: entropy of a worker's values, quantised to {PLANE_ERROR:.0%} relative squared error, "
        "against what two workers share, both quantised so. Bars: standard error over the records.",
        _plot_plane,
    ),
    (
        "Redundancy over training",
        "Kraskov's mutual information of two workers, mean over the layers weighted by size; dotted: the same values "
        "in another order, which share nothing. Bars: the estimator's standard error. Grey: rate warm-up.",
        _plot_over_training,
    ),
    (
        "Correlations",
        "Pearson's, mean over the layers weighted by size. Bars: standard error of independent samples.",
        _plot_correlations,
    ),
    (
        "Bits per entry",
        "Second half of the run. Index: code length given each kind of knowledge, with densities learned from the "
        f"records before. Leader's magnitude: Shannon's lower bound at {VALUE_ERROR:.0%} relative squared error; "
        "another's value: what is enough for it. Bars: standard error over the records.",
        _plot_budget,
    ),
    ("Gradients, by layer", "Shared by two workers (Kraskov).", partial(_plot_heat_map, "gradient")),
    ("Accumulators, by layer", "Shared by two workers (Kraskov).", partial(_plot_heat_map, "accumulator")),
]


def _format(estimate: Estimate) -> str:
    value, error = estimate
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"
