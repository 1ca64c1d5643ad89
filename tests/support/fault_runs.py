"""Runs with faults, and the undisturbed ones that they are to end like."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_job import Fault
from runs import ENVIRONMENT, LIMIT_S, SMALL, TORCHRUN, lgc, measured

from lgc import checkpoint

JOB = Path(__file__).parent / "fault_job.py"
PHASE_STEPS = 3
PHASES = ("dense", "warmup", "train", "compressed")
SCHEDULE = f"dense_steps={PHASE_STEPS}:warmup_steps={PHASE_STEPS}:train_steps={PHASE_STEPS}:refresh_below=0"
LEARNED = {name: f"{name}:{SCHEDULE}" for name in ("lgc-ring", "lgc-ps")}
LOCAL = f"local:every={PHASE_STEPS}:start_steps={PHASE_STEPS}"
SCHEMES = LEARNED | {
    "quantized": "quantized:reduction=two_stage",
    "local": f"{LOCAL}+quantized",
    "local-overlap": f"{LOCAL}:overlap=True+quantized",
    "local-moments": f"{LOCAL}:outer_lr=1.4:first_moments=0.5:ahead=0.5+quantized:reduction=gather:values=largest0.1",
}

CHECKPOINT_EVERY = 2


def phases_of(scheme: str) -> list[str]:
    """The phase of every step."""
    if scheme in LEARNED:
        return [phase for phase in PHASES for _ in range(PHASE_STEPS)]
    start = PHASE_STEPS if scheme.startswith("local") else 0
    return ["warmup"] * start + ["compressed"] * (len(PHASES) * PHASE_STEPS - start)


def arguments(scheme: str, out: Path, *, timeout: float, steps: int = len(PHASES) * PHASE_STEPS) -> list[str]:
    """Of `lgc` for a short run, the folder last."""
    size = ["--batch-size", "8", "--steps", str(steps), "--limit-test", "64"]
    size += ["--checkpoint-every", str(CHECKPOINT_EVERY)]
    run = ["train", "--recipe", SMALL, *size, "--scheme", scheme, "--timeout", str(timeout)]
    return [*run, "--out", str(out)]


def faulty(out: Path, faults: Sequence[Fault], run: list[str]) -> list[str]:
    """The program of one rank, with its arguments; the log is beside the folder."""
    return [str(JOB), str(log_of(out)), json.dumps([fault._asdict() for fault in faults]), *run]


def log_of(out: Path) -> Path:
    """What the ranks of a run with faults have written of starts and faults."""
    return out.with_suffix(".log")


def torchrun(out: Path, faults: Sequence[Fault], run: list[str], *, limit_s: float = LIMIT_S) -> str:
    """Two ranks with faults, restarted by torchrun until they are done; what they have written.

    Only at its first start does such a job overwrite what is there.
    """
    command, *others = run
    restarts = len(faults) + 2  # two to spare, for a machine so busy that ranks miss each other at the start
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    process = subprocess.Popen(
        [*TORCHRUN, *options, *faulty(out, faults, [command, "--overwrite", *others])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, the stopped ones after 30 s
        output, _ = process.communicate()
        raise AssertionError(f"not done after {limit_s:g} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def run_undisturbed(run: list[str]) -> None:
    """The same with two ranks to which nothing happens."""
    lgc(*run, "--workers", "2")


def results(out: Path) -> tuple[Any, ...]:
    """Everything that a finished run of two ranks has measured, and its model, bit for bit."""
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    models = [checkpoint.load_rank(newest, rank=rank, world_size=2)["model"] for rank in range(2)]
    return *measured(out), [{name: tensor.numpy().tobytes() for name, tensor in model.items()} for model in models]
