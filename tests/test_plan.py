"""What a step is predicted to cost, and what is chosen for it."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from click.testing import CliRunner
from ddp_models import batch, build, optimizer_of, parameters, train
from ranks import Ranks
from torch import Tensor
from torch.optim import SGD

import lgc
from lgc.choice.cost import Collective, Link, Profile, SchemeCost, StageCost, choose, predict
from lgc.choice.rehearsal import probe, rehearse
from lgc.comm.transport import Transport
from lgc.schemes import parse_scheme
from lgc_lab.bench.link.results import Cell
from lgc_lab.cli import main
from lgc_lab.plan import command
from lgc_lab.plan.profile import Job, measure
from lgc_lab.recipes import find_recipe

RankFactory = Callable[[int], Ranks]

SLOW = Link(bandwidth=1e6)  # bytes/s
FAST = Link(bandwidth=1e12)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor has the same bits."""
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# --- the cost model, by hand ---


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [  # of 1 MB on 4 ranks at 1 MB/s and 10 ms a message
        ("all-reduce", 6 * 0.01 + 1.5),
        ("all-gather", 3 * 0.01 + 3),
        ("broadcast", 2 * 0.01 + 2),
        ("gather", 0.01 + 3),
        ("relay", 2.75 * 0.01 + 2.75),
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
    assert choose(predict(of, FAST)).scheme == "dense"
    dense, topk = predict(of, SLOW)
    assert dense.step == pytest.approx(1 + 10)
    assert topk.step == pytest.approx(1 + 0.5 + 0.01)
    assert (topk.compute, topk.compression, topk.communication) == pytest.approx((1, 0.5, 0.01))
    assert topk.speedup == pytest.approx(11 / 1.51)
    assert topk.sent_bytes == 10**4
    assert choose([dense, topk]) == topk


def test_of_equals_the_one_that_would_be_fastest_on_half_the_link_is_chosen() -> None:
    of = profile(most=0.5, less=0.506)  # 1.51 and 1.511 s; on half the link 1.52 and 1.516 s
    assert choose(predict(of, SLOW)).scheme == "less"
    assert choose(predict(of, SLOW), tolerance=0.0001).scheme == "most"
    of = profile(most=0.5, less=0.52)  # 1.51 and 1.525 s; on half the link 1.52 and 1.53 s
    assert choose(predict(of, SLOW)).scheme == "most"


def test_half_the_link_takes_no_longer_for_what_waits_for_latency() -> None:
    waiting = SchemeCost("waits", [StageCost("compressed", None, 0.5, [Collective("all-gather", 1)] * 8)])  # 1.58 s
    moving = SchemeCost("moves", [StageCost("compressed", None, 0.5, [Collective("all-reduce", 5 * 10**4)])])  # 1.57 s
    of = profile()
    of.arms.extend([moving, waiting])
    link = SLOW._replace(latency=0.01)
    assert [round(one.step_at_half - one.step, 3) for one in predict(of, link)[1:]] == [0.05, 0.0]
    assert choose(predict(of, link)).scheme == "waits"


def test_of_equals_one_that_compresses_nothing_is_chosen_before_all() -> None:
    of = profile(less=0.0)
    of.arms.insert(1, SchemeCost("bf16", [StageCost("dense", None, 0.0, [Collective("all-reduce", 10**7 // 2)])]))
    assert choose(predict(of, Link(2e8))).scheme == "dense"  # 1.05, 1.025 and 1.0 s
    assert choose(predict(of, Link(1e8))).scheme == "bf16"  # 1.1, 1.05 and 1.0 s
    assert choose(predict(of, Link(5e7))).scheme == "less"  # 1.2, 1.1 and 1.0 s


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
    _, won_early = predict(profile()._replace(arms=[*profile().arms, SchemeCost("slow start", stages)]), SLOW)
    assert won_early.pays_from == 10 + math.ceil(10 * (14 - dense.step) / (dense.step - 1)) < 20


# --- rehearsals ---

EXACT: dict[str, Any] = {  # the length of what they send does not depend on what it is
    "topk": lgc.TopK.paper(rate=0.02, warmup_steps=4),
    "dgc-server": lgc.DGC.paper(rate=0.02, server=True),
    "scalecom": lgc.ScaleCom.paper(rate=0.02),
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
    arm = rehearse(scheme, gradients, transport, of, early=True)
    assert arm is not None
    same = all(torch.equal(gradients[name], value) for name, value in gradients_of(rank).items())
    contents = transport.wire.phases["setup"].contents
    return Rehearsed(
        [(stage.phase, stage.steps) for stage in arm.stages],
        [[(one.kind, one.size) for one in stage.collectives] for stage in arm.stages],
        [stage.sent_bytes(of) for stage in arm.stages],
        sum(size for content, size in contents.items() if content not in ("plan", "weights")),
        contents["preamble"],
        same and torch.equal(random, torch.get_rng_state()),
    )


@pytest.mark.parametrize("scheme", EXACT)
def test_one_rank_sends_what_all_would(ranks: RankFactory, scheme: str) -> None:
    (alone,) = ranks(1).run(rehearsed, EXACT[scheme], 4)
    halves = ranks(2).run(rehearsed, EXACT[scheme], 4)
    everyone = ranks(4).run(rehearsed, EXACT[scheme], 4)
    for other in (*halves, *everyone):
        assert other.stages == alone.stages
        assert other.sent == alone.sent
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


class Noting(Transport):
    """Notes whose messages the server has relayed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.sources: set[int] = set()

    def relay(self, tensor: Tensor, content: str, *, source: int) -> Tensor:
        self.sources.add(source)
        return super().relay(tensor, content, source=source)


def led(rank: int, world_size: int, of: int) -> set[int]:
    assert dist.group.WORLD is not None
    transport = Noting(dist.group.WORLD)
    rehearse(EXACT["lgc-ps"], gradients_of(rank), transport, of, early=False)
    return transport.sources


def test_the_ranks_that_are_there_lead_in_turn(ranks: RankFactory) -> None:
    assert ranks(2).run(led, 4) == [{0, 1}, {0, 1}]


def beside_work(rank: int, world_size: int, dense_work: Callable[[], object] | None) -> tuple[float, int]:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.3)

    scheme, gradients = EXACT["topk"], gradients_of(rank)
    arm = rehearse(scheme, gradients, world(), world_size, early=False, work=work, dense_work=dense_work)
    assert arm is not None
    return arm.stages[-1].seconds, calls


def test_what_a_rank_does_besides_is_taken_off(ranks: RankFactory) -> None:
    for seconds, calls in ranks(2).run(beside_work, None):
        assert calls >= 2 * 4
        assert seconds < 0.3


def test_what_is_taken_off_is_what_dense_does_besides(ranks: RankFactory) -> None:
    for seconds, _ in ranks(2).run(beside_work, partial(time.sleep, 0.01)):
        assert seconds > 0.15


def measured(rank: int, world_size: int, scheme: Any, of: int) -> list[list[tuple[str, int]]]:
    def job(device: torch.device) -> Job:
        ddp = build("convolutional")
        x, y = batch(rank, 0)
        return Job(ddp.module, lambda model: F.cross_entropy(model(x), y), lambda _: SGD(ddp.parameters(), lr=0.0))

    dense, arm = measure(job, [scheme], of, world(), torch.device("cpu")).arms
    assert dense.scheme == "dense"
    return [[(one.kind, one.size) for one in stage.collectives] for stage in arm.stages]


@pytest.mark.parametrize("scheme", ["scalecom", "lgc-ring"])
def test_a_model_is_measured_as_it_is_attached_to(ranks: RankFactory, scheme: str) -> None:
    (alone,) = ranks(1).run(rehearsed, EXACT[scheme], 4)
    for sent in ranks(2).run(measured, EXACT[scheme], 4):
        assert sent == alone.sent  # whatever the order of DDP's buckets


def probed(rank: int, world_size: int) -> Link:
    return probe(world(), torch.device("cpu"))


def test_all_ranks_measure_the_same_link(ranks: RankFactory) -> None:
    first, *others = ranks(3).run(probed)
    assert others == [first, first]
    assert 1e6 < first.bandwidth < 1e12
    assert 0 < first.latency < 0.1


# --- lgc plan ---


def run_plan(*arguments: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-m", "lgc", "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plan_of_a_recipe() -> None:
    printed = run_plan(
        *("--recipe", "digits", "--workers", "2", "--ranks-per-machine", "2", "--bandwidth", "1mbit"),
        *("--bandwidth", "1000gbit", "--schemes", "dense,bf16,powersgd:rank=2,dgc,lgc-ps", "--json"),
    )
    slow, fast = json.loads(printed)
    assert [row["scheme"].split(":")[0] for row in slow["schemes"]] == ["dense", "bf16", "powersgd", "dgc", "lgc-ps"]
    dense, bf16, powersgd, dgc, learned = slow["schemes"]
    assert dense["sent_bytes"] == 4 * 973_930
    assert bf16["sent_bytes"] == 2 * 973_930
    assert dense["step_s"] > 8 * 4 * 973_930 / 1e6
    for row in slow["schemes"]:
        parts = row["compute_s"] + row["compression_s"] + row["communication_s"]
        assert row["step_s"] == pytest.approx(parts)
    assert powersgd["sent_bytes"] < dense["sent_bytes"] / 30
    assert dgc["sent_bytes"] < dense["sent_bytes"] / 300
    assert dgc["speedup"] > 3
    assert [stage["phase"] for stage in learned["early"]] == ["dense", *["warmup"] * 4, "train"]
    assert slow["recommended"] not in ("dense", "bf16")
    assert slow["attach"] == f'handle = lgc.attach(model, "{slow["recommended"]}", optimizer)'
    assert fast["schemes"][0]["communication_s"] < dense["communication_s"] / 3


JOB = """
import torch
from torch.nn.functional import cross_entropy

def job():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(64, 10), torch.randn(16, 64), torch.randint(10, (16,))
    return model, lambda model: cross_entropy(model(x), y)
"""


def test_plan_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(JOB)
    arguments = ("--model", "mine:job", "--workers", "8", "--latency", "5ms", "--schemes", "dense,topk")
    printed = run_plan(*arguments, "--bandwidth", "10gbit", cwd=tmp_path)
    assert (
        "8 ranks, 10gbit: 9.36e+03 Mbit/s of payload, 5 ms; what the latency adds is predicted, not validated"
        in printed
    )
    assert "Dense is best here" in printed or "topk is best here" in printed
    assert "handle = lgc.attach" not in printed or 'lgc.attach(model, "topk", optimizer)' in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --recipe and --model must be given"),
        (["--recipe", "digits", "--model", "a:b"], "one of --recipe and --model must be given"),
        (
            ["--model", "nothing_of_this_name:job"],
            "model nothing_of_this_name:job: No module named 'nothing_of_this_name'; looked in ",
        ),
        (["--model", "json"], "model must be MODULE:NAME, as in mine:NAME for NAME of mine.py, got 'json'"),
        (["--recipe", "digits", "--bandwidth", "slow"], "bandwidth must be a number"),
        (["--recipe", "digits", "--schemes", "best"], "unknown scheme 'best'"),
        (["--recipe", "digits", "--schemes", "dense,auto"], "--schemes must be what auto could choose"),
        (["--check", "."], "results.json is not a measurement"),
        (["--recipe", "digits", "--workers", "4", "--ranks-per-machine", "3"], "must divide --workers 4"),
        (["--model", "json:dumps", "--bf16"], "are for recipes"),
    ],
)
def test_plan_refuses(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_check_shows_how_far_off_the_predictions_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = profile(dgc=0.5)
    scheme = str(parse_scheme("dgc", find_recipe("digits").scheme_defaults))
    renamed = of._replace(arms=[of.arms[0], of.arms[1]._replace(scheme=scheme)])
    monkeypatch.setattr(command, "_measure_here", lambda question, ranks: renamed)
    seconds = {
        "10mbit": {"compute": 1.0, "dense": 9.0, "dgc": 2.0},
        "unshaped": {"compute": 1.0, "dense": 1.1, "dgc": 1.0},
    }
    cells = [
        [rate, 0, arm, "dense", [[1.5 * step, step / 2]], None, None, [1, 1], [1, 1], None, None, None, None]
        for rate, steps in seconds.items()
        for arm, step in steps.items()
    ]
    settings = {"recipe": "digits", "data": None, "batch_size": None, "world_size": 2}
    content = {
        "finished": True,
        "configuration": settings,
        "cells": [dict(zip(Cell._fields, cell, strict=True)) for cell in cells],
    }
    (tmp_path / "results.json").write_text(json.dumps(content))
    printed = CliRunner().invoke(main, ["plan", "--check", str(tmp_path)]).output
    transfer = 10**7 / (1.25e6 * 1448 / 1547)
    assert re.search(
        rf"^dense +{1e3 * (1 + transfer):,.1f} ms +9,000\.0 ms +\+{100 * ((1 + transfer) / 9 - 1):.1f} %$",
        printed,
        re.MULTILINE,
    )
    assert re.search(r"^dgc +1,508\.. ms +2,000\.0 ms +-24\.. %$", printed, re.MULTILINE)
    assert "advised dgc; fastest when measured dgc; following the advice loses 0.0 %" in printed
    assert "advised dense; fastest when measured dgc; following the advice loses 10.0 %" in printed


# --- scheme="auto" ---

CANDIDATES = (lgc.DGC(rate=0.02, momentum=0.0, warmup_steps=4), lgc.ScaleCom(rate=0.02, momentum=0.0))
SLOWEST = (lgc.LGCServer(momentum=0.0),)


class Chosen(NamedTuple):
    scheme: str
    phases: list[str]
    parameters: dict[str, Tensor]
    messages: list[str]
    state: dict[str, Any]
    setup_bytes: int


def train_auto(
    rank: int, world_size: int, scheme: Any, steps: int, state: Any = None, momentum: float = 0.9, poison: int = -1
) -> Chosen:
    """Train with auto; with `state`, only from its step on. At step `poison` one rank's gradient is NaN."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lgc").addHandler(handler)
    logging.getLogger("lgc").setLevel(logging.INFO)
    ddp = build("wide", bucket_cap_mb=1)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=momentum)
    handle = lgc.attach(ddp, scheme, optimizer, on_nonfinite="propagate")
    if state is not None:
        ddp.module.load_state_dict(state[rank]["model"])
        optimizer.load_state_dict(state[rank]["optimizer"])
        handle.load_state_dict(state[rank]["handle"])
    phases = []
    for step in range(handle.step, steps):
        x, y = batch(rank, step)
        if step == poison and rank == 0:
            x = x * math.nan
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        if step != poison:
            optimizer.step()
        phases.append(str(handle.phase))
    logging.getLogger("lgc").removeHandler(handler)
    everything = {
        "handle": handle.state_dict(),
        "model": ddp.module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    setup = handle.wire.phases["setup"].sent_bytes
    return Chosen(str(handle.scheme), phases, parameters(ddp), messages, everything, setup)


def names_at_the_choice(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    ddp = build("wide", bucket_cap_mb=1)
    handle = lgc.attach(ddp, lgc.Auto(after=5))
    seen: list[str] = []
    choice: Any = handle._choice
    choice.choose = lambda gradients: seen.extend(gradients)
    for step in range(6):
        x, y = batch(rank, step)
        ddp.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
    return seen, list(parameters(ddp))


def test_the_choice_sees_the_models_order(ranks: RankFactory) -> None:
    for seen, names in ranks(2).run(names_at_the_choice):
        assert seen == names


def test_auto_compresses_on_a_slow_link(ranks: RankFactory) -> None:
    scheme = lgc.Auto(after=6, bandwidth="1mbit", candidates=CANDIDATES)
    first, second, third = ranks(3).run(train_auto, scheme, 14)
    assert first.scheme in map(str, CANDIDATES)
    assert first.scheme == second.scheme == third.scheme
    assert first.phases == ["dense"] * 6 + first.phases[6:]
    assert set(first.phases[6:10]) == {"warmup"}  # its schedule begins with the choice
    assert_same(first.parameters, second.parameters)
    (message,) = first.messages
    assert message.startswith(f"auto: {first.scheme} from here on. A dense step takes ")
    assert "per step: dense " in message
    assert second.messages == []


def test_auto_stays_dense_where_compression_loses_and_then_is_plain_ddp(ranks: RankFactory) -> None:
    plain = ranks(2).run(train, "wide", None, 12, {"bucket_cap_mb": 1})
    chosen = ranks(2).run(train_auto, lgc.Auto(after=6, candidates=SLOWEST), 12)
    for one, other in zip(chosen, plain, strict=True):
        assert one.scheme == "dense"
        assert one.phases == ["dense"] * 12
        assert_same(one.parameters, other.parameters)
    (message,) = chosen[0].messages
    assert message.startswith("auto: dense from here on. ")


def test_auto_takes_16_bits_if_that_is_all_there_is_to_win(ranks: RankFactory) -> None:
    chosen = ranks(2).run(train_auto, lgc.Auto(after=6, bandwidth="1mbit", candidates=(lgc.BF16(),)), 9)
    bf16 = ranks(2).run(train, "wide", lgc.BF16(), 9, {"bucket_cap_mb": 1})
    assert [one.scheme for one in chosen] == ["bf16", "bf16"]
    assert_same(chosen[0].parameters, chosen[1].parameters)
    assert chosen[0].state["handle"]["step"] == 9
    for name, parameter in bf16[0].parameters.items():
        torch.testing.assert_close(chosen[0].parameters[name], parameter, rtol=0.02, atol=0.02)


def test_auto_alone_is_dense(ranks: RankFactory) -> None:
    (chosen,) = ranks(1).run(train_auto, lgc.Auto(after=5, bandwidth="1kbit"), 7)
    assert chosen.scheme == "dense"
    (message,) = chosen.messages
    assert message.endswith("; no candidate can win that back.")


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_keeps_the_choice(ranks: RankFactory, stop: int) -> None:
    scheme = lgc.Auto(after=6, bandwidth="1mbit", candidates=CANDIDATES[:1])
    straight = ranks(2).run(train_auto, scheme, 14)
    states = [one.state for one in ranks(2).run(train_auto, scheme, stop)]
    resumed = ranks(2).run(train_auto, scheme, 14, states)
    assert [one.scheme for one in resumed] == [one.scheme for one in straight]
    if stop == 9:
        assert resumed[0].messages == []  # nothing was decided anew
        assert resumed[0].phases == straight[0].phases[9:]
        assert_same(resumed[0].parameters, straight[0].parameters)
        assert resumed[0].state["handle"]["chosen_at"] == 6
    else:
        assert resumed[0].state["handle"]["chosen_at"] == 10  # six steps after it was resumed


def load_wrong(rank: int, world_size: int, scheme: Any, state: dict[str, Any], changes: dict[str, Any]) -> None:
    ddp = build("wide")
    lgc.attach(ddp, scheme, optimizer_of(ddp, None)).load_state_dict(state | changes)


def test_a_state_with_another_choice_is_refused(ranks: RankFactory) -> None:
    scheme = lgc.Auto(after=6, bandwidth="1mbit", candidates=CANDIDATES[:1])
    (one,) = ranks(1).run(train_auto, scheme, 3)
    for of, changes, message in [
        (scheme, {"chosen": "topk"}, "chosen is 'topk', here it may be dense, dgc:rate=0.02:momentum=0.0"),
        (scheme, {"chosen_at": -1}, "chosen_at must be an integer of at least 0, got -1"),
        (lgc.Dense(), {"scheme": "dense", "chosen": "bf16"}, "chosen is 'bf16', dense has nothing to choose"),
    ]:
        (error,) = ranks(1).exceptions(load_wrong, of, one.state["handle"], changes)
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_a_candidate_that_the_model_cannot_have_is_refused_at_once(ranks: RankFactory) -> None:
    candidate = lgc.DGC(momentum=0.0, roles={"nowhere*": lgc.Role.DENSE})
    (error,) = ranks(1).exceptions(train_auto, lgc.Auto(candidates=(candidate,)), 1)
    assert isinstance(error, ValueError)
    assert "nowhere*" in str(error)


def attach_unlike(rank: int, world_size: int) -> None:
    roles = {"nowhere*": lgc.Role.DENSE} if rank == 0 else {}
    lgc.attach(build("wide"), lgc.Auto(candidates=(lgc.DGC(momentum=0.0, roles=roles),)))


def test_a_difference_is_named_on_every_rank_before_what_one_of_them_cannot_have(ranks: RankFactory) -> None:
    for error in ranks(2).exceptions(attach_unlike):
        assert isinstance(error, RuntimeError)
        assert "the ranks differ in auto.candidates" in str(error)


def test_a_gradient_that_is_not_finite_puts_the_choice_off(ranks: RankFactory) -> None:
    scheme = lgc.Auto(after=6, bandwidth="1mbit", candidates=CANDIDATES[:1])
    chosen = ranks(2).run(train_auto, scheme, 9, None, 0.0, 6)
    for one in chosen:
        assert one.scheme == str(CANDIDATES[0])
        assert one.state["handle"]["chosen_at"] == 7
        assert one.phases == ["dense"] * 7 + ["warmup"] * 2


def test_auto_in_text_takes_a_recipes_arguments() -> None:
    scheme = lgc.parse_scheme("auto:after=7:bandwidth=10mbit:latency=1ms", {"rate": 0.05, "momentum": 0.9})
    assert isinstance(scheme, lgc.Auto)
    assert (scheme.after, scheme.bandwidth, scheme.latency) == (7, "10mbit", "1ms")
    assert [str(one) for one in scheme.candidates[:2]] == ["bf16", "dgc:rate=0.05:momentum=0.0"]
    assert str(lgc.Auto()) == "auto"
    assert lgc.parse_scheme("auto") == lgc.Auto()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": 4}, r"Auto\(after=\.\.\.\) must be at least 5, got 4\."),
        ({"bandwidth": "fast"}, r"bandwidth must be a number with kbit, mbit, gbit, as in 100mbit, got 'fast'\."),
        ({"candidates": (lgc.DGC(),)}, r"sparse scheme with momentum=0, since the optimizer keeps its own; got dgc\."),
        ({"candidates": (lgc.TopK(second_moment=0.9),)}, r"its own; got topk:second_moment=0.9\."),
        ({"candidates": (lgc.PowerSGD(),)}, r"Auto\(candidates=\.\.\.\) must be able to take over from dense"),
    ],
)
def test_auto_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lgc.Auto(**arguments)


def test_a_run_of_a_recipe_goes_on_with_the_choice(tmp_path: Path) -> None:
    arguments = [
        "--recipe",
        "digits",
        "--scheme",
        "auto:after=5:bandwidth=1mbit",
        "--workers",
        "2",
        "--batch-size",
        "4",
    ]
    command = [sys.executable, "-m", "lgc", "train", *arguments, "--steps", "8", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scheme"] == "auto"
    assert summary["chosen"].split(":")[0] in ("dgc", "scalecom", "lgc-ring", "lgc-ps")
    assert f"auto: {summary['chosen']} from here on. " in done.stderr
    phases = [json.loads(line).get("phase") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert phases[:5] == ["dense"] * 5
