"""Checkpoints on disk: one safetensors file a rank and a JSON manifest, which is written last.

    DIR/step-0000001200/rank-0000.safetensors   tensors; everything else as JSON in the header's metadata
    DIR/step-0000001200/manifest.json           schema, versions, and per file its size, sha256 and tensors

Every file is written under a temporary name, synced and renamed. A folder without a valid manifest is not a
checkpoint. `DIR` must be one folder for all ranks (one machine or a shared file system). Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from lgc.comm.transport import SERVER, Transport
from lgc.version import __version__

logger = logging.getLogger("lgc")

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**28  # bytes; read whole before it is understood
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
ESCAPES = {"~": "~0", "/": "~1", "[": "~2"}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64),
    )
}

State = Mapping[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and what is wrong."""


class RefusedError(CheckpointError):
    """A checkpoint that is damaged or not understood; to try again would not help."""


def save(directory: Path | str, state: State, *, step: int, group: dist.ProcessGroup, keep: int = 2) -> Path:
    """Write every rank's state as the checkpoint of `step`; a collective.

    Args:
        directory: holds the checkpoints of one run; the same folder for all ranks.
        state: this rank's; nested dicts (keys str or int), lists and tuples of tensors, numbers, strings, booleans
            and None, such as the `state_dict()` of a handle, a module and an optimizer.
        step: at least 0, and above that of every checkpoint that is there.
        group: the ranks that save; the handle's.
        keep: how many complete checkpoints stay, at least 1; older ones are removed once this one is complete.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: a wrong argument.
        CheckpointError: on every rank, naming each rank that failed and its file. The older checkpoints are
            untouched then.
    """
    if step < 0:
        raise ValueError(f"checkpoint.save(step=...) must be at least 0, got {step}.")
    if keep < 1:
        raise ValueError(f"checkpoint.save(keep=...) must be at least 1, got {keep}.")
    path = Path(directory) / f"step-{step:010d}"
    transport = Transport(group)
    steps = _together(transport, "checkpoint.save", lambda: step)
    if len(set(steps)) != 1:
        raise CheckpointError(f"checkpoint.save(step=...) must be the same on every rank, got {steps} (by rank).")
    _together(transport, "checkpoint.save", lambda: _prepare(path), rank=SERVER)
    try:
        files = _together(transport, "checkpoint.save", lambda: _write_rank(path / _file_name(transport.rank), state))
        _together(transport, "checkpoint.save", lambda: _publish(path, step, files, _scheme(state)), rank=SERVER)
    except CheckpointError:
        if transport.rank == SERVER:
            with contextlib.suppress(OSError):
                _remove(path)
        raise
    try:
        _together(transport, "checkpoint.save", lambda: _remove_old(path.parent, keep), rank=SERVER)
    except CheckpointError as error:  # no reason to end a run
        if transport.rank == SERVER:
            logger.warning("%s is complete; older ones stay for now: %s", path, error)
    return path


def available(directory: Path | str, *, group: dist.ProcessGroup | None = None) -> list[Path]:
    """The complete checkpoints of a folder, newest first.

    Complete is one that has a valid manifest and all its files in their full size; what is in them is for `load` to
    check. One of a newer schema is in the list, and `load` refuses it.

    Args:
        directory: holds the checkpoints of one run.
        group: whose ranks all get what the first of them finds, as a collective; None is by oneself.

    Raises:
        CheckpointError: a manifest is there and cannot be read, which may be no fault of the checkpoint.
    """
    if group is not None:

        def names() -> list[str]:
            return [path.name for path in available(directory)]

        found = _together(Transport(group), "checkpoint.available", names, rank=SERVER)[SERVER]
        return [Path(directory) / name for name in found]
    flaws = {path: _flaw(path) for path in _step_folders(Path(directory))}
    for path, flaw in flaws.items():
        if flaw is not None:
            logger.warning("%s is not a complete checkpoint: %s", path, flaw)
    return [path for path, flaw in flaws.items() if flaw is None]


def latest(directory: Path | str) -> Path | None:
    """The newest complete checkpoint of a folder, None where there is none."""
    return next(iter(available(directory)), None)


def set_aside(path: Path, *, group: dist.ProcessGroup) -> Path:
    """Rename a checkpoint that `load` refused, so that it is not found any more; a collective. Returns the new path.

    Raises:
        CheckpointError: on every rank, if it cannot be renamed.
    """

    def rename() -> str:
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        paths = (path.with_name(f"{path.name}.refused{number}") for number in numbers)
        aside = next(path for path in paths if not path.exists())
        path.rename(aside)
        return aside.name

    return path.with_name(_together(Transport(group), "checkpoint.set_aside", rename, rank=SERVER)[SERVER])


def resume(directory: Path | str, *, group: dist.ProcessGroup) -> dict[str, Any] | None:
    """This rank's state from the newest checkpoint that is not refused, None if there is none; a collective.

    Rank 0 logs which one it is, at level INFO. What is refused is set aside, with a warning: the run then goes on from
    an older checkpoint, and repeats the steps since. To have the last word on that, use `available`, `load` and
    `set_aside`.

    Raises:
        CheckpointError: on every rank, if a file cannot be read or renamed, which may be no fault of the checkpoint.
    """
    for path in available(directory, group=group):
        try:
            state = load(path, group=group)
        except RefusedError as error:
            aside = set_aside(path, group=group)
            if dist.get_rank(group) == 0:
                logger.warning("%s\nThis checkpoint is now %s; going on from the one before it, if any.", error, aside)
        else:
            if dist.get_rank(group) == 0:
                logger.info("goes on from step %d (%s)", int(path.name.removeprefix("step-")), path)
            return state
    return None


def load(path: Path, *, group: dist.ProcessGroup) -> dict[str, Any]:
    """This rank's state from a checkpoint of these ranks, or of another number of ranks; a collective.

    As `load_rank`, but a file that one rank refuses is refused by all.

    Raises:
        RefusedError: on every rank, naming each rank that refused, the file, and what is wrong with it.
        CheckpointError: the same, where a file could not be read, which may be no fault of the checkpoint.
    """
    transport = Transport(group)
    state: dict[str, Any] = {}

    def read() -> str:
        state.update(load_rank(path, rank=transport.rank, world_size=transport.world_size))
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()

    manifests = _together(transport, "checkpoint.load", read)
    if len(set(manifests)) != 1:
        raise CheckpointError(f"checkpoint.load: the ranks have different checkpoints: {manifests} (sha256 by rank).")
    return state


def load_rank(path: Path, *, rank: int, world_size: int) -> dict[str, Any]:
    """The state of one rank out of `world_size`, verified before anything of it is used.

    At the world size of the checkpoint it is what that rank saved, bit for bit: tensors are contiguous, on the CPU,
    each with storage of its own, and every mapping is a dict. At another one, the state of a handle is resharded
    (see `reshard`), wherever in the nested state it is, and everything else is that of the saved rank `rank % K`: what
    differs between ranks otherwise, such as a random generator, is for the caller to set.

    Raises:
        RefusedError: naming the file and the field, what was expected and what is there.
        CheckpointError: naming the file that could not be read.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"checkpoint.load_rank(rank=...) must be in 0 .. {world_size - 1}, got {rank}.")
    manifest = _read_manifest(path)
    saved = len(manifest.files)
    state = _read_rank(path, manifest.files[rank % saved])
    if saved == world_size:
        return state

    def resharded(keys: tuple[Any, ...]) -> dict[str, Any]:
        states = (_at(_read_rank(path, file), keys) for file in manifest.files)
        return reshard(states, rank=rank, world_size=world_size)

    return dict(_with_handles(state, resharded))


def reshard(states: Iterable[State], *, rank: int, world_size: int) -> dict[str, Any]:
    """The state of a handle at another world size, from its states on all K ranks, in order of rank.

    New rank j of K' takes over the old ranks' share [j / K', (j + 1) / K') of [0, 1), on which old rank i is
    [i / K, (i + 1) / K): its residual and momentum are the old ranks' averages, weighted by their part in it. That
    keeps their mean over the ranks, and with it the update that is still owed. Replicated state is old rank 0's, and
    so is the server's. The byte counts are dealt out in the same shares, so that their sums over all ranks stay.
    """
    totals: dict[str, Any] = {}
    wires: list[Any] = []
    first: State | None = None
    for old_rank, state in enumerate(states):
        if state["rank"] != old_rank:
            raise ValueError(
                f"reshard(states=...) must be in order of rank, got {state['rank']} in place of {old_rank}."
            )
        first = first or state
        wires.append(json.loads(state["wire"]))
        weight = _overlap(old_rank, state["world_size"], rank, world_size)
        if weight:
            _accumulate(totals, state["aggregator"].get("per_rank", {}), float(weight))
    if first is None or len(wires) != first["world_size"]:
        raise ValueError(f"reshard(states=...) must have the state of every rank, got {len(wires)}.")
    aggregator = dict(first["aggregator"])
    if aggregator:
        aggregator["per_rank"] = _as_saved(totals, aggregator["per_rank"])
        aggregator["server"] = aggregator["server"] if rank == SERVER else {}
    return {
        **first,
        "rank": rank,
        "world_size": world_size,
        "resharded_from": first["world_size"],
        "wire": json.dumps(_deal_counts(wires, rank, world_size)),
        "aggregator": aggregator,
    }


class _File(NamedTuple):
    """One rank's file as the manifest has it."""

    name: str
    size: int
    sha256: str
    tensors: dict[str, list[Any]]  # name to [dtype, shape]


class _Manifest(NamedTuple):
    step: int
    files: list[_File]


class _NewerSchemaError(RefusedError):
    pass


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _step_folders(directory: Path) -> list[Path]:
    """All folders named as checkpoints are, newest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (path for path in directory.iterdir() if re.fullmatch(r"step-\d{10}", path.name) and path.is_dir()),
        reverse=True,
    )


def _together(transport: Transport, what: str, action: Callable[[], Any], rank: int | None = None) -> list[Any]:
    """Do something on every rank, or on one; what it returned on each (JSON values). All raise if one fails."""
    result, error, cause = None, None, None
    try:
        if rank in (None, transport.rank):
            result = action()
    except Exception as exception:
        error = str(exception) if isinstance(exception, CheckpointError) else repr(exception)
        cause = exception
    answers = _all_gather_json(transport, [result, error, isinstance(cause, RefusedError)])
    failures = [(f"rank {number}: {error}", refused) for number, (_, error, refused) in enumerate(answers) if error]
    if failures:
        kind = RefusedError if all(refused for _, refused in failures) else CheckpointError
        raise kind(f"{what}: {'; '.join(text for text, _ in failures)}") from cause
    return [result for result, *_ in answers]


def _all_gather_json(transport: Transport, value: Any) -> list[Any]:
    """The JSON values of all ranks, by rank, exchanged as lengths and bytes."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    payloads = transport.all_gather_bytes(payload, "checkpoint", limit=MANIFEST_LIMIT)
    return [json.loads(payload.numpy().tobytes()) for payload in payloads]


def _prepare(path: Path) -> None:
    """Make the empty folder of a new checkpoint."""
    later = [folder for folder in _complete(path.parent) if folder.name >= path.name]
    if later:
        raise CheckpointError(
            f"{later[0]} is there already, and {path.name} would not be the newest; save to another directory, or "
            "set_aside what is not wanted."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(path)
    path.mkdir()
    _sync_folder(path.parent)


def _write_rank(path: Path, state: State) -> list[Any]:
    """Write one rank's file; its entry in the manifest."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, "", tensors), allow_nan=False)
    data = safetensors.torch.save(tensors, {"state": text})
    _write_file(path, data)
    forms = {name: [_dtype_name(tensor), list(tensor.shape)] for name, tensor in tensors.items()}
    return [path.name, len(data), hashlib.sha256(data).hexdigest(), forms]


def _publish(path: Path, step: int, files: list[Any], scheme: str | None) -> None:
    """Write the manifest; the checkpoint exists from here on."""
    entries = [_File(*file) for file in files]
    for entry in entries:
        _require_size(path / entry.name, entry)  # seen from here: all ranks wrote to the same folder
    content = {
        "schema": SCHEMA,
        "versions": {"lgc": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__},
        "step": step,
        "world_size": len(entries),
        "scheme": scheme,
        "files": [entry._asdict() for entry in entries],
    }
    text = json.dumps(content | {"sha256": _content_digest(content)}, indent=1)
    _write_file(path / MANIFEST, text.encode())


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def _remove_old(directory: Path, keep: int) -> None:
    """Remove the complete checkpoints beyond `keep`, and whatever older is not complete."""
    kept = _complete(directory)[:keep]
    for path in _step_folders(directory):
        if path.name < kept[0].name and path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        _sync_folder(path)
        shutil.rmtree(path)


def _complete(directory: Path) -> list[Path]:
    """As `available`, of one rank, without telling of the others."""
    return [path for path in _step_folders(directory) if _flaw(path) is None]


def _flaw(path: Path) -> RefusedError | None:
    """Why this is no complete checkpoint; None if it is one, or of a newer schema."""
    try:
        for file in _read_manifest(path).files:
            _require_size(path / file.name, file)
    except _NewerSchemaError:
        return None
    except RefusedError as error:
        return error
    return None


def _read_manifest(path: Path) -> _Manifest:
    """The manifest of a checkpoint, as far as it can be checked without reading the files."""
    file = path / MANIFEST
    content, digest = _parse_manifest(file)
    schema: Any = content.get("schema")
    _require(file, "schema", "an integer", schema, type(schema) is int)
    if schema > SCHEMA:
        raise _NewerSchemaError(
            f"{file}: schema must be at most {SCHEMA}, got {schema}; a newer lgc wrote it ({content.get('versions')})."
        )
    _require(file, "schema", SCHEMA, schema, schema == SCHEMA)
    _require(file, "sha256", digest, content.get("sha256"), digest == content.get("sha256"))
    step: Any = content.get("step")
    files: Any = content.get("files")
    world_size = content.get("world_size")
    _require(file, "step", path.name, step, type(step) is int and path.name.startswith(f"step-{step:010d}"))
    _require(file, "files", "a list", files, isinstance(files, list) and len(files) > 0)
    _require(file, "world_size", len(files), world_size, world_size == len(files))
    return _Manifest(step, [_read_entry(file, rank, entry) for rank, entry in enumerate(files)])


def _parse_manifest(file: Path) -> tuple[dict[str, Any], str]:
    """The content of a manifest, and the digest that it should have of itself."""
    try:
        size = file.stat().st_size
        _require(file, "size", f"at most {MANIFEST_LIMIT}", size, size <= MANIFEST_LIMIT)
        text = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        content = dict(json.loads(text))
        return content, _content_digest({key: value for key, value in content.items() if key != "sha256"})
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(f"{file} is not a JSON object: {error}.") from error


def _read_entry(manifest: Path, rank: int, entry: Any) -> _File:
    where = f"files[{rank}]"
    fields = set(entry) if isinstance(entry, dict) else None
    _require(manifest, where, f"an object of {', '.join(_File._fields)}", entry, fields == set(_File._fields))
    file = _File(**entry)
    _require(manifest, f"{where}.name", _file_name(rank), file.name, file.name == _file_name(rank))
    _require(manifest, f"{where}.sha256", "a string", file.sha256, isinstance(file.sha256, str))
    _require(manifest, f"{where}.tensors", "an object", file.tensors, isinstance(file.tensors, dict))
    data = 0
    for name, form in file.tensors.items():
        _require(manifest, f"{where}.tensors[{name!r}]", "[dtype, shape]", form, _is_form(form))
        data += math.prod(form[1]) * DTYPES[form[0]].itemsize
    bound = f"{data} and a header of at most {HEADER_LIMIT} bytes"
    plausible = type(file.size) is int and data + 8 <= file.size <= data + 8 + HEADER_LIMIT
    _require(manifest, f"{where}.size", bound, file.size, plausible)
    return file


def _is_form(form: Any) -> bool:
    return (
        isinstance(form, list)
        and len(form) == 2
        and isinstance(form[0], str)
        and form[0] in DTYPES
        and isinstance(form[1], list)
        and all(type(length) is int and length >= 0 for length in form[1])
    )


def _read_rank(path: Path, entry: _File) -> dict[str, Any]:
    """One rank's state, after its file has been verified."""
    file = path / entry.name
    _require_size(file, entry)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    digest = hashlib.sha256(data).hexdigest()
    _require(file, "sha256", entry.sha256, digest, digest == entry.sha256)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tree = json.loads(header["__metadata__"]["state"], parse_constant=_refuse_constant)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{file} cannot be understood: {error!r}.") from error
    forms = {name: [_dtype_name(tensor), list(tensor.shape)] for name, tensor in tensors.items()}
    for name in sorted({*forms, *entry.tensors}):
        expected, actual = entry.tensors.get(name), forms.get(name)
        _require(file, f"tensors[{name!r}]", expected, actual, actual == expected)
    try:
        state = _decode(tree, tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{file}: state cannot be understood: {error!r}.") from error
    _require(file, "state", "an object", type(state).__name__, isinstance(state, dict))
    return dict(state)


def _require_size(file: Path, entry: _File) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error
    _require(file, "size", entry.size, size, size == entry.size)


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    kind = RefusedError if isinstance(error, FileNotFoundError) else CheckpointError
    return kind(f"{file} cannot be read: {error.strerror}.")


def _require(file: Path, field: str, expected: object, actual: object, holds: bool) -> None:
    if not holds:
        raise RefusedError(f"{file}: {field} must be {expected}, got {actual!r:.200}.")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON value for `value`; its tensors go to `tensors`, by their path.

    Lists are lists and dicts with string keys are objects; {"$tensor": name}, {"$float": "nan"}, {"$tuple": [...]} and
    {"$dict": [[key, value], ...]} are what JSON does not have.
    """
    if isinstance(value, Tensor):
        if _dtype_name(value) not in DTYPES or value.layout is not torch.strided:
            raise TypeError(f"state[{name!r}] is a {value.layout} tensor of {value.dtype}, which has no file format.")
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        tensors[name] = plain.clone(memory_format=torch.contiguous_format)
        return {"$tensor": name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) in (list, tuple):
        items = [_encode(item, _join(name, index), tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"state[{name!r}] has the key {key!r} ({type(key).__name__}); it must be str or int.")
        encoded = [(key, _encode(item, _join(name, key), tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(encoded)
        return {"$dict": encoded}
    raise TypeError(f"state[{name!r}] is a {type(value).__name__}, which has no file format.")


def _join(name: str, key: str | int) -> str:
    """The path of a part, as a JSON pointer (RFC 6901), integers in brackets."""
    part = f"[{key}]" if isinstance(key, int) else "".join(ESCAPES.get(character, character) for character in key)
    return f"{name}/{part}"


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Back from `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"{value!r:.100} has no meaning")


def _is_handle(value: Any) -> bool:
    return isinstance(value, Mapping) and {"scheme", "rank", "world_size", "wire", "aggregator"} <= set(value)


def _with_handles(value: Any, replacement: Callable[[tuple[Any, ...]], Any], keys: tuple[Any, ...] = ()) -> Any:
    """A nested state with another one in place of each handle's, given where that is."""
    if _is_handle(value):
        return replacement(keys)
    if isinstance(value, Mapping):
        return {key: _with_handles(item, replacement, (*keys, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_handles(item, replacement, (*keys, index)) for index, item in enumerate(value))
    return value


def _scheme(state: State) -> str | None:
    """The scheme of the first handle in a nested state."""
    found: list[tuple[Any, ...]] = []
    _with_handles(state, found.append)
    return _at(state, found[0])["scheme"] if found else None


def _at(state: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        state = state[key]
    return state


def _overlap(old_rank: int, old_world_size: int, rank: int, world_size: int) -> Fraction:
    """The part of new rank's share that the old rank had, in [0, 1]; over the old ranks they add up to 1."""
    start = max(Fraction(old_rank, old_world_size), Fraction(rank, world_size))
    stop = min(Fraction(old_rank + 1, old_world_size), Fraction(rank + 1, world_size))
    return max(stop - start, Fraction(0)) * world_size


def _accumulate(totals: dict[str, Any], values: Mapping[str, Any], weight: float) -> None:
    """Add `weight * values` to nested totals, tensors in float64."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _accumulate(totals.setdefault(key, {}), value, weight)
        elif isinstance(value, Tensor):
            totals[key] = totals.get(key, 0.0) + weight * value.double()
        else:
            totals[key] = totals.get(key, 0.0) + weight * value


def _as_saved(totals: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _as_saved(totals[key], value)
        if isinstance(value, Mapping)
        else totals[key].to(value.dtype)
        if isinstance(value, Tensor)
        else totals[key]
        for key, value in like.items()
    }


def _deal_counts(wires: list[Any], rank: int, world_size: int) -> dict[str, Any]:
    """The new rank's share of the byte counts; steps are everyone's."""

    def share(counts: list[int]) -> int:
        def before(boundary: Fraction) -> int:
            whole = int(boundary)
            part = boundary - whole
            return sum(counts[:whole]) + (int(part * counts[whole]) if part else 0)

        return before(Fraction(rank + 1, world_size) * len(counts)) - before(Fraction(rank, world_size) * len(counts))

    phases = {}
    for name, traffic in wires[0].items():
        ranks = [wire[name] for wire in wires]
        contents = {content for of_rank in ranks for content in of_rank["contents"]}
        phases[name] = {
            "steps": traffic["steps"],
            **{
                key: share([of_rank[key] for of_rank in ranks])
                for key in ("sent_bytes", "received_bytes", "upload_bytes")
            },
            "contents": {
                content: share([of_rank["contents"].get(content, 0) for of_rank in ranks])
                for content in sorted(contents)
            },
        }
    return phases
