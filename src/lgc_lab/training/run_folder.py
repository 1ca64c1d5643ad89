"""The folder of one run.

settings.json     what was asked for, from the start on
metrics.jsonl     a row a step and a row an evaluation, while it trains
checkpoints/      to go on from, see lgc.checkpoint
tensorboard/      events, if asked for
summary.json      last and at once: a run that has it has finished
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lgc_lab.folder import OtherRunError, read_objects, require_same, write_json, write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
OVERWRITE = "overwrite.pending"
NOT_EVENTS = ("step", "epoch", "seconds", "phase")


def is_to_be_overwritten(folder: Path, *, first_start: bool) -> bool:
    """Whether what is there is still to be removed, of a job that was to and that a launcher may have restarted."""
    marker = folder / OVERWRITE
    if first_start:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return marker.exists()


def claim(folder: Path, configuration: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Make `folder` that of a run with this configuration; False if it has that run already, finished.

    What an unfinished run of the same configuration has left stays, to go on from; its number of ranks may differ. One
    that has not done a step is not in the way of another.

    Args:
        folder: of the run; need not exist.
        configuration: see `Settings.configuration`.
        overwrite: remove whatever run is there, finished or not, of whatever settings.

    Raises:
        OtherRunError: the folder has a run of other settings.
        ValueError: a file of the folder cannot be read.
    """
    if overwrite:
        _clear(folder)
    finished = is_finished(folder, configuration)
    if not finished:
        write_json(folder / SETTINGS, configuration)
    return not finished


def is_finished(folder: Path, configuration: Mapping[str, Any]) -> bool:
    """Whether a folder has a run of this configuration, finished; changes nothing. Raises as `claim`."""
    if _has_content(folder / SUMMARY):
        there = _read_own(folder / SUMMARY).get("configuration")
        if not isinstance(there, dict):
            raise ValueError(f"{folder / SUMMARY} has no configuration; --overwrite starts anew.")
        require_same(there, configuration, f"{folder} has a finished run")
        return True
    settings, metrics, checkpoints = folder / SETTINGS, folder / METRICS, folder / CHECKPOINTS
    begun = _has_content(metrics) or checkpoints.exists()
    there = _read_own(settings) if _has_content(settings) else {}
    if (begun or there) and not {"recipe", "scheme"} <= there.keys():
        found = next(path for path in (settings, checkpoints, metrics) if path.exists())
        raise OtherRunError(
            f"{found} is not of a run whose settings are known, and stays as it is; choose another --out, or "
            "--overwrite."
        )
    if begun:
        require_same(there, configuration, f"{folder} has an unfinished run", but=("world_size",))
    return False


def _read_own(file: Path) -> dict[str, Any]:
    try:
        return read_objects(file)[0]
    except ValueError as error:
        raise ValueError(f"{error} --overwrite starts anew.") from None


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _clear(folder: Path) -> None:
    for name in (CHECKPOINTS, EVENTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (SUMMARY, METRICS, SETTINGS, OVERWRITE):  # so that after a kill it is still known what is to be done
        (folder / name).unlink(missing_ok=True)


class RunLog:
    """Rank 0's log of a run: metrics.jsonl, a progress bar where there is a terminal, TensorBoard events.

    Args:
        folder: of the run.
        step: steps done before; rows of later ones are dropped, they will be made again.
        seconds: wall time before.
        total: steps of the run.
        title: for the progress bar.
        tensorboard: whether to write events; needs lgc[tensorboard].
    """

    def __init__(
        self, folder: Path, *, step: int, seconds: float, total: int, title: str, tensorboard: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        cut_metrics(folder / METRICS, step)
        self._started = time.monotonic() - seconds
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._events: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=step)
        self._bar = tqdm(
            total=total, initial=step, desc=title, unit="step", disable=None, leave=False, dynamic_ncols=True
        )

    def row(self, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Record what was measured in a step, or in the evaluation after it."""
        seconds = round(time.monotonic() - self._started, 3)
        row = {"step": step, "epoch": round(epoch, 4), "seconds": seconds} | dict(values)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events:
            for name, value in row.items():
                if name not in NOT_EVENTS:
                    self._events.add_scalar(name, value, step)

    def progress(self, text: str) -> None:
        """Move the progress bar on by a step."""
        self._bar.set_postfix_str(text)
        self._bar.update()

    def sync(self) -> None:
        """Have everything on the disk, before a checkpoint says that these steps are done."""
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        self._file.close()
        if self._events:
            self._events.close()


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows of `step` and later ones, and a line that was not written to its end.

    Raises:
        ValueError: if a line before that is no row.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                break
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {len(kept) + 1} is not a row of a run: {line[:100]!r}.") from None
        kept.append(line)
    write_whole(path, b"".join(kept))
