"""Folders of results: one job at a time, of one configuration, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class OtherRunError(ValueError):
    """Run that is in the way: one of other settings (the message names the first field that differs), or going on."""


def require_same(there: Mapping[str, Any], wanted: Mapping[str, Any], where: str, *, but: tuple[str, ...] = ()) -> None:
    """Require that the configuration found `there` is the one that is to go on, `but` for fields that may differ.

    Raises OtherRunError, which says `where` it was found, the first field that differs, and both values.
    """
    for field, value in wanted.items():
        if field not in but and there.get(field) != value:
            raise OtherRunError(
                f"{where} of other settings ({field}: {there.get(field)!r}, now {value!r}); choose another --out, or "
                "--overwrite."
            )


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder for as long as the `with` block lasts. Raises OtherRunError if one is in there.

    Jobs of other machines too where the file system has such locks for all of them; NFS has them for each machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OtherRunError(f"{folder} has a run that is going on; choose another --out, or stop it.") from None
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    # A child has the lock for as long as it lives, and may outlive this process.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


_held: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave an empty file under the name
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file: one or, of a *.jsonl, one a line. Raises ValueError if it has something else."""
    try:
        text = path.read_text(encoding="utf-8")
        objects = [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not all(isinstance(each, dict) for each in objects):
        raise ValueError(f"{path} must have JSON objects.")
    return objects
