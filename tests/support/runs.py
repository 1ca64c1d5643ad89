"""Commands as a user would start them, and what runs leave behind."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner
from ranks import start_fork_server

from lgc_lab.cli import main

LGC = [sys.executable, "-m", "lgc"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT_S = 600
SMALL = "small_recipe:SMALL"
PACED = "small_recipe:PACED"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see "Resuming" in docs/usage.md
}


def is_running(pid: int, *, of_group: int | None = None) -> bool:
    """Whether a process, of this group if one is given, has not ended: an orphan that has may be reaped late."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX" and of_group in (None, int(group))


class Done(NamedTuple):
    """A command that has ended: its exit code, what it printed, and what it and its ranks wrote to stderr."""

    returncode: int
    stdout: str
    stderr: str


def lgc(*arguments: str, returncode: int = 0) -> Done:
    """Run `lgc` to its end, in this process and with ranks that have torch imported: a fifth of the time.

    A process of its own (`LGC`) is for tests of processes: how they are killed, interrupted, started by others.
    """
    errors = start_fork_server()
    before = os.fstat(errors.fileno()).st_size
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    of_ranks = os.pread(errors.fileno(), os.fstat(errors.fileno()).st_size - before, before)
    done = Done(result.exit_code, result.stdout, result.stderr + of_ranks.decode())
    assert done.returncode == returncode, done.stderr
    return done


def rows(folder: Path) -> list[dict[str, Any]]:
    """What is complete of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def measured(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Everything that a finished run has measured, but for time."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["time"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)], summary


def children_of(parent: int) -> list[int]:
    """The processes that a process has started, the newest last, whose id may be the smallest."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split()]


def forked_ranks() -> list[int]:
    """The ranks of this process, the newest last."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return children_of(server)
