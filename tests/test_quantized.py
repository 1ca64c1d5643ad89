"""Every coordinate in few bits, gathered or in two stages, on up to sixteen real ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_models import batch, build, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from local_runs import Run as LocalRun
from local_runs import differ
from ranks import RankPool, Ranks
from torch import Tensor, nn

import lgc
from lgc.checkpoint.state import reshard
from lgc.choice.rehearsal import Rounds, Timer
from lgc.coding import Kind, PayloadError, header_size, pack
from lgc.comm.messages import Post, lockstep, to_each
from lgc.comm.transport import Transport
from lgc.rounds.codes import QuantizedCode
from lgc.rounds.layout import Role, Segment
from lgc.rounds.selection import Region
from lgc.rounds.topk import FEWER_ARE_LONGER, Codecs, SparseCode
from lgc.rounds.two_stage import cut
from lgc.synchronizer import Policy

Runs = Callable[..., list["Run"]]

MOST_RANKS = 16
STEPS = 5
UNSEEN = 7  # the row of the embedding that no rank has
SHAPES = {"embedding": (20, 96), "weight": (64, 31), "bias": (31,), "nothing": (0, 4), "scale": ()}
PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())
REDUCTIONS = ("gather", "two_stage")
CODECS: dict[str, Any] = {
    "float32": lgc.Float32(),
    "float16": lgc.Float16(),
    "bfloat16": lgc.BFloat16(),
    "sign": lgc.Sign(),
    "uniform2": lgc.Uniform(2),
    "uniform4x256": lgc.Uniform(4, 256),
    **{f"lloyd{bits}": lgc.LloydMax(bits) for bits in (1, 2, 4, 8)},
    "deadzone": lgc.DeadZone(),
    "largest": lgc.Largest(0.1),
}

HOST = torch.device("cpu")

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_world_size = pytest.mark.parametrize("world_size", [1, 2, 3, 5, MOST_RANKS])


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """The processes of all ranks of this file."""
    pool = RankPool(MOST_RANKS)
    yield pool
    pool.kill()


@pytest.fixture(scope="module")
def ranks(pool: RankPool) -> Callable[[int], Ranks]:
    """As the suite's, for up to sixteen."""
    return lambda world_size: Ranks(pool, world_size)


def gradient(rank: int, step: int) -> dict[str, Tensor]:
    """Of layers of different scales, with a row of zeros and a rank's own zeros."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    scales = dict(zip(SHAPES, (1.0, 1e-3, 10.0, 1.0, 1e-9), strict=True))
    tensors = {name: scales[name] * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["embedding"][UNSEEN] = 0
    tensors["embedding"][(rank + step) % 5] = 0
    return tensors


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All of it as one vector, in the order of SHAPES."""
    return torch.cat([tensors[name].reshape(-1) for name in SHAPES])


class Run(NamedTuple):
    """What one rank saw: by step the mean and what it sent, then what it owes; its state and its counts."""

    means: list[dict[str, Tensor]]
    sent: list[Tensor]
    residual: Tensor
    server_residual: Tensor | None
    state: dict[str, Any]
    contents: dict[str, int]
    received_bytes: int


def world() -> Transport:
    return Transport(dist.distributed_c10d._get_default_group())


def make(scheme: Any, policy: Policy | None = None) -> lgc.Synchronizer:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return lgc.Synchronizer(scheme, zeros, world(), policy or Policy(check_every=0))


def observe(rank: int, world_size: int, scheme: Any, steps: int = STEPS) -> Run:
    synchronizer = make(scheme)
    sent: list[Tensor] = []

    class Observer:
        def before_round(self, step: int, gradient: Tensor) -> None: ...

        def after_round(self, step: int, result: Any) -> None:
            ((where, values),) = result.sent
            sent.append(torch.zeros(PARAMETERS).index_put((torch.arange(PARAMETERS)[where],), values))

    synchronizer.observers.append(Observer())
    means = []
    for step in range(steps):
        means.append({n: mean.clone() for n, mean in synchronizer.synchronize(gradient(rank, step), step).items()})
    aggregator: Any = synchronizer.aggregator
    traffic = synchronizer.transport.wire.phases["compressed"]
    assert traffic.steps == steps  # from the first round on
    return Run(
        means,
        sent,
        aggregator.feedback.residual,
        aggregator.server_residual,
        synchronizer.state_dict(),
        dict(traffic.contents),
        traffic.received_bytes,
    )


@pytest.fixture(scope="module")
def runs(ranks: Callable[[int], Ranks]) -> Runs:
    """`runs(world_size, scheme)`: what every rank saw; each of them is run once."""
    done: dict[tuple[int, str], list[Run]] = {}

    def run(world_size: int, scheme: str) -> list[Run]:
        if (world_size, scheme) not in done:
            done[world_size, scheme] = ranks(world_size).run(observe, lgc.parse_scheme(scheme))
        return done[world_size, scheme]

    return run


def owed_by_servers(real: Sequence[Run]) -> Tensor:
    """What all servers together have still to send."""
    parts = [run.server_residual for run in real if run.server_residual is not None]
    return torch.stack(parts).double().mean(0) if parts else torch.zeros(PARAMETERS, dtype=torch.float64)


# --- the contract ---


@pytest.mark.grid
@every_reduction
@every_world_size
def test_all_ranks_have_the_same_bits(runs: Runs, world_size: int, reduction: str) -> None:
    real = runs(world_size, f"quantized:reduction={reduction}")
    for run in real[1:]:
        for mean, first in zip(run.means, real[0].means, strict=True):
            assert all(torch.equal(mean[name], first[name]) for name in SHAPES)


@every_reduction
@every_world_size
def test_what_was_sent_and_what_is_owed_is_what_came_in(runs: Runs, world_size: int, reduction: str) -> None:
    real = runs(world_size, f"quantized:reduction={reduction}")
    for rank, run in enumerate(real):
        given_in = torch.stack([flat(gradient(rank, step)) for step in range(STEPS)]).double().sum(0)
        total = torch.stack(run.sent).double().sum(0) + run.residual
        torch.testing.assert_close(total, given_in, rtol=0, atol=1e-5)
    delivered = torch.stack([flat(mean) for mean in real[0].means]).double().sum(0)
    sent = torch.stack([torch.stack(run.sent).double().sum(0) for run in real]).mean(0)
    torch.testing.assert_close(delivered + owed_by_servers(real), sent, rtol=0, atol=1e-5)
    assert all((run.server_residual is None) == (reduction == "gather") for run in real)


@every_reduction
@every_world_size
def test_a_row_that_no_rank_has_seen_does_not_move_while_its_neighbours_do(
    runs: Runs, world_size: int, reduction: str
) -> None:
    for mean in runs(world_size, f"quantized:reduction={reduction}")[0].means:
        assert not mean["embedding"][UNSEEN].any()
        assert mean["embedding"][UNSEEN - 1].all()
        assert mean["embedding"][UNSEEN + 1].all()
        assert mean["scale"] != 0


@every_reduction
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_keeps_what_it_loses(ranks: Callable[[int], Ranks], codec: str, reduction: Any) -> None:
    values = CODECS[codec]
    mean_values = values if reduction == "two_stage" else None
    real = ranks(3).run(observe, lgc.Quantized(values=values, mean_values=mean_values, reduction=reduction), 3)
    delivered = torch.stack([flat(mean) for mean in real[0].means]).double().sum(0)
    residual = torch.stack([run.residual for run in real]).double().mean(0)
    inputs = torch.stack([flat(gradient(rank, step)) for rank in range(3) for step in range(3)]).double().sum(0) / 3
    torch.testing.assert_close(delivered + residual + owed_by_servers(real), inputs, rtol=0, atol=1e-4)
    assert bool(residual.any()) == (codec != "float32")
    for run in real[1:]:
        assert all(torch.equal(flat(mean), flat(first)) for mean, first in zip(run.means, real[0].means, strict=True))


def test_by_default_up_to_three_ranks_gather(runs: Runs) -> None:
    for world_size, gathers in ((3, True), (5, False)):
        assert all((run.server_residual is None) == gathers for run in runs(world_size, "quantized"))


# --- bytes ---


def ones(rank: int, world_size: int, scheme: Any, size: int) -> tuple[dict[str, int], int, int]:
    """Bytes of one round of two tensors without zeros: sent by content, sent, received."""
    return one_round(scheme, {"a": torch.ones(size), "b": torch.ones(300)})


def noise(rank: int, world_size: int, scheme: Any, size: int) -> tuple[dict[str, int], int, int]:
    """The same of noise, which is another on every rank."""
    return one_round(scheme, {"a": torch.randn(size, generator=torch.Generator().manual_seed(rank))})


def one_round(scheme: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, int], int, int]:
    synchronizer = lgc.Synchronizer(scheme, tensors, world(), Policy(check_every=0))
    synchronizer.synchronize(tensors, 0)
    traffic = synchronizer.transport.wire.phases["compressed"]
    return dict(traffic.contents), traffic.sent_bytes, traffic.received_bytes


def code_bytes(bits: int, sizes: Sequence[int]) -> int:
    """A payload of two parts, no zeros (a byte says so), and a scale of two bytes every 256 values of a tensor."""
    return 29 + sum(2 * math.ceil(size / 256) for size in sizes) + math.ceil(bits * sum(sizes) / 8)


def test_gathered_bytes_are_those_of_the_formula(ranks: Callable[[int], Ranks]) -> None:
    for contents, sent, received in ranks(3).run(ones, lgc.Quantized(bits=3), 1000):
        assert contents == {"preamble": 2 * 32, "values": 2 * code_bytes(3, [1000, 300])}
        assert sent == received == sum(contents.values())


def test_bytes_in_two_stages_are_those_of_the_formula(ranks: Callable[[int], Ranks]) -> None:
    pieces = [[325], [325], [325], [25, 300]]  # of 1,300 values on four ranks
    for rank, (contents, sent, received) in enumerate(ranks(4).run(ones, lgc.Quantized(reduction="two_stage"), 1000)):
        others = pieces[:rank] + pieces[rank + 1 :]
        assert contents == {
            "preamble": 3 * 32,
            "values": sum(8 + code_bytes(2, sizes) for sizes in others),
            "means": 3 * (8 + code_bytes(4, pieces[rank])),
        }
        assert sent == sum(contents.values())
        assert received == 3 * (32 + 8 + code_bytes(2, pieces[rank])) + sum(
            8 + code_bytes(4, sizes) for sizes in others
        )


@pytest.mark.parametrize(
    "scheme", ["quantized:reduction=two_stage", "dgc:rate=0.02:warmup_steps=0:reduction=two_stage"]
)
def test_bytes_of_a_rank_grow_with_their_number_as_those_of_a_ring_do(
    ranks: Callable[[int], Ranks], scheme: str
) -> None:
    of_two, of_sixteen = (
        max(sent + received for _, sent, received in ranks(world_size).run(noise, lgc.parse_scheme(scheme), 300_000))
        for world_size in (2, MOST_RANKS)
    )
    assert of_sixteen <= 1.1 * (15 / 16) / (1 / 2) * of_two


def train_locally(rank: int, _: int, scheme: lgc.LocalSteps) -> dict[str, Tensor]:
    run = LocalRun(scheme).train(rank, range(8))
    run.handle.finish()
    return run.weights()


LARGEST = lgc.Quantized(values=lgc.Largest(0.05))
OF_ALL: Any = {"outer_lr": 1.4, "first_moments": 0.5, "second_moments": "all", "ahead": 0.5}
LOCAL = {
    "two-stage": lgc.LocalSteps(every=3, start_steps=2),
    "largest": lgc.LocalSteps(every=2, exchange=LARGEST, start_steps=2, **OF_ALL),
}


@pytest.mark.parametrize("scheme", LOCAL.values(), ids=LOCAL)
def test_many_ranks_end_their_local_steps_with_the_same_weights(
    ranks: Callable[[int], Ranks], scheme: lgc.LocalSteps
) -> None:
    assert not differ(ranks(MOST_RANKS).run(train_locally, scheme))


class Received(NamedTuple):
    values: int
    means: int


def receive(rank: int, world_size: int, scheme: lgc.Quantized) -> Received:
    contents, _, _ = ones(rank, world_size, scheme, 10_000)
    return Received(contents["values"], contents.get("means", 0))


def test_the_largest_values_are_gathered_on_any_number_of_ranks(ranks: Callable[[int], Ranks]) -> None:
    """Where nothing else is said: a mean of every coordinate would take many times as much."""
    for received in ranks(4).run(receive, LARGEST):
        assert received.values
        assert not received.means
    assert lgc.Quantized(values=lgc.Largest(0.05), mean_values=lgc.Largest(0.1)).reduction is None


@pytest.mark.parametrize(
    ("values", "finer"),
    [
        (lgc.Sign(), lgc.LloydMax(4)),
        (lgc.RecentSign(), lgc.LloydMax(4)),
        (lgc.LloydMax(2), lgc.LloydMax(4)),
        (lgc.LloydMax(6, block=64), lgc.LloydMax(6, block=64)),
        (lgc.Uniform(3), lgc.Uniform(4)),
        (lgc.DeadZone(1.5), lgc.DeadZone(1.25)),
        (lgc.Largest(0.02), lgc.Largest(0.036)),
        (lgc.Largest(0.8), lgc.Largest(1.0)),
        (lgc.Float16(), lgc.Float16()),
    ],
    ids=str,
)
def test_in_two_stages_the_mean_has_a_finer_code_of_its_kind(
    ranks: Callable[[int], Ranks], values: Any, finer: Any
) -> None:
    assert values.finer() == finer
    arguments: dict[str, Any] = {"values": values, "reduction": "two_stage"}
    assert ranks(2).run(receive, lgc.Quantized(**arguments)) == ranks(2).run(
        receive, lgc.Quantized(**arguments, mean_values=finer)
    )


def rehearsed(rank: int, world_size: int, scheme: Any, of: int) -> list[tuple[str, int]]:
    """Kinds and sizes of the collectives of a round of so many ranks, of which only some are there."""
    timer = Timer(world(), HOST, enough=0.01)
    arm = Rounds(scheme, gradient(rank, 0), timer, of, lambda: None, lambda: None, early=False).rehearse()
    assert arm is not None
    return [(collective.kind, collective.size) for collective in arm.stages[-1].collectives]


def test_fewer_ranks_rehearse_what_all_would_send(ranks: Callable[[int], Ranks]) -> None:
    scheme = lgc.Quantized(reduction="two_stage")
    (alone,), pair, everyone = (ranks(world_size).run(rehearsed, scheme, 4) for world_size in (1, 2, 4))
    kinds = ["all-gather", "all-to-all", "all-to-all", "all-gather", "all-gather"]  # the preamble is the first
    for sent in (alone, *pair, *everyone):
        assert [kind for kind, _ in sent] == kinds
        assert [size for _, size in sent] == pytest.approx([size for _, size in everyone[0]], rel=0.1)


def test_one_rank_sends_nothing_and_codes_all_the_same(runs: Runs) -> None:
    for reduction in REDUCTIONS:
        (run,) = runs(1, f"quantized:reduction={reduction}")
        assert not any(run.contents.values())
        assert run.received_bytes == 0
        assert run.residual.any()


# --- shards ---


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), max_size=6),
    units=st.lists(st.sampled_from([1, 3, 9]), min_size=6, max_size=6),
    parts=st.integers(1, 16),
    start=st.integers(0, 100),
)
def test_shards_follow_each_other_and_cut_no_unit(sizes: list[int], units: list[int], parts: int, start: int) -> None:
    segments, place = [], start
    for number, (size, unit) in enumerate(zip(sizes, units, strict=False)):
        segments.append(Segment(str(number), Role.OWN, slice(place, place + size * unit), 0.1, unit))
        place += size * unit
    shards = cut(segments, parts)
    assert len(shards) == parts
    found = [
        (part.name, shard.where.start + part.slice.start, shard.where.start + part.slice.stop)
        for shard in shards
        for part in shard.segments
    ]
    for shard in shards:
        assert sum(part.size for part in shard.segments) == shard.size
        assert abs(shard.size - (place - start) / parts) <= max(units)
        assert all(part.size % part.unit == 0 for part in shard.segments)
    for segment in segments:
        pieces = [(begin, end) for name, begin, end in found if name == segment.name]
        assert [begin for begin, _ in pieces[1:]] == [end for _, end in pieces[:-1]]
        assert sum(end - begin for begin, end in pieces) == segment.size


def test_more_ranks_than_values_have_empty_shards(ranks: Callable[[int], Ranks]) -> None:
    for mean in ranks(5).run(mean_of_few, 2):
        torch.testing.assert_close(mean, torch.tensor([3.0, 3.0]), rtol=0.1, atol=0)
    for mean in ranks(5).run(mean_of_few, 0):
        assert mean.numel() == 0


def mean_of_few(rank: int, world_size: int, size: int) -> Tensor:
    tensors = {"few": torch.full((size,), 1.0 + rank)}
    synchronizer = lgc.Synchronizer(lgc.Quantized(reduction="two_stage"), tensors, world())
    return synchronizer.synchronize(tensors, 0)["few"].clone()


# --- training ---


def train(rank: int, world_size: int, scheme: str) -> tuple[dict[str, Tensor], list[float]]:
    ddp = build("transformer")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    lgc.attach(ddp, scheme, optimizer, check_every=10)
    losses = []
    for step in range(60):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return parameters(ddp), losses


@every_reduction
def test_a_transformer_learns_with_it_under_adam(ranks: Callable[[int], Ranks], reduction: str) -> None:
    results = ranks(3).run(train, f"quantized:reduction={reduction}")
    for found, losses in results:
        assert all(torch.equal(found[name], results[0][0][name]) for name in found)
        assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10])


# --- rounds that fail ---


def abandon(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether the state has changed in a round whose second stage failed, and in one of NaN."""
    synchronizer = make(lgc.Quantized(reduction="two_stage"), Policy(0, on_nonfinite="propagate"))
    synchronizer.synchronize(gradient(rank, 0), 0)
    aggregator: Any = synchronizer.aggregator

    def state() -> Tensor:
        return torch.cat([aggregator.feedback.residual, aggregator.server_residual])

    before = state()
    together = synchronizer.transport.together

    def fails(posts: Sequence[Post]) -> list[list[Tensor]]:
        results = together(posts)
        if any(post.content == "means" for post in posts):
            raise RuntimeError("out of luck")
        return results

    synchronizer.transport.together = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of luck"):
        synchronizer.synchronize(gradient(rank, 1), 1)
    after_failure = state()
    synchronizer.transport.together = together  # type: ignore[method-assign]
    bad = gradient(rank, 2) | ({"scale": torch.tensor(torch.nan)} if rank == 1 else {})
    assert all(mean.isnan().all() for mean in synchronizer.synchronize(bad, 2).values())
    return torch.equal(before, after_failure), torch.equal(before, state())


def test_a_round_that_is_abandoned_changes_nothing(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(3).run(abandon) == [(True, True)] * 3


def told_too_much(rank: int, world_size: int) -> str:
    payload = torch.zeros(10 if rank == 1 else 5, dtype=torch.uint8)
    with pytest.raises(PayloadError) as error:
        lockstep([to_each([payload] * world_size, "values", limit=9)], world().together)
    return str(error.value)


def test_more_bytes_than_possible_are_refused_before_they_are_sent(ranks: Callable[[int], Ranks]) -> None:
    for rank, message in enumerate(ranks(2).run(told_too_much)):
        assert rank == 1 or message == "payload field length must be 0 to 9 bytes, as announced, got 10."


# --- hostile payloads ---

SEGMENTS = [Segment("a", Role.OWN, slice(0, 40), 0.2), Segment("b", Role.OWN, slice(40, 76), 0.2, 9)]
MOST = [8, 2]
SPARSE = SparseCode(Region(SEGMENTS), MOST, Codecs(lgc.Rice(), lgc.LloydMax(2)))
FULL = QuantizedCode(SEGMENTS, lgc.LloydMax(2))


def few() -> Tensor:
    """Values as a selection leaves them."""
    x = torch.zeros(76)
    x[[3, 4, 39]] = torch.tensor([1.0, -2.0, 3.0])
    x[49:58] = torch.arange(9.0)
    return x


@pytest.mark.parametrize("code", [SPARSE, FULL], ids=["sparse", "full"])
def test_a_code_keeps_zeros_and_decodes_what_it_encodes(code: Any) -> None:
    decoded = code.decode(code.encode(few(), 3), 3, HOST)
    assert decoded[[3, 4, 39]].all()
    assert not decoded[:3].any()
    assert torch.equal(decoded, code.decode(code.encode(few(), 4), 4, HOST))


@pytest.mark.parametrize("code", [SPARSE, FULL], ids=["sparse", "full"])
@settings(deadline=None)
@given(data=st.data())
def test_damaged_payloads_are_refused_or_are_other_payloads(code: Any, data: st.DataObject) -> None:
    payload = code.encode(few(), 3)
    start = header_size(len(code.bounds))
    ends = np.cumsum(np.frombuffer(payload[20:start].numpy().tobytes(), "<u4")) + start
    parts = [payload[begin:end].clone() for begin, end in zip([start, *ends[:-1]], ends, strict=True)]
    for part in parts:
        if part.numel() and data.draw(st.booleans()):
            part[data.draw(st.integers(0, part.numel() - 1))] = data.draw(st.integers(0, 255))
    damaged = pack(parts, kind=int(payload[5]), step=3)  # with a checksum that is right
    try:
        decoded = code.decode(damaged, 3, HOST)
    except PayloadError:
        return
    assert decoded.isfinite().all()
    assert decoded.numel() == 76


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([9, 1], r"counts must be at most 8, got 9\."),
        ([3, 2**32 - 1], r"counts must be at most 2, got 4294967295\."),
        ([3], r"counts must be 8 bytes, got 4\."),
    ],
)
def test_numbers_of_entries_that_cannot_be_are_refused(counts: list[int], message: str) -> None:
    parts = [np.array(counts, "<u4").tobytes(), b"", b""]
    with pytest.raises(PayloadError, match=message):
        SPARSE.decode(pack(parts, kind=Kind.SHARE, step=3), 3, HOST)


@settings(deadline=None)
@given(size=st.integers(1, 10**6), data=st.data())
def test_fewer_indices_have_no_longer_code_than_is_allowed_for(size: int, data: st.DataObject) -> None:
    most = data.draw(st.integers(0, size))
    fewer = data.draw(st.integers(0, most))
    for coder in (lgc.Rice(), lgc.RawIndices()):
        assert coder.bound([size], [fewer]) <= FEWER_ARE_LONGER * coder.bound([size], [most])


# --- state ---


def aggregator_of(scheme: Any, rank: int, world_size: int) -> Any:
    """One rank's, alone: it cannot exchange anything."""
    transport: Any = SimpleNamespace(rank=rank, world_size=world_size)
    layout = scheme.layout([(name, torch.zeros(shape)) for name, shape in SHAPES.items()])
    return scheme.build(layout, transport, device=HOST)


def state_of(scheme: Any, run: Run, rank: int, world_size: int) -> dict[str, Any]:
    """As that of a handle."""
    keys = {"scheme": str(scheme), "rank": rank, "world_size": world_size, "wire": "{}"}
    return keys | {"aggregator": run.state}


def owed(states: Sequence[dict[str, Any]]) -> Tensor:
    """The mean over the ranks of what they and their servers owe."""
    parts = [state["per_rank"] for state in states]
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    each = [flat(part["residual"]).double() + flat(part.get("server_residual", zeros)) for part in parts]
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("scheme", [lgc.Quantized(), lgc.Quantized(reduction="two_stage")], ids=str)
@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 3), (4, 8), (2, 4)])
def test_at_another_number_of_ranks_what_is_owed_stays(
    ranks: Callable[[int], Ranks], runs: Runs, scheme: Any, before: int, after: int
) -> None:
    real = runs(before, str(scheme))
    saved = [state_of(scheme, run, rank, before) for rank, run in enumerate(real)]
    adapted = []
    for rank in range(after):
        aggregator = aggregator_of(scheme, rank, after)
        state = reshard(saved, rank=rank, world_size=after)["aggregator"]
        state = aggregator.adapt_state(state, STEPS)
        assert state["per_rank"].keys() == aggregator.state_dict()["per_rank"].keys()
        aggregator.load_state_dict(state)
        adapted.append(aggregator.state_dict())
        assert aggregator.server_residual is None or not aggregator.server_residual.any()
    torch.testing.assert_close(owed(adapted), owed([run.state for run in real]), rtol=0, atol=1e-6)
    assert owed(adapted).any()


def resumed(rank: int, world_size: int, scheme: Any) -> bool:
    """Whether a run goes on from a state bit for bit."""
    whole, other = make(scheme), make(scheme)
    for step in range(3):
        whole.synchronize(gradient(rank, step), step)
    keys = make(scheme).state_dict()["per_rank"].keys()
    state = whole.state_dict()
    assert state["per_rank"].keys() == keys  # as before the first step
    other.load_state_dict(state, 3)
    means = [flat(each.synchronize(gradient(rank, 3), 3)).clone() for each in (whole, other)]
    return torch.equal(*means) and all(
        torch.equal(flat(whole.state_dict()["per_rank"][key]), flat(other.state_dict()["per_rank"][key]))
        for key in keys
    )


@every_reduction
def test_a_run_goes_on_from_its_state_bit_for_bit(ranks: Callable[[int], Ranks], reduction: Any) -> None:
    assert ranks(3).run(resumed, lgc.Quantized(reduction=reduction)) == [True] * 3


# --- arguments ---


def test_text_forms() -> None:
    assert str(lgc.parse_scheme("quantized:bits=2")) == "quantized"
    for text in ("quantized:bits=4", "quantized:values=sign:reduction=two_stage", "quantized:mean_values=lloyd8"):
        assert str(lgc.parse_scheme(text)) == text
    assert lgc.parse_scheme("quantized:values=uniform4x256") == lgc.Quantized(values=lgc.Uniform(4, 256))
    assert lgc.parse_scheme("quantized:values=none:reduction=none") == lgc.Quantized()
    assert lgc.parse_scheme("quantized:values=largest0.01") == lgc.parse_scheme(
        "quantized:reduction=gather:values=largest0.01"
    )
    assert str(lgc.parse_scheme("dgc:reduction=two_stage")) == "dgc:reduction=two_stage"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"Quantized\(bits=\.\.\.\) must be at least 1, got 0\."),
        ({"bits": 9}, r"Quantized\(bits=\.\.\.\) must be at most 8, got 9\."),
        ({"bits": 2.0}, r"Quantized\(bits=\.\.\.\) must be an integer, got 2\.0\."),
        (
            {"bits": 4, "values": lgc.Sign()},
            r"Quantized\(bits=\.\.\.\) must be left at 2 where values are given, got 4\.",
        ),
        ({"values": "sign"}, r"Quantized\(values=\.\.\.\) must be a value codec, such as lgc\.Sign\(\), got 'sign'\."),
        ({"mean_values": "sign"}, r"Quantized\(mean_values=\.\.\.\) must be a value codec"),
        ({"mean_values": lgc.Sign(), "reduction": "gather"}, 'must be None where reduction is "gather", got Sign'),
        ({"reduction": "ring"}, r"Quantized\(reduction=\.\.\.\) must be one of gather, two_stage, got 'ring'\."),
    ],
)
def test_bounds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lgc.Quantized(**arguments)


def test_complex_parameters_are_refused(ranks: Callable[[int], Ranks]) -> None:
    for error in ranks(1).exceptions(attach_to_complex):
        assert isinstance(error, ValueError)
        assert "of which quantized would see one half" in str(error)


def attach_to_complex(rank: int, world_size: int) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    lgc.attach(nn.parallel.DistributedDataParallel(Complex()), lgc.Quantized())
