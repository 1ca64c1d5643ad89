"""The state of a handle at another number of ranks, and where handles are in a nested state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor

from lgc.checkpoint.nested import State
from lgc.comm.transport import SERVER

HANDLE_KEYS = {"scheme", "rank", "world_size", "wire", "aggregator"}

Keys = tuple[Any, ...]


def reshard(states: Iterable[State], *, rank: int, world_size: int) -> dict[str, Any]:
    """The state of a handle at another world size, from its states on all K ranks, in order of rank.

    New rank j of K' takes over the old ranks' share [j / K', (j + 1) / K') of [0, 1), on which old rank i is
    [i / K, (i + 1) / K): its residual and momentum are the old ranks' averages, weighted by their part in it. That
    keeps their mean over the ranks, and with it the update that is still owed. Replicated state is old rank 0's, and
    so is the server's. The byte counts are dealt out in the same shares, so that their sums over all ranks stay.

    Raises:
        ValueError: if the states are not those of all old ranks, in order.
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


def with_handles(value: Any, replacement: Callable[[Keys], Any], keys: Keys = ()) -> Any:
    """A nested state with `replacement(keys)` in place of each handle's, which is under `keys`."""
    if isinstance(value, Mapping):
        if value.keys() >= HANDLE_KEYS:
            return replacement(keys)
        return {key: with_handles(item, replacement, (*keys, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_handles(item, replacement, (*keys, index)) for index, item in enumerate(value))
    return value


def scheme_of(state: State) -> str | None:
    """The scheme of the first handle in a nested state."""
    found: list[Keys] = []
    with_handles(state, found.append)
    return at(state, found[0])["scheme"] if found else None


def at(state: Any, keys: Keys) -> Any:
    """The part of a nested state that is under `keys`."""
    for key in keys:
        state = state[key]
    return state


def _overlap(old_rank: int, old_world_size: int, rank: int, world_size: int) -> Fraction:
    """The part of new rank's share that the old rank had, in [0, 1]; over the old ranks they add up to 1."""
    start = max(Fraction(old_rank, old_world_size), Fraction(rank, world_size))
    stop = min(Fraction(old_rank + 1, old_world_size), Fraction(rank + 1, world_size))
    return max(stop - start, Fraction(0)) * world_size


def _accumulate(totals: dict[str, Any], values: State, weight: float) -> None:
    """Add `weight * values` to nested totals, tensors in float64."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _accumulate(totals.setdefault(key, {}), value, weight)
        else:
            totals[key] = totals.get(key, 0.0) + weight * (value.double() if isinstance(value, Tensor) else value)


def _as_saved(total: Any, like: Any) -> Any:
    """Nested totals in the order and with the dtypes of `like`."""
    if isinstance(like, Mapping):
        return {key: _as_saved(total[key], value) for key, value in like.items()}
    return total.to(like.dtype) if isinstance(like, Tensor) else total


def _deal_counts(wires: list[Any], rank: int, world_size: int) -> dict[str, Any]:
    """The new rank's share of the byte counts by phase; steps are everyone's."""

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
