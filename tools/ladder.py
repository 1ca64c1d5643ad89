"""Draw docs/ladder.svg from the table of local steps in docs/results.md: what is lost against what is sent."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lgc_lab.report.figures import HEIGHT, WIDTH, draw

DOCS = Path(__file__).parents[1] / "docs"
TABLE = "## A GPT with AdamW: local steps"
MOST = 0.12  # bits per byte that are shown
KINDS = {  # the first that its scheme contains
    "dense training": "dense ",
    "every second step, the largest values": "largest",
    "dead zones": "deadzone",
    "two bits": "quantized",
    "exact": "+dense",
}


class Rung(NamedTuple):
    """A row of the table."""

    scheme: str
    loss: float  # bits per byte over dense
    megabytes: float  # of the whole run
    ratio: float  # of the local phase


def read_rungs() -> list[Rung]:
    """The rows of local steps, the means of their seeds, without those that the table points away from."""
    table = (DOCS / "results.md").read_text().split(TABLE)[1].split("\n## ")[0]
    (megabytes,) = re.findall(r"^\| `dense` .*\| ([\d.,]+) \| 1.0", table, re.MULTILINE)[:1]
    rungs = [Rung("dense ", 0.0, float(megabytes.replace(",", "")), 1.0)]
    for row in re.findall(r"^\| (`local:.*) \|$", table, re.MULTILINE):
        scheme, _, _, loss, *numbers = row.replace("*", "").split(" | ")
        if "see below" not in scheme:
            megabytes, _, ratio = (float(each.replace(",", "")) for each in numbers)
            rungs.append(Rung(scheme, fmean(map(float, loss.split(", "))), megabytes, ratio))
    return rungs


def _kind(rung: Rung) -> str:
    return next(kind for kind, part in KINDS.items() if part in rung.scheme)


def plot(figure: Figure) -> None:
    """Loss against bytes of the run, and against the ratio of the local phase; a point a row."""
    rungs = read_rungs()
    by_bytes, by_ratio = figure.subplots(2)
    for axes, place in ((by_bytes, "megabytes"), (by_ratio, "ratio")):
        for kind in KINDS:
            found = [each for each in rungs if _kind(each) == kind]
            axes.scatter([getattr(each, place) for each in found], [each.loss for each in found], label=kind, zorder=3)
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", ylim=(-0.03, MOST), ylabel="loss, bits per byte")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(StrMethodFormatter(""))
    by_bytes.set_xlabel("MB of a rank in the whole run")
    by_ratio.set_xlabel("times fewer bytes, once the start is over")
    handles, labels = by_ratio.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left")


if __name__ == "__main__":
    (DOCS / "ladder.svg").write_text(draw("ladder", (WIDTH, 2 * HEIGHT + 1), plot))
