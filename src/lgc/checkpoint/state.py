"""Nested states: as JSON text and named tensors and back, and those of handles at another number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lgc.buffers import is_integer
from lgc.comm.transport import SERVER
from lgc.sites import is_sharded

State = Mapping[str, Any]
Keys = tuple[Any, ...]

HANDLE_KEYS = {"scheme", "rank", "world_size", "wire", "aggregator"}
ESCAPES = str.maketrans({"~": "~0", "/": "~1", "[": "~2"})
DTYPES = {  # that have a file format
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
}


@dataclass(frozen=True)
class Shard:
    """A shard of a DTensor, as read from a checkpoint: what its rank held of it, and of what it is a part.

    Attributes:
        local: what the rank held.
        shape, stride: of the whole.
        dim: along which the whole is sharded.
        place, places: the rank's among those of the mesh, and their number.
    """

    local: Tensor
    shape: list[int]
    stride: list[int]
    dim: int
    place: int
    places: int

    def __post_init__(self) -> None:
        numbers = (self.dim, self.place, self.places, *self.shape, *self.stride)
        if not isinstance(self.local, Tensor) or any(type(each) is not int or each < 0 for each in numbers):
            raise ValueError("a shard must have a tensor, and numbers of at least 0")
        if not (self.dim < len(self.shape) == len(self.stride) and self.place < self.places):
            raise ValueError(f"a shard must be a part of the whole, got {self.place} of {self.places}")
        size = -(-self.shape[self.dim] // self.places)  # as torch cuts it
        start = min(self.place * size, self.shape[self.dim])
        shape = [*self.shape]
        shape[self.dim] = min(size, self.shape[self.dim] - start)
        if list(self.local.shape) != shape:
            raise ValueError(f"shard {self.place} of {self.places} must be {shape}, got {list(self.local.shape)}")

    def on(self, mesh: DeviceMesh) -> Tensor:
        """The DTensor on a mesh of one dimension, of as many ranks; ValueError if this rank has another place there."""
        from torch.distributed import tensor  # slow to import, and whoever has a DTensor has done so

        if (mesh.ndim, mesh.size()) != (1, self.places) or mesh.get_local_rank() != self.place:
            raise ValueError(
                f"is of place {self.place} of {self.places}, and the mesh is {mesh}; go on with as many ranks a site, "
                "or save by torch.distributed.checkpoint and lgc.checkpoint.distributed_state: see docs/sites.md"
            )
        placements, local = [tensor.Shard(self.dim)], self.local.to(mesh.device_type)
        size = {"shape": torch.Size(self.shape), "stride": tuple(self.stride)}
        sharded: Tensor = tensor.DTensor.from_local(local, mesh, placements, run_check=False, **size)  # type: ignore[arg-type]
        return sharded


def placed(value: Any, mesh: DeviceMesh | None, keys: Keys = ()) -> Any:
    """A nested state with DTensors on `mesh` in place of shards; ValueError, naming the first, where there is none."""
    if isinstance(value, Shard):
        where = "/".join(map(str, keys))
        if mesh is None:
            raise ValueError(f"has a shard of {where}: give load(mesh=...) the mesh that the model is sharded over")
        try:
            return value.on(mesh)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    if isinstance(value, Mapping):
        return {key: placed(item, mesh, (*keys, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(placed(item, mesh, (*keys, index)) for index, item in enumerate(value))
    return value


def to_json(state: State) -> tuple[str, dict[str, Tensor]]:
    """Split a state into JSON text and tensors by their path in it: contiguous, on the CPU, with storage of their own.

    Lists are lists and dicts with string keys are objects; {"$tensor": name}, {"$shard": {"local": {"$tensor": name},
    "shape": ...}} (see `Shard`), {"$bytes": name} (as a tensor), {"$float": "nan"}, {"$tuple": [...]} and {"$dict":
    [[key, value], ...]} are what JSON does not have. Raises TypeError, naming the part that has no such form.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_encode(state, "", tensors), allow_nan=False), tensors


def from_json(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `to_json` was given; ValueError, KeyError, TypeError or RecursionError if there is nothing."""
    return _decode(json.loads(text, parse_constant=_refuse_constant), tensors)


def to_bytes(state: State) -> tuple[bytes, dict[str, Tensor]]:
    """Make a state one run of bytes, a safetensors file's, and give the tensors in it; TypeError as `to_json`."""
    text, tensors = to_json(state)
    return safetensors.torch.save(tensors, {"state": text}), tensors


def from_bytes(data: bytes) -> dict[str, Any]:
    """Put together what `to_bytes` was given; ValueError if there is nothing that can be understood."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = from_json(header["__metadata__"]["state"], tensors)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot be understood: {error!r}.") from error
    if not isinstance(state, dict):
        raise ValueError(f"must be an object, got {type(state).__name__}.")
    return state


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors)
    if type(value) is bytes:
        tensors[name] = torch.from_numpy(np.frombuffer(value, np.uint8).copy())
        return {"$bytes": name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{name}/[{index}]", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"state[{name!r}] has the key {key!r} ({type(key).__name__}); it must be str or int.")
        # as in a JSON pointer (RFC 6901), integers in brackets
        parts = {key: f"[{key}]" if isinstance(key, int) else key.translate(ESCAPES) for key in value}
        encoded = [(key, _encode(item, f"{name}/{parts[key]}", tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(encoded)
        return {"$dict": encoded}
    raise TypeError(f"state[{name!r}] is a {type(value).__name__}, which has no file format.")


def _encode_tensor(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if is_sharded(value):
        mesh, placements = value.device_mesh, value.placements
        if mesh.ndim != 1 or not placements[0].is_shard():
            raise TypeError(f"state[{name!r}] is a DTensor placed as {placements} on {mesh}, which has no file format.")
        local = _encode_tensor(value.detach().to_local(), name, tensors)
        place = {"place": mesh.get_local_rank(), "places": mesh.size()}
        whole = {"shape": list(value.shape), "stride": list(value.stride()), "dim": placements[0].dim}
        return {"$shard": {"local": local, **whole, **place}}
    if value.dtype not in DTYPES or value.layout is not torch.strided:
        raise TypeError(f"state[{name!r}] is a {value.layout} tensor of {value.dtype}, which has no file format.")
    plain = value.detach().resolve_conj().resolve_neg().cpu()
    tensors[name] = plain.clone(memory_format=torch.contiguous_format)
    return {"$tensor": name}


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$bytes" and tensors[content].dtype == torch.uint8:
        return tensors[content].numpy().tobytes()
    if kind == "$shard":
        return Shard(**_decode(content, tensors))
    if kind == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"{value!r:.100} has no meaning")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def reshard(states: Iterable[State], *, rank: int, world_size: int) -> dict[str, Any]:
    """Make the state of a handle at another world size, from its states on all K ranks, in order of rank.

    With sites of R ranks, which are in order too, one after the other, it is of another number of sites: the peers at
    each place take over from those before them. R stays.

    New rank j of K' takes over the old ranks' share [j / K', (j + 1) / K') of [0, 1), on which old rank i is
    [i / K, (i + 1) / K): its residual and momentum are the old ranks' averages, weighted by their part in it. That
    keeps their mean over the ranks, and with it the update that is still owed. Of integers it has the largest.
    Replicated state is old rank 0's, and so is the server's. The byte counts are dealt out in the same shares, so that
    their sums over all ranks stay.

    Raises:
        ValueError: if the states are not those of all old ranks, in order, or `world_size` is no multiple of R.
    """
    totals: dict[str, Any] = {}
    peers: list[State] = []
    places = number = 1
    form: tuple[Any, ...] = ()
    for number, state in enumerate(states, 1):
        given = state.get("places", 1), state["world_size"]
        form = form or given
        if any(type(each) is not int or each < 1 for each in given) or given != form:
            raise ValueError(
                "reshard(states=...) must be of as many ranks a site and as many sites each, integers of at least 1, "
                f"got {given} in place of {form}."
            )
        places = given[0]
        if world_size % places:
            raise ValueError(
                f"reshard(world_size=...) must be a multiple of the {places} ranks of a site, got {world_size}; "
                "lgc.checkpoint.distributed_state goes on with another number of ranks a site."
            )
        old_site, old_place = divmod(number - 1, places)
        site, place = divmod(rank, places)
        if (state["rank"], state.get("place", 0)) != (old_site, old_place):
            found = f"{state['rank']} in place of {old_site}"
            if places > 1:
                found = (
                    f"place {state['place']} of site {state['rank']} in that of place {old_place} of site {old_site}"
                )
            raise ValueError(f"reshard(states=...) must be in order of rank, got {found}.")
        if old_place == place:
            weight = overlap(old_site, state["world_size"], site, world_size // places)
            if weight:
                accumulate(totals, state["aggregator"].get("per_rank", {}), float(weight))
            peers.append({**state, "aggregator": state["aggregator"] if not peers else {}})
    if not peers or number != peers[0]["world_size"] * places:
        raise ValueError(f"reshard(states=...) must have the state of every rank, got {number if peers else 0}.")
    site, sites = rank // places, world_size // places
    aggregator = dict(peers[0]["aggregator"])
    if aggregator:
        aggregator["per_rank"] = as_saved(totals, aggregator["per_rank"])
        aggregator["server"] = aggregator["server"] if site == SERVER else {}
    counts = {name: [json.loads(state[name]) for state in peers] for name in ("wire", "inside") if name in peers[0]}
    return {
        **peers[0],
        "rank": site,
        "world_size": sites,
        "resharded_from": peers[0]["world_size"],
        **{name: json.dumps(deal_counts(wires, site, sites)) for name, wires in counts.items()},
        "aggregator": aggregator,
    }


def of_rank(read: Callable[[int], State], saved: int, *, rank: int, world_size: int) -> dict[str, Any]:
    """Make the state of one rank out of `world_size` from those of the `saved` ranks, of which `read` gives one.

    At the world size of the saved ones it is that rank's. At another one, the state of a handle is resharded, wherever
    in the nested state it is, and everything else is that of the saved rank `rank % saved`.
    """
    state = read(rank % saved)
    if saved == world_size:
        return dict(state)

    def resharded(keys: Keys) -> dict[str, Any]:
        return reshard((at(read(old), keys) for old in range(saved)), rank=rank, world_size=world_size)

    return dict(with_handles(state, resharded))


def with_handles(value: Any, replacement: Callable[[Keys], Any], keys: Keys = ()) -> Any:
    """Copy a nested state with `replacement(keys)` in place of each handle's, which is under `keys`."""
    if isinstance(value, Mapping):
        if value.keys() >= HANDLE_KEYS:
            return replacement(keys)
        return {key: with_handles(item, replacement, (*keys, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_handles(item, replacement, (*keys, index)) for index, item in enumerate(value))
    return value


def of_first_handle(state: State, name: str) -> Any:
    """Find this part of the state of the first handle in a nested state, None if there is no handle."""
    found: list[Keys] = []
    with_handles(state, found.append)
    return at(state, found[0])[name] if found else None


def at(state: Any, keys: Keys) -> Any:
    """Find the part of a nested state that is under `keys`."""
    for key in keys:
        state = state[key]
    return state


def overlap(old_rank: int, old_world_size: int, rank: int, world_size: int) -> Fraction:
    """Part of the new rank's share that the old rank had, in [0, 1]; over the old ranks they add up to 1."""
    start = max(Fraction(old_rank, old_world_size), Fraction(rank, world_size))
    stop = min(Fraction(old_rank + 1, old_world_size), Fraction(rank + 1, world_size))
    return max(stop - start, Fraction(0)) * world_size


def accumulate(totals: dict[str, Any], values: State, weight: float) -> None:
    """Add `weight * values` to nested totals, floats in float64.

    Buffers may be anything else: of integers the largest stays, as in rounds, of all others the first.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            accumulate(totals.setdefault(key, {}), value, weight)
        elif isinstance(value, Tensor) and not value.is_floating_point():
            kept = totals.setdefault(key, value)
            if is_integer(value):
                totals[key] = torch.maximum(kept.long(), value.long())
        else:
            totals[key] = totals.get(key, 0.0) + weight * (value.double() if isinstance(value, Tensor) else value)


def as_saved(total: Any, like: Any) -> Any:
    """Nested totals in the order and with the dtypes of `like`."""
    if isinstance(like, Mapping):
        return {key: as_saved(total[key], value) for key, value in like.items()}
    return total.to(like.dtype) if isinstance(like, Tensor) else total


def deal_counts(wires: list[Any], rank: int, world_size: int) -> dict[str, Any]:
    """Deal out the byte counts by phase: the new rank's share; steps are everyone's."""

    def share(counts: list[int]) -> int:
        def before(boundary: Fraction) -> int:
            whole = int(boundary)
            return sum(counts[:whole]) + int((boundary - whole) * sum(counts[whole : whole + 1]))

        return before(Fraction(rank + 1, world_size) * len(counts)) - before(Fraction(rank, world_size) * len(counts))

    phases = {}
    for name, traffic in wires[0].items():
        ranks = [wire[name] for wire in wires]
        sums = {key: share([of[key] for of in ranks]) for key in ("sent_bytes", "received_bytes", "upload_bytes")}
        names = sorted({content for of in ranks for content in of["contents"]})
        contents = {content: share([of["contents"].get(content, 0) for of in ranks]) for content in names}
        phases[name] = {"steps": traffic["steps"], **sums, "contents": contents}
    return phases
