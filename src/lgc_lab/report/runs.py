"""Finished runs: what each has left, and which of them belong together."""

from __future__ import annotations

import json
import numbers
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lgc_lab.folder import read_objects
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
        sizes = self.summary["world_sizes"]
        if len(sizes) > 1:
            changes = ", ".join(f"{size} from step {step} on" for step, size in sizes)
            return f"# no command repeats a run whose number of ranks changed ({changes})"
        options = {"recipe": self.configuration["recipe"], "scheme": self.summary["label"]}
        options |= {"workers": self.configuration["world_size"]}
        options |= {
            name.replace("_", "-"): value
            for name, value in self.configuration.items()
            if name not in ("recipe", "scheme", "world_size", "source", "version") and value not in (None, False)
        }
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        return shlex.join(["lgc", "train", *words, "--out=OUT"])

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
    """One line of the table and of the figures: runs that differ in their seed alone."""

    recipe: str
    label: str  # the scheme as it was asked for, and what else tells the line from others of the recipe
    runs: list[Run]


def load_runs(folders: Iterable[Path], unreadable: Callable[[ValueError], object] | None = None) -> list[Run]:
    """Load the finished runs of these folders, of one run each.

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
    """Runs of which an earlier one has the same settings and seed; they are on no line."""
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
