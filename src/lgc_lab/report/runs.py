"""Finished runs: what each has left, and which of them belong together."""

from __future__ import annotations

import json
import math
import operator
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

from lgc.choice.cost import PAYLOAD
from lgc_lab.folder import read_objects
from lgc_lab.terminal import notify
from lgc_lab.training.run_folder import METRICS, SUMMARY

RATIOS = ("wire.ratio", "wire.ratio_compressed_phase", "wire.paper.ratio_compressed_phase")
NEEDED = (  # of a summary, for a report
    *("recipe", "scheme", "label", "steps", "parameters", "world_size", "world_sizes", "wire.phases", *RATIOS),
    *("wire.sent_bytes", "wire.received_bytes", "metric.name", "metric.value", "metric.better", "time.started"),
    *("time.wall_s", "time.train_s", "versions.lgc", "versions.torch"),
    *("configuration.recipe", "configuration.scheme", "configuration.seed", "configuration.world_size"),
)
Row = Mapping[str, Any]
PACE = ("world_sizes", "world_size", "batch_size", "data", "backbone", "memory_format", "bf16", "compile")
NOT_OPTIONS = ("memory_format", "source", "version")  # of a configuration: what follows from the rest
Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """Run as its folder has it."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl, one a step and one an evaluation

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder. Raises ValueError, naming the file and what is wrong with it."""
        run = cls(folder, read_objects(folder / SUMMARY)[0], read_objects(folder / METRICS))
        for name in NEEDED:
            try:
                run.value(name)
            except (KeyError, TypeError):
                raise ValueError(f"{folder / SUMMARY} has no {name}.") from None
        if not run.rows:
            raise ValueError(f"{folder / METRICS} has no rows.")
        return run

    def value(self, name: str) -> Any:
        """Find a value of the summary, such as "metric.value"."""
        return reduce(operator.getitem, name.split("."), self.summary)

    @property
    def configuration(self) -> dict[str, Any]:
        """Settings that it ran with."""
        return dict(self.summary["configuration"])

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions that runs on one line share: the configuration but for the seed, changes of it included."""
        sizes = self.summary["world_sizes"]
        changed = {"world_sizes": sizes} if len(sizes) > 1 else {}
        return {key: value for key, value in self.configuration.items() if key != "seed"} | changed

    @property
    def pace(self) -> str:
        """What decides how long a step computes, but for the scheme."""
        return json.dumps([self.conditions.get(name) for name in PACE])

    @property
    def metric(self) -> str:
        """Name of the recipe's metric."""
        return str(self.summary["metric"]["name"])

    @property
    def better(self) -> str:
        """Better one of two values of the metric: the "higher" or the "lower"."""
        return str(self.summary["metric"]["better"])

    def is_as_good(self, value: float, target: float) -> bool:
        """Compare two values of the metric; NaN is as good as nothing."""
        return value >= target if self.better == "higher" else value <= target

    @property
    def command(self) -> str:
        """Command that repeats the run, with the scheme as asked for; a comment where no command does."""
        sizes = self.summary["world_sizes"]
        if len(sizes) > 1:
            changes = ", ".join(f"{size} from step {step} on" for step, size in sizes)
            return f"# no command repeats a run whose number of ranks changed ({changes})"
        left = {name: value for name, value in self.configuration.items() if name not in NOT_OPTIONS}
        options = {"recipe": left.pop("recipe"), "scheme": self.summary["label"], "workers": left.pop("world_size")}
        del left["scheme"]
        options |= {name.replace("_", "-"): value for name, value in left.items() if value not in (None, False)}
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        return shlex.join(["lgc", "train", *words, "--out=OUT"])

    def series(self, x: Callable[[Row], float], y: str) -> Series:
        """Extract a column of the rows that have it, over what `x` makes of each and of the last of other columns."""
        seen: dict[str, Any] = defaultdict(float)
        series: Series = ([], [])
        for row in self.rows:
            seen.update(row)
            if y in row:
                series[0].append(x(seen))
                series[1].append(row[y])
        return series


class Line(NamedTuple):
    """Line of the table and of the figures: runs that differ in their seed alone."""

    recipe: str
    label: str  # the scheme as it was asked for, and what else tells the line from others of the recipe
    runs: list[Run]
    step_seconds: float  # of a step: the median over the recipe's runs of the same pace, whatever their schemes

    def seconds(self, row: Row, link: float) -> float:
        """Predict the seconds from the start to a row, on a link of so many bits per second each way.

        Every step takes `step_seconds`, which no load of the machine during one of the runs changes, and then the
        larger of what rank 0 sends and receives, with headers. Latency is left out, and so is overlap.
        """
        moved = max(row["rank0_sent_bytes"], row["rank0_received_bytes"])
        return float((row["step"] + 1) * self.step_seconds + 8 * moved / (PAYLOAD * link))

    def seconds_to(self, target: float, link: float) -> float | None:
        """Predict the seconds to the first evaluation from which on all are as good as the target, None if never.

        Of several seeds, the mean is to get there.
        """
        run, first = self.runs[0], None
        means = mean_by_point([each.series(partial(self.seconds, link=link), run.metric) for each in self.runs])
        for seconds, value in zip(*means, strict=True):
            if not run.is_as_good(value, target):
                first = None
            elif first is None:
                first = seconds
        return first


def mean_by_point(all_series: Sequence[Series]) -> Series:
    """Average both coordinates, point by point, as far as all go."""
    xs = [statistics.mean(values) for values in zip(*(xs for xs, _ in all_series), strict=False)]
    ys = [math.fsum(values) / len(values) for values in zip(*(ys for _, ys in all_series), strict=False)]
    return xs, ys


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Load the finished runs of these folders, of one run each; what cannot be read is left out, with a warning."""
    runs = []
    for folder in folders:
        try:
            runs.append(Run.load(folder))
        except ValueError as error:
            notify(f"WARNING: left out: {error}")
    return runs


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Load the finished runs in these folders and below, as `load_runs`; below a folder in the order of their start.

    Of those of the same settings and seed the first one, with a warning.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        below = load_runs(path.parent for path in sorted(folder.rglob(SUMMARY)))
        for run in sorted(below, key=lambda run: str(run.value("time.started"))):
            first = runs.setdefault(json.dumps([run.conditions, run.configuration["seed"]], sort_keys=True), run)
            if first.folder.resolve() != run.folder.resolve():
                notify(f"WARNING: left out: {run.folder} has the settings and the seed of a run before it.")
    return list(runs.values())


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Group runs into the lines of every recipe, in the order of their first ones."""
    recipes: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        lines = recipes.setdefault(run.configuration["recipe"], {})
        lines.setdefault(json.dumps(run.conditions, sort_keys=True), []).append(run)
    return {recipe: _lines(recipe, [*lines.values()]) for recipe, lines in recipes.items()}


def _lines(recipe: str, lines: list[list[Run]]) -> list[Line]:
    steps = defaultdict(list)
    for run in (run for runs in lines for run in runs):
        steps[run.pace].append(run.value("time.train_s") / run.value("steps"))
    return [
        Line(recipe, label, runs, statistics.median(steps[runs[0].pace]))
        for label, runs in zip(_labels(lines), lines, strict=True)
    ]


def _labels(lines: list[list[Run]]) -> list[str]:
    """Label lines by the scheme as asked for, in full where that is not enough, and what other settings differ."""
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
