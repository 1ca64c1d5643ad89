"""Opening of a page: how long dense and the fastest others take on slow links to the same value of the metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lgc.schemes import Dense
from lgc_lab.report.figures import AGAINST_TIME, SPEED, TICK_WIDTH, WIDTH, draw, wrapped
from lgc_lab.report.runs import Line

SAME = 0.005  # of dense's value: what the metric may be worse by and count as the same
MOST_LINKS = 2
MOST_OTHERS = 4
BAR, TITLE, LABEL_ROW = 0.3, 0.45, 0.17  # inches
LABEL_SIZE = 10  # points
VALUE_ROOM = 1.2  # times the longest bar, for the number at its end

Times = dict[str, float]  # seconds to the target by label


def draw_opening(lines: Sequence[Line], links: Sequence[float]) -> dict[str, str] | None:
    """Say and draw when dense and the fastest others reach what dense ends with, or 0.5 % less: sentence, svg, caption.

    On the slowest two of these links, in bits per second. Of several lines of dense the best one counts. None where
    there is nothing to compare: no link, no dense that ended with a number, or no other that gets there.
    """
    dense = _best_dense(lines)
    if dense is None or not links:
        return None
    final, run = _final(dense), dense.runs[0]
    target = final - SAME * abs(final) * (1 if run.better == "higher" else -1)
    others = [line for line in lines if not _is_dense(line)]
    times = {link: _times([dense, *others], target, link) for link in sorted(links)[:MOST_LINKS]}
    never = [line.label for line in others if any(line.label not in of for of in times.values())]
    fastest = _fastest(times, dense.label)
    if not fastest:
        return None
    shown = {link: {label: of[label] for label in [dense.label, *fastest]} for link, of in times.items()}
    goal = f"{run.metric.replace('_', ' ')} {target:.4g}"
    parts = [
        f"Time until {goal}, within {100 * SAME:g} % of what dense ends with, is reached and kept.",
        f"The fastest {len(fastest)} of {len(others)} others." if len(fastest) < len(others) - len(never) else "",
        f"Not reached by {', '.join(never)}." if never else "",
        AGAINST_TIME,
    ]
    return {
        "sentence": _sentence(shown, goal, dense.label),
        "svg": draw(f"{dense.recipe} opening", _size(shown), lambda figure: _plot_bars(figure, shown, lines)),
        "caption": " ".join(filter(None, parts)),
    }


def _is_dense(line: Line) -> bool:
    return bool(line.runs[0].conditions["scheme"] == Dense.name)


def _final(line: Line) -> float:
    return statistics.mean(float(run.value("metric.value")) for run in line.runs)


def _best_dense(lines: Sequence[Line]) -> Line | None:
    ended = [line for line in lines if _is_dense(line) and math.isfinite(_final(line))]
    return (max if lines[0].runs[0].better == "higher" else min)(ended, key=_final, default=None)


def _times(lines: Sequence[Line], target: float, link: float) -> Times:
    """Find the times on a link, of those lines that get there."""
    found = {line.label: line.seconds_to(target, link) for line in lines}
    return {label: seconds for label, seconds in found.items() if seconds is not None}


def _fastest(times: Mapping[float, Times], dense: str) -> list[str]:
    """Pick the others that come the closest to the fastest of them on one of the links, in the order of the first."""
    slowest = next(iter(times.values()))
    others = [label for label in slowest if label != dense]
    best = {link: min((of[label] for label in others), default=0.0) for link, of in times.items()}
    closest = sorted(others, key=lambda label: min(of[label] / best[link] for link, of in times.items()))
    return sorted(closest[:MOST_OTHERS], key=slowest.__getitem__)


def _sentence(times: Mapping[float, Times], goal: str, dense: str) -> str:
    """Compare dense with the fastest other on every link, the faster of the two first."""
    parts: list[str] = []
    for link, of in times.items():
        other = min((label for label in of if label != dense), key=of.__getitem__)
        first, second = sorted((other, dense), key=of.__getitem__)
        reaches = f" reaches {goal}" if not parts else ""
        parts.append(f"on {SPEED(link)}, {first}{reaches} in {_text(of[first])}, {second} in {_text(of[second])}")
    return f"O{'; '.join(parts)[1:]}."


def _text(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 20 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _size(times: Mapping[float, Times]) -> tuple[float, float]:
    rows = [wrapped(label, TICK_WIDTH).count("\n") + 1 for of in times.values() for label in of]
    return WIDTH, len(times) * TITLE + len(rows) * max(BAR, LABEL_ROW * max(rows))


def _plot_bars(figure: Figure, times: Mapping[float, Times], lines: Sequence[Line]) -> None:
    """A panel a link, with an axis of its own from 0, and the numbers at the ends of the bars."""
    colors = {line.label: f"C{number}" for number, line in enumerate(lines)}
    for axes, (link, of) in zip(figure.subplots(len(times), squeeze=False)[:, 0], times.items(), strict=True):
        labels = [wrapped(label, TICK_WIDTH) for label in of]
        bars = axes.barh(labels, [*of.values()], color=[colors[label] for label in of])
        axes.bar_label(bars, [_text(seconds) for seconds in of.values()], padding=3)
        axes.set_xlim(0, VALUE_ROOM * max(of.values()))
        axes.set_title(f"on {SPEED(link)}", loc="left", fontsize="medium", fontweight="bold")
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=LABEL_SIZE)
        axes.invert_yaxis()
