"""Byte counts and the ratios made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

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


@dataclass
class Wire:
    """Traffic of one rank by phase; `setup` is what attach exchanged before the first step."""

    phases: dict[str, Traffic] = field(default_factory=dict)

    def take(self, other: Wire) -> None:
        """Add what another one has counted, and empty it."""
        for name, traffic in other.phases.items():
            own = self.phases.setdefault(name, Traffic())
            own.steps += traffic.steps
            own.sent_bytes += traffic.sent_bytes
            own.received_bytes += traffic.received_bytes
            own.upload_bytes += traffic.upload_bytes
            for content, sent in traffic.contents.items():
                own.contents[content] = own.contents.get(content, 0) + sent
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


class Baseline(NamedTuple):
    """Bytes of plain data-parallel training: ring all-reduce of float32 gradients."""

    parameters: float
    world_size: int

    def bytes(self, steps: int) -> float:
        """Bytes sent and received by all ranks together."""
        return 4 * (self.world_size - 1) * self.upload(1) * steps

    def upload(self, steps: int) -> float:
        """Bytes that one rank contributes."""
        return FLOAT32_BYTES * self.parameters * steps


def summarise(ranks: list[Wire], parameters: float, world_size: int) -> dict[str, object]:
    """Sums over these ranks, and ratios against float32 ring all-reduce of the same steps, by groups of `world_size`
    ranks, of `parameters` each.

    `ratio` is for the whole run, setup included, `ratio_compressed_phase` for that phase alone; `paper` has the
    paper's way of counting, uploads averaged over the ranks. A ratio is None where nothing was sent or there was no
    such phase.
    """
    baseline = Baseline(parameters, world_size)
    phases = [{"name": str(name)} | _sum([wire.phases[name] for wire in ranks]) for name in ranks[0].phases]
    compressed = [phase for phase in phases if phase["name"] == Phase.COMPRESSED]

    def total(key: str, of: list[dict[str, object]]) -> int:
        return sum(value for phase in of if isinstance(value := phase[key], int))

    def ratio(base: float, sent: int) -> float | None:
        return base * len(ranks) / world_size / sent if base and sent else None

    def both(of: list[dict[str, object]]) -> int:
        return total("sent_bytes", of) + total("received_bytes", of)

    steps, compressed_steps = total("steps", phases), total("steps", compressed)
    return {
        "sent_bytes": total("sent_bytes", phases),
        "received_bytes": total("received_bytes", phases),
        "max_rank_bytes": max(
            sum(traffic.sent_bytes + traffic.received_bytes for traffic in wire.phases.values()) for wire in ranks
        ),
        "ratio": ratio(baseline.bytes(steps), both(phases)),
        "ratio_compressed_phase": ratio(baseline.bytes(compressed_steps), both(compressed)),
        "paper": {
            "upload_bytes_per_rank": total("upload_bytes", phases) / len(ranks),
            "ratio": ratio(baseline.upload(steps) * world_size, total("upload_bytes", phases)),
            "ratio_compressed_phase": ratio(
                baseline.upload(compressed_steps) * world_size, total("upload_bytes", compressed)
            ),
        },
        "phases": phases,
    }


def _sum(ranks: list[Traffic]) -> dict[str, object]:
    return {
        "steps": sum(traffic.steps for traffic in ranks) // len(ranks),  # the mean, of ranks that may go their own way
        "sent_bytes": sum(traffic.sent_bytes for traffic in ranks),
        "received_bytes": sum(traffic.received_bytes for traffic in ranks),
        "upload_bytes": sum(traffic.upload_bytes for traffic in ranks),
        "contents": {
            content: sum(traffic.contents.get(content, 0) for traffic in ranks)
            for content in sorted({content for traffic in ranks for content in traffic.contents})
        },
    }
