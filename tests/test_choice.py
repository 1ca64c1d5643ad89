"""What a step is predicted to cost, what is measured for that, and what is chosen by it."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import cases
from ddp_models import MODELS, batch, build, seeded
from ranks import Ranks
from torch import Tensor, nn

import lgc
from lgc.choice import choose as choosing
from lgc.choice.cost import Collective, Link, Profile, SchemeCost, StageCost, as_fast, predict
from lgc.choice.profile import Job, Profiler, stand_in
from lgc.choice.rehearsal import Rounds, Timer, probe
from lgc.comm.messages import FromOne, Post
from lgc.comm.transport import RankError, Transport

RankFactory = Callable[[int], Ranks]

PARAMETERS = 4_358  # of the convolutional model
SLOW = Link(bandwidth=1e6)  # bytes/s
FAST = Link(bandwidth=1e12)


# --- the cost model, by hand ---


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [  # of 1 MB on 4 ranks at 1 MB/s and 10 ms a message
        ("all-reduce", 6 * 0.01 + 1.5),
        ("all-gather", 0.01 + 3),
        ("broadcast", 2 * 0.01 + 2),
        ("gather", 0.01 + 3),
        ("all-to-all", 0.01 + 0.75),
        ("spread", 2 * 0.01 + 1.5),
        ("sum", 2 * 0.01 + 1.5),
    ],
)
def test_a_collective_takes_its_messages_and_its_bytes(kind: Any, seconds: float) -> None:
    assert Collective(kind, 10**6).time(Link(1e6, 0.01), 4) == pytest.approx(seconds)
    assert Collective(kind, 10**6).time(Link(1e6, 0.01), 1) == 0
    assert Collective(kind, 10**6, seconds=9.0).time(Link(1e6, 0.01), 4) == 9  # as measured, if that is longer


def test_a_link_is_read_with_its_headers_taken_off() -> None:
    link = Link.parse("100mbit", "2ms")
    assert link.bandwidth == pytest.approx(12.5e6 * 1448 / 1547)
    assert link.latency == 0.002
    for bandwidth, latency, message in [
        ("fast", "1ms", r"bandwidth must be a number with kbit, mbit, gbit, as in 100mbit, got 'fast'\."),
        ("0mbit", "1ms", r"bandwidth must be above 0, got '0mbit'\."),
        ("1gbit", "1", r"latency must be a number with us, ms, s, as in 1ms, got '1'\."),
    ]:
        with pytest.raises(ValueError, match=message):
            Link.parse(bandwidth, latency)
    with pytest.raises(
        ValueError, match=r"Link\(bandwidth=\.\.\.\) must be a number above 0, got '10mbit'; Link.parse"
    ):
        Link("10mbit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Link\(latency=\.\.\.\) must be a number of at least 0, got nan;"):
        Link(1e6, math.nan)


def test_the_backward_pass_hides_what_is_ready_before_its_end() -> None:
    early, late = Collective("all-reduce", 4 * 10**5, lead=1.0), Collective("all-reduce", 2 * 10**5, lead=0.0)
    stage = StageCost("dense", None, 0.0, [early, late])
    assert stage.communication(Link(1e6), 2) == pytest.approx(0.2)  # 0.4 s of the first are hidden
    assert stage.communication(Link(1e5), 2) == pytest.approx(-1 + 4 + 2)  # all but the first second is seen
    assert stage.communication(Link(math.inf), 2) == 0


def profile(**compression: float) -> Profile:
    """1 s of computation, 10 MB dense, and schemes that send 10 kB, 5 kB, ... after so many seconds of their own."""
    arms = [SchemeCost("dense", [StageCost("dense", None, 0.0, [Collective("all-reduce", 10**7)])])]
    for number, (name, seconds) in enumerate(compression.items()):
        first = StageCost("warmup", 100, 2 * seconds, [Collective("all-reduce", 10**6)])
        last = StageCost("compressed", None, seconds, [Collective("all-reduce", 10**4 // 2**number)])
        arms.append(SchemeCost(name, [first, last]))
    return Profile(2, 1.0, arms)


def test_dense_is_best_on_a_fast_link_and_compression_on_a_slow_one() -> None:
    of = profile(topk=0.5)
    assert min(predict(of, FAST), key=lambda one: one.step).scheme == "dense"
    dense, topk = predict(of, SLOW)
    assert dense.step == pytest.approx(1 + 10)
    assert topk.step == pytest.approx(1 + 0.5 + 0.01)
    assert (topk.compute, topk.compression, topk.communication) == pytest.approx((1, 0.5, 0.01))
    assert topk.speedup == pytest.approx(11 / 1.51)
    assert topk.sent_bytes == 10**4
    assert as_fast([dense, topk]) == [topk]


def test_those_that_may_be_as_fast_are_listed_in_their_order() -> None:
    of = profile(slow=0.6, first=0.52, fastest=0.5, near=0.53)  # 1.61, 1.525, 1.5025 and 1.53125 s
    assert [one.scheme for one in as_fast(predict(of, SLOW))] == ["first", "fastest", "near"]
    assert [one.scheme for one in as_fast(predict(of, SLOW), tolerance=0.1)] == ["slow", "first", "fastest", "near"]
    assert [one.scheme for one in as_fast(predict(of, SLOW), tolerance=0.0)] == ["fastest"]
    assert as_fast(predict(profile(), FAST))[0].scheme == "dense"


def test_a_step_has_its_part_of_a_round_that_several_share() -> None:
    stage = StageCost("compressed", None, 2.0, [Collective("all-reduce", 10**7)], every=10)
    of = profile()
    of.arms.append(SchemeCost("local", [stage]))
    _, local = predict(of, SLOW)
    assert (local.compute, local.compression, local.communication) == pytest.approx((1, 0.2, 1))
    assert local.step == pytest.approx(2.2)
    assert local.sent_bytes == 10**6


def test_a_run_is_ahead_once_what_it_lost_at_first_is_won_back() -> None:
    dense, topk, slow = predict(profile(topk=0.5, slow=11.0), SLOW)
    (early,) = topk.early
    assert (early.phase, early.steps) == ("warmup", 100)
    assert early.step == pytest.approx(1 + 1 + 1)  # ahead from the start
    assert topk.pays_from == 0
    assert dense.pays_from is None
    assert slow.pays_from is None
    _, costly = predict(profile(costly=8.0), SLOW)  # 100 steps lose 7 s each, the others win 2 s - 0.01 s each
    assert costly.pays_from == 100 + math.ceil(700 / 1.99)
    lengths = {"dense": (10, 13.0), "warmup": (100, 0.0), "compressed": (None, 0.0)}
    stages = [StageCost(phase, steps, seconds, []) for phase, (steps, seconds) in lengths.items()]
    _, won_early = predict(replace(profile(), arms=[*profile().arms, SchemeCost("slow start", stages)]), SLOW)
    assert won_early.pays_from == 10 + math.ceil(10 * (14 - dense.step) / (dense.step - 1)) < 20


# --- rehearsals ---

EXACT: dict[str, Any] = {  # the length of what they send does not depend on what it is, but for means in two stages
    "topk": lgc.TopK.paper(rate=0.02, warmup_steps=4),
    "dgc-two-stage": lgc.DGC.paper(rate=0.02, reduction="two_stage"),
    "scalecom": lgc.ScaleCom.paper(rate=0.02),
    "quantized": lgc.Quantized(reduction="gather"),
    "quantized-two-stage": lgc.Quantized(reduction="two_stage"),
    "lgc-ring": lgc.LGCRing.paper(rate=0.02, dense_steps=3, warmup_steps=5, train_steps=6),
    "lgc-ps": lgc.LGCServer.paper(rate=0.02, dense_steps=3, warmup_steps=5, train_steps=6),
}


def gradients_of(rank: int) -> dict[str, Tensor]:
    ddp = build("convolutional")
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn(p.shape, generator=generator) for name, p in ddp.module.named_parameters()}


def world() -> Transport:
    assert dist.group.WORLD is not None
    return Transport(dist.group.WORLD)


def timer_of(transport: Transport) -> Timer:
    return Timer(transport, torch.device("cpu"), enough=0.01)


def nothing() -> None:
    """Nothing is done beside the rounds."""


RoundsAlone = partial(Rounds, work=nothing, dense_work=nothing)


class Rehearsed(NamedTuple):
    stages: list[tuple[str, int | None]]
    sent: list[list[tuple[str, int]]]  # kinds and sizes by stage
    sent_bytes: list[float]
    counted_bytes: int
    preamble_bytes: int
    unchanged: bool


def rehearsed(rank: int, world_size: int, scheme: Any, of: int) -> Rehearsed:
    gradients, random = gradients_of(rank), torch.get_rng_state()
    transport = world()
    arm = RoundsAlone(scheme, gradients, timer_of(transport), of, early=True).rehearse()
    assert arm is not None
    same = all(torch.equal(gradients[name], value) for name, value in gradients_of(rank).items())
    contents = transport.wire.phases["setup"].contents
    return Rehearsed(
        [(stage.phase, stage.steps) for stage in arm.stages],
        [[(one.kind, one.size) for one in stage.collectives] for stage in arm.stages],
        [stage.sent_bytes(of) for stage in arm.stages],
        sum(size for content, size in contents.items() if content not in ("rehearsal", "weights")),
        contents["preamble"],
        same and torch.equal(random, torch.get_rng_state()),
    )


@cases("scheme", EXACT, in_suite=["dgc-two-stage", "scalecom", "quantized-two-stage", "lgc-ps"])
def test_one_rank_sends_what_all_would(ranks: RankFactory, scheme: str) -> None:
    (alone,) = ranks(1).run(rehearsed, EXACT[scheme], 4)
    halves = ranks(2).run(rehearsed, EXACT[scheme], 4)
    everyone = ranks(4).run(rehearsed, EXACT[scheme], 4)
    for other in (*halves, *everyone):
        assert other.stages == alone.stages
        for here, there in zip(other.sent, alone.sent, strict=True):
            assert [kind for kind, _ in here] == [kind for kind, _ in there]
            rel = 0.1 if "two-stage" in scheme else 1e-9
            assert [size for _, size in here] == pytest.approx([size for _, size in there], rel=rel)
        assert other.unchanged
    if scheme.startswith("lgc"):
        assert [phase for phase, _ in alone.stages] == ["dense", *["warmup"] * 2, "train", "compressed"]
        assert [steps for _, steps in alone.stages] == [3, 3, 2, 6, None]


def test_the_bytes_are_those_of_the_transport(ranks: RankFactory) -> None:
    everyone = ranks(4).run(rehearsed, EXACT["scalecom"], 4)
    counted = sum(rank.counted_bytes for rank in everyone) / 4
    *early, last = everyone[0].sent_bytes
    rounds = everyone[0].preamble_bytes / (3 * 32)
    assert counted == pytest.approx(sum(early) + (rounds - len(early)) * last, rel=1e-6)


DELAYS: dict[str, tuple[Any, float]] = {  # messages of a compressed step that wait for each other, at most
    "dgc": (lgc.DGC(rate=0.02), 2),
    "dgc-two-stage": (lgc.DGC(rate=0.02, reduction="two_stage"), 5),
    "topk": (lgc.TopK(rate=0.02), 2),
    "scalecom": (lgc.ScaleCom(rate=0.02), 4),
    "quantized": (lgc.Quantized(reduction="gather"), 2),
    "quantized-two-stage": (lgc.Quantized(reduction="two_stage"), 5),
    "scalecom:paper": (lgc.parse_scheme("scalecom:paper"), 5),
    "lgc-ring": (lgc.LGCRing(rate=0.5), 5),  # at this rate the first layer is small enough to be dense
    "lgc-ps": (lgc.LGCServer(rate=0.5), 5),
    "lgc-ring:paper": (lgc.parse_scheme("lgc-ring:paper"), 5),
    "lgc-ps:paper": (lgc.parse_scheme("lgc-ps:paper"), 5),
}


def delays(rank: int, world_size: int, scheme: Any) -> float:
    rounds = RoundsAlone(scheme, gradients_of(rank), timer_of(world()), 4, early=False)
    arm = rounds.rehearse()
    assert arm is not None
    return sum(one.messages(4) for one in arm.stages[-1].collectives)


@pytest.mark.parametrize("scheme", DELAYS)
def test_on_four_ranks_a_compressed_step_waits_for_few_messages(ranks: RankFactory, scheme: str) -> None:
    of, most = DELAYS[scheme]
    assert ranks(1).run(delays, of) == [most]


class Noting(Transport):
    """Notes whose payloads all ranks have got."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.sources: set[int] = set()

    def together(self, posts: Sequence[Post]) -> list[list[Tensor]]:
        self.sources |= {post.source for post in posts if isinstance(post, FromOne)}
        return super().together(posts)


def led(rank: int, world_size: int, of: int) -> set[int]:
    assert dist.group.WORLD is not None
    transport = Noting(dist.group.WORLD)
    RoundsAlone(EXACT["lgc-ps"], gradients_of(rank), timer_of(transport), of, early=False).rehearse()
    return transport.sources


def test_the_ranks_that_are_there_lead_in_turn(ranks: RankFactory) -> None:
    assert ranks(2).run(led, 4) == [{0, 1}, {0, 1}]


def beside_work(rank: int, world_size: int, dense_seconds: float) -> tuple[float, int]:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.3)

    dense_work = partial(time.sleep, dense_seconds)
    timer = timer_of(world())
    arm = Rounds(EXACT["topk"], gradients_of(rank), timer, world_size, work, dense_work, early=False).rehearse()
    assert arm is not None
    return arm.stages[-1].seconds, calls


@pytest.mark.parametrize(("dense_seconds", "least", "most"), [(0.3, 0.0, 0.3), (0.01, 0.15, math.inf)])
def test_what_dense_does_besides_is_taken_off(
    ranks: RankFactory, dense_seconds: float, least: float, most: float
) -> None:
    for seconds, calls in ranks(2).run(beside_work, dense_seconds):
        assert least <= seconds < most
        assert calls >= 4


def make_job(rank: int, bucket_cap_mb: int | None) -> Job:
    ddp = build("convolutional", bucket_cap_mb=bucket_cap_mb)
    x, y = batch(rank, 0)
    return Job(ddp, lambda: F.cross_entropy(ddp(x), y), partial(stand_in, ddp))


def profiled(rank: int, world_size: int, scheme: Any, of: int) -> list[list[tuple[str, int]]]:
    profiler = Profiler(partial(make_job, rank), world(), of, enough=0.01)
    assert profiler.add(scheme, early=True)
    dense, arm = profiler.profile.arms
    assert dense.scheme == "dense"
    return [[(one.kind, one.size) for one in stage.collectives] for stage in arm.stages]


@pytest.mark.parametrize("scheme", ["scalecom", "lgc-ring"])
def test_a_model_is_measured_as_it_is_attached_to(ranks: RankFactory, scheme: str) -> None:
    (alone,) = ranks(1).run(rehearsed, EXACT[scheme], 4)
    for sent in ranks(2).run(profiled, EXACT[scheme], 4):
        assert sent == alone.sent  # whatever the order of DDP's buckets


class Local(NamedTuple):
    every_step: list[StageCost]
    compute: float
    local: list[StageCost]


def local_steps(rank: int, world_size: int, exchange: Any, scheme: Any, of: int) -> Local:
    """What an exchange costs at every step, and under local steps."""
    profiler = Profiler(partial(make_job, rank), world(), of, enough=0.01)
    if exchange is not None:
        assert profiler.add(exchange, early=True)
    assert profiler.add(scheme, early=True)
    return Local(profiler.profile.arms[-2].stages, profiler.profile.compute, profiler.profile.arms[-1].stages)


@pytest.mark.parametrize("reduction", ["gather", "two_stage"])
def test_local_steps_cost_their_exchange_and_a_roll_call_every_so_many_steps(
    ranks: RankFactory, reduction: Any
) -> None:
    exchange = lgc.Quantized(reduction=reduction)
    scheme = lgc.LocalSteps(every=20, exchange=exchange, start_steps=7, start=lgc.Float32())
    for found in ranks(2).run(local_steps, exchange, scheme, 4):
        (at_every_step,) = found.every_step
        start, local = found.local
        opening, *others = at_every_step.collectives
        assert (opening.kind, opening.size) == ("all-gather", 32)
        assert local == replace(at_every_step, collectives=[opening, opening, *others], every=20)
        assert (start.phase, start.steps, start.every) == ("dense", 7, 1)
        assert start.sent_bytes(4) == 3 * 32 + 1.5 * 4 * PARAMETERS


def test_fragments_send_as_much_in_more_rounds_and_overlap_waits_for_what_the_steps_do_not_hide(
    ranks: RankFactory,
) -> None:
    scheme = lgc.LocalSteps(every=20, fragments=2, overlap=True, start_steps=0)
    (found,) = ranks(1).run(local_steps, lgc.Quantized(), scheme, 4)
    (whole,), (part,) = found.every_step, found.local
    assert part.every == 10
    assert part.seconds == whole.seconds / 2
    openings = 3 * 32
    assert part.sent_bytes(4) * 10 - 2 * openings == pytest.approx((whole.sent_bytes(4) - openings) / 2, abs=3)
    slow = Link(1.0)  # bytes/s, so that no busy machine hides all of it
    in_turn = replace(part, collectives=[replace(one, lead=0.0) for one in part.collectives])
    waits = in_turn.communication(slow, 4) - found.compute
    assert part.communication(slow, 4) == pytest.approx(waits)
    assert part.communication(Link(1e12), 4) == 0


def test_the_warm_up_of_an_exchange_counts_rounds(ranks: RankFactory) -> None:
    scheme = lgc.LocalSteps(every=20, exchange=lgc.TopK(rate=0.02, warmup_steps=4), start_steps=300)
    (found,) = ranks(1).run(local_steps, None, scheme, 4)
    assert [(stage.phase, stage.steps, stage.every) for stage in found.local] == [
        ("warmup", 300, 1),
        ("warmup", 40, 20),
        ("warmup", 40, 20),
        ("compressed", None, 20),
    ]


def sent_by_local_steps(rank: int, world_size: int, scheme: Any) -> tuple[float, float]:
    """Bytes a step: as predicted, and as sent but for buffers, which are not predicted."""
    profiler = Profiler(partial(make_job, rank), world(), world_size, enough=0.01)
    assert profiler.add(scheme, early=False)
    job = make_job(rank, None)
    optimizer = torch.optim.SGD(job.ddp.parameters(), lr=0.01)
    handle = lgc.attach(job.ddp, scheme, optimizer, check_every=0)
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(job.loss())
        optimizer.step()
    traffic = handle.wire.phases["compressed"]
    assert traffic.steps == 4
    sent = sum(size for content, size in traffic.contents.items() if content != "buffers")
    return profiler.profile.arms[-1].stages[-1].sent_bytes(world_size), sent / 4


@pytest.mark.parametrize("exchange", ["dense", "quantized:reduction=gather", "quantized:reduction=two_stage"])
def test_local_steps_send_what_is_predicted(ranks: RankFactory, exchange: str) -> None:
    scheme = lgc.parse_scheme(f"local:every=2:start_steps=0+{exchange}")
    predicted, sent = zip(*ranks(2).run(sent_by_local_steps, scheme), strict=True)
    assert predicted[0] == predicted[1]
    assert sum(sent) / 2 == pytest.approx(predicted[0], rel=0.05)  # as zeros cost nothing, and are not always the same


def probed(rank: int, world_size: int) -> Link:
    return probe(world(), torch.device("cpu"))


def test_all_ranks_measure_the_same_link(ranks: RankFactory) -> None:
    first, *others = ranks(3).run(probed)
    assert others == [first, first]
    assert 1e6 < first.bandwidth < 1e12
    assert 0 < first.latency < 0.1


# --- choose ---

SLOWEST = Link.parse("10kbit", "1ms")


class Chosen(NamedTuple):
    scheme: str
    messages: list[str]


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What lgc logs inside."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lgc")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)


def loss_of(rank: int) -> Callable[[nn.Module], Tensor]:
    """Random, and slower the higher the rank."""
    x, y = batch(rank, 0)

    def loss(model: nn.Module) -> Tensor:
        time.sleep(0.002 * rank)
        return F.cross_entropy(model(F.dropout(x, 0.1)), y)

    return loss


def chosen(
    rank: int, world_size: int, model: str, candidates: Any, link: Any = None, form: str = "ddp", patience: float = 2.0
) -> Chosen:
    """Let it choose for a DDP model, that model compiled, or a module."""
    with seeded(rank):
        of: Any = MODELS[model]() if form == "module" else build(model)
    if form == "compiled":
        of = torch.compile(of, backend="eager")
    with pytest.MonkeyPatch.context() as patch, logged() as messages:
        patch.setattr(choosing, "PATIENCE", patience)
        patch.setattr(choosing, "BRIEF", 0.01)
        return Chosen(str(lgc.choose(of, loss_of(rank), candidates, link=link)), messages)


@cases("form", ["ddp", "compiled", "module"], in_suite=["ddp", "module"])
def test_all_ranks_choose_the_same_compressor_on_a_slow_link(ranks: RankFactory, form: str) -> None:
    compressors = ["topk:rate=0.01", "powersgd" if form == "module" else "lgc-ring:rate=0.02"]
    candidates = ["bf16", lgc.TopK(rate=0.01), "dense", compressors[1]]
    first, other = ranks(2).run(chosen, "wider", candidates, Link.parse("1mbit"), form)
    assert first.scheme in compressors
    assert other.scheme == first.scheme
    (message,) = [text for text in first.messages if text.startswith("choose: ") and "A dense step takes " in text]
    assert message.startswith(f"choose: {first.scheme}. A dense step takes ")
    assert "per step: dense " in message
    assert "bf16 " in message
    assert not other.messages


def test_whatever_is_measured_is_the_same_on_all_ranks(ranks: RankFactory) -> None:
    first, *others = ranks(3).run(chosen, "convolutional", ["bf16", "dgc:rate=0.02:momentum=0"])
    assert first.scheme in {"dense", "bf16", "dgc:rate=0.02:momentum=0.0"}
    assert [other.scheme for other in others] == [first.scheme] * 2


def test_of_equals_the_first_that_was_given_is_chosen(ranks: RankFactory) -> None:
    candidates = ["topk:rate=0.01", "local:every=100+quantized", lgc.LocalSteps(every=101)]  # the last sends least
    for one in ranks(2).run(chosen, "convolutional", candidates, SLOWEST):
        assert one.scheme == "local:every=100+quantized"


def test_one_rank_alone_is_dense(ranks: RankFactory) -> None:
    (alone,) = ranks(1).run(chosen, "convolutional", ["topk"], SLOWEST)
    assert alone.scheme == "dense"
    assert alone.messages[-1].endswith("; no candidate can win that back.")


def test_a_candidate_that_at_once_takes_too_long_is_given_up(ranks: RankFactory) -> None:
    for one in ranks(2).run(chosen, "convolutional", ["topk", "bf16"], SLOWEST, "ddp", 0.0):
        assert one.scheme == "bf16"
        if one.messages:
            assert one.messages[-1].endswith("slower at once, and given up: topk.")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that must not change, as copies."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"grad of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state |= {f"mode of {n}": torch.tensor(module.training) for n, module in model.named_modules()}
    return state | {"random": torch.get_rng_state()}


def unchanged(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    ddp.module.norm2.eval()
    loss_of(rank)(ddp).backward()
    before = state_of(ddp)
    scheme = lgc.choose(ddp, loss_of(rank), ["bf16", "lgc-ps:rate=0.02"], link=SLOWEST)
    after = state_of(ddp)
    assert list(before) == list(after)
    assert "grad of module.conv1.weight" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    lgc.attach(ddp, scheme, stand_in(ddp, scheme))  # has no hook yet
    ddp.zero_grad()
    loss_of(rank)(ddp).backward()


def test_the_model_and_the_random_state_are_left_as_they_were(ranks: RankFactory) -> None:
    ranks(2).run(unchanged)


def choose_wrongly(rank: int, world_size: int, wrong: str, everywhere: bool) -> None:
    """Choose with one argument wrong, on the last rank or on all."""
    ddp, loss = build("convolutional"), loss_of(rank)
    arguments: dict[str, Any] = {"candidates": ["bf16"], "make_loss": loss}
    changes: dict[str, dict[str, Any]] = {
        "none": {"candidates": []},
        "text": {"candidates": "bf16"},
        "unknown": {"candidates": ["bf61"]},
        "number": {"candidates": [3]},
        "auto": {"candidates": ["auto"]},
        "roles": {"candidates": [lgc.TopK(roles={"nowhere*": lgc.Role.DENSE})]},
        "roles of an exchange": {"candidates": [lgc.LocalSteps(exchange=lgc.TopK(roles={"nowhere*": lgc.Role.DENSE}))]},
        "fragments": {"candidates": ["local:every=100:fragments=50+quantized"]},
        "link": {"link": "10mbit"},
        "nan": {"make_loss": lambda model: loss(model) * math.nan},
        "detached": {"make_loss": lambda model: loss(model).detach()},
        "other": {"make_loss": lambda model: loss(ddp.module)},
        "vector": {"make_loss": lambda model: model(batch(rank, 0)[0])},
        "candidates differ": {"candidates": ["topk"]},
        "links differ": {"link": SLOWEST},
    }
    if everywhere or rank == world_size - 1:
        arguments |= changes[wrong]
    lgc.choose(ddp, **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("none", r"choose\(candidates=\.\.\.\) must be a sequence of at least one scheme, got \[\]"),
        ("text", r"choose\(candidates=\.\.\.\) must be a sequence of at least one scheme, got 'bf16'"),
        ("unknown", r"choose\(candidates=\.\.\.\): unknown scheme 'bf61'"),
        ("number", r"choose\(candidates=\.\.\.\) must be schemes, or their text forms, got 3"),
        ("auto", r"choose\(candidates=\.\.\.\): there is no scheme 'auto'"),
        ("link", r"choose\(link=\.\.\.\) must be None or a link, such as lgc.Link.parse\(\"10mbit\"\), got '10mbit'"),
        ("nan", r"choose\(make_loss=\.\.\.\) must return a finite loss, got nan"),
        ("detached", r"choose\(make_loss=\.\.\.\) must return a tensor of one number, with a gradient"),
        ("vector", r"choose\(make_loss=\.\.\.\) must return a tensor of one number, with a gradient"),
        ("other", r"choose\(make_loss=\.\.\.\) must call the model that it is given"),
    ],
)
@pytest.mark.grid
@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_wrong_on_one_rank_is_named_on_all(
    ranks: RankFactory, wrong: str, message: str, everywhere: bool
) -> None:
    *others, last = ranks(2).exceptions(choose_wrongly, wrong, everywhere)
    assert isinstance(last, TypeError if wrong in ("number", "link") else ValueError)
    for error in (*others, last):
        assert error is not None
        assert re.search(message, str(error)), error
        assert everywhere or error is last or isinstance(error, RankError)


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"choose\(group=\.\.\.\) must be a process group or None, got 'gloo'"):
        lgc.choose(torch.nn.Linear(2, 2), lambda model: model(torch.ones(2)).sum(), ["bf16"], group="gloo")  # type: ignore[arg-type]


def test_a_candidate_that_the_model_cannot_have_is_named_on_all(ranks: RankFactory) -> None:
    for wrong, named in {
        "roles": "nowhere*",
        "roles of an exchange": "nowhere*",
        "fragments": "LocalSteps(fragments=...) must leave no fragment without a tensor, got 50",
    }.items():
        for error in ranks(2).exceptions(choose_wrongly, wrong, True):
            assert isinstance(error, ValueError)
            assert str(error).startswith("choose(candidates=...): ")
            assert named in str(error)
    for error in ranks(2).exceptions(chosen, "wider", ["powersgd"], SLOWEST):
        assert isinstance(error, ValueError)
        assert "on gloo powersgd needs a model with one bucket" in str(error)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("candidates differ", "choose: the ranks differ in candidates: rank 0: ['bf16'], rank 1: ['topk']."),
        ("links differ", "choose: the ranks differ in link: rank 0: None, rank 1: Link(bandwidth="),
    ],
)
def test_a_difference_between_the_ranks_is_named_on_all(ranks: RankFactory, wrong: str, message: str) -> None:
    for error in ranks(2).exceptions(choose_wrongly, wrong, False):
        assert isinstance(error, RuntimeError)
        assert str(error).startswith(message)
