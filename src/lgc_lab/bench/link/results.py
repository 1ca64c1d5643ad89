"""Results of a measurement, and what is made of them: steps split into their parts, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lgc.choice.cost import Link, parse_rate
from lgc.phase import Phase
from lgc.schemes import Dense
from lgc_lab.folder import read_objects
from lgc_lab.launch.network import HEADER_BYTES
from lgc_lab.terminal import aligned

RESULTS = "results.json"
UNSHAPED = "unshaped"
DELAYS_OF_MESSAGE = 2
LOOPBACK = "loopback"
COMPUTE = "compute"  # the arm that exchanges nothing


class Cell(NamedTuple):
    """Samples of one scheme in one phase on one link; what is a list of lists is by step and rank, in seconds.

    `compression` and `communication` are None where the exchange goes on amid the backward pass. Bytes are by rank, of
    all these steps together: `counted_*` by the transport, `counter_*` by the interface with headers, `packets_*` that
    these were in; None without a network. Under local steps a sample is the average of `every` steps.
    """

    rate: str
    repeat: int
    scheme: str
    phase: str
    seconds: list[list[float]]
    compression: list[list[float]] | None
    communication: list[list[float]] | None
    counted_sent: list[int]
    counted_received: list[int]
    counter_sent: list[int] | None = None
    counter_received: list[int] | None = None
    packets_sent: list[int] | None = None
    packets_received: list[int] | None = None
    every: int = 1


class Row(NamedTuple):
    """Seconds and bytes of a step of one scheme in one phase on one link.

    The step is the median over all steps, on average over the ranks. It is not that of the slowest rank of each step:
    another one is late every time, but in the end all take equally long. Compression and communication are those of
    the rank that waits least in a step. While the autoencoder is trained, all are of the rank that does it. Where the
    exchange goes on amid the backward pass, `compression` is None and `communication` has both: the step less what it
    takes without any exchange. `spread` is half of the range over the repeats.

    Bytes are those that all ranks together have sent: `counted` by the transport, `headers` and `payload` by the
    interfaces, None without a network.
    """

    rate: str
    scheme: str
    phase: str
    step: float
    compute: float
    compression: float | None
    communication: float
    spread: float
    counted: float
    headers: float | None
    payload: float | None


class Results:
    """Results of a measurement of one link or more."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.configuration: dict[str, Any] = content["configuration"]
        self.finished = content.get("finished") is True
        self.content = content
        self.cells = [Cell(**cell) for cell in content["cells"]]
        grouped: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            grouped.setdefault((cell.rate, cell.scheme, cell.phase), []).append(cell)
        self.compute = {rate: step_seconds(group) for (rate, scheme, _), group in grouped.items() if scheme == COMPUTE}
        self.rows = [self._row(*place, group) for place, group in grouped.items() if place[1] != COMPUTE]
        self.rates = list(dict.fromkeys(row.rate for row in self.rows))  # in the order they were measured
        self.schemes = list(dict.fromkeys(row.scheme for row in self.rows))  # text forms, as they were asked for

    @classmethod
    def load(cls, folder: Path, *, unfinished: bool = False) -> Results:
        """Read a folder. Raises ValueError if it has no measurement, or one that was cut short, unless `unfinished`."""
        path = folder / RESULTS
        try:
            results = cls(read_objects(path)[0])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a measurement: {error!r}.") from None
        if not results.finished and not unfinished:
            raise ValueError(f"{path} is not a finished measurement: it was interrupted.")
        return results

    def lasting(self, rate: str, scheme: str) -> Row:
        """Find the row of the phase that a long run spends its time in, which is a scheme's last."""
        return [row for row in self.rows if (row.rate, row.scheme) == (rate, scheme)][-1]

    def _row(self, rate: str, scheme: str, phase: str, cells: list[Cell]) -> Row:
        of_turns = [step_seconds([cell]) for cell in cells]
        steps = sum(len(cell.seconds) * cell.every for cell in cells)
        counted, framed, packets = (
            sum(sum(getattr(cell, name) or ()) for cell in cells) / steps
            for name in ("counted_sent", "counter_sent", "packets_sent")
        )
        headers = HEADER_BYTES * packets
        of_interfaces = (headers, framed - headers) if packets else (None, None)
        spread = (max(of_turns) - min(of_turns)) / 2
        return Row(rate, scheme, phase, *_split(cells, self.compute[rate]), spread, counted, *of_interfaces)

    def text(self) -> str:
        """Show all rows in an aligned table, a block a link."""
        blocks = []
        unlimited = {(row.scheme, row.phase): row.step for row in self.rows if row.rate == UNSHAPED}
        for rate in self.rates:
            rows = [row for row in self.rows if row.rate == rate]
            dense = next((row.step for row in rows if row.scheme == Dense.name), None)
            lines = [_cells(row, dense, unlimited.get((row.scheme, row.phase))) for row in rows]
            table = [tuple(lines[0]), *(tuple(line.values()) for line in lines)]
            blocks.append(f"{rate}, compute alone {_ms(self.compute[rate])} ms\n{aligned(table)}")
        settings, parameters, cores = self.configuration, self.content["parameters"], self.content["machine"]["cores"]
        ranks = f"{settings['world_size']} ranks on {cores} cores, {settings['repeats']} repeats"
        return "\n\n".join([f"{settings['recipe']}, {parameters:,} parameters, {ranks}", *blocks])


def _cells(row: Row, dense: float | None, unlimited: float | None) -> dict[str, str]:
    """Format a row, by column."""
    headers = counters = "-"
    if row.headers is not None and row.payload is not None and row.counted:
        headers = f"{100 * row.headers / row.counted:+.1f} %"
        counters = f"{100 * (row.payload / row.counted - 1):+.1f} %"
    return {
        "scheme": row.scheme,
        "phase": row.phase,
        "step, ms": _ms(row.step),
        "±": _ms(row.spread),
        "compute": _ms(row.compute),
        "compression": "-" if row.compression is None else _ms(row.compression),
        "communication": _ms(row.communication),
        "link": "-" if unlimited is None else _ms(row.step - unlimited),
        "against dense": "-" if dense is None else f"{dense / row.step:.2f}x",
        "kB a step": f"{row.counted / 1e3:,.1f}",
        "headers": headers,
        "counters": counters,
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _split(cells: Sequence[Cell], compute: float) -> tuple[float, float, float | None, float]:
    """Split the step of one scheme in one phase, as in `Row`; `compute` is that of steps without any exchange."""
    step = step_seconds(cells)
    if cells[0].communication is None:
        return step, min(compute, step), None, max(0.0, step - compute)
    waits, own = _samples(cells, "communication"), _samples(cells, "compression")
    last = waits.argmin(axis=1, keepdims=True)  # rank to arrive
    communication, compression = (_typical(cells, np.take_along_axis(part, last, axis=1)) for part in (waits, own))
    return step, max(0.0, step - compression - communication), compression, communication


def step_seconds(cells: Sequence[Cell]) -> float:
    """Seconds of a step of one scheme in one phase, see `Row`."""
    return _typical(cells, _samples(cells, "seconds"))


def _typical(cells: Sequence[Cell], samples: NDArray[np.float64]) -> float:
    """Take the median over the steps, or in the warm-up, whose rates differ, the mean; on average over the ranks."""
    return float((np.mean if cells[0].phase == Phase.WARMUP else np.median)(samples, axis=0).mean())


def _samples(cells: Sequence[Cell], quantity: str) -> NDArray[np.float64]:
    """Stack a quantity, by step of all turns and by rank.

    While the autoencoder is trained, it is rank 0's alone, which does that (after a few steps all run at its pace),
    and without the last step, which sends it.
    """
    training = cells[0].phase == Phase.TRAIN
    turns = (getattr(cell, quantity) for cell in cells)
    samples = np.concatenate([turn[:-1] if training and len(turn) > 1 else turn for turn in turns])
    return samples[:, :1] if training else samples


def bits_per_second(rate: str) -> float | None:
    """Read a rate such as "100mbit", or "100mbit/20ms" with a delay; None where the link is not limited."""
    bandwidth = rate.partition("/")[0]
    return None if bandwidth in (UNSHAPED, LOOPBACK) else parse_rate("link", bandwidth)


def delay_of(rate: str) -> float:
    """Read how many seconds later a packet arrives on a link such as "100mbit/20ms"; 0 where it has no delay."""
    return Link.parse("1gbit", rate.partition("/")[2] or "0ms").latency


def link_of(rate: str) -> Link:
    """Make the link of a rate. Under gloo a message takes two delays: its receiver says that it is ready before."""
    latency = DELAYS_OF_MESSAGE * delay_of(rate)
    if bits_per_second(rate) is None:
        return Link(math.inf, latency)
    return Link(Link.parse(rate.partition("/")[0]).bandwidth, latency)
