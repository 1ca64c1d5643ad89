"""A fault on one rank under torchrun, by kind, moment and phase: all ranks end in time, and the restarted job is right.

One cell of the grid is in the suite; `make faults` runs all of them, `make soak` ten random faults in one job.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_job import MOMENTS, Fault, Kind, Moment, read
from fault_runs import (
    CHECKPOINT_EVERY,
    PHASE_STEPS,
    PHASES,
    SCHEMES,
    arguments,
    log_of,
    phases_of,
    results,
    run_undisturbed,
    torchrun,
)

TIMEOUT_S = 15.0
LONG_TIMEOUT_S = 600.0  # what nobody may wait for
TORCHRUN_KILLS_S = 30.0  # torchrun's wait from SIGTERM to SIGKILL, fixed for a restart
PATIENCE_S = 60.0  # with a busy machine
KINDS: tuple[Kind, ...] = ("kill", "stop", "exception")
SOAK_KINDS: tuple[Kind, ...] = (*KINDS, "damage")
SOAK_FAULTS = 10
SOAK_STEPS = 40


class Cell(NamedTuple):
    """One place in the grid."""

    kind: Kind
    moment: Moment
    phase: str
    scheme: str

    def fault(self) -> Fault:
        """At one of the last three steps of the phase, on either rank by turns."""
        phase, moment = PHASES.index(self.phase), MOMENTS.index(self.moment)
        rank = (phase + moment + list(SCHEMES).index(self.scheme)) % 2
        steps = [step for step, of_step in enumerate(phases_of(self.scheme)) if of_step == self.phase]
        return Fault(self.kind, rank, steps[-PHASE_STEPS:][moment], self.moment)


IN_SUITE = Cell("kill", "during", "compressed", "local-overlap")


def grid() -> Iterator[Any]:
    """All cells; those that are not in the suite are marked as exhaustive."""
    for scheme in SCHEMES:
        for kind in KINDS:
            for phase in dict.fromkeys(phases_of(scheme)):
                for moment in MOMENTS:
                    cell = Cell(kind, moment, phase, scheme)
                    marks = () if cell == IN_SUITE else pytest.mark.exhaustive
                    yield pytest.param(cell, id="-".join(cell), marks=marks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, ...]]:
    """`undisturbed(scheme)`: the results of a run without faults."""

    @cache
    def run(scheme: str) -> tuple[Any, ...]:
        out = tmp_path_factory.mktemp("undisturbed") / scheme
        run_undisturbed(arguments(SCHEMES[scheme], out, timeout=60))
        found = results(out)
        assert [row["phase"] for row in found[0] if "phase" in row] == phases_of(scheme)
        return found

    return run


@pytest.mark.parametrize("cell", list(grid()))
def test_after_a_fault_all_ranks_end_in_time_and_the_restarted_job_ends_as_if_undisturbed(
    cell: Cell, undisturbed: Callable[[str], tuple[Any, ...]], tmp_path: Path
) -> None:
    out, fault = tmp_path / "run", cell.fault()
    timeout = TIMEOUT_S if cell.kind == "stop" else LONG_TIMEOUT_S
    output = torchrun(out, [fault], arguments(SCHEMES[cell.scheme], out, timeout=timeout))
    (happened,) = read(log_of(out), "fault")
    assert happened["fault"] == fault._asdict()
    restarted = [event for event in read(log_of(out), "start") if event["time"] > happened["time"]]
    assert len(restarted) == 2
    assert not any(event["alive"] for event in restarted)
    limit = TIMEOUT_S + TORCHRUN_KILLS_S if cell.kind == "stop" else 0.0
    assert min(event["time"] for event in restarted) - happened["time"] < limit + PATIENCE_S
    if cell.kind == "exception":
        assert f"[rank{fault.rank}]: ValueError: {fault}, on purpose" in output
    if cell.kind == "stop":
        assert f"Timed out waiting {TIMEOUT_S * 1000:.0f}ms" in output
    if fault.step >= CHECKPOINT_EVERY:
        assert "goes on from step" in output
    assert results(out) == undisturbed(cell.scheme)


@pytest.mark.long
def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("SOAK_SEED") or random.randrange(10**6))
    chance = random.Random(seed)
    scheme = chance.choice([*SCHEMES, "dgc:warmup_steps=9", "scalecom:warmup_steps=9"])
    scheme = SCHEMES.get(scheme, scheme).replace(f"={PHASE_STEPS}", "=9")
    steps = sorted(chance.randrange(SOAK_STEPS) for _ in range(SOAK_FAULTS))
    faults = [Fault(chance.choice(SOAK_KINDS), chance.randrange(2), step, chance.choice(MOMENTS)) for step in steps]
    with capsys.disabled():
        print(f"\nsoak: SOAK_SEED={seed}, {scheme}: {'; '.join(map(str, faults))}", flush=True)

    expected, out = tmp_path / "undisturbed", tmp_path / "run"
    run_undisturbed(arguments(scheme, expected, timeout=60, steps=SOAK_STEPS))
    limit_s = SOAK_FAULTS * (TIMEOUT_S + TORCHRUN_KILLS_S + 2 * PATIENCE_S)
    torchrun(out, faults, arguments(scheme, out, timeout=TIMEOUT_S, steps=SOAK_STEPS), limit_s=limit_s)
    assert [event["fault"] for event in read(log_of(out), "fault")] == [fault._asdict() for fault in faults], seed
    assert not any(event["alive"] for event in read(log_of(out), "start")), f"SOAK_SEED={seed}"
    assert results(out) == results(expected), f"SOAK_SEED={seed}"
