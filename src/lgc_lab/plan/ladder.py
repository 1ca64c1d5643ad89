"""The ladders: the schemes that are planned, and what they were measured to lose against dense training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from lgc.schemes import LocalSteps, Scheme, parse_scheme

EARLY = {"start_steps", "dense_steps", "warmup_steps", "train_steps"}  # arguments of phases that end


class Ladder(NamedTuple):
    """The losses against dense training of one model, trained with one kind of optimizer.

    Attributes:
        conditions: what was trained, and for how long.
        unit: of the losses.
        of_half: what dense training loses in half as many steps.
        losses: by text form; None where it was not measured.
    """

    conditions: str
    unit: str
    of_half: float
    losses: Mapping[str, float | None]

    def loss(self, scheme: Scheme) -> float | None:
        """Find the loss of a scheme, however long its early phases are; None if it was not measured."""
        wanted = _lasting(scheme)
        return next((loss for text, loss in self.losses.items() if _lasting(parse_scheme(text)) == wanted), None)

    def more_steps(self, loss: float) -> float:
        """Estimate how many times as many steps as dense it takes to make up for a loss.

        As dense training gains `of_half` from twice as many steps. What gained takes as many: so little may be chance.
        """
        return float(2 ** (max(0.0, loss) / self.of_half))


def _lasting(scheme: Scheme) -> Scheme:
    """The same with the usual early phases."""
    early: dict[str, Any] = {item.name: item.default for item in fields(scheme) if item.name in EARLY}
    if isinstance(scheme, LocalSteps):
        early["exchange"] = _lasting(scheme.exchange)
    return replace(scheme, **early)


OF_ALL = "second_moments=all:ahead=0.5"
LARGEST = "quantized:reduction=gather:values=largest"
PEERS = dict.fromkeys(("bf16", "powersgd:rank=1", "powersgd:rank=2", "powersgd:rank=4", "topk"))
LADDERS = {  # by the kind of optimizer
    "adamw": Ladder(
        "in 3,000 steps of text-gpt with AdamW",
        "bits per byte",
        0.251,
        {"dense": 0.0}
        | PEERS
        | {
            "powersgd:rank=4": 0.209,
            "dgc": None,
            "scalecom": None,
            "lgc-ring": None,
            "lgc-ps": None,
            "quantized": None,
            f"local:every=2:outer_lr=1.4:first_moments=0.5:{OF_ALL}+{LARGEST}0.0187": -0.008,
            f"local:every=2:outer_lr=2.5:first_moments=0.3:{OF_ALL}+{LARGEST}0.006": 0.010,
            f"local:every=2:outer_lr=3.5:first_moments=0.3:{OF_ALL}+{LARGEST}0.0024": 0.069,
            f"local:every=6:first_moments=all:{OF_ALL}+quantized:values=deadzone1.5:mean_values=deadzone1.25": 0.032,
            "local:every=2+quantized": 0.045,
            "local:every=20+dense": 0.062,
            "local:every=20+quantized": 0.057,
            "local:every=50+quantized": None,
            "local:every=100+quantized": None,
        },
    ),
    "sgd": Ladder(
        "in five epochs of cifar10-resnet20 with SGD",
        "points of accuracy",
        10.1,
        {"dense": 0.0}
        | PEERS
        | {
            "powersgd:rank=1": 16.4,
            "powersgd:rank=4": 3.3,
            "dgc:rate=0.001": 11.0,
            "dgc:rate=0.01": 4.2,
            "scalecom:rate=0.001": 17.6,
            "scalecom:rate=0.01": 10.6,
            "lgc-ring:rate=0.001": 12.8,
            "lgc-ring:rate=0.01": 6.9,
            "lgc-ps:rate=0.001": 12.9,
            "quantized": None,
            "local:every=2:first_moments=all:ahead=0.5+quantized": 1.1,
            f"local:every=2:outer_lr=1.4:first_moments=0.5:ahead=0.5+{LARGEST}0.019": 1.9,
            "local:every=2+quantized": 2.8,
            "local:every=20+quantized": None,
        },
    ),
}
