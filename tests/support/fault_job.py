"""One rank of a training run in which faults happen: `fault_job.py LOG FAULTS [arguments of lgc]`.

A launcher starts it. FAULTS is a JSON list; they happen one after the other, at most one between two starts of the
ranks. LOG is a file to which every rank appends a line of JSON when it starts, and when a fault happens to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["kill", "stop", "exception", "damage", "node", "partition"]
Moment = Literal["before", "during", "after"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
PARTITION = ("ip", "link", "set", "lgc-link", "down")


class Fault(NamedTuple):
    """What happens to one rank.

    It is killed, stopped, raises, is killed after the newest checkpoint was damaged, is killed with its launcher, or
    its link goes down.

    Before is ahead of the forward pass of a step; during, when its round is open and the other ranks wait for this
    one; after, when its round is done and its mean has yet to act. If the step has none it is the next round.
    """

    kind: Kind
    rank: int
    step: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} {self.moment} step {self.step}"


def main(log: Path, faults: list[Fault], arguments: list[str]) -> None:
    """Run `lgc`, with the first of the faults that has not happened yet."""
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    earlier = [event["pid"] for event in read(log) if event["event"] == "start" and event["start"] < start]
    alive = [pid for pid in earlier if Path(f"/proc/{pid}").exists()]
    write(log, "start", start=start, alive=alive)  # before torch is imported, which takes its time
    fault = next(iter(faults[len(read(log, "fault")) :]), None)
    if fault is not None and fault.rank == int(os.environ["RANK"]):
        await_moment(fault, lambda: happen(log, fault, Path(arguments[-1])))
    from lgc_lab.cli import main as lgc

    sys.argv[1:] = arguments
    lgc()


def happen(log: Path, fault: Fault, folder: Path) -> None:
    """Let this rank, of the run in `folder`, have its fault."""
    write(log, "fault", fault=fault._asdict())
    if fault.kind == "exception":
        raise ValueError(f"{fault}, on purpose")
    if fault.kind == "partition":
        subprocess.run(PARTITION, check=True)
        return
    if fault.kind == "damage":
        for file in sorted(folder.glob("checkpoints/step-*/rank-0001.safetensors"))[-1:]:
            os.truncate(file, file.stat().st_size // 2)
    if fault.kind == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)


def await_moment(fault: Fault, happens: Callable[[], None]) -> None:
    """Have the fault happen at its step and moment, once."""
    from lgc.comm.transport import Transport
    from lgc.synchronizer import Synchronizer
    from lgc_lab.training.loop import Training

    update, synchronize = Training.update, Synchronizer.synchronize
    open_round, count = Transport.open_round, Transport._count
    pending = [fault]
    step, is_open = -1, False

    def reach(moment: Moment) -> None:
        # Not every step has a round, and one in a thread may be behind.
        if pending and moment == fault.moment and step >= fault.step:
            pending.clear()
            happens()

    def faulty_update(training: Training, *batch: Any) -> Any:
        nonlocal step, is_open
        step, is_open = training.step, False
        reach("before")
        return update(training, *batch)

    def remembered_round(transport: Transport, step: int, **state: Any) -> Any:
        nonlocal is_open
        opening = open_round(transport, step, **state)
        is_open = True
        return opening

    def faulty_count(transport: Transport, content: str, **counts: int) -> None:
        if is_open:
            reach("during")
        count(transport, content, **counts)

    def faulty_synchronize(synchronizer: Synchronizer, tensors: Any, step: int, **arguments: Any) -> Any:
        means = synchronize(synchronizer, tensors, step, **arguments)
        reach("after")
        return means

    replacements: dict[Any, dict[str, Any]] = {
        Training: {"update": faulty_update},
        Synchronizer: {"synchronize": faulty_synchronize},
        Transport: {"open_round": remembered_round, "_count": faulty_count},
    }
    for owner, methods in replacements.items():
        for name, method in methods.items():
            setattr(owner, name, method)


def write(log: Path, event: str, **values: Any) -> None:
    """Add an event, with this process and the time."""
    with log.open("a") as file:
        file.write(json.dumps({"event": event, "pid": os.getpid(), "time": time.time()} | values) + "\n")


def read(log: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events so far, all or those of one name."""
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [entry for entry in events if event in (None, entry["event"])]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Fault(**fault) for fault in json.loads(sys.argv[2])], sys.argv[3:])
