"""Finished runs side by side: a table for the terminal, a page with figures for the browser."""

from __future__ import annotations

import json
import math
import numbers
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from lgc.choice.cost import parse_rate
from lgc_lab.folder import read_objects, write_whole
from lgc_lab.terminal import aligned
from lgc_lab.training.run_folder import METRICS, SUMMARY

RATIOS = ("wire.ratio", "wire.ratio_compressed_phase", "wire.paper.ratio_compressed_phase")
SUMMARY_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "scheme", "label", "metric.name", "metric.better", "time.started"), (str,)),
    **dict.fromkeys(("configuration.recipe", "configuration.scheme", "versions.lgc", "versions.torch"), (str,)),
    **dict.fromkeys(("steps", "parameters", "world_size", "wire.sent_bytes", "wire.received_bytes"), (int,)),
    **dict.fromkeys(("configuration.seed", "configuration.world_size"), (int,)),
    **dict.fromkeys(("world_sizes", "wire.phases"), (list,)),
    **dict.fromkeys(("metric.value", "time.wall_s"), (numbers.Real,)),
    **dict.fromkeys(RATIOS, (numbers.Real, type(None))),
}  # what a report needs
ARROWS = {"higher": "↑", "lower": "↓"}
Series = tuple[list[float], list[float]]


class LineRate(NamedTuple):
    """The speed of a network link in each direction, headers and all."""

    text: str
    bits_per_second: float

    @classmethod
    def parse(cls, text: str) -> LineRate:
        """A rate from a number with one of the units kbit, mbit, gbit (per second), such as "100mbit".

        Raises:
            ValueError: if it is not that.
        """
        rate = parse_rate("link", text)
        number, unit = re.split("(?=[a-z])", text.lower(), maxsplit=1)
        return cls(f"{float(number):g} {unit.capitalize()}/s", rate)


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
        summary = read_objects(folder / SUMMARY)[0]
        rows = read_objects(folder / METRICS)
        for name, kinds in SUMMARY_TYPES.items():
            value: Any = summary
            for key in name.split("."):
                if not isinstance(value, dict) or key not in value:
                    raise ValueError(f"{folder / SUMMARY} has no {name}.")
                value = value[key]
            if not isinstance(value, kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{folder / SUMMARY}: {name} must be {expected}, got {value!r:.100}.")
        if not rows:
            raise ValueError(f"{folder / METRICS} has no rows.")
        return cls(folder, summary, rows)

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings it ran with."""
        return dict(self.summary["configuration"])

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for runs to be on one line: the configuration but for the seed, changes of it included."""
        sizes = self.summary["world_sizes"]
        changed = {"world_sizes": sizes} if len(sizes) > 1 else {}
        return {key: value for key, value in self.configuration.items() if key != "seed"} | changed

    @property
    def metric(self) -> str:
        """Name of the recipe's metric."""
        return str(self.summary["metric"]["name"])

    @property
    def better(self) -> str:
        """Which of two values of the metric is the better one: the higher or the lower."""
        return str(self.summary["metric"]["better"])

    @property
    def command(self) -> str:
        """The command that repeats the run, with the scheme as asked for; a comment where no command does."""
        options = {"recipe": self.configuration["recipe"], "scheme": self.summary["label"]}
        options |= {"workers": self.configuration["world_size"]}
        options |= {
            name.replace("_", "-"): value
            for name, value in self.configuration.items()
            if name not in ("recipe", "scheme", "world_size", "source", "version") and value not in (None, False)
        }
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        command = shlex.join(["lgc", "train", *words, "--out=OUT"])
        sizes = self.summary["world_sizes"]
        changes = ", ".join(f"{size} from step {step} on" for step, size in sizes)
        return command if len(sizes) == 1 else f"# no command repeats a run whose number of ranks changed ({changes})"

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
    """One line of the table: runs that differ in their seed alone."""

    recipe: str
    label: str  # the scheme as it was asked for, and what else tells the line from others of the recipe
    runs: list[Run]

    @property
    def values(self) -> list[float]:
        """The metric of every run."""
        return [float(run.summary["metric"]["value"]) for run in self.runs]

    def cells(self) -> list[str]:
        """As text, in the order of `COLUMNS`."""
        diverged = not all(map(math.isfinite, self.values))
        spread = f" ± {math.nan if diverged else statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
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


def load_runs(folders: Iterable[Path], unreadable: Callable[[ValueError], object] | None = None) -> list[Run]:
    """The finished runs of these folders, of one run each.

    Args:
        folders: of the runs.
        unreadable: is told of a run that cannot be read, which is then left out; None raises.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    runs = []
    for folder in folders:
        try:
            runs.append(Run.load(folder))
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable(error)
    return runs


def find_runs(folders: Iterable[Path], unreadable: Callable[[ValueError], object] | None = None) -> list[Run]:
    """As `load_runs`, in these folders and below, each once; below one folder in the order they were started."""
    runs: dict[Path, Run] = {}
    for folder in folders:
        below = load_runs((path.parent for path in sorted(folder.rglob(SUMMARY))), unreadable)
        for run in sorted(below, key=lambda run: str(run.summary["time"]["started"])):
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values())


def repeated(runs: Sequence[Run]) -> list[Run]:
    """Those of which an earlier one has the same settings and seed; neither the table nor the page has them."""
    shown = {id(run) for lines in by_recipe(runs).values() for line in lines for run in line.runs}
    return [run for run in runs if id(run) not in shown]


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """The lines of every recipe, in the order of their first runs; of runs that repeat each other the first one."""
    recipes: dict[str, dict[str, dict[int, Run]]] = {}
    for run in runs:
        lines = recipes.setdefault(run.configuration["recipe"], {})
        seeds = lines.setdefault(json.dumps(run.conditions, sort_keys=True), {})
        seeds.setdefault(run.configuration["seed"], run)
    grouped = {recipe: [list(seeds.values()) for seeds in lines.values()] for recipe, lines in recipes.items()}
    return {
        recipe: [Line(recipe, label, runs) for label, runs in zip(_labels(lines), lines, strict=True)]
        for recipe, lines in grouped.items()
    }


def _labels(lines: list[list[Run]]) -> list[str]:
    """The scheme as it was asked for, in full where that is not enough, and the other settings that lines differ in."""
    firsts = [runs[0] for runs in lines]
    fields = sorted({field for run in firsts for field in run.conditions} - {"scheme", "recipe"})
    differing = [name for name in fields if len({json.dumps(run.conditions.get(name)) for run in firsts}) > 1]
    labels = []
    for run in firsts:
        asked, full = run.summary["label"], run.conditions["scheme"]
        ambiguous = {other.conditions["scheme"] for other in firsts if other.summary["label"] == asked} != {full}
        settings = [f"{name}={run.conditions[name]}" for name in differing if run.conditions.get(name) is not None]
        labels.append(", ".join([full if ambiguous else asked, *settings]))
    return labels


def format_table(runs: Sequence[Run]) -> str:
    """The table as aligned text, one block a recipe."""
    blocks = []
    for recipe, lines in by_recipe(runs).items():
        table = [_columns(lines), *(line.cells() for line in lines)]
        blocks.append(f"{recipe}, {_setting(lines)}\n{aligned(table)}")
    return "\n\n".join(blocks)


def write_report(runs: Sequence[Run], page: Path, links: Sequence[LineRate] = ()) -> None:
    """One HTML page that holds everything it shows; opens without a network.

    Args:
        runs: what it is about.
        page: the file.
        links: speeds to predict the time for.
    """
    import jinja2  # here, as the figures, because most commands need neither

    from lgc_lab.report.figures import draw_figures

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("lgc_lab.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    recipes = [
        {
            "name": recipe,
            "setting": _setting(lines),
            "columns": _columns(lines),
            "rows": [line.cells() for line in lines],
            "figures": draw_figures(lines, list(links)),
            "commands": [run.command for line in lines for run in line.runs],
            "versions": _versions(lines),
            "better": lines[0].runs[0].better,
        }
        for recipe, lines in by_recipe(runs).items()
    ]
    write_whole(page, template.render(recipes=recipes))


def _columns(lines: list[Line]) -> list[str]:
    run = lines[0].runs[0]
    return [column or f"{run.metric} {ARROWS[run.better]}" for column in COLUMNS]


def _setting(lines: list[Line]) -> str:
    def numbers(key: str) -> str:
        return " or ".join(
            f"{number:,}" for number in sorted({run.summary[key] for line in lines for run in line.runs})
        )

    return f"{numbers('parameters')} parameters, {numbers('world_size')} ranks, {numbers('steps')} steps"


def _versions(lines: list[Line]) -> str:
    def of(package: str) -> str:
        found = {str(run.summary["versions"][package]) for line in lines for run in line.runs}
        return f"{package} {' or '.join(sorted(found))}"

    return f"{of('lgc')}, {of('torch')}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f}"


def _ratio(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.mean(known):,.1f}" if known else "-"
