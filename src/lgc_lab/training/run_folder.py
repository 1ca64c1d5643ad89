"""Folder of one run.

settings.json     what was asked for, from the start on
metrics.jsonl     a row a step and a row an evaluation, while it trains
checkpoints/      to go on from, see lgc.checkpoint
tensorboard/      events, if asked for
summary.json      last and at once: a run that has it has finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgc_lab.folder import OtherRunError, read_objects, require_same, write_json, write_whole

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
OVERWRITE = "overwrite.pending"


def is_to_be_overwritten(folder: Path, *, first_start: bool) -> bool:
    """Tell whether what is there is still to be removed, by a job that a launcher may have restarted."""
    marker = folder / OVERWRITE
    if first_start:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return marker.exists()


def claim(folder: Path, configuration: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Make `folder` that of a run with this configuration; False if it has that run already, finished.

    What an unfinished run of the same configuration has left stays, to go on from; its number of ranks may differ. One
    that has not done a step is not in the way of another. `overwrite` removes whatever run is there.

    Raises:
        OtherRunError: the folder has a run of other settings.
        ValueError: a file of the folder cannot be read.
    """
    if overwrite:
        for name in (CHECKPOINTS, EVENTS):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (SUMMARY, METRICS, SETTINGS, OVERWRITE):  # the marker last, for a launcher that restarts ranks
            (folder / name).unlink(missing_ok=True)
    finished = is_finished(folder, configuration)
    if not finished:
        write_json(folder / SETTINGS, configuration)
    return not finished


def is_finished(folder: Path, configuration: Mapping[str, Any]) -> bool:
    """Tell whether a folder has a run of this configuration, finished; changes nothing. Raises as `claim`."""
    summary = _content(folder / SUMMARY)
    if summary is not None:
        if not isinstance(summary.get("configuration"), dict):
            raise ValueError(f"{folder / SUMMARY} has no configuration; --overwrite starts anew.")
        require_same(summary["configuration"], configuration, f"{folder} has a finished run")
        return True
    settings, metrics, checkpoints = folder / SETTINGS, folder / METRICS, folder / CHECKPOINTS
    begun = checkpoints.exists() or (metrics.exists() and metrics.stat().st_size > 0)
    there = _content(settings) or {}
    if (begun or there) and not {"recipe", "scheme"} <= there.keys():
        found = next(path for path in (settings, checkpoints, metrics) if path.exists())
        raise OtherRunError(
            f"{found} is not of a run whose settings are known, and stays as it is; choose another --out, or "
            "--overwrite."
        )
    if begun:
        require_same(there, configuration, f"{folder} has an unfinished run", but=("world_size",))
    return False


def _content(file: Path) -> dict[str, Any] | None:
    """Read the object in a file, None if there is no file, or one that a power failure has left empty."""
    if not file.exists() or file.stat().st_size == 0:
        return None
    try:
        return read_objects(file)[0]
    except ValueError as error:
        raise ValueError(f"{error} --overwrite starts anew.") from None


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows of `step` and later ones, and a line that was not written to its end.

    Raises ValueError if a line before that is no row.
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
