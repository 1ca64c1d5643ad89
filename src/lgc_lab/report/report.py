"""Finished runs side by side: a table for the terminal, a page with figures for the browser."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from lgc_lab.report.runs import RATIOS, Line, Run, by_recipe
from lgc_lab.terminal import aligned

ARROWS = {"higher": "↑", "lower": "↓"}


def format_table(runs: Sequence[Run]) -> str:
    """Format the table as aligned text, one block a recipe."""
    return "\n\n".join(
        f"{recipe}, {_setting(lines)}\n{aligned([_columns(lines), *map(_cells, lines)])}"
        for recipe, lines in by_recipe(runs).items()
    )


def write_report(runs: Sequence[Run], page: Path, links: Sequence[float] = ()) -> None:
    """Write one HTML page about these runs, with the time predicted on links of so many bits per second.

    It holds everything it shows, and opens without a network.
    """
    # Here, because most commands need none of them.
    from lgc_lab.report.figures import draw_figures, write_page
    from lgc_lab.report.opening import draw_opening

    recipes = [
        {
            "name": recipe,
            "opening": draw_opening(lines, links),
            "setting": _setting(lines),
            "columns": _columns(lines),
            "rows": [_cells(line) for line in lines],
            "figures": draw_figures(lines, links),
            "commands": [run.command for line in lines for run in line.runs],
            "versions": ", ".join(f"{package} {_either(lines, f'versions.{package}')}" for package in ("lgc", "torch")),
            "better": lines[0].runs[0].better,
        }
        for recipe, lines in by_recipe(runs).items()
    ]
    write_page(page, "report/report.html.jinja", recipes=recipes)


def _columns(lines: list[Line]) -> list[str]:
    run = lines[0].runs[0]
    metric = f"{run.metric} {ARROWS[run.better]}"
    return ["scheme", metric, "seeds", "MB per rank", "ratio, run", "ratio, compressed", "uploads only", "time"]


def _cells(line: Line) -> list[str]:
    """Format a line of the table, in the order of `_columns`."""

    def mean(name: str) -> float:
        known = [value for run in line.runs if (value := run.value(name)) is not None]
        return statistics.mean(known) if known else math.nan

    values = [float(run.value("metric.value")) for run in line.runs]
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    moved = (mean("wire.sent_bytes") + mean("wire.received_bytes")) / line.runs[0].value("world_size")
    return [
        line.label,
        f"{statistics.mean(values):.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else ""),
        str(len(values)),
        f"{moved / 1e6:,.2f}",
        *("-" if math.isnan(mean(ratio)) else f"{mean(ratio):,.1f}" for ratio in RATIOS),
        f"{mean('time.wall_s'):.0f} s",
    ]


def _setting(lines: list[Line]) -> str:
    keys = {"parameters": "parameters", "world_size": "ranks", "steps": "steps"}
    return ", ".join(f"{_either(lines, key)} {words}" for key, words in keys.items())


def _either(lines: list[Line], name: str) -> str:
    """Join the values that the summaries have of this name: "4 or 8"."""
    found = {run.value(name) for line in lines for run in line.runs}
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(found))
