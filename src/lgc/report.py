"""Finished runs side by side: a table for the terminal, a page with figures for the browser."""

from __future__ import annotations

import io
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lgc.run_folder import METRICS, SUMMARY
from lgc.schedule import Phase
from lgc.wire import SETUP

LINK_BITS_PER_SECOND = 100e6
SMOOTHING = 10
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """What one run left in its folder."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl, one a step and one an evaluation

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not the folder of a finished run: {error}") from None
        missing = {"recipe", "scheme", "metric", "wire", "time", "configuration"} - set(summary)
        if missing:
            raise ValueError(f"{folder / SUMMARY} has no {', '.join(sorted(missing))}.")
        return cls(folder, summary, rows)

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings it ran with."""
        return dict(self.summary["configuration"])

    @property
    def label(self) -> str:
        """The scheme as it was asked for."""
        return str(self.summary["label"])

    @property
    def metric(self) -> str:
        """Name of the recipe's metric."""
        return str(self.summary["metric"]["name"])

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        options = {
            "recipe": self.summary["recipe"],
            "scheme": self.configuration["scheme"],
            "workers": self.configuration["world_size"],
        }
        options |= {
            name.replace("_", "-"): value
            for name, value in self.configuration.items()
            if name not in ("recipe", "scheme", "world_size", "version") and value is not None
        }
        return shlex.join(["lgc", "train", *(f"--{name}={value}" for name, value in options.items()), "--out=OUT"])

    def series(self, x: str, y: str) -> Series:
        """Two columns of the rows that have the second; the first is carried on from the last row that had it."""
        xs: list[float] = []
        ys: list[float] = []
        last = 0.0
        for row in self.rows:
            last = row.get(x, last)
            if y in row:
                xs.append(last)
                ys.append(row[y])
        return xs, ys


class Line(NamedTuple):
    """One line of the table: the runs of one scheme that differ in their seed alone."""

    recipe: str
    label: str
    runs: list[Run]

    @property
    def values(self) -> list[float]:
        """The metric of every run."""
        return [float(run.summary["metric"]["value"]) for run in self.runs]

    def cells(self) -> list[str]:
        """As text, in the order of `COLUMNS`."""
        spread = f" ± {statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
        wire = [run.summary["wire"] for run in self.runs]
        ranks = self.runs[0].summary["world_size"]
        return [
            self.label,
            f"{statistics.mean(self.values):.2f}{spread}",
            str(len(self.runs)),
            _megabytes(statistics.mean((w["sent_bytes"] + w["received_bytes"]) / ranks for w in wire)),
            _ratio([w["ratio"] for w in wire]),
            _ratio([w["ratio_compressed_phase"] for w in wire]),
            _ratio([w["paper"]["ratio_compressed_phase"] for w in wire]),
            f"{statistics.mean(run.summary['time']['wall_s'] for run in self.runs):.0f} s",
        ]


COLUMNS = ["scheme", "", "seeds", "MB per rank", "ratio, run", "ratio, compressed", "uploads only", "time"]


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All finished runs in these folders and below, each once, in the order of the folders' names."""
    found = {path.resolve(): path.parent for folder in folders for path in sorted(folder.rglob(SUMMARY))}
    return [Run.load(folder) for folder in found.values()]


def group(runs: Sequence[Run]) -> list[Line]:
    """Runs of the same settings but for the seed, together."""
    lines: dict[str, Line] = {}
    for run in runs:
        settings = {key: value for key, value in run.configuration.items() if key != "seed"}
        key = json.dumps(settings, sort_keys=True)
        lines.setdefault(key, Line(run.summary["recipe"], run.label, [])).runs.append(run)
    return list(lines.values())


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """The lines of every recipe."""
    recipes: dict[str, list[Line]] = {}
    for line in group(runs):
        recipes.setdefault(line.recipe, []).append(line)
    return recipes


def format_table(runs: Sequence[Run]) -> str:
    """The table as aligned text, one block a recipe."""
    blocks = []
    for recipe, lines in by_recipe(runs).items():
        table = [_columns(lines), *(line.cells() for line in lines)]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        blocks.append("\n".join([f"{recipe}, {_setting(lines)}", *text]))
    return "\n\n".join(blocks)


def write_report(runs: Sequence[Run], page: Path) -> None:
    """One HTML page that holds everything it shows; opens without a network."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("lgc").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    recipes = [
        {
            "name": recipe,
            "setting": _setting(lines),
            "columns": _columns(lines),
            "rows": [line.cells() for line in lines],
            "figures": _figures(lines),
            "commands": [run.command for line in lines for run in line.runs],
            "versions": lines[0].runs[0].summary["versions"],
        }
        for recipe, lines in by_recipe(runs).items()
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(template.render(recipes=recipes), encoding="utf-8")


def _columns(lines: list[Line]) -> list[str]:
    return [column or lines[0].runs[0].metric for column in COLUMNS]


def _setting(lines: list[Line]) -> str:
    run = lines[0].runs[0]
    return (
        f"{run.summary['parameters']:,} parameters, {run.summary['world_size']} ranks, {run.summary['steps']:,} steps"
    )


def _figures(lines: list[Line]) -> list[dict[str, str]]:
    metric = lines[0].runs[0].metric
    figures = [
        ("Against steps", f"{metric} on the test data after every epoch; every seed is a line.", _plot_steps),
        ("Against bytes", "The same over what rank 0 has sent and received by then.", _plot_bytes),
        (
            f"Against time on a link of {LINK_BITS_PER_SECOND / 1e6:g} Mbit/s",
            "Predicted: this machine's time, plus rank 0's bytes (the larger of sent and received) over the link.",
            _plot_time,
        ),
        ("Bytes by phase", "Sent and received by all ranks, mean over the seeds.", _plot_phases),
    ]
    if any(run.series("step", "autoencoder_loss")[0] for line in lines for run in line.runs):
        figures += [
            ("Loss of the autoencoder", f"At rank 0, while it is trained. Mean of {SMOOTHING} steps.", _plot_loss),
            (
                "What the autoencoder loses",
                "Squared error of its reconstruction over the squared values, at rank 0; 1 is as bad as sending "
                f"nothing. Mean of {SMOOTHING} steps.",
                _plot_reconstruction,
            ),
        ]
    return [
        {"title": title, "caption": caption, "svg": _svg(f"{lines[0].recipe} {title}", plot, lines)}
        for title, caption, plot in figures
    ]


def _svg(name: str, plot: Any, lines: list[Line]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained")
        axes = figure.subplots()
        plot(axes, lines)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _plot(axes: Axes, lines: list[Line], series: Callable[[Run], Series]) -> None:
    for number, line in enumerate(lines):
        for i, run in enumerate(line.runs):
            xs, ys = series(run)
            if xs:
                axes.plot(xs, ys, color=f"C{number}", linewidth=1.4, alpha=0.9, label="" if i else line.label)
    axes.legend()


def _plot_steps(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda run: run.series("step", run.metric))
    axes.set(xlabel="step", ylabel=lines[0].runs[0].metric)


def _plot_bytes(axes: Axes, lines: list[Line]) -> None:
    def series(run: Run) -> Series:
        sent, values = run.series("rank0_sent_bytes", run.metric)
        received, _ = run.series("rank0_received_bytes", run.metric)
        return [(a + b) / 1e6 for a, b in zip(sent, received, strict=True)], values

    _plot(axes, lines, series)
    axes.set(xlabel="MB of rank 0", ylabel=lines[0].runs[0].metric, xscale="log")


def _plot_time(axes: Axes, lines: list[Line]) -> None:
    def series(run: Run) -> Series:
        seconds, values = run.series("seconds", run.metric)
        sent, _ = run.series("rank0_sent_bytes", run.metric)
        received, _ = run.series("rank0_received_bytes", run.metric)
        on_link = [8 * max(a, b) / LINK_BITS_PER_SECOND for a, b in zip(sent, received, strict=True)]
        return [a + b for a, b in zip(seconds, on_link, strict=True)], values

    _plot(axes, lines, series)
    axes.set(xlabel="seconds", ylabel=lines[0].runs[0].metric, xscale="log")


def _plot_phases(axes: Axes, lines: list[Line]) -> None:
    names = [SETUP, *Phase]
    for position, name in enumerate(names):
        heights = [statistics.mean(_phase_bytes(run, name) for run in line.runs) / 1e6 or math.nan for line in lines]
        places = [i + (position - (len(names) - 1) / 2) * 0.16 for i in range(len(lines))]
        axes.bar(places, heights, width=0.16, label=name)
    axes.set(ylabel="MB, all ranks", yscale="log")
    axes.set_xticks(range(len(lines)), [line.label for line in lines], rotation=20, ha="right", fontsize=9)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names), columnspacing=1, handlelength=1)


def _phase_bytes(run: Run, name: str) -> int:
    return sum(
        phase["sent_bytes"] + phase["received_bytes"]
        for phase in run.summary["wire"]["phases"]
        if phase["name"] == name
    )


def _plot_loss(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda run: _smoothed(run.series("step", "autoencoder_loss")))
    axes.set(xlabel="step", ylabel="loss", yscale="log")


def _plot_reconstruction(axes: Axes, lines: list[Line]) -> None:
    _plot(axes, lines, lambda run: _smoothed(run.series("step", "reconstruction_error")))
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
            xs.append(x)
            ys.append(math.nan)
            window = []
        window = [*window[1 - SMOOTHING :], y]
        last = x
        xs.append(x)
        ys.append(statistics.mean(window))
    return xs, ys


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f}"


def _ratio(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.mean(known):,.1f}" if known else "-"
