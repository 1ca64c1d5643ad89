"""The state of handles in the form of `torch.distributed.checkpoint`, for whatever ranks go on from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lgc.attach import STATE_HINTS, Handle
from lgc.checkpoint.state import accumulate, as_saved, deal_counts, overlap
from lgc.comm.transport import Transport
from lgc.sites import Site

OF_ALL = ("version", "scheme", "step", "phase")  # of a handle's state, the same on all ranks
ABOUT = (*OF_ALL, "sites", "ranks", "cut", "counts", "owing")
COUNTS = ("wire", "inside")
OWED, BUFFERS, PAST = "server_residual", "buffers", "past"


def distributed_state(handle: Handle) -> dict[str, Any]:
    """The state of a handle for `torch.distributed.checkpoint`, under the same key on all ranks; a collective.

        save({"handle": lgc.checkpoint.distributed_state(handle)}, checkpoint_id="checkpoint")

    Tensors are whole, as DTensors where the model is sharded. What all sites have the same of is under equal keys; what
    is of one site, of one rank, or of the ranks at one place of all sites, has its number in the key.
    `load_distributed` goes on from it.

    Raises:
        ValueError: on every rank, where rounds are opened by time, or ranks come and go.
    """
    transport, site = _meeting(handle)
    state, sites = handle.state_dict(whole=True), transport.world_size
    counts = site.of_all(transport, [state.get(name) for name in COUNTS], "counts")
    aggregator = state["aggregator"]
    per_rank = aggregator.get("per_rank", {})
    # of the first site: until LGC's autoencoder is trained, rank 0 alone has it
    replicated = {} if transport.rank else aggregator.get("replicated", {})
    about = {"sites": sites, "ranks": sites * site.places, "cut": site.cut}
    about |= {"counts": json.dumps(counts), "owing": json.dumps(_owing(per_rank))}
    return {
        **{name: state[name] for name in OF_ALL},
        **about,
        "replicated": _without(replicated, PAST),
        f"past {site.place}": _only(replicated, PAST),
        "server": aggregator.get("server", {}),  # empty but on rank 0
        f"site {transport.rank}": _without(per_rank, BUFFERS),
        f"rank {transport.rank * site.places + site.place}": _only(per_rank, BUFFERS),
    }


def load_distributed(handle: Handle, *, key: str = "handle", **where: Any) -> None:
    """Go on from a `distributed_state`, of any number of sites and of ranks in each; a collective of all ranks.

        lgc.checkpoint.load_distributed(handle, checkpoint_id="checkpoint")

    On as many sites and ranks as saved it, and with the model cut in the same way, the run goes on bit for bit. Else
    the handle must be new. Each rank takes its part out of the whole; at another number of sites, what is of one is
    shared out as by `reshard`, so that the mean of what is owed stays. What codes know of earlier rounds is forgotten
    where the model is cut in another way, which costs bytes for a few rounds, and changes no number.

    Args:
        handle: at the step of the model, which is to be loaded before.
        key: that the state was saved under.
        where: as `torch.distributed.checkpoint.load` takes it, such as `checkpoint_id`.

    Raises:
        ValueError: naming the first field that does not fit, or if no such state is there; nothing has changed then.
        CheckpointException: torch's, if the model has parameters of other shapes, or a file is missing or damaged.
    """
    from torch.distributed import checkpoint  # slow to import

    def load(wanted: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {key: wanted}
        checkpoint.load(found, **where)
        return dict(found[key])

    transport, site = _meeting(handle)
    state = handle.state_dict(whole=True)
    saved = _saved(load, key, state)
    sites, ranks = transport.world_size, transport.world_size * site.places
    rank = transport.rank * site.places + site.place
    is_cut_alike = [saved["ranks"], saved["cut"]] == [saved["sites"] * site.places, site.cut]
    is_same = is_cut_alike and saved["sites"] == sites
    state |= {name: saved[name] for name in OF_ALL}
    if not is_same:
        state["resharded_from"] = saved["sites"]
    if state["aggregator"]:  # there is something to load
        of_site, of_rank = _shares(saved["sites"], transport.rank, sites), _shares(saved["ranks"], rank, ranks)
        replicated, past = state["aggregator"]["replicated"], f"past {site.place}"
        wanted = {"replicated": _without(replicated, PAST), "server": state["aggregator"]["server"]}
        if is_cut_alike:
            wanted[past] = _only(replicated, PAST)
        for each in of_site:  # a new copy each time, to be overwritten
            here = handle.state_dict(whole=True)["aggregator"]["per_rank"]
            wanted[f"site {each}"] = _owing_as(json.loads(saved["owing"]), _without(here, BUFFERS))
        for each in of_rank:
            wanted[f"rank {each}"] = _only(handle.state_dict()["aggregator"]["per_rank"], BUFFERS)
        found = load(wanted)
        state["aggregator"] = {
            "replicated": _merged(found["replicated"], found.get(past, _only(replicated, PAST)), PAST),
            "server": found["server"],
            "per_rank": _merged(_mean(found, "site", of_site), _mean(found, "rank", of_rank), BUFFERS),
        }
    for name, counts in zip(COUNTS, zip(*json.loads(saved["counts"]), strict=True), strict=True):
        if name in state and None not in counts:
            wires = [json.loads(each) for each in counts]
            state[name] = json.dumps(wires[rank] if is_same else deal_counts(wires, rank, ranks))
    handle.load_state_dict(state)


def _saved(load: Callable[[dict[str, Any]], dict[str, Any]], key: str, here: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved state says of itself; raises ValueError if it is none, or of another version or scheme."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        saved = load(dict.fromkeys(ABOUT, ""))
    except CheckpointException as error:
        raise ValueError(f"load_distributed: no lgc.checkpoint.distributed_state can be read under {key!r}.") from error
    for name in ("version", "scheme"):
        if saved[name] != here[name]:
            hint = STATE_HINTS[name]
            raise ValueError(f"load_distributed: {name} was {saved[name]!r}, here it is {here[name]!r}{hint}.")
    return saved


def _meeting(handle: Handle) -> tuple[Transport, Site]:
    """Between the sites and inside this one, uncounted, where all ranks are about to save or load; a collective."""
    handle.require_whole()
    transport, site = handle.transport.uncounted(), handle.site.uncounted()
    site.meet(transport, "lgc.checkpoint")
    return transport, site


def _shares(saved: int, number: int, total: int) -> dict[int, float]:
    """The saved ones that one of a total takes over, each with the part of it that is its."""
    shares = {each: float(overlap(each, saved, number, total)) for each in range(saved)}
    return {each: share for each, share in shares.items() if share}


def _mean(found: Mapping[str, Any], kind: str, shares: Mapping[int, float]) -> Any:
    """The average of the saved states that this one takes over; one alone as it is."""
    first, *others = (found[f"{kind} {each}"] for each in shares)
    if not others:
        return first
    totals: dict[str, Any] = {}
    for state, share in zip((first, *others), shares.values(), strict=True):
        accumulate(totals, state, share)
    return as_saved(totals, first)


def _owing(state: Any) -> dict[str, Any]:
    """Where in a nested state something is that servers owe, as nested keys."""
    nested = {name: each for name, each in state.items() if isinstance(each, Mapping)}
    return {
        name: {} if name == OWED else deeper
        for name, each in nested.items()
        if (deeper := _owing(each)) or name == OWED
    }


def _owing_as(owing: Mapping[str, Any], state: Any) -> Any:
    """A state in which servers owe something where they did in a saved one; that depends on the number of ranks."""
    if not isinstance(state, Mapping):
        return state
    deeper = {name: _owing_as(owing.get(name, {}), each) for name, each in state.items() if name != OWED}
    if OWED in owing:
        deeper[OWED] = {name: each.clone() for name, each in state["residual"].items()}
    return deeper


def _without(state: Any, part: str) -> Any:
    """A nested state without the parts of one name, which are mappings: parameters of that name stay."""
    if not isinstance(state, Mapping):
        return state
    kept = {name: each for name, each in state.items() if name != part or not isinstance(each, Mapping)}
    return {name: _without(each, part) for name, each in kept.items()}


def _only(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The parts of one name in a nested state, where they are."""
    nested = {name: each for name, each in state.items() if isinstance(each, Mapping)}
    found = {name: each if name == part else _only(each, part) for name, each in nested.items()}
    return {name: each for name, each in found.items() if name == part or each}


def _merged(state: Mapping[str, Any], parts: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What `_without` and `_only` have parted."""
    inserted = {name: each if name == part else _merged(state[name], each, part) for name, each in parts.items()}
    return {**state, **inserted}
