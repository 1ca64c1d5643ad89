"""Finished runs side by side: a table for the terminal, a page with figures for the browser."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgc_lab.report.runs import Line, Run, by_recipe
from lgc_lab.terminal import aligned

ARROWS = {"higher": "↑", "lower": "↓"}


def format_table(runs: Sequence[Run]) -> str:
    """The table as aligned text, one block a recipe."""
    return "\n\n".join(
        f"{recipe}, {_setting(lines)}\n{aligned([_columns(lines), *map(_cells, lines)])}"
        for recipe, lines in by_recipe(runs).items()
    )


def write_report(runs: Sequence[Run], page: Path, links: Sequence[float] = ()) -> None:
    """Write one HTML page that holds everything it shows; it opens without a network.

    Args:
        runs: what it is about.
        page: the file.
        links: speeds to predict the time for, in bits per second.
    """
    from lgc_lab.report.figures import draw_figures  # here, because most commands need neither of them
    from lgc_lab.report.page import write_page

    recipes = [
        {
            "name": recipe,
            "setting": _setting(lines),
            "columns": _columns(lines),
            "rows": [_cells(line) for line in lines],
            "figures": draw_figures(lines, links),
            "commands": [run.command for line in lines for run in line.runs],
            "versions": ", ".join(f"{package} {_either(lines, 'versions', package)}" for package in ("lgc", "torch")),
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
    """A line of the table, in the order of `_columns`."""
    values = [float(run.summary["metric"]["value"]) for run in line.runs]
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    wires = [run.summary["wire"] for run in line.runs]
    ranks = line.runs[0].summary["world_size"]
    per_rank = statistics.mean((wire["sent_bytes"] + wire["received_bytes"]) / ranks for wire in wires)
    return [
        line.label,
        f"{statistics.mean(values):.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else ""),
        str(len(values)),
        f"{per_rank / 1e6:,.2f}",
        _ratio([wire["ratio"] for wire in wires]),
        _ratio([wire["ratio_compressed_phase"] for wire in wires]),
        _ratio([wire["paper"]["ratio_compressed_phase"] for wire in wires]),
        f"{statistics.mean(run.summary['time']['wall_s'] for run in line.runs):.0f} s",
    ]


def _ratio(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.mean(known):,.1f}" if known else "-"


def _setting(lines: list[Line]) -> str:
    keys = {"parameters": "parameters", "world_size": "ranks", "steps": "steps"}
    return ", ".join(f"{_either(lines, key)} {words}" for key, words in keys.items())


def _either(lines: list[Line], *keys: str) -> str:
    """The values that the summaries have under these keys, one below the other: "4 or 8"."""
    found = set()
    for run in (run for line in lines for run in line.runs):
        value: Any = run.summary
        for key in keys:
            value = value[key]
        found.add(value)
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(found))
