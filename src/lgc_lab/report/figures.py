"""Figures as SVG text, and the pages that hold them. Imported where one is made: most commands need neither of them."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from lgc.comm.traffic import SETUP
from lgc.phase import Phase
from lgc_lab.folder import write_whole
from lgc_lab.report.runs import Line, Row, Run, Series, mean_by_point

STEP: Callable[[Row], float] = itemgetter("step")
SMOOTHING = 10
LATE = 0.5  # fraction of a run's evaluations from which on the metric's axis shows all
MARGIN = 0.06
BAR = 0.16  # thickness, where schemes are 1 apart
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
SPEED = EngFormatter("bit/s")
ZOOM = "The axis shows the later half of every run in full; what lies outside came before."
AGAINST_BYTES = "The same over what rank 0 has sent and received by then."
AGAINST_TIME = (
    "Predicted: a step takes as long as in the median run, whatever its scheme, and then as long as the larger of what "
    "rank 0 sends and receives needs at this speed, with headers. Latency, overlap, and what some schemes compute more "
    "than others, are left out."
)
RECONSTRUCTION = "Its squared error over the squared values, at rank 0; 1 is as bad as sending nothing."


def write_page(page: Path, template: str, **content: Any) -> None:
    """Write an HTML page that holds all it shows, whole or not at all; the template's path is that in this package."""
    loader = jinja2.PackageLoader("lgc_lab", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_whole(page, environment.get_template(template).render(content))


def draw(name: str, size: tuple[float, float], plot: Callable[[Figure], object]) -> str:
    """Draw a figure as an element of a page; the same bytes for the same name, size (inches) and plot."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


Curves = dict[str, list[float | None]]  # a value a speed by label, None where there is none


def draw_against_links(name: str, speeds: list[float | None], panels: dict[str, Curves]) -> str:
    """Draw curves by unit, one panel below the other, both axes logarithmic, as SVG; its ids come from the name.

    Speeds are bits per second, ascending; None is a link that is not limited, drawn at the right.
    """
    limitless = 10 * max((speed for speed in speeds if speed is not None), default=1e9)
    xs = [limitless if speed is None else speed for speed in speeds]

    def plot(figure: Figure) -> None:
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (unit, curves) in zip(all_axes, panels.items(), strict=True):
            for label, values in curves.items():
                ys = [math.nan if value is None else value for value in values]
                axes.plot(xs, ys, marker="o", label=wrapped(label, LEGEND_WIDTH))
            axes.set(ylabel=unit, xscale="log", yscale="log")
            _label_plainly(axes.yaxis)
        axes.set_xticks(xs, ["unlimited" if speed is None else SPEED(speed) for speed in speeds])
        axes.set_xlabel("link")
        axes.xaxis.set_minor_locator(NullLocator())
        _add_legend(figure, axes, columns)

    columns, height = _legend_of(next(iter(panels.values())))
    return draw(name, (WIDTH, HEIGHT * len(panels) + height), plot)


def _legend_of(labels: Collection[str]) -> tuple[int, float]:
    """Number of columns, and height in inches."""
    longest = max(map(len, labels))
    columns = 3 if longest <= 12 else 2 if longest <= 24 else 1
    rows = sum(wrapped(label, LEGEND_WIDTH).count("\n") + 1 for label in labels)
    return columns, LEGEND_ROW * math.ceil(rows / columns)


def _add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.4, columnspacing=1.2)


def draw_figures(lines: list[Line], links: Sequence[float]) -> list[dict[str, str]]:
    """Draw all figures of one recipe: title, caption and svg. `links`, in bits per second, to predict the time on."""
    runs = [run for line in lines for run in line.runs]
    seeds = " Thick: mean over the seeds; thin: each seed." if len(runs) > len(lines) else ""
    smoothed = f"Mean of {SMOOTHING} steps.{seeds}"
    plots: list[tuple[str, str, Callable[[Axes, list[Line]], None]]] = [
        ("Against steps", f"Test {runs[0].metric} after every epoch.{seeds} {ZOOM}", partial(_metric, _step, "step"))
    ]
    has_bytes = any(_phase_bytes(run, name) for run in runs for name in (SETUP, *Phase))
    if has_bytes:
        plots.append(("Against bytes", AGAINST_BYTES, partial(_metric, _megabytes, "MB of rank 0")))
    for link in links:
        title = f"Against time on a link of {SPEED(link)}"
        caption = AGAINST_TIME if link == links[0] else "The same at this speed."
        plots.append((title, caption, partial(_metric, partial(Line.seconds, link=link), "seconds")))
    if has_bytes:
        plots.append(("Bytes by phase", "Sent and received by all ranks, mean over the seeds.", _phases))
    if any(run.series(STEP, "autoencoder_loss")[0] for run in runs):
        plots.append(("Loss of the autoencoder", f"At rank 0, while it is trained. {smoothed}", _loss))
        plots.append(("What the autoencoder loses", f"{RECONSTRUCTION} {smoothed}", _reconstruction))
    return [
        {"title": title, "caption": caption, "svg": _with_legend(f"{lines[0].recipe} {title}", lines, plot)}
        for title, caption, plot in plots
    ]


def _with_legend(name: str, lines: list[Line], plot: Callable[[Axes, list[Line]], None]) -> str:
    columns, height = _legend_of([line.label for line in lines])

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        plot(axes, lines)
        _add_legend(figure, axes, columns)

    return draw(name, (WIDTH, HEIGHT + height), fill)


def wrapped(label: str, width: int) -> str:
    """Break a label into as many lines as it takes, between the arguments of the scheme."""
    rows = [""]
    for part in re.split(r"(?<=[:,+])", label):
        if rows[-1] and len(rows[-1]) + len(part) > width:
            rows.append("")
        rows[-1] += part
    return "\n".join(rows).replace("$", r"\$")  # no formulas


def _mean_by_step(all_series: list[Series]) -> Series:
    """Average at every step that all have, with a gap in place of others."""
    values = [dict(zip(xs, ys, strict=True)) for xs, ys in all_series]
    steps = sorted(set().union(*values))
    return steps, [math.fsum(of.get(step, math.nan) for of in values) / len(values) for step in steps]


def _plot(
    axes: Axes,
    lines: list[Line],
    series: Callable[[Line, Run], Series],
    mean: Callable[[list[Series]], Series],
) -> list[Series]:
    """Draw the mean of every line's runs, and each thinly where there are several; what all runs have."""
    drawn = []
    for number, line in enumerate(lines):
        found = [each for run in line.runs if (each := series(line, run))[0]]
        if len(found) > 1:
            for xs, ys in found:
                axes.plot(xs, ys, color=f"C{number}", linewidth=0.7, alpha=0.5)
        if found:
            axes.plot(*mean(found), color=f"C{number}", linewidth=1.8, label=wrapped(line.label, LEGEND_WIDTH))
        drawn += found
    return drawn


def _metric(x: Callable[[Line, Row], float], xlabel: str, axes: Axes, lines: list[Line]) -> None:
    drawn = _plot(axes, lines, lambda line, run: run.series(partial(x, line), run.metric), mean_by_point)
    run = lines[0].runs[0]
    axes.set(xlabel=xlabel, ylabel=f"{run.metric} ({run.better} is better)")
    if x is not _step:
        axes.set_xscale("log")
        _label_plainly(axes.xaxis)
    late = [value for _, ys in drawn for value in ys[int(LATE * len(ys)) :] if math.isfinite(value)]
    if late and max(late) > min(late):
        margin = MARGIN * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    if any(len(xs) == 1 for xs, _ in drawn):
        for curve in axes.lines:
            curve.set_marker("o")


def _label_plainly(axis: Axis) -> None:
    """Decimal numbers on a logarithmic axis: as many to a decade as its span leaves room for."""
    low, high = axis.get_view_interval()
    steps = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0) if high < 5 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps if high < 200 * low else (1.0,), numticks=6))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _step(_: Line, row: Row) -> float:
    return STEP(row)


def _megabytes(_: Line, row: Row) -> float:
    return float(row["rank0_sent_bytes"] + row["rank0_received_bytes"]) / 1e6


def _phases(axes: Axes, lines: list[Line]) -> None:
    names = [SETUP, *Phase]
    for position, name in enumerate(names):
        widths = [statistics.mean(_phase_bytes(run, name) for run in line.runs) / 1e6 or math.nan for line in lines]
        places = [i + (position - (len(names) - 1) / 2) * BAR for i in range(len(lines))]
        axes.barh(places, widths, height=BAR, label=name)
    axes.set(xlabel="MB, all ranks", xscale="log")
    _label_plainly(axes.xaxis)
    axes.set_yticks(range(len(lines)), [wrapped(line.label, TICK_WIDTH) for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _phase_bytes(run: Run, name: str) -> int:
    phases = [phase for phase in run.summary["wire"]["phases"] if phase["name"] == name]
    return sum(phase["sent_bytes"] + phase["received_bytes"] for phase in phases)


def _loss(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda _, run: _smoothed(run.series(STEP, "autoencoder_loss")), _mean_by_step)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    _label_plainly(axes.yaxis)


def _reconstruction(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda _, run: _smoothed(run.series(STEP, "reconstruction_error")), _mean_by_step)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="relative squared error", ylim=(0, None))


def _smoothed(series: Series) -> Series:
    """Means of `SMOOTHING` consecutive steps, with a gap where there are none."""
    xs: list[float] = []
    ys: list[float] = []
    window: deque[float] = deque(maxlen=SMOOTHING)
    for x, y in zip(*series, strict=True):
        if xs and x != xs[-1] + 1:
            xs.append(xs[-1] + 1)
            ys.append(math.nan)
            window.clear()
        window.append(y)
        xs.append(x)
        ys.append(statistics.mean(window))
    return xs, ys
