"""Broken bytes are refused with PayloadError, or are a code; `lgc bench codec --fuzz N` does the same for longer."""

from __future__ import annotations

from lgc_lab.bench.codec import fuzz


def test_fuzzed_decoders_only_ever_refuse() -> None:
    outcomes = fuzz(50_000)
    assert sum(outcomes.values()) == 50_000
    refused = {name for name in outcomes if name.endswith("refused")}
    assert len(refused) == 10  # four coders, five value codecs, the payload
