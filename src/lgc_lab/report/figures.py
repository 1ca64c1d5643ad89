"""Figures as SVG text, those of a report among them. Imported where one is drawn: most commands need no matplotlib."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from lgc.choice.cost import PAYLOAD, RATE_UNITS
from lgc.comm.traffic import SETUP
from lgc.phase import Phase
from lgc_lab.report.runs import Line, Run, Series

SMOOTHING = 10
LATE = 0.5  # fraction of a run's evaluations from which on the metric's axis shows all
MARGIN = 0.06
WIDTH, HEIGHT, LEGEND_ROW = 4.6, 3.0, 0.21  # inches; text keeps its size on a phone's screen
LEGEND_WIDTH, TICK_WIDTH = 52, 26  # characters
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
ZOOM = "The axis shows the later half of every run in full; what lies outside came before."


def draw(name: str, size: tuple[float, float], plot: Callable[[Figure], object]) -> str:
    """Draw a figure as an element of a page; the same bytes for the same name, size (inches) and plot."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


class Panel(NamedTuple):
    """One pair of axes over the speeds of links: the unit, and values by label, None where there is none."""

    ylabel: str
    values: dict[str, list[float | None]]


def draw_against_links(name: str, speeds: list[float | None], panels: list[Panel]) -> str:
    """Draw one panel below the other, both axes logarithmic, as SVG.

    Args:
        name: the figure's, for its ids.
        speeds: bits per second of the links, ascending; None is a link that is not limited, drawn at the right.
        panels: with one value a speed for every label.
    """
    known = [speed for speed in speeds if speed is not None]
    limitless = 10 * max(known, default=1e9)
    xs = [limitless if speed is None else speed for speed in speeds]

    def plot(figure: Figure) -> None:
        for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
            for label, values in panel.values.items():
                axes.plot(xs, [math.nan if value is None else value for value in values], marker="o", label=label)
            axes.set(ylabel=panel.ylabel, xscale="log", yscale="log")
            _label_plainly(axes.yaxis)
        axes.set_xticks(xs, ["unlimited" if speed is None else _speed(speed) for speed in speeds])
        axes.set_xlabel("link")
        axes.xaxis.set_minor_locator(NullLocator())
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, handlelength=1.4)

    rows = math.ceil(len(panels[0].values) / 2)
    return draw(name, (WIDTH, HEIGHT * len(panels) + LEGEND_ROW * rows), plot)


def _speed(bits_per_second: float) -> str:
    units = reversed(RATE_UNITS.items())
    unit, size = next((unit, size) for unit, size in units if bits_per_second >= size or size == 1e3)
    return f"{bits_per_second / size:g} {unit.capitalize()}/s"


def draw_figures(lines: list[Line], links: Sequence[float]) -> list[dict[str, str]]:
    """Draw all figures of one recipe: title, caption and svg.

    Args:
        lines: of the recipe.
        links: bits per second of those to predict the time on.
    """
    metric = lines[0].runs[0].metric
    runs = [run for line in lines for run in line.runs]
    seeds = " Thick: mean over the seeds; thin: each seed." if len(runs) > len(lines) else ""
    has_bytes = any(_phase_bytes(run, name) for run in runs for name in (SETUP, *Phase))
    figures: list[dict[str, str]] = []

    def add(title: str, caption: str, plot: Callable[[Axes, list[Line]], None]) -> None:
        svg = _with_legend(f"{lines[0].recipe} {title}", lines, plot)
        figures.append({"title": title, "caption": caption, "svg": svg})

    add("Against steps", f"Test {metric} after every epoch.{seeds} {ZOOM}", _steps)
    if has_bytes:
        add("Against bytes", "The same over what rank 0 has sent and received by then.", _bytes)
    for link in links:
        add(
            f"Against time on a link of {_speed(link)}",
            "Predicted: this machine's time, plus rank 0's bytes (the larger of sent and received) "
            "and their headers over the link.",
            partial(_time, link),
        )
    if has_bytes:
        add("Bytes by phase", "Sent and received by all ranks, mean over the seeds.", _phases)
    if any(run.series("step", "autoencoder_loss")[0] for run in runs):
        add("Loss of the autoencoder", f"At rank 0, while it is trained. Mean of {SMOOTHING} steps.{seeds}", _loss)
        add(
            "What the autoencoder loses",
            "Squared error of its reconstruction over the squared values, at rank 0; 1 is as bad as sending "
            f"nothing. Mean of {SMOOTHING} steps.{seeds}",
            _reconstruction,
        )
    return figures


def _with_legend(name: str, lines: list[Line], plot: Callable[[Axes, list[Line]], None]) -> str:
    longest = max(len(line.label) for line in lines)
    columns = 3 if longest <= 12 else 2 if longest <= 24 else 1
    rows = sum(_wrapped(line.label, LEGEND_WIDTH).count("\n") + 1 for line in lines)

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        plot(axes, lines)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.4, columnspacing=1.2)

    return draw(name, (WIDTH, HEIGHT + LEGEND_ROW * math.ceil(rows / columns)), fill)


def _wrapped(label: str, width: int) -> str:
    """A label on as many lines as it takes, broken between the arguments of the scheme."""
    rows = [""]
    for part in re.split(r"(?<=[:,])", label):
        if rows[-1] and len(rows[-1]) + len(part) > width:
            rows.append("")
        rows[-1] += part
    return "\n".join(rows).replace("$", r"\$")  # no formulas


def _mean_by_point(all_series: list[Series]) -> Series:
    """The mean of both coordinates, point by point, as far as all go."""
    xs = [statistics.mean(values) for values in zip(*(xs for xs, _ in all_series), strict=False)]
    ys = [math.fsum(values) / len(values) for values in zip(*(ys for _, ys in all_series), strict=False)]
    return xs, ys


def _mean_by_step(all_series: list[Series]) -> Series:
    """The mean at every step that all have, with a gap in place of others."""
    values = [dict(zip(xs, ys, strict=True)) for xs, ys in all_series]
    steps = sorted(set().union(*values))
    return steps, [math.fsum(of.get(step, math.nan) for of in values) / len(values) for step in steps]


def _plot(
    axes: Axes,
    lines: list[Line],
    series: Callable[[Run], Series],
    mean: Callable[[list[Series]], Series] = _mean_by_point,
) -> None:
    for number, line in enumerate(lines):
        color = f"C{number}"
        all_series = [found for run in line.runs if (found := series(run))[0]]
        if len(all_series) > 1:
            for xs, ys in all_series:
                axes.plot(xs, ys, color=color, linewidth=0.7, alpha=0.5)
        if all_series:
            xs, ys = mean(all_series)
            axes.plot(xs, ys, color=color, linewidth=1.8, label=_wrapped(line.label, LEGEND_WIDTH))


def _plot_metric(axes: Axes, lines: list[Line], series: Callable[[Run], Series], xlabel: str, xscale: str) -> None:
    _plot(axes, lines, series)
    run = lines[0].runs[0]
    late = [
        value
        for line in lines
        for run in line.runs
        for values in [series(run)[1]]
        for value in values[int(LATE * len(values)) :]
        if math.isfinite(value)
    ]
    axes.set(xlabel=xlabel, ylabel=f"{run.metric} ({run.better} is better)", xscale=xscale)
    if xscale == "log":
        _label_plainly(axes.xaxis)
    if late and max(late) > min(late):
        margin = MARGIN * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    if any(len(series(run)[0]) == 1 for line in lines for run in line.runs):
        for drawn in axes.lines:
            drawn.set_marker("o")


def _label_plainly(axis: Axis) -> None:
    """Decimal numbers on a logarithmic axis: as many to a decade as its span leaves room for."""
    low, high = axis.get_view_interval()
    steps = (
        (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0) if high < 5 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    )
    axis.set_major_locator(LogLocator(subs=steps, numticks=6))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _steps(axes: Axes, lines: list[Line]) -> None:
    _plot_metric(axes, lines, lambda run: run.series("step", run.metric), "step", "linear")


def _bytes(axes: Axes, lines: list[Line]) -> None:
    def series(run: Run) -> Series:
        sent, values = run.series("rank0_sent_bytes", run.metric)
        received, _ = run.series("rank0_received_bytes", run.metric)
        return [(a + b) / 1e6 for a, b in zip(sent, received, strict=True)], values

    _plot_metric(axes, lines, series, "MB of rank 0", "log")


def _time(bits_per_second: float, axes: Axes, lines: list[Line]) -> None:
    def series(run: Run) -> Series:
        seconds, values = run.series("seconds", run.metric)
        sent, _ = run.series("rank0_sent_bytes", run.metric)
        received, _ = run.series("rank0_received_bytes", run.metric)
        on_link = [8 * max(a, b) / (PAYLOAD * bits_per_second) for a, b in zip(sent, received, strict=True)]
        return [a + b for a, b in zip(seconds, on_link, strict=True)], values

    _plot_metric(axes, lines, series, "seconds", "log")


def _phases(axes: Axes, lines: list[Line]) -> None:
    names = [SETUP, *Phase]
    thickness = 0.16
    for position, name in enumerate(names):
        widths = [statistics.mean(_phase_bytes(run, name) for run in line.runs) / 1e6 or math.nan for line in lines]
        places = [i + (position - (len(names) - 1) / 2) * thickness for i in range(len(lines))]
        axes.barh(places, widths, height=thickness, label=name)
    axes.set(xlabel="MB, all ranks", xscale="log")
    _label_plainly(axes.xaxis)
    axes.set_yticks(range(len(lines)), [_wrapped(line.label, TICK_WIDTH) for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _phase_bytes(run: Run, name: str) -> int:
    return sum(
        phase["sent_bytes"] + phase["received_bytes"]
        for phase in run.summary["wire"]["phases"]
        if phase["name"] == name
    )


def _loss(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda run: _smoothed(run.series("step", "autoencoder_loss")), _mean_by_step)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    _label_plainly(axes.yaxis)


def _reconstruction(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda run: _smoothed(run.series("step", "reconstruction_error")), _mean_by_step)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="relative squared error", ylim=(0, None))


def _smoothed(series: Series) -> Series:
    """Means of `SMOOTHING` consecutive steps, with a gap where there are none."""
    xs: list[float] = []
    ys: list[float] = []
    window: list[float] = []
    last = None
    for x, y in zip(*series, strict=True):
        if last is not None and x != last + 1:
            xs.append(last + 1)
            ys.append(math.nan)
            window = []
        window = [*window[1 - SMOOTHING :], y]
        last = x
        xs.append(x)
        ys.append(statistics.mean(window))
    return xs, ys
