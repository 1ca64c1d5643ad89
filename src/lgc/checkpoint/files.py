"""Folder of a checkpoint: written so that it is there whole or not at all, verified before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch

from lgc.checkpoint.state import State, from_bytes, to_bytes
from lgc.version import __version__

SCHEMA = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**28  # bytes; read whole before it is understood


class CheckpointError(ValueError):
    """Checkpoint that cannot be written or read; the message names the file and what is wrong."""


class RefusedError(CheckpointError):
    """Checkpoint that is damaged or not understood; to try again would not help."""


class _NewerSchemaError(RefusedError):
    pass


class Entry(NamedTuple):
    """Rank's file as the manifest has it."""

    name: str
    size: int
    sha256: str
    tensors: dict[str, dict[str, Any]]  # by name {"dtype": "float32", "shape": [2, 3]}


def flaws(directory: Path) -> dict[Path, RefusedError | None]:
    """Say of every folder named as a checkpoint, newest first, why it is none; None if it is, or of a newer schema."""
    found: dict[Path, RefusedError | None] = {}
    for path in _step_folders(directory):
        found[path] = None
        try:
            for entry in read_manifest(path):
                _require_size(path, entry)
        except RefusedError as error:
            found[path] = None if isinstance(error, _NewerSchemaError) else error
    return found


def prepare(path: Path) -> None:
    """Make the empty folder of a new checkpoint. Raises CheckpointError if one of this step or a later one is there."""
    later = [folder for folder in _complete(path.parent) if folder.name >= path.name]
    if later:
        raise CheckpointError(
            f"{later[0]} is there already, and {path.name} would not be the newest; save to another directory, or "
            "set_aside what is not wanted."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    path.mkdir()
    _sync_folder(path.parent)


def write_rank(path: Path, rank: int, state: State) -> dict[str, Any]:
    """Write one rank's file; its `Entry` as a JSON object."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}, which rank 0 has made, is not there: checkpoint.save(directory=...) must be one folder for all "
            "ranks; where each has its own, of which something else makes one, give shared=False."
        )
    data, tensors = to_bytes(state)
    forms = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }
    _write_file(path / _file_name(rank), data)
    return Entry(_file_name(rank), len(data), hashlib.sha256(data).hexdigest(), forms)._asdict()


def publish(path: Path, step: int, files: list[dict[str, Any]], scheme: str | None, *, shared: bool) -> None:
    """Write the manifest; the checkpoint exists from here on, or once the ranks' folders, not `shared`, are one."""
    for file in files if shared else []:
        _require_size(path, Entry(**file))  # seen from here: all ranks wrote to the same folder
    content = {
        "schema": SCHEMA,
        "versions": {"lgc": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__},
        "step": step,
        "world_size": len(files),
        "scheme": scheme,
        "files": files,
    }
    text = json.dumps(content | {"sha256": _content_digest(content)}, indent=1)
    _write_file(path / MANIFEST, text.encode())


def remove(path: Path) -> None:
    """Remove a checkpoint, or what is there of one."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        _sync_folder(path)
        shutil.rmtree(path)


def remove_old(directory: Path, keep: int) -> None:
    """Remove the complete checkpoints beyond `keep`, and whatever older is not complete."""
    kept = _complete(directory)[:keep]
    for path in _step_folders(directory):
        if kept and path.name < kept[0].name and path not in kept:
            remove(path)


def read_manifest(path: Path) -> list[Entry]:
    """Read which files the ranks have, checked as far as it can be without reading them.

    Raises:
        RefusedError: naming the field that is wrong.
        CheckpointError: if the manifest cannot be read, or is of an older schema.
    """
    file = path / MANIFEST
    with _reading(file):
        size = file.stat().st_size
        _require(file, "size", f"at most {MANIFEST_LIMIT}", size, size <= MANIFEST_LIMIT)
        text = file.read_bytes()
    try:
        content = dict(json.loads(text))
        digest = _content_digest({key: value for key, value in content.items() if key != "sha256"})
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(f"{file} is not a JSON object: {error}.") from error
    schema: Any = content.get("schema")
    versions = content.get("versions")
    _require(file, "schema", "an integer", schema, type(schema) is int)
    if schema > SCHEMA:
        writer = f"a newer lgc wrote it ({versions})"
        raise _NewerSchemaError(f"{file}: schema must be at most {SCHEMA}, got {schema}; {writer}.")
    _require(file, "sha256", digest, content.get("sha256"), digest == content.get("sha256"))
    if schema < SCHEMA:  # nothing is wrong with it, so that it is neither set aside nor passed over
        raise CheckpointError(
            f"{file}: schema must be {SCHEMA}, got {schema}; an older lgc wrote it ({versions}): finish this run with "
            "the release that began it, or save to another directory."
        )
    step: Any = content.get("step")
    files: Any = content.get("files")
    world_size = content.get("world_size")
    _require(file, "step", path.name, step, type(step) is int and path.name.startswith(f"step-{step:010d}"))
    _require(file, "files", "a list", files, isinstance(files, list) and len(files) > 0)
    _require(file, "world_size", len(files), world_size, world_size == len(files))
    for rank, fields in enumerate(files):  # the digest is right: what is checked is that no path leaves the folder
        named = isinstance(fields, dict) and fields.keys() == set(Entry._fields)
        _require(file, f"files[{rank}]", f"an object of {', '.join(Entry._fields)}", fields, named)
        _require(file, f"files[{rank}].name", _file_name(rank), fields["name"], fields["name"] == _file_name(rank))
    return [Entry(**fields) for fields in files]


def read_rank(path: Path, entry: Entry) -> dict[str, Any]:
    """Read one rank's state, after its file has been verified.

    Raises:
        RefusedError: naming the file and what is wrong with it.
        CheckpointError: if it cannot be read.
    """
    file = path / entry.name
    _require_size(path, entry)
    with _reading(file):
        data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    _require(file, "sha256", entry.sha256, digest, digest == entry.sha256)
    try:
        return from_bytes(data)
    except ValueError as error:
        raise RefusedError(f"{file} {error}") from error


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _step_folders(directory: Path) -> list[Path]:
    """Find the folders named as checkpoints are, newest first."""
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if re.fullmatch(r"step-\d{10}", path.name))
    return sorted((path for path in named if path.is_dir()), reverse=True)


def _complete(directory: Path) -> list[Path]:
    return [path for path, flaw in flaws(directory).items() if flaw is None]


def _write_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror} ({temporary.name}).") from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_size(path: Path, entry: Entry) -> None:
    file = path / entry.name
    with _reading(file):
        size = file.stat().st_size
    _require(file, "size", entry.size, size, size == entry.size)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = RefusedError if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind(f"{file} cannot be read: {error.strerror}.") from error


def _require(file: Path, field: str, expected: object, actual: object, holds: bool) -> None:
    if not holds:
        raise RefusedError(f"{file}: {field} must be {expected}, got {actual!r:.200}.")
