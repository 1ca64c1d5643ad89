"""Codes that know what every rank has sent: the same numbers in fewer bytes, and a past that all ranks have alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

import lgc
from lgc import checkpoint
from lgc.comm.messages import FromOne, Post, ToAll
from lgc.comm.replicas import ReplicaError
from lgc.comm.transport import RankError, Transport
from lgc.rounds.layout import Role
from lgc.rounds.past import Past
from lgc.schemes import RoundScheme, SparseScheme
from lgc.synchronizer import Policy

RankFactory = Callable[[int], Ranks]

SHAPES = {"a": (30, 40), "b": (20,), "c": (50, 30)}
RECENT: dict[str, Any] = {"indices": lgc.Recent(), "values": lgc.RecentSign()}
SCHEMES: dict[str, SparseScheme] = {
    "dgc": lgc.DGC(rate=0.05, warmup_steps=4),
    "topk-two-stage": lgc.TopK(rate=0.05, reduction="two_stage"),
    "scalecom": lgc.ScaleCom(rate=0.05, warmup_steps=4, roles={"c": Role.OWN}),
    "lgc-ps": lgc.LGCServer(rate=0.05, dense_steps=1, warmup_steps=4, train_steps=1, autoencoder_updates=1),
}
LEARNING = {name: replace(scheme, **RECENT) for name, scheme in SCHEMES.items()}
STEPS = 10


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Recorded(Transport):
    """Keeps what this rank has sent in messages."""

    def __init__(self) -> None:
        super().__init__(world())
        self.sent: list[bytes] = []

    def together(self, posts: Sequence[Post]) -> list[list[Tensor]]:
        self.sent += [each.payload.numpy().tobytes() for each in posts if isinstance(each, ToAll | FromOne)]
        return super().together(posts)


class Rank:
    """One rank's rounds, on gradients of which a part stays."""

    def __init__(self, rank: int, scheme: RoundScheme, policy: Policy | None = None) -> None:
        self.rank = rank
        self.transport = Recorded()
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.synchronizer = lgc.Synchronizer(scheme, tensors, self.transport, policy)

    def gradient(self, step: int) -> dict[str, Tensor]:
        still = torch.Generator().manual_seed(self.rank)
        noise = torch.Generator().manual_seed(1000 * self.rank + step + 7)
        return {
            name: torch.randn(shape, generator=still) + torch.randn(shape, generator=noise)
            for name, shape in SHAPES.items()
        }

    def train(self, steps: range) -> Tensor:
        """The means of these rounds, shape (steps, N)."""
        return torch.stack([self.round(step) for step in steps])

    def round(self, step: int) -> Tensor:
        """The mean of one round, shape (N,)."""
        means = self.synchronizer.synchronize(self.gradient(step), step)
        return torch.cat([mean.flatten() for mean in means.values()])

    def sent(self) -> int:
        """Bytes of all rounds."""
        return sum(traffic.sent_bytes for traffic in self.transport.wire.phases.values())

    def past(self) -> dict[str, bytes]:
        """What is known of earlier rounds."""
        past: dict[str, bytes] = self.synchronizer.state_dict()["replicated"]["past"]
        return past


class Run(NamedTuple):
    means: Tensor  # (steps, N)
    sent: int  # bytes


def run(rank: int, world_size: int, scheme: RoundScheme) -> Run:
    one = Rank(rank, scheme)
    return Run(one.train(range(STEPS)), one.sent())


@pytest.mark.parametrize("name", SCHEMES)
def test_means_are_the_same_to_the_bit_and_bytes_are_fewer(ranks: RankFactory, name: str) -> None:
    plain, recent = ranks(2).run(run, SCHEMES[name]), ranks(2).run(run, LEARNING[name])
    for known, other in zip(recent, plain, strict=True):
        assert torch.equal(known.means, other.means)
    if name in ("dgc", "scalecom"):
        assert sum(known.sent for known in recent) < sum(other.sent for other in plain)


# --- in checkpoints ---


def resumed(rank: int, world_size: int, scheme: RoundScheme, folder: Path, stop: int) -> list[list[bytes]]:
    """What a run sends after its checkpoint, and what those do that go on from there: a new one, and one of others."""
    straight, fresh, other = Rank(rank, scheme), Rank(rank, scheme), Rank(rank + 5, scheme)
    straight.train(range(stop))
    other.train(range(2))
    other.rank = rank
    path = checkpoint.save(folder, {"of this rank": straight.synchronizer.state_dict()}, step=stop, group=world())
    for each in (fresh, other):
        each.synchronizer.load_state_dict(checkpoint.load(path, group=world())["of this rank"], stop)
        assert each.past() == straight.past()
    found = []
    for each in (straight, fresh, other):
        each.transport.sent.clear()
        each.train(range(stop, STEPS))
        found.append(each.transport.sent)
    return found


@pytest.mark.grid
@pytest.mark.parametrize("stop", [3, 7])  # in the warm-up, and after it
@pytest.mark.parametrize("name", ["dgc", "scalecom", "lgc-ps"])
def test_a_run_that_goes_on_from_a_checkpoint_sends_the_same_bytes_as_an_undisturbed_one(
    ranks: RankFactory, name: str, stop: int, tmp_path: Path
) -> None:
    for straight, fresh, other in ranks(2).run(resumed, LEARNING[name], tmp_path, stop):
        assert any(straight)
        assert fresh == other == straight


def state_of(rank: int, world_size: int, scheme: RoundScheme) -> dict[str, Any]:
    """A state as a handle has it, after some rounds."""
    one = Rank(rank, scheme)
    one.train(range(7))
    aggregator = one.synchronizer.state_dict()
    return {"rank": rank, "world_size": world_size, "wire": "{}", "aggregator": aggregator}


class Resharded(NamedTuple):
    means: Tensor
    sent: int
    past: dict[str, bytes]


def on_other_ranks(rank: int, world_size: int, scheme: RoundScheme, states: list[Any], forgets: bool) -> Resharded:
    one = Rank(rank, scheme)
    state = checkpoint.reshard(states, rank=rank, world_size=world_size)["aggregator"]
    one.synchronizer.load_state_dict(state, 7, resharded=True)
    past = one.past()
    if forgets:
        one.synchronizer.aggregator.forget()
    return Resharded(one.train(range(7, STEPS)), one.sent(), past)


@pytest.mark.grid
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (1, 2)])
@pytest.mark.parametrize("name", ["dgc", "lgc-ps"])
def test_at_another_number_of_ranks_all_know_of_each_what_was_known_of_one_before(
    ranks: RankFactory, name: str, before: int, after: int
) -> None:
    states = ranks(before).run(state_of, LEARNING[name])
    kept, forgotten = (ranks(after).run(on_other_ranks, LEARNING[name], states, each) for each in (False, True))
    for knows, forgets in zip(kept, forgotten, strict=True):
        assert knows.past == kept[0].past
        assert torch.equal(knows.means, forgets.means)
        if name == "dgc":
            assert knows.sent < forgets.sent


def refused(rank: int, world_size: int) -> list[str]:
    """What pasts that no ranks know are refused with, while nothing changes."""
    one = Rank(rank, LEARNING["dgc"])
    one.train(range(4))
    good = one.synchronizer.state_dict()
    past = good["replicated"]["past"]["own"]
    one.train(range(4, 6))
    before = one.past()
    messages = []
    for wrong in (b"", past[:-1], past + b"\0", past[:15] + b"\xff" + past[16:], past[:-1] + b"\xff", "text"):
        state = {**good, "replicated": {**good["replicated"], "past": {"own": wrong}}}
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller matches it
            one.synchronizer.load_state_dict(state, 4)
        assert one.past() == before
        assert one.synchronizer.state_dict()["replicated"]["updates"] == 6
        messages.append(str(caught.value))
    return messages


def test_a_past_that_no_ranks_know_is_refused_and_changes_nothing(ranks: RankFactory) -> None:
    (messages,) = ranks(1).run(refused)
    fields = ["past", "past", "past", "known.numbers", "past.signs"]
    for message, field in zip(messages, fields, strict=False):
        assert message.startswith(f"payload field {field} must be")
    assert messages[-1].startswith("state_dict: aggregator.replicated.past.own is 'text'")


# --- the same on all ranks ---


def differing(rank: int, world_size: int, scheme: SparseScheme, victim: int, policy: Policy) -> tuple[str, Tensor, str]:
    """An error, the means after that, and a warning, where the victim has loaded what others sent in another run."""
    one, other = (Rank(rank, scheme, policy) for _ in range(2))
    other.rank = rank + 10
    other.train(range(4))
    one.train(range(4))
    state = one.synchronizer.state_dict()
    if rank == victim:
        state["replicated"]["past"] = other.past()
    one.synchronizer.load_state_dict(state, 4)
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lgc").addHandler(handler)
    error = ""
    try:
        one.train(range(4, 5))
    except ReplicaError as caught:
        error = str(caught)
        after = one.synchronizer.state_dict()
        assert after["replicated"] == state["replicated"]
        for name, residual in after["per_rank"]["residual"].items():
            assert torch.equal(residual, state["per_rank"]["residual"][name])
        one.synchronizer.aggregator.forget()  # as all ranks can
        one.train(range(4, 5))
    logging.getLogger("lgc").removeHandler(handler)
    return error, one.train(range(5, 8)), " ".join(warned)


@pytest.mark.parametrize("codes", [{"indices": lgc.Recent()}, {"values": lgc.RecentSign()}], ids=["indices", "signs"])
def test_a_rank_that_knows_something_else_is_named_on_every_rank_before_anything_is_decoded(
    ranks: RankFactory, codes: dict[str, Any]
) -> None:
    scheme = replace(SCHEMES["dgc"], **codes)
    expected, *_ = ranks(3).run(differing, SCHEMES["dgc"], 3, Policy())
    for error, means, _ in ranks(3).run(differing, scheme, 1, Policy()):
        assert "step 4: what the ranks know of earlier rounds, and code by, is not the same on rank 1." in error
        assert 'attach(on_difference="synchronise") has all ranks forget it' in error
        assert torch.equal(means, expected[1])


def test_or_all_ranks_forget_it_with_a_warning(ranks: RankFactory) -> None:
    expected, *_ = ranks(2).run(differing, SCHEMES["dgc"], 2, Policy())
    results = ranks(2).run(differing, LEARNING["dgc"], 1, Policy(on_difference="synchronise"))
    for rank, (error, means, warned) in enumerate(results):
        assert error == ""
        assert ("is not the same on rank 1; all forget it." in warned) == (rank == 0)
        assert torch.equal(means, expected[1])


def damaged(rank: int, world_size: int) -> str:
    """The error where a sign that rank 0 has sent is another one in rank 1's memory."""
    one = Rank(rank, LEARNING["dgc"], Policy(check_every=4))
    one.train(range(4))
    signs = one.synchronizer.aggregator.replicas()["signs sent by rank 0"]
    if rank == 1:
        place = int(signs.nonzero()[0])
        signs[place] = -signs[place]
    try:
        one.train(range(4, 5))
    except ReplicaError as error:
        return str(error)
    return ""


def test_signs_are_compared_with_the_other_replicas(ranks: RankFactory) -> None:
    for error in ranks(2).run(damaged):
        assert "step 4: the ranks are no longer the same: signs sent by rank 0 on rank 1." in error


# --- what teaches nothing ---


def abandoned(rank: int, world_size: int) -> list[dict[str, bytes]]:
    """The past before and after a round that is not finite on rank 1, and after one that rank 1 fails to prepare."""
    one = Rank(rank, LEARNING["dgc"], Policy(on_nonfinite="propagate"))
    one.train(range(4))
    pasts = [one.past()]
    gradient = one.gradient(4)
    if rank == 1:
        gradient["a"][0] = torch.nan
    one.synchronizer.synchronize(gradient, 4)
    pasts.append(one.past())
    exchange = one.synchronizer.aggregator.exchanges(one.synchronizer.aggregator.schedule.at(5))[1]
    if rank == 1:
        exchange.prepare = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(RankError, match="rank 1: ZeroDivisionError"):
        one.train(range(5, 6))
    return [*pasts, one.past()]


def test_a_round_that_is_abandoned_teaches_nothing(ranks: RankFactory) -> None:
    for before, *after in ranks(2).run(abandoned):
        assert all(past == before for past in after)


def uncommitted(rank: int, world_size: int) -> tuple[list[bytes], list[int]]:
    """A past and its digest at first, after something was taken note of, after that was committed, and forgotten."""
    scheme = LEARNING["dgc"]
    layout = scheme.layout((name, torch.zeros(shape)) for name, shape in SHAPES.items())
    own = scheme.build(layout, Transport(world()), device=torch.device("cpu")).pasts["own"]
    assert isinstance(own, Past)
    seen = [(own.to_bytes(), own.digest())]
    own.learn_selected({0: torch.tensor([3, 5, 8])})
    own.learn_sent([torch.tensor([3, 5, 8])], [torch.tensor([1.0, -2.0, 1.0])])
    seen.append((own.to_bytes(), own.digest()))
    own.commit()
    seen.append((own.to_bytes(), own.digest()))
    own.forget()
    seen.append((own.to_bytes(), own.digest()))
    return [past for past, _ in seen], [digest for _, digest in seen]


def test_what_was_decoded_is_known_once_it_is_committed(ranks: RankFactory) -> None:
    ((pasts, digests),) = ranks(1).run(uncommitted)
    for values in (pasts, digests):
        first, noted, committed, forgotten = values
        assert first == noted == forgotten != committed


def test_other_codes_have_no_past_in_their_state(ranks: RankFactory) -> None:
    (state,) = ranks(1).run(state_of, SCHEMES["dgc"])
    assert "past" not in state["aggregator"]["replicated"]
    assert json.loads(state["wire"]) == {}
