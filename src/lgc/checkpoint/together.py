"""Saving, finding, loading and resuming by all ranks: what one refuses or fails at, all do."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lgc.checkpoint import files
from lgc.checkpoint.files import CheckpointError, RefusedError
from lgc.checkpoint.state import State, from_bytes, of_first_handle, of_rank, placed, to_bytes
from lgc.comm.transport import SERVER, Transport

logger = logging.getLogger("lgc")

PART = 2**26  # bytes that are gathered at a time, which may be on a GPU meanwhile


class _Alone(NamedTuple):
    """A rank that saves and loads by itself, as do those that come and go."""

    rank: int = 0
    world_size: int = 1

    def all_gather_json(self, value: object, _: str) -> list[Any]:
        return [value]


def save(
    directory: Path | str,
    state: State,
    *,
    step: int,
    group: dist.ProcessGroup | None,
    keep: int = 2,
    shared: bool = True,
) -> Path:
    """Write every rank's state as the checkpoint of `step`; a collective, unless a rank is by itself.

    Args:
        directory: holds the checkpoints of one run; the same folder for all ranks, unless `shared` is False.
        state: this rank's; nested dicts (keys str or int), lists and tuples of tensors, numbers, strings, booleans
            and None, such as the `state_dict()` of a handle, a module and an optimizer.
        step: at least 0, and above that of every checkpoint that is there.
        group: the ranks that save; the handle's. None is this rank by itself, into a folder that no other has, as under
            `lgc.elastic`; so it is for `resume`, `load` and `set_aside`.
        keep: how many complete checkpoints stay, at least 1; older ones are removed once this one is complete.
        shared: False where `directory` is another one on each rank, and empty, and something else makes one folder of
            them, as Ray Train does; that one has the checkpoint, and older ones are left to whoever makes it.

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
    if group is None and (ranks := of_first_handle(state, "world_size")) not in (None, 1):
        raise ValueError(
            f"checkpoint.save(group=...) must be the group of the handle's {ranks} ranks, got None, which is for ranks "
            "that come and go (lgc.elastic)."
        )
    path = Path(directory) / f"step-{step:010d}"
    transport = _ranks(group)
    together = partial(_together, transport, "checkpoint.save")
    steps = together(lambda: step)
    if len(set(steps)) != 1:
        raise CheckpointError(f"checkpoint.save(step=...) must be the same on every rank, got {steps} (by rank).")
    makers = SERVER if shared else None
    together(lambda: files.prepare(path), only=makers)
    try:
        entries = together(lambda: files.write_rank(path, transport.rank, state))
        scheme = of_first_handle(state, "scheme")
        together(lambda: files.publish(path, step, entries, scheme, shared=shared), only=SERVER)
    except CheckpointError:
        if makers in (None, transport.rank):
            with contextlib.suppress(OSError):
                files.remove(path)
        raise
    try:
        together(lambda: files.remove_old(path.parent, keep), only=SERVER)
    except CheckpointError as error:  # no reason to end a run
        if transport.rank == SERVER:
            logger.warning("%s is complete; older ones stay for now: %s", path, error)
    return path


def available(directory: Path | str, *, group: dist.ProcessGroup | None = None) -> list[Path]:
    """List the complete checkpoints of a folder, newest first.

    Complete is one that has a valid manifest and all its files in their full size; what is in them is for `load` to
    check. One of a newer schema is in the list, and `load` refuses it. With a group it is a collective, and all ranks
    get what the first of them finds.

    Raises:
        CheckpointError: a manifest is there and cannot be read, which may be no fault of the checkpoint, or is of an
            older schema.
    """
    if group is not None:
        transport = _meeting(group)
        names = _together(
            transport, "checkpoint.available", lambda: [p.name for p in available(directory)], only=SERVER
        )
        return [Path(directory) / name for name in names[SERVER]]
    flaws = files.flaws(Path(directory))
    for path, flaw in flaws.items():
        if flaw is not None:
            logger.warning("%s is not a complete checkpoint: %s", path, flaw)
    return [path for path, flaw in flaws.items() if flaw is None]


def latest(directory: Path | str) -> Path | None:
    """Find the newest complete checkpoint of a folder, None where there is none; raises as `available`."""
    return next(iter(available(directory)), None)


def set_aside(path: Path, *, group: dist.ProcessGroup | None) -> Path:
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

    return path.with_name(_together(_ranks(group), "checkpoint.set_aside", rename, only=SERVER)[SERVER])


def resume(
    directory: Path | str, *, group: dist.ProcessGroup | None, step: int | None = None, mesh: DeviceMesh | None = None
) -> dict[str, Any] | None:
    """Load this rank's state from the newest checkpoint that is not refused, None if there is none; a collective.

    With a step, where something else decides where training goes on, it is that of this step or an error. With a mesh,
    DTensors come back on it; see `load`.

    Rank 0 logs which one it is, at level INFO. What is refused is set aside, with a warning: the run then goes on from
    an older checkpoint, and repeats the steps since. To have the last word on that, use `available`, `load` and
    `set_aside`.

    Raises:
        CheckpointError: on every rank, if a file cannot be read or renamed, which may be no fault of the checkpoint,
            or a checkpoint is of an older schema; or there is none of `step`.
    """
    is_first = group is None or dist.get_rank(group) == 0
    if step is not None:
        paths = {_step_of(path): path for path in available(directory, group=group)}
        if step not in paths:
            raise CheckpointError(
                f"checkpoint.resume(step=...): {directory} has no checkpoint of step {step}, it has {sorted(paths)}."
            )
        return load(paths[step], group=group, mesh=mesh)
    for path in available(directory, group=group):
        try:
            state = load(path, group=group, mesh=mesh)
        except RefusedError as error:
            aside = set_aside(path, group=group)
            if is_first:
                logger.warning("%s\nThis checkpoint is now %s; going on from the one before it, if any.", error, aside)
        else:
            if is_first:
                logger.info("goes on from step %d (%s)", _step_of(path), path)
            return state
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(path: Path, *, group: dist.ProcessGroup | None, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Load this rank's state from a checkpoint of these ranks, or of another number of ranks; a collective.

    As `load_rank`, but a file that one rank refuses is refused by all.

    Args:
        path: of the checkpoint.
        group: the ranks that load.
        mesh: that a model is sharded over, for states that have DTensors, of which a file has this rank's shards. It
            has as many ranks as when they were saved.

    Raises:
        RefusedError: on every rank, naming each rank that refused, the file, and what is wrong with it.
        CheckpointError: the same, where a file could not be read, which may be no fault of the checkpoint, or is of an
            older schema.
    """
    transport = _ranks(group)
    state: dict[str, Any] = {}

    def read() -> str:
        state.update(load_rank(path, rank=transport.rank, world_size=transport.world_size, mesh=mesh))
        return hashlib.sha256((path / files.MANIFEST).read_bytes()).hexdigest()

    manifests = _together(transport, "checkpoint.load", read)
    if len(set(manifests)) != 1:
        raise CheckpointError(f"checkpoint.load: the ranks have different checkpoints: {manifests} (sha256 by rank).")
    return state


def load_rank(path: Path, *, rank: int, world_size: int, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Load the state of one rank out of `world_size`, verified before anything of it is used.

    At the world size of the checkpoint it is what that rank saved, bit for bit: tensors are contiguous, on the CPU,
    each with storage of its own, and every mapping is a dict. At another one, the state of a handle is resharded
    (see `reshard`), wherever in the nested state it is, and everything else is that of the saved rank `rank % K`: what
    differs between ranks otherwise, such as a random generator, is for the caller to set.

    Raises:
        RefusedError: naming the file and the field, what was expected and what is there.
        CheckpointError: naming the file that could not be read or is of an older schema, the DTensor for which there is
            no mesh, or another one, or what is wrong with states that cannot be resharded.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"checkpoint.load_rank(rank=...) must be in 0 .. {world_size - 1}, got {rank}.")
    entries = files.read_manifest(path)
    saved = len(entries)
    try:
        state = of_rank(lambda old: files.read_rank(path, entries[old]), saved, rank=rank, world_size=world_size)
        return dict(placed(state, mesh))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} {error}.") from None


def gather(state: State, *, group: dist.ProcessGroup) -> list[Tensor] | None:
    """Bring the state of every rank to rank 0, for a checkpoint that one process writes; a collective.

    Args:
        state: this rank's, as for `save`.
        group: the ranks whose states belong together; the handle's.

    Returns:
        The states by rank, each as one uint8 tensor on the CPU, for `load_gathered`; None on the other ranks.

    Raises:
        CheckpointError: on every rank, if the state of one has something that has no form in a file.
    """
    transport = _meeting(group)
    own = bytearray()

    def pack() -> int:
        own.extend(to_bytes(state)[0])
        return len(own)

    lengths = _together(transport, "checkpoint.gather", pack)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    for start in range(0, max(lengths), PART):
        size = min(PART, max(lengths) - start)
        part = torch.frombuffer(own[start : start + size].ljust(size, b"\0"), dtype=torch.uint8)
        gathered = transport.gather(part, "checkpoint")
        for rank, piece in enumerate([] if gathered is None else gathered):
            parts[rank].append(piece[: lengths[rank] - start])
    return [torch.cat(pieces) for pieces in parts] if transport.rank == SERVER else None


def load_gathered(states: Sequence[Tensor], *, group: dist.ProcessGroup) -> dict[str, Any]:
    """Load this rank's state from those that `gather` has brought to rank 0, and all ranks have read; a collective.

    On another number of ranks as `load_rank`.

    Raises:
        RefusedError: on every rank, naming each rank that refused, and what is wrong.
    """
    transport = _meeting(group)
    state: dict[str, Any] = {}

    def unpack(saved: int) -> dict[str, Any]:
        try:
            data = states[saved]
            if not isinstance(data, Tensor) or data.dtype != torch.uint8:
                raise ValueError(f"must be a tensor of bytes, got {data!r:.100}.")
            return from_bytes(data.cpu().numpy().tobytes())
        except ValueError as error:
            raise RefusedError(f"the state of rank {saved} {error}") from error

    def read() -> None:
        if not isinstance(states, list | tuple) or not states:
            raise RefusedError(f"load_gathered(states=...) must be the states of all ranks, got {states!r:.100}.")
        own = of_rank(unpack, len(states), rank=transport.rank, world_size=transport.world_size)
        state.update(placed(own, None))

    _together(transport, "checkpoint.load_gathered", read)
    return state


def _ranks(group: dist.ProcessGroup | None) -> Transport | _Alone:
    """The ranks that save or load together, which is a collective, or this one alone."""
    return _Alone() if group is None else _meeting(group)


def _meeting(group: dist.ProcessGroup) -> Transport:
    """A transport whose ranks are all about to save or load a checkpoint; a collective."""
    transport = Transport(group)
    transport.meet("lgc.checkpoint")
    return transport


def _together(
    transport: Transport | _Alone, what: str, action: Callable[[], Any], only: int | None = None
) -> list[Any]:
    """Do something on every rank, or `only` on one; what it returned on each (JSON values). All raise if one fails."""
    result, error, cause = None, None, None
    try:
        if only in (None, transport.rank):
            result = action()
    except Exception as exception:
        error = str(exception) if isinstance(exception, CheckpointError) else repr(exception)
        cause = exception
    answer = {"result": result, "error": error, "refused": isinstance(cause, RefusedError)}
    answers = transport.all_gather_json(answer, "checkpoint")
    failures = {rank: answer for rank, answer in enumerate(answers) if answer["error"]}
    if failures:
        kind = RefusedError if all(answer["refused"] for answer in failures.values()) else CheckpointError
        texts = (f"rank {rank}: {answer['error']}" for rank, answer in failures.items())
        raise kind(f"{what}: {'; '.join(texts)}") from cause
    return [answer["result"] for answer in answers]
