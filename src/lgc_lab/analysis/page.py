"""The measured rows as a table and as a page of figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from lgc_lab.analysis.estimators import Estimate
from lgc_lab.analysis.record import Recording
from lgc_lab.analysis.redundancy import PLANE_ERROR, VALUE_ERROR, Row
from lgc_lab.report.figures import draw
from lgc_lab.report.page import write_page

CLAIMED_SHARE = 0.8
SHARE = "its part of the entropy"
QUANTITIES = {"gradient": "gradient", "accumulator": "accumulator v"}
LAYER_COLUMNS = {
    f"entropy at {PLANE_ERROR:.0%} error": ("entropy",),
    "shared by two workers at that": ("quantised_mutual_information",),
    "the same, shuffled": ("quantised_shuffled_mutual_information",),
    "shared by two workers (Kraskov)": ("kraskov_mutual_information",),
    "the same, histogram": ("histogram_mutual_information",),
    "Kraskov, shuffled": ("shuffled_mutual_information",),
    "Kraskov, over channel scales": ("unscaled_mutual_information",),
    "shared by the signs": ("sign_mutual_information",),
    "shared by the magnitudes": ("magnitude_mutual_information",),
    "correlation of two workers": ("pearson",),
    "correlation of two halves of the workers": ("pooled_pearson",),
    "shared by two halves of the workers": ("pooled_mutual_information",),
    "shared with the step before": ("temporal_mutual_information",),
    "correlation with the step before": ("temporal_pearson",),
    SHARE: ("quantised_mutual_information", "entropy"),
    f"{SHARE}, uncorrected histograms": ("plug_in_mutual_information", "plug_in_entropy"),
    f"{SHARE}, uncorrected histograms, shuffled": (
        "plug_in_shuffled_mutual_information",
        "plug_in_shuffled_entropy",
    ),
}  # a column, or the ratio of two
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
    "index: exact counts per layer": "layer",
    "index: independent, by layer": "independent",
    "index: time since last sent": "recency",
    "index: magnitude last sent": "magnitude",
    "index: recent density of kernel or row": "row",
    "index: recent density of output": "output",
    "index: time and both densities": "past",
    "index: others in the kernel or row, same step": "kernel",
    "index: another worker's selection, same step": "worker",
}
SIGN_COLUMNS = {
    "sign: shared with the sign last sent there": "sign_last",
    "sign: shared with the sum last sent in the kernel or row": "sign_row",
}


class Line(NamedTuple):
    """One quantity in the first and in the second half of the records after the warm-up, in bits or a plain number."""

    label: str
    early: Estimate
    late: Estimate


class Analysis:
    """A recording's rows, by kind.

    Means are over the records of a window, their errors from the spread between records: it holds what the
    estimators' own errors leave out, but records of one run are not independent either.
    """

    def __init__(self, recording: Recording, rows: Sequence[Row]) -> None:
        self.recording = recording
        self.layers = [row for row in rows if row["kind"] == "layer"]
        self.shared = [row for row in rows if row["kind"] == "shared"]
        self.indices = [row for row in rows if row["kind"] == "index"]
        steps = [row["step"] for row in self.shared if not row["warmup"]]
        self.windows = (set(steps[: (len(steps) + 1) // 2]), set(steps[len(steps) // 2 :]))

    @property
    def title(self) -> str:
        """What was run."""
        settings = self.recording.settings
        return (
            f"{settings['recipe']}, {settings['world_size']} workers, batches of {settings['batch_size']}, "
            f"{settings['scheme']}, {len(self.recording.loss)} steps"
        )

    def summary(self) -> str:
        """The table as aligned text."""
        lines = list(self.lines())
        width = max(len(line.label) for line in lines)
        text = [f"{'':{width}}  {'first half':>16}  {'second half':>16}"]
        text += [f"{line.label:{width}}  {_format(line.early):>16}  {_format(line.late):>16}" for line in lines]
        return "\n".join([self.title, *text])

    def write_page(self, page: Path) -> None:
        """Write one HTML page that holds everything it shows; it opens without a network."""
        figures = []
        for title, caption, plot, size in FIGURES:
            svg = draw(title, size, lambda figure, plot=plot: plot(figure.subplots(), self))  # type: ignore[misc]
            figures.append({"title": title, "caption": caption, "svg": svg})
        lines = [(line.label, _format(line.early), _format(line.late)) for line in self.lines()]
        version = self.recording.settings.get("version", "")
        write_page(
            page, "analysis/redundancy.html.jinja", title=self.title, lines=lines, figures=figures, versions=version
        )

    def lines(self) -> Iterator[Line]:
        """The table, without what was not measured."""
        series = {
            f"{name}: {label}": by_step(self.rows_of(quantity), *columns)
            for quantity, name in QUANTITIES.items()
            for label, columns in LAYER_COLUMNS.items()
        }
        series |= {label: by_step(self.shared, column) for label, column in SHARED_COLUMNS.items()}
        series |= {label: by_step(self.indices, column) for label, column in (INDEX_COLUMNS | SIGN_COLUMNS).items()}
        for label, values in series.items():
            line = Line(label, self.over(0, values), self.over(1, values))
            if line.early.value == line.early.value:
                yield line

    def rows_of(self, quantity: str) -> list[Row]:
        """Rows of one quantity, all layers and steps."""
        return [row for row in self.layers if row["quantity"] == quantity]

    def over(self, window: int, series: dict[int, float]) -> Estimate:
        """Mean and standard error over the records of a window, 0 the first; NaN if there is none."""
        return mean_and_error([value for step, value in series.items() if step in self.windows[window]])


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Mean and its standard error from the spread; NaN where that needs more values."""
    if not values:
        return Estimate(float("nan"), float("nan"))
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(statistics.mean(values), error)


def by_step(rows: Iterable[Row], column: str, over: str | None = None) -> dict[int, float]:
    """A column's mean over the layers, weighted by their sizes, at every step; or the ratio of two such means."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        if column in row:
            weight = float(row.get("size", 1))
            total = sums.setdefault(row["step"], [0.0, 0.0])
            total[0] += weight * row[column]
            total[1] += weight * (row[over] if over else 1.0)
    return {step: value / weight for step, (value, weight) in sums.items()}


def _plot_plane(axes: Axes, analysis: Analysis) -> None:
    for number, (quantity, name) in enumerate(QUANTITIES.items()):
        rows = analysis.rows_of(quantity)
        for window, marker in enumerate("ov"):
            points = []
            for layer in {row["layer"]: None for row in rows}:
                own = [row for row in rows if row["layer"] == layer]
                points.append(
                    [
                        *analysis.over(window, by_step(own, "entropy")),
                        *analysis.over(window, by_step(own, "quantised_mutual_information")),
                    ]
                )
            if points:
                x, x_error, y, y_error = np.array(points).T
                axes.errorbar(
                    x,
                    y,
                    np.nan_to_num(y_error),
                    np.nan_to_num(x_error),
                    fmt=marker,
                    markersize=4,
                    linewidth=0.8,
                    color=f"C{number}",
                    alpha=0.5 + 0.5 * window,
                    label=f"{name}, {('first', 'second')[window]} half",
                )
    limit = axes.get_xlim()[1]
    axes.plot([0, limit], [0, CLAIMED_SHARE * limit], color="black", linewidth=0.8, linestyle="--", label="four fifths")
    axes.set(xlabel="entropy of one worker, bits", ylabel="shared by two workers, bits", xlim=(0, None))
    axes.legend()


def _plot_over_training(axes: Axes, analysis: Analysis) -> None:
    series = {name: analysis.rows_of(quantity) for quantity, name in QUANTITIES.items()}
    series["values at the leader's indices"] = analysis.shared
    for number, (name, rows) in enumerate(series.items()):
        _errorbar(axes, rows, "kraskov_mutual_information", name, f"C{number}", "-")
        _errorbar(axes, rows, "shuffled_mutual_information", "", f"C{number}", ":")
    axes.axvspan(0, analysis.recording.warmup_end, color="black", alpha=0.06, linewidth=0)
    axes.set(xlabel="step", ylabel="shared by two workers, bits")
    axes.legend()


def _errorbar(axes: Axes, rows: list[Row], column: str, label: str, color: str, style: str) -> None:
    values = by_step(rows, column)
    variance: dict[int, list[float]] = {}
    for row in rows:
        if column in row:
            total = variance.setdefault(row["step"], [0.0, 0.0])
            total[0] += (row.get("size", 1) * row[f"{column}_error"]) ** 2
            total[1] += row.get("size", 1)
    errors = [variance[step][0] ** 0.5 / variance[step][1] for step in values]
    axes.errorbar(
        list(values), list(values.values()), errors, color=color, linestyle=style, linewidth=1.3, label=label or None
    )


def _plot_correlations(axes: Axes, analysis: Analysis) -> None:
    for number, (quantity, name) in enumerate(QUANTITIES.items()):
        for column, style, of in (("pearson", "-", "two workers"), ("temporal_pearson", ":", "two steps")):
            series = by_step(analysis.rows_of(quantity), column)
            axes.plot(list(series), list(series.values()), color=f"C{number}", linestyle=style, label=f"{name}, {of}")
    for number, (column, name) in enumerate(
        {"pearson": "sent, leader and another", "overlap": "top-k overlap"}.items(), 2
    ):
        series = by_step(analysis.shared, column)
        axes.plot(list(series), list(series.values()), color=f"C{number}", label=name)
    axes.set(xlabel="step", ylabel="correlation, or overlap")
    axes.legend()


def _heat_map(quantity: str) -> Callable[[Axes, Analysis], None]:
    def plot(axes: Axes, analysis: Analysis) -> None:
        rows = analysis.rows_of(quantity)
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        steps = sorted({row["step"] for row in rows})
        grid = np.full((len(layers), len(steps)), np.nan)
        for row in rows:
            if "kraskov_mutual_information" in row:
                grid[layers.index(row["layer"]), steps.index(row["step"])] = row["kraskov_mutual_information"]
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
        axes.grid(False)
        axes.set_yticks(range(len(layers)), layers, fontsize=6)
        shown = range(0, len(steps), max(1, len(steps) // 6))
        axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
        axes.set(xlabel="step")
        axes.figure.colorbar(image, ax=axes, label="bits")

    return plot


def _plot_budget(axes: Axes, analysis: Analysis) -> None:
    bars: list[tuple[str, Estimate, str]] = []
    for label, column in INDEX_COLUMNS.items():
        bars.append((label, analysis.over(1, by_step(analysis.indices, column)), "C0"))
    parts = {
        "leader's sign": ("sign_entropy", "sign_mutual_information"),
        "leader's magnitude": ("magnitude_bound", "magnitude_mutual_information"),
    }
    for number, (name, (column, shared)) in enumerate(parts.items(), 1):
        whole = analysis.over(1, by_step(analysis.shared, column))
        saved = analysis.over(1, by_step(analysis.shared, shared))
        bars.append((name, whole, f"C{number}"))
        error = float(np.hypot(np.nan_to_num(whole.error), np.nan_to_num(saved.error)))
        bars.append(
            (f"{name}, given one more worker's", Estimate(max(0.0, whole.value - saved.value), error), f"C{number}")
        )
    for name, column in (
        ("another's value", "alone_bound"),
        ("another's value, given the leader's", "given_leader_bound"),
    ):
        bars.append((name, analysis.over(1, by_step(analysis.shared, column)), "C3"))
    bars = [bar for bar in bars if bar[1].value == bar[1].value][::-1]
    errors = [float(np.nan_to_num(estimate.error)) for _, estimate, _ in bars]
    axes.barh(
        [label for label, _, _ in bars],
        [estimate.value for _, estimate, _ in bars],
        xerr=errors,
        color=[color for _, _, color in bars],
        height=0.7,
    )
    for place, (_, estimate, _) in enumerate(bars):
        axes.text(estimate.value + 0.15, place, f"{estimate.value:.2f}", va="center", fontsize=9)
    axes.tick_params(axis="y", labelsize=9)
    axes.margins(x=0.12)
    axes.set(xlabel="bits per entry")


FIGURES: list[tuple[str, str, Callable[[Axes, Analysis], None], tuple[float, float]]] = [
    (
        "Information plane",
        f"A point is a layer: entropy of a worker's values, quantised to {PLANE_ERROR:.0%} relative squared error, "
        "against what two workers share, both quantised so. Bars: standard error over the records.",
        _plot_plane,
        (5.6, 3.9),
    ),
    (
        "Redundancy over training",
        "Kraskov's mutual information of two workers, mean over the layers weighted by size; dotted: the same values "
        "in another order, which share nothing. Bars: the estimator's standard error. Grey: rate warm-up.",
        _plot_over_training,
        (5.6, 3.9),
    ),
    ("Correlations", "Pearson's, mean over the layers weighted by size.", _plot_correlations, (5.6, 3.9)),
    (
        "Bits per entry",
        "Second half of the run. Index: code length given each kind of knowledge, with densities learned from the "
        f"records before. Leader's magnitude: Shannon's lower bound at {VALUE_ERROR:.0%} relative squared error; "
        "another's value: what is enough for it. Bars: standard error over the records.",
        _plot_budget,
        (5.6, 4.6),
    ),
    ("Gradients, by layer", "Shared by two workers (Kraskov).", _heat_map("gradient"), (5.6, 4.6)),
    ("Accumulators, by layer", "Shared by two workers (Kraskov).", _heat_map("accumulator"), (5.6, 4.6)),
]


def _format(estimate: Estimate) -> str:
    value, error = estimate
    return f"{value:.3f}" if error != error else f"{value:.3f} ± {error:.3f}"
