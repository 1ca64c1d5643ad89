"""The ladder: the schemes that are planned, and what they were measured to lose against dense training."""

from __future__ import annotations

from lgc.schemes import parse_scheme

CONDITIONS = "bits per byte over the best dense, in 3,000 steps of text-gpt with AdamW"
OF_ALL = ":second_moments=all:ahead=0.5"
LOSSES: dict[str, float | None] = {  # by text form, which the recipe completes; None where it was not measured
    "dense": 0.0,
    "bf16": None,
    "powersgd:rank=1": None,
    "powersgd:rank=2": None,
    "powersgd:rank=4": None,
    "dgc": None,
    "topk": None,
    "scalecom": None,
    "lgc-ring": None,
    "lgc-ps": None,
    "quantized": None,
    f"local:every=2:outer_lr=1.4:first_moments=0.5{OF_ALL}+quantized:reduction=gather:values=largest0.019": -0.013,
    f"local:every=2:outer_lr=2.5:first_moments=0.3{OF_ALL}+quantized:reduction=gather:values=largest0.006": 0.010,
    f"local:every=2:outer_lr=3.5:first_moments=0.3{OF_ALL}+quantized:reduction=gather:values=largest0.0024": 0.069,
    f"local:every=6:first_moments=all{OF_ALL}+quantized:values=deadzone1.5:mean_values=deadzone1.25": 0.032,
    "local:every=2+quantized": 0.045,
    "local:every=20+dense": None,
    "local:every=20+quantized": 0.057,
    "local:every=50+quantized": None,
    "local:every=100+quantized": None,
}


def find_loss(text: str) -> float | None:
    """Find the loss of a scheme, however its text is written, under `CONDITIONS`; None if it was not measured."""
    wanted = parse_scheme(text)
    return next((loss for measured, loss in LOSSES.items() if parse_scheme(measured) == wanted), None)
