"""Ranks that come and go."""

from __future__ import annotations

import signal
from typing import Any

import pytest

pytest.importorskip("torchft", reason="torchft is not installed (lgc[elastic]; it has wheels for Linux on x86-64)")

from elastic_ranks import Process, crew, dies_in_round, loses_sight, trains_apart


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
        same = next(each for each in told(ranks.ranks[0], "step") if each["step"] == first["step"])
        assert (first["digest"], first["rate"]) == (same["digest"], same["rate"])


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
        ranks.start(fault=dies_in_round)
        ranks.ranks.pop().process.join()
        ranks.wait_for_ranks(2)
        assert are_alike(ranks.end())
        for rank in ranks.ranks:
            tries = [each for each in told(rank, "moved") if each["round"] == 4]
            assert len(tries) > 1
            assert all(each == tries[0] for each in tries)
            assert tries[0]["owed"] > 0


def test_a_rank_whose_payload_the_others_have_counted_owes_what_is_left_of_it() -> None:
    with crew(2, least=2) as ranks:
        lost = ranks.start(fault=loses_sight)
        after = lost.wait_for(lambda each: "after" in each)["after"]
        first = lost.wait_for(lambda each: each.get("rounds", 0) > 4)
        assert first["owed"] == after > 0
        assert are_alike(ranks.end())


def test_of_two_groups_that_have_trained_apart_the_smaller_one_steps_back() -> None:
    with crew(2, least=2) as ranks:
        apart = ranks.start(fault=trains_apart)
        apart.wait_for(lambda each: "apart" in each)
        ranks.wait_for_ranks(3)
        assert are_alike(ranks.end())
        own = {each["rounds"]: each["digest"] for each in told(apart, "digest")}
        others = {each["rounds"]: each["digest"] for each in told(ranks.ranks[0], "digest")}
        assert own[5] != others[5]
        assert own[max(own)] == others[max(own)]
        owed = {each["round"]: each["owed"] for each in told(apart, "owed") if "round" in each}
        assert max(owed.values()) > 0
