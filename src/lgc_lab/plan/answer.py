"""What `lgc plan` answers for one link: a table, and which scheme to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lgc.choice.cost import Link, Prediction, Profile, as_fast
from lgc.choice.rehearsal import knows_past
from lgc.schemes import LocalSteps, PowerSGD, SparseScheme, parse_scheme
from lgc.schemes.powersgd import bucket_mb
from lgc_lab.plan.ladder import Ladder
from lgc_lab.terminal import aligned

MEASURED = "measured"  # the name of a link that was
FAST_ENOUGH = 0.1  # so much longer than the fastest something may take, if less is lost
TIMES = ("compute", "compression", "communication", "step")
HEADER = ("scheme", "sent", *TIMES, "vs dense", "ahead from", "loss", "at no loss")


@dataclass(frozen=True)
class Answer:
    """What was measured and predicted for one link.

    Attributes:
        name: of the link, as it was asked for, or `MEASURED`.
        link: itself.
        profile: what was measured.
        rows: what is predicted, dense first.
        labels: the full text of each scheme to the one that was asked for.
        ladder: what schemes have lost.
    """

    name: str
    link: Link
    profile: Profile
    rows: Sequence[Prediction]
    labels: Mapping[str, str]
    ladder: Ladder

    def recommend(self) -> Prediction:
        """Take what is the first to reach dense training's loss, or of those nearly as soon the one that lost least.

        Where only dense has a measured loss, it is the first in their order of those that are nearly the fastest.
        """
        measured = [(row, loss) for row in self.rows if (loss := self._loss(row)) is not None]
        if len(measured) <= 1:
            return as_fast(self.rows, FAST_ENOUGH)[0]
        soonest = max(self._speedup_at_no_loss(row, loss) for row, loss in measured)
        least = soonest / (1 + FAST_ENOUGH)
        soon = [(row, loss) for row, loss in measured if self._speedup_at_no_loss(row, loss) >= least]
        return min(soon, key=lambda each: max(0.0, each[1]))[0]  # a gain may be chance

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [HEADER]
        for row in self.rows:
            seconds = [f"{1e3 * getattr(row, name):,.1f} ms" for name in TIMES]
            ahead = "-" if row.pays_from is None else f"step {row.pays_from:,}"
            loss, label = self._loss(row), self.labels[row.scheme]
            lost = ("-", "-")
            if loss is not None:
                lost = (f"{loss:+g}" if loss else "0", f"{self._speedup_at_no_loss(row, loss):.2f} x")
            table.append((label, _bytes(row.sent_bytes), *seconds, f"{row.speedup:.2f} x", ahead, *lost))
        title = f"{self.profile.world_size} ranks, {self.name}: {self.link}"
        if self.name != MEASURED:
            title += "" if self.link.latency else " (--latency sets it)"
        remembering = [self.labels[row.scheme] for row in self.rows if knows_past(parse_scheme(row.scheme))]
        notes = [f"Counted as in a first round, after which its codes are shorter: {each}." for each in remembering]
        return "\n\n".join([title, aligned(table), *notes, *self._advice()])

    def as_json(self) -> dict[str, Any]:
        """The same as objects for JSON."""
        best = self.recommend()
        return {
            "link": {
                "name": self.name,
                "bytes_per_s": self.link.bandwidth,
                "latency_s": self.link.latency,
                "measured": self.name == MEASURED,
            },
            "workers": self.profile.world_size,
            "loss": {"unit": self.ladder.unit, "conditions": self.ladder.conditions},
            "schemes": [self._row_as_json(row) for row in self.rows],
            "recommended": best.scheme,
            "attach": _attach(best) if best != self.rows[0] else None,
        }

    def _row_as_json(self, row: Prediction) -> dict[str, Any]:
        seconds = {f"{name}_s": getattr(row, name) for name in TIMES}
        loss = self._loss(row)
        return {
            "scheme": row.scheme,
            "sent_bytes": round(row.sent_bytes),
            **seconds,
            "speedup": row.speedup,
            "early": [{"phase": stage.phase, "steps": stage.steps, "step_s": stage.step} for stage in row.early],
            "ahead_from_step": row.pays_from,
            "loss": loss,
            "speedup_at_no_loss": None if loss is None else self._speedup_at_no_loss(row, loss),
        }

    def _loss(self, row: Prediction) -> float | None:
        return self.ladder.loss(parse_scheme(row.scheme))

    def _speedup_at_no_loss(self, row: Prediction, loss: float) -> float:
        """How many times as soon as dense something that lost as much is where dense training ends."""
        return row.speedup / self.ladder.more_steps(loss)

    def _advice(self) -> list[str]:
        """Say which scheme to take and what else to know, by paragraphs."""
        best = self.recommend()
        scheme, reason = parse_scheme(best.scheme), self._reason(best)
        if best == self.rows[0]:
            return [f"Dense is best here. {reason} Use plain DDP."]
        paragraphs = [
            f"{self.labels[best.scheme]} is best here, {best.speedup:.1f} times as fast as dense:",
            f"    {_attach(best)}",
            f"{reason} lgc compare tells what your model loses.",
        ]
        if isinstance(scheme, SparseScheme):
            paragraphs.append(f"Its rate is {100 * scheme.rate:g} %.")
        if best.early:
            steps = sum(stage.steps for stage in best.early)
            mean = sum(stage.steps * stage.step for stage in best.early) / steps
            phases = ", ".join(dict.fromkeys(stage.phase for stage in best.early))
            paragraphs.append(
                f"Its first {steps} steps ({phases}) take {1e3 * mean:,.1f} ms on average; the run as a whole is ahead "
                f"of dense from step {best.pays_from} on."
            )
        if isinstance(scheme, LocalSteps):
            paragraphs.append("Evaluate and save within handle.anchored(), and end with handle.finish().")
        if scheme.makes_adams_step:
            paragraphs.append("It makes Adam's step: train with SGD without momentum.")
        elif scheme.corrected_momentum:
            paragraphs.append(
                "It has SGD's momentum: give SGD none, or the scheme momentum=0, as with every other optimizer."
            )
        if isinstance(scheme, PowerSGD):
            size = bucket_mb(sum(collective.size for collective in self.profile.arms[0].stages[-1].collectives))
            paragraphs.append(
                f"On gloo it needs all gradients in one bucket: DistributedDataParallel(model, bucket_cap_mb={size})."
            )
        return paragraphs

    def _reason(self, best: Prediction) -> str:
        """Say in which respect it is the best."""
        loss, ladder = self._loss(best), self.ladder
        faster = [self.labels[row.scheme] for row in self.rows if self._loss(row) is None and row.step < best.step]
        unknown = f" Faster, but of a loss that was not measured: {', '.join(faster)}." if faster else ""
        if loss is None:
            return f"No loss was measured but dense's; this is the first within {FAST_ENOUGH:.0%} of the fastest."
        if best == self.rows[0]:
            return f"Nothing of a measured loss gets as far more than {FAST_ENOUGH:.0%} sooner.{unknown}"
        if loss <= 0:
            return f"It lost nothing {ladder.conditions}.{unknown}"
        return (
            f"It lost {loss:g} {ladder.unit} {ladder.conditions}. To make up for that should take "
            f"{ladder.more_steps(loss):.2f} times as many steps, and still be "
            f"{self._speedup_at_no_loss(best, loss):.1f} times as fast as dense.{unknown}"
        )


def _attach(best: Prediction) -> str:
    return f'handle = lgc.attach(model, "{best.scheme}", optimizer)'


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
