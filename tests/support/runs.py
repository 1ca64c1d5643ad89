"""Runs of `lgc train` as a user would start them, and what they leave behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LGC = [sys.executable, "-m", "lgc"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT_S = 600
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see "Resuming" in docs/usage.md
}


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
    """The processes that a process has started, in the order of their ids."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return sorted(int(pid) for pid in text.split())
