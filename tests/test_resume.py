"""Interrupted runs: real processes are killed, the same command goes on, and nobody sees a difference afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lgc.run_folder import cut_metrics

LGC = [sys.executable, "-m", "lgc"]
STEPS = 56
RUN = ["--recipe", "digits", "--workers", "2", "--batch-size", "8", "--steps", str(STEPS), "--checkpoint-every", "5"]
PHASES = {"dense": 12, "warmup": 14, "train": 14, "compressed": 16}
SCHEDULE = "dense_steps=12:warmup_steps=14:train_steps=14"
LIMIT_S = 90


def train(out: Path, *arguments: str, returncode: int = 0) -> subprocess.CompletedProcess[str]:
    """`lgc train` of two ranks, to its end."""
    command = [*LGC, "train", *RUN, *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == returncode, done.stderr
    return done


def rows(folder: Path) -> list[dict[str, Any]]:
    """What is complete of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def measured(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Everything that a run has measured, but for time."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["time"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)], summary


def start_until(phase: str, out: Path, *command: str) -> subprocess.Popen[str]:
    """Start a command, and return as soon as it has done a step of this phase."""
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    deadline = time.monotonic() + LIMIT_S
    while not any(row.get("phase") == phase for row in rows(out)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks: those of the launcher's session that run the most deeply nested."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == launcher:
            parents[int(stat.parent.name)] = int(fields[1])
    return sorted(pid for pid, parent in parents.items() if parent != launcher and pid != launcher)


def kill_and_wait(process: subprocess.Popen[str], whole_job: bool) -> None:
    """SIGKILL to all processes of the job, or to its last rank alone."""
    if whole_job:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT_S)
    if not whole_job:
        assert process.returncode == 1
        assert "rank 1: process 1 terminated with signal SIGKILL" in output


@pytest.fixture(scope="module", params=["lgc-ring", "lgc-ps"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A scheme, and a finished run of it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    scheme = f"{request.param}:{SCHEDULE}"
    train(out, "--scheme", scheme)
    assert {name: sum(row.get("phase") == name for row in rows(out)) for name in PHASES} == PHASES
    return scheme, out


def test_killed_in_every_phase_a_run_ends_as_if_it_had_not_been(
    uninterrupted: tuple[str, Path], tmp_path: Path
) -> None:
    scheme, expected = uninterrupted
    command = [*LGC, "train", *RUN, "--scheme", scheme]
    whole_job = "ring" in scheme
    for phase in PHASES:
        kill_and_wait(start_until(phase, tmp_path, *command), whole_job)
        assert rows(tmp_path)[-1]["phase"] == phase
        whole_job = not whole_job
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # as if killed in the middle of a line
    done = train(tmp_path, "--scheme", scheme)
    assert "goes on from step 4" in done.stderr
    assert measured(tmp_path) == measured(expected)
