"""Ranks that come and go: processes that are killed, stopped and cut off, of which most tests are exhaustive."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("torchft", reason="torchft is not installed (lgc[elastic]; it has wheels for Linux on x86-64)")

from elastic_ranks import (
    EVERY,
    LIMIT_S,
    Process,
    breaks,
    cannot_connect,
    crew,
    dies_in_round,
    hold_store,
    loses_sight,
    run_script,
    serve_lighthouse,
    shows_sockets,
    trains_apart,
    wait_for,
)
from torch import nn

import lgc
import lgc.elastic
from lgc.comm.transport import RankError
from lgc.elastic.lighthouse import MOST_DRAWN, Member, is_told
from lgc.elastic.transport import LostError
from lgc_lab.cli import main


def are_alike(results: list[dict[str, Any]]) -> bool:
    """Whether all ranks have ended with the same, bit for bit."""
    return len({(each["digest"], each["rounds"], each["step"], each["rate"]) for each in results}) == 1


def told(rank: Process, key: str) -> list[dict[str, Any]]:
    """What a rank has told that has something of this name."""
    return [each for each in rank.told if isinstance(each, dict) and key in each]


# --- ranks that go and come ---


def test_ranks_go_on_without_one_that_is_killed_and_take_in_another() -> None:
    with crew(3, least=2) as ranks:
        ranks.wait_for_ranks(3)
        ranks.kill(ranks.ranks[1])
        ranks.wait_for_ranks(2)
        newcomer = ranks.start()
        ranks.wait_for_ranks(3)
        results = ranks.end()
        assert len(results) == 3
        assert are_alike(results)
        entering, first = told(newcomer, "moved")[0], told(newcomer, "step")[0]
        assert entering["moved"] == entering["owed"] == first["owed"] == 0.0
        met = [each for rank in ranks.ranks[:2] for each in told(rank, "step") if each["rounds"] == first["rounds"]]
        assert (first["digest"], first["step"], first["rate"]) in {
            (each["digest"], each["step"], each["rate"]) for each in met
        }


@pytest.mark.exhaustive
def test_a_rank_that_was_stopped_takes_the_state_of_the_others_and_still_owes_what_it_did() -> None:
    with crew(3, least=2) as ranks:
        ranks.wait_for_ranks(3)
        ranks.ranks[2].signal(signal.SIGSTOP)
        stopped = ranks.ranks.pop()
        ranks.wait_for_ranks(2)
        stopped.signal(signal.SIGCONT)
        ranks.ranks.append(stopped)
        ranks.wait_for_ranks(3)
        assert are_alike(ranks.end())


# --- rounds that fail ---


def test_a_round_that_is_not_committed_is_tried_again_with_the_same_work_and_residual() -> None:
    with crew(2, least=2) as ranks:
        dying = ranks.start(fault=dies_in_round)
        number = dying.wait_for(lambda each: "dies" in each)["dies"]
        ranks.ranks.remove(dying)
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())
        for rank in ranks.ranks:
            tries = [each for each in told(rank, "moved") if each["round"] == number]
            assert len(tries) > 1
            assert all(each == tries[0] for each in tries)
            assert tries[0]["owed"] > 0


def test_a_rank_whose_payload_the_others_have_counted_owes_what_is_left_of_it() -> None:
    with crew(2, least=2) as ranks:
        lost = ranks.start(fault=loses_sight)
        cut_off = lost.wait_for(lambda each: "after" in each)
        first = lost.wait_for(lambda each: each.get("rounds", 0) > cut_off["in"])
        assert first["owed"] == cut_off["after"] > 0
        assert are_alike(ranks.end())


@pytest.mark.exhaustive
def test_of_two_groups_that_have_trained_apart_the_smaller_one_steps_back() -> None:
    with crew(2, least=2) as ranks:
        apart = ranks.start(fault=trains_apart)
        rounds = apart.wait_for(lambda each: "apart" in each)["apart"]
        ranks.wait_for_ranks(3)
        assert are_alike(ranks.end())
        own = {each["rounds"]: each["digest"] for each in told(apart, "digest")}
        others = {each["rounds"]: each["digest"] for each in told(ranks.ranks[0], "digest")}
        assert own[rounds] != others[rounds]
        assert own[max(own)] == others[max(own)]


@pytest.mark.exhaustive
def test_the_last_round_ends_alike_for_a_rank_that_lost_sight_of_the_others_in_it() -> None:
    with crew(2, least=2) as ranks:
        ranks.start(fault=loses_sight, last=True)
        ranks.wait_for_ranks(3)
        results = ranks.end()
        assert told(ranks.ranks[2], "after")
        assert len({(each["digest"], each["rounds"]) for each in results}) == 1


@pytest.mark.exhaustive
def test_a_rank_whose_weights_are_not_finite_leaves_alone() -> None:
    with crew(2, least=2) as ranks:
        broken = ranks.start(fault=breaks)
        with pytest.raises(FloatingPointError, match=r"0\.weight is not finite on this rank"):
            broken.result()
        ranks.ranks.remove(broken)
        assert are_alike(ranks.end())


@pytest.mark.exhaustive
def test_a_rank_that_was_given_another_scheme_learns_what_differs_and_the_others_go_on() -> None:
    with crew(2, least=2) as ranks:
        ranks.wait_for_ranks(2)
        other = ranks.start(scheme=f"local:every={EVERY}:start_steps=0+quantized:bits=3")
        message = r"differ in local\.exchange\.bits: rank .*: \d, rank .*: \d\. The others go on without this one"
        with pytest.raises(RuntimeError, match=message):
            other.result()
        ranks.ranks.remove(other)
        assert are_alike(ranks.end())


def named(name: str, **given: Any) -> dict[str, Any]:
    return {"attach": {"ranks": 3, "min_ranks": 2, "name": name}, **given}


def test_of_two_different_models_that_meet_first_each_ends_with_what_differs_by_name() -> None:
    with crew(0, least=2) as ranks:
        for name, width in {"wide": 16, "narrow": 8}.items():
            ranks.start(**named(name, width=width))
        for rank in ranks.ranks:
            with pytest.raises(RuntimeError, match=r"so each of them ends; start those again that are right") as raised:
                rank.result()
            assert "differ in parameter 0.weight" in str(raised.value)
            assert re.search(r"rank wide:[-0-9a-f]+: \[16, 6, 'torch.float32'\]", str(raised.value))
            assert re.search(r"rank narrow:[-0-9a-f]+: \[8, 6, 'torch.float32'\]", str(raised.value))


def test_of_two_that_carry_different_things_by_one_name_each_ends_with_what_they_are() -> None:
    with crew(0, least=2) as ranks:
        for name, carries in {"one": True, "other": False}.items():
            ranks.start(**named(name, carries_sampler=carries))
        for rank in ranks.ranks:
            with pytest.raises(RuntimeError, match=r"so each of them ends") as raised:
                rank.result()
            assert "differ in carried" in str(raised.value)
            assert "sampler: Sampler" in str(raised.value)
            assert "sampler: LambdaLR" in str(raised.value)


@pytest.mark.exhaustive
def test_of_three_that_meet_first_the_two_of_one_model_go_on() -> None:
    with crew(0, least=3) as ranks:
        for width in (16, 16, 8):
            ranks.start(attach={"ranks": 3, "min_ranks": 2}, width=width)
        with pytest.raises(RuntimeError, match=r"The others go on without this one"):
            ranks.ranks.pop().result()
        ranks.lighthouse.kill()
        ranks.lighthouse = Process(serve_lighthouse, 2, ranks.address)
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())


@pytest.mark.exhaustive
def test_a_newcomer_that_the_others_cannot_reach_leaves_before_they_do() -> None:
    attempts = {"ranks": 2, "connect_timeout": 1.0, "attempts": 4}
    with crew(2, least=2, attach=attempts) as ranks:
        ranks.wait_for_ranks(2)
        newcomer = ranks.start(fault=cannot_connect)
        message = r"round 0 has failed 2 times .* could not connect .* \(no route to host\).* at 127\.0\.0\.1:\d+"
        with pytest.raises(RankError, match=message):
            newcomer.result()
        ranks.ranks.remove(newcomer)
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())


# --- the lighthouse ---


@pytest.mark.exhaustive
def test_ranks_go_on_by_themselves_when_the_lighthouse_is_back_in_time() -> None:
    with crew(2, least=2) as ranks:
        ranks.wait_for_ranks(2)
        ranks.lighthouse.kill()
        ranks.lighthouse = Process(serve_lighthouse, 2, ranks.address)
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())


def test_without_a_lighthouse_ranks_say_so_once_their_timeout_has_passed() -> None:
    with crew(2, least=2, attach={"ranks": 2, "quorum_timeout": 5.0}) as ranks:
        ranks.wait_for_ranks(2)
        ranks.lighthouse.kill()
        for rank in ranks.ranks:
            with pytest.raises(lgc.elastic.NoQuorumError, match=r"lighthouse at .* has not answered"):
                rank.result()


def test_a_rank_waits_for_a_lighthouse_no_longer_than_for_a_round() -> None:
    handle = attached(nn.Linear(2, 2), lgc.LocalSteps(start_steps=0), quorum_timeout=1.0, connect_timeout=LIMIT_S)
    started = time.monotonic()
    with pytest.raises(lgc.elastic.NoQuorumError, match=r"lighthouse at .* has not answered"):
        handle._caller._round(handle._caller._fragment)
    assert time.monotonic() - started < LIMIT_S / 2


def test_a_rank_waits_for_one_that_has_met_it_and_was_stopped_no_longer_than_its_timeout() -> None:
    handle = attached(nn.Linear(2, 2), lgc.LocalSteps(start_steps=0), connect_timeout=1.0)
    holder = Process(hold_store)
    try:
        port = holder.wait_for(lambda each: isinstance(each, int))
        holder.signal(signal.SIGSTOP)
        names = ["stopped", handle.transport.lighthouse.name]
        handle.transport.ranks = [Member(name, f"127.0.0.1:{port}", 0, {}) for name in names]
        with pytest.raises(LostError, match=rf"could not connect .*stopped at 127\.0\.0\.1:{port}"):
            handle.transport._connect("a meeting")
    finally:
        holder.kill()


@pytest.mark.exhaustive
def test_too_few_ranks_make_no_round_and_say_so() -> None:
    with crew(2, least=2, attach={"ranks": 2, "quorum_timeout": 3.0}) as ranks:
        ranks.wait_for_ranks(2)
        ranks.kill(ranks.ranks[0])
        with pytest.raises(lgc.elastic.NoQuorumError, match=r"fewer than min_ranks=2 ranks have met within 3 s"):
            ranks.ranks[0].result()


@pytest.mark.exhaustive
def test_a_run_whose_ranks_are_all_gone_goes_on_from_their_checkpoints() -> None:
    with crew(2, least=2) as ranks:
        ranks.wait_for_ranks(2)
        ended = ranks.end()
        assert are_alike(ended)
        states = [told(rank, "state")[-1]["state"] for rank in ranks.ranks]
    with crew(0, least=2, attach={"ranks": 2}) as ranks:
        for state in states:
            ranks.start(state=state)
        first, second = (rank.wait_for(lambda each: "rounds" in each) for rank in ranks.ranks)
        assert (first["step"], first["rounds"]) == (ended[0]["step"] + 1, ended[0]["rounds"] + 1)
        assert not set(first["places"]) & set(second["places"])  # each goes on with its own share of the data
        assert first["taken"] == second["taken"] == ended[0]["taken"] + len(first["places"] + second["places"])
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())


@pytest.mark.exhaustive
def test_top_k_of_weights_beside_dense_biases_on_ranks_that_come_and_go() -> None:
    with crew(2, least=2, scheme=f"local:every={EVERY}:start_steps=0+topk:rate=0.2:small=dense") as ranks:
        ranks.wait_for_ranks(2)
        ranks.start()
        ranks.wait_for_ranks(3)
        ranks.kill(ranks.ranks[0])
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())


# --- what ranks take from each other ---


@pytest.mark.exhaustive
@pytest.mark.parametrize(("address", "socket"), [("127.0.0.1", "0100007F"), ("::1", 24 * "0" + "01000000")])
def test_a_rank_listens_on_its_address_alone(address: str, socket: str) -> None:
    alone = {"ranks": 2, "min_ranks": 1, "may_split": True, "address": address}
    with crew(2, least=1, attach=alone, fault=shows_sockets) as ranks:
        assert ranks.ranks[0].wait_for(lambda each: "listens" in each)["listens"] == {socket}


@pytest.fixture
def alone() -> lgc.elastic.ElasticHandle:
    """A rank that has met nobody yet."""
    model = nn.Linear(2, 2)
    return attached(model, lgc.LocalSteps(every=EVERY, start_steps=0))


def attached(model: nn.Module, scheme: Any, **given: Any) -> lgc.elastic.ElasticHandle:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments: dict[str, Any] = {"lighthouse": "127.0.0.1:1", "ranks": 3} | given
    return lgc.elastic.attach(model, scheme, optimizer, **arguments)


@pytest.mark.parametrize(
    "harm", [lambda state: b"no state", lambda state: state[:-1], lambda state: state.replace(b"F32", b"F16")]
)
def test_a_state_that_does_not_fit_is_refused(alone: lgc.elastic.ElasticHandle, harm: Callable[[bytes], bytes]) -> None:
    rounds = alone._caller
    state = rounds.shared_state()
    rounds.heal(state)
    with pytest.raises(RankError, match="the state that another rank has sent does not fit this one"):
        rounds.heal(harm(state))


def test_a_state_of_all_ranks_together_is_refused(alone: lgc.elastic.ElasticHandle) -> None:
    with pytest.raises(ValueError, match="each saves"):
        lgc.checkpoint.distributed_state(alone)


# --- arguments ---


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("dgc", r"attach\(scheme=\.\.\.\) must be LocalSteps on ranks that come and go"),
        ("local:start_steps=0+dense", r"must be Quantized or TopK on ranks that come and go, not Dense"),
        ("local:start_steps=0+scalecom", "not ScaleCom, whose indices all ranks must have alike"),
        (
            "local:start_steps=0+quantized:reduction=two_stage",
            r"Quantized\(reduction='two_stage'\) has each rank serve",
        ),
        ("local:start_steps=0+topk:reduction=two_stage", r"TopK\(reduction='two_stage'\) has each rank serve"),
        ("local:start_steps=0+topk:values=recentsign", r"TopK\(values=.*\) codes by what each rank has sent before"),
        ("local:start_steps=0:overlap=True", r"LocalSteps\(overlap=\.\.\.\) must be False .* got True"),
        ("local:start_steps=0:fragments=2", r"LocalSteps\(fragments=\.\.\.\) must be 1 .* got 2"),
        ("local:start_steps=0:second_moments=all", r"LocalSteps\(second_moments=\.\.\.\) must be 'own' .* got 'all'"),
        ("local", r"LocalSteps\(start_steps=\.\.\.\) must be 0 .* got 300"),
        ("local:start_steps=0:every=30s", r"LocalSteps\(every=\.\.\.\) must be a number of steps"),
    ],
)
def test_what_is_not_done_on_ranks_that_come_and_go_is_refused_by_name(scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(nn.Linear(2, 2), scheme)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"min_ranks": 1},
            r"attach\(min_ranks=\.\.\.\) must be at least 2, more than half of ranks=3, got 1",
        ),
        ({"min_ranks": 4}, r"attach\(min_ranks=\.\.\.\) must be an integer from 1 to ranks=3, got 4"),
        ({"ranks": 0}, r"attach\(ranks=\.\.\.\) must be an integer of at least 1, got 0"),
        ({"quorum_timeout": 0}, r"attach\(quorum_timeout=\.\.\.\) must be 0.001 to 1e\+06 seconds, got 0"),
        ({"lighthouse": "10.0.0.1"}, r"attach\(lighthouse=\.\.\.\) must be host:port, such as .*, got '10.0.0.1'"),
        ({"address": "0.0.0.0"}, r"attach\(address=\.\.\.\) must be an address of this machine .* every address"),
        ({"address": "::"}, r"attach\(address=\.\.\.\) must be an address of this machine .* every address"),
        ({"address": ""}, r"attach\(address=\.\.\.\) must be an address of this machine .* got ''"),
        ({"address": "198.51.100.7"}, r"attach\(address=\.\.\.\) must be an address of this machine .*Cannot assign"),
        ({"address": "nobody.invalid"}, r"attach\(address=\.\.\.\) must be an address of this machine .* got 'nobody"),
        ({"port": 2**16}, r"attach\(port=\.\.\.\) must be an integer of 0 to 65535, got 65536"),
        ({"attempts": 0}, r"attach\(attempts=\.\.\.\) must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(nn.Linear(2, 2), lgc.LocalSteps(start_steps=0), **given)


@pytest.mark.parametrize("carried", [[1], {"place": 5}, {5: nn.Linear(1, 1)}])
def test_what_is_carried_is_named_and_has_a_state(carried: Any) -> None:
    with pytest.raises(TypeError, match=r"attach\(carried=\.\.\.\) must be a dict of names and of objects with"):
        attached(nn.Linear(2, 2), lgc.LocalSteps(start_steps=0), carried=carried)


def test_a_carried_object_whose_state_cannot_travel_is_refused() -> None:
    class Place:
        def state_dict(self) -> dict[str, Any]:
            return {"place": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Nothing."""

    with pytest.raises(TypeError, match=r"carried/place/place.* is a object, which has no file format"):
        attached(nn.Linear(2, 2), lgc.LocalSteps(start_steps=0), carried={"place": Place()})


# --- the data ---


def drawn(samplers: dict[str, lgc.elastic.Sampler], steps: int) -> dict[str, list[int]]:
    return {name: [index for _, index in zip(range(steps), each, strict=False)] for name, each in samplers.items()}


def test_every_sample_is_taken_once_an_epoch_whoever_is_there() -> None:
    names = ["a", "b", "c"]
    samplers = {name: lgc.elastic.Sampler(48, seed=3) for name in names}
    here: list[str] = []
    used: list[int] = []

    def divide(counted: list[str]) -> None:
        shares = [samplers[name].drawn for name in counted]
        for rank, name in enumerate(here):
            samplers[name].divide(shares, rank=rank, world_size=len(here))

    for number in range(10):
        before, here = here, names if number % 3 else names[:2]  # c comes and goes
        for name in {*here} - {*before}:  # as a newcomer has it from the others
            samplers[name].load_state_dict(samplers["a"].state_dict())
        divide([])
        taken = drawn({name: samplers[name] for name in here}, 2)
        if number == 7:  # all start from their checkpoints
            states = {name: samplers[name].state_dict() for name in here}
            samplers = {name: lgc.elastic.Sampler(48, seed=3) for name in names}
            for name, state in states.items():
                samplers[name].load_state_dict(state)
        taken = {name: taken[name] + more for name, more in drawn({n: samplers[n] for n in here}, 2).items()}
        counted = here[:1] if number == 4 else here  # what the others have taken is lost once
        used += [index for name in counted for index in taken[name]]
        divide(counted)
    assert sorted(used) == sorted([*range(48), *range(48)])
    assert samplers["a"].epoch == 2


# --- what the guide says ---


@contextmanager
def two_running(script: str, folders: list[Path]) -> Iterator[list[Process]]:
    """Two ranks of a script, and their lighthouse; killed at the end of the `with` block."""
    lighthouse = Process(serve_lighthouse, 2)
    ranks: list[Process] = []
    try:
        address = lighthouse.wait_for(lambda each: isinstance(each, str))
        ranks += [Process(run_script, script, address, folder) for folder in folders]
        yield ranks
    finally:
        for each in (*ranks, lighthouse):
            each.kill()


def test_the_script_of_the_guide_goes_on_from_its_checkpoints_once_everything_is_gone(tmp_path: Path) -> None:
    guide = Path(__file__).parents[1] / "docs" / "elastic.md"
    scripts = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    (script,) = (each for each in scripts if "lgc.elastic.attach" in each)
    before, epochs, after = script.partition("8 * len(data)")
    assert epochs
    folders = [tmp_path / "first", tmp_path / "second"]
    with two_running(f"{before}10**9{after}", folders) as ranks:
        wait_for(lambda: all(map(lgc.checkpoint.latest, folders)))
        assert all(rank.told == [] for rank in ranks)
    newest = max((path for folder in folders for path in folder.glob("step-*[0-9]")), key=lambda path: path.name)
    state = lgc.checkpoint.load(newest, group=None)
    rounds, taken = int(newest.name.removeprefix("step-")), state["sampler"]["next"]
    with two_running(f"{before}{taken} + {epochs}{after}", folders) as ranks:
        printed = [rank.result() for rank in ranks]
    assert printed[0] == printed[1]
    found = re.fullmatch(r"rounds (\d+), accuracy (.*)", printed[0])
    assert found, printed
    assert int(found[1]) == rounds + 14  # one after the first step, then as many of 640 samples as make 8 * 1024
    assert float(found[2]) > 0.9


@pytest.mark.exhaustive
def test_the_measurement_ends_with_the_same_weights_on_all_ranks(tmp_path: Path) -> None:
    size = ["--recipe", "elastic_ranks:TINY", "--batch-size", "8", "--samples", "1600", "--ranks", "3"]
    arguments = ["bench", "elastic", *size, "--kills", "1", "--stops", "0", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    undisturbed, disturbed = (line.split() for line in result.stdout.splitlines()[-2:])
    assert undisturbed[-1] == disturbed[-1] == "alike"
    assert float(disturbed[-4]) - float(undisturbed[-4]) == pytest.approx(float(disturbed[-3]), abs=1e-3)
    again = CliRunner().invoke(main, arguments)
    assert again.stdout == result.stdout
    other = CliRunner().invoke(main, [*arguments, "--seed", "1"])
    assert "of other settings (seed: 0, now 1)" in other.output


TOLD = {"digest": "0a", "form": "1b", "group": "", "closing": False, "step": 20, "steps": 10, "drawn": [[1, 80]]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": 1},
        {"closing": 0},
        {"step": -1},
        {"steps": 10**18},
        {"steps": True},
        {"drawn": [[0, MOST_DRAWN]]},
        {"drawn": [[0, -1]]},
        {"drawn": [[0]]},
        {"drawn": "all"},
    ],
    ids=str,
)
def test_what_a_rank_says_of_itself_is_within_bounds_or_not_of_this_job(wrong: dict[str, Any]) -> None:
    assert is_told(TOLD)
    assert not is_told(TOLD | wrong)
    assert not is_told({name: value for name, value in TOLD.items() if name not in wrong})


def test_without_torchft_all_else_is_there_and_the_error_says_what_to_do() -> None:
    code = "import sys; sys.modules['torchft'] = None; import lgc; print('imported'); import lgc.elastic"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported\n"
    assert "ImportError: lgc.elastic needs torchft 0.2: pip install 'lgc[elastic]'" in done.stderr
    assert "wheels for Linux on x86-64" in done.stderr
