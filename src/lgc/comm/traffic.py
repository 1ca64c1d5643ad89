"""Byte counts and the ratios made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from lgc.phase import Phase

SETUP = "setup"
FLOAT32_BYTES = 4


@dataclass
class Traffic:
    """Bytes that one rank sent and received in one phase.

    `upload_bytes` counts every buffer once, as the paper does: what this rank contributes, not how the collective
    spreads it. `contents` splits `sent_bytes` by kind.
    """

    steps: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    upload_bytes: int = 0
    contents: dict[str, int] = field(default_factory=dict)

    def add(self, other: Traffic) -> None:
        """Count what another one has counted too."""
        self.steps += other.steps
        self.sent_bytes += other.sent_bytes
        self.received_bytes += other.received_bytes
        self.upload_bytes += other.upload_bytes
        for content, sent in other.contents.items():
            self.contents[content] = self.contents.get(content, 0) + sent


@dataclass
class Wire:
    """Traffic of one rank by phase; `setup` is what attach exchanged before the first step."""

    phases: dict[str, Traffic] = field(default_factory=dict)

    def take(self, other: Wire) -> None:
        """Add what another one has counted, and empty it."""
        for name, traffic in other.phases.items():
            self.phases.setdefault(name, Traffic()).add(traffic)
        other.phases.clear()

    def to_json(self) -> str:
        """The text that `wire_from_json` reads."""
        return json.dumps({name: asdict(traffic) for name, traffic in self.phases.items()})


def wire_from_json(text: object) -> Wire:
    """The byte counts by phase that a state has as text.

    Raises:
        ValueError: if they are not that.
    """
    try:
        wire = Wire({name: Traffic(**traffic) for name, traffic in json.loads(str(text)).items()})
        rows = [asdict(traffic) for traffic in wire.phases.values()]
        counts = [count for row in rows for count in (*row.pop("contents").values(), *row.values())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"state_dict: wire is not the byte counts by phase: {error}.") from None
    for count in counts:
        if type(count) is not int or count < 0:
            raise ValueError(f"state_dict: wire must have counts of at least 0, got {count!r}.")
    return wire


def summarise(ranks: list[Wire], parameters: float, world_size: int) -> dict[str, object]:
    """Sums over these ranks, and ratios against float32 ring all-reduce of the same steps, by groups of `world_size`
    ranks, of `parameters` each.

    `ratio` is for the whole run, setup included, `ratio_compressed_phase` for that phase alone; `paper` has the
    paper's way of counting, uploads averaged over the ranks. A ratio is None where nothing was sent or there was no
    such phase.
    """
    phases = {str(name): _sum([wire.phases[name] for wire in ranks]) for name in ranks[0].phases}
    gradient = FLOAT32_BYTES * parameters
    compressed, total = phases.get(Phase.COMPRESSED, Traffic()), Traffic()
    for traffic in phases.values():
        total.add(traffic)

    def ratio(of_group: float, counted: int) -> float | None:
        return of_group * len(ranks) / world_size / counted if of_group and counted else None

    def both_ways(of: Traffic) -> float | None:
        return ratio(4 * (world_size - 1) * gradient * of.steps, of.sent_bytes + of.received_bytes)

    def uploads(of: Traffic) -> float | None:
        return ratio(gradient * of.steps * world_size, of.upload_bytes)

    return {
        "sent_bytes": total.sent_bytes,
        "received_bytes": total.received_bytes,
        "max_rank_bytes": max(
            sum(traffic.sent_bytes + traffic.received_bytes for traffic in wire.phases.values()) for wire in ranks
        ),
        "ratio": both_ways(total),
        "ratio_compressed_phase": both_ways(compressed),
        "paper": {
            "upload_bytes_per_rank": total.upload_bytes / len(ranks),
            "ratio": uploads(total),
            "ratio_compressed_phase": uploads(compressed),
        },
        "phases": [{"name": name} | asdict(traffic) for name, traffic in phases.items()],
    }


def _sum(ranks: list[Traffic]) -> Traffic:
    """What they have counted together, in as many steps as they have made on average: they may go their own way."""
    total = Traffic()
    for traffic in ranks:
        total.add(traffic)
    return replace(total, steps=total.steps // len(ranks), contents=dict(sorted(total.contents.items())))
