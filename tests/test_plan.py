"""`lgc plan` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from runs import lgc

from lgc.choice.cost import Collective, Link, Prediction, Profile, SchemeCost, StageCost
from lgc.schemes import parse_scheme
from lgc_lab.bench.link.results import Cell
from lgc_lab.cli import main
from lgc_lab.plan import command
from lgc_lab.plan.answer import Answer
from lgc_lab.plan.ladder import LADDERS, Ladder
from lgc_lab.recipes import find_recipe


def plan_of_digits(*schemes: str) -> list[dict[str, Any]]:
    """Of two ranks on one machine, at 1 Mbit/s and at 1,000 Gbit/s."""
    done = lgc(
        *("plan", "--recipe", "digits", "--workers", "2", "--ranks-per-machine", "2", "--bandwidth", "1mbit"),
        *("--bandwidth", "1000gbit", "--json", "--schemes", ",".join(schemes)),
    )
    plans: list[dict[str, Any]] = json.loads(done.stdout)
    for plan in plans:
        assert [row["scheme"].split(":")[0] for row in plan["schemes"]] == [
            re.split("[:+]", each)[0] for each in schemes
        ]
    return plans


def test_plan_of_a_recipe() -> None:
    slow, fast = plan_of_digits("dense", "dgc", "quantized", "local+quantized")
    dense, dgc, quantized, local = slow["schemes"]
    assert dense["sent_bytes"] == 4 * 973_930
    assert dense["step_s"] > 8 * 4 * 973_930 / 1e6
    for row in slow["schemes"]:
        parts = row["compute_s"] + row["compression_s"] + row["communication_s"]
        assert row["step_s"] == pytest.approx(parts)
    assert dgc["sent_bytes"] < dense["sent_bytes"] / 300
    assert dgc["speedup"] > 3
    assert local["sent_bytes"] == pytest.approx((quantized["sent_bytes"] + 32) / 20, abs=1)
    assert [(stage["phase"], stage["steps"]) for stage in local["early"]] == [("warmup", 15)]
    assert (dense["loss"], dense["speedup_at_no_loss"]) == (0.0, 1.0)
    assert (local["loss"], local["speedup_at_no_loss"]) == (None, None)
    assert slow["recommended"] != "dense"
    assert slow["attach"] == f'handle = lgc.attach(model, "{slow["recommended"]}", optimizer)'
    assert fast["schemes"][0]["communication_s"] < dense["communication_s"] / 3


@pytest.mark.exhaustive
def test_plan_knows_the_peers_and_the_phases_of_what_learns() -> None:
    slow, _ = plan_of_digits("dense", "bf16", "powersgd:rank=2", "lgc-ps:rate=0.001")
    dense, bf16, powersgd, learned = slow["schemes"]
    assert bf16["sent_bytes"] == dense["sent_bytes"] / 2
    assert powersgd["sent_bytes"] < dense["sent_bytes"] / 30
    assert [stage["phase"] for stage in learned["early"]] == ["dense", *["warmup"] * 4, "train"]
    assert slow["recommended"] not in ("dense", "bf16")


def predicted(**steps: float) -> list[Prediction]:
    """Predictions of a step's seconds, by full text."""
    return [Prediction(name, 0, 1, 0, 0, step, 9 / step, [], 0) for name, step in steps.items()]


def answer(losses: dict[str, float | None], **steps: float) -> Answer:
    """Of a ladder where half as many steps lose 0.1."""
    labels = {name: name for name in steps}
    measured = Ladder("in 3,000 steps", "bits per byte", 0.1, losses)
    return Answer("10mbit", Link.parse("10mbit"), Profile(4, 1.0, []), predicted(**steps), labels, measured)


def test_what_is_first_to_reach_the_loss_of_dense_training_is_recommended() -> None:
    seldom, often = "local:every=20+quantized", "local:every=2+quantized"
    losses: dict[str, float | None] = {"dense": 0.0, seldom: 0.1, often: 0.02, "topk": None}
    far = answer(losses, dense=9, **{seldom: 1, often: 1.5, "topk": 0.9})
    assert far.recommend().scheme == often  # for 1.15 times as many steps, and not twice as many
    assert f"{often} is best here, 6.0 times as fast as dense:" in str(far)
    assert (
        "It lost 0.02 bits per byte in 3,000 steps. To make up for that should take 1.15 times as many steps, and "
        "still be 5.2 times as fast as dense. Faster, but of a loss that was not measured: topk. lgc compare tells "
        "what your model loses." in str(far)
    )
    assert answer(losses, dense=9, **{seldom: 0.7, often: 1.5}).recommend().scheme == seldom
    gained = answer({"dense": 0.0, often: -0.01}, dense=1.2, **{often: 1.15})
    assert gained.recommend().scheme == "dense"  # a gain may be chance
    assert "Dense is best here. Nothing of a measured loss gets as far more than 10% sooner. Use plain DDP." in str(
        gained
    )


def test_without_any_measured_loss_the_first_of_the_fastest_is_recommended() -> None:
    unknown = answer({"dense": 0.0}, dense=9, dgc=1.05, topk=1)
    assert unknown.recommend().scheme == "dgc"
    assert "No loss was measured but dense's; this is the first within 10% of the fastest." in str(unknown)


def test_codes_that_know_earlier_rounds_are_said_to_be_counted_as_in_the_first() -> None:
    schemes = [
        "dense",
        "dgc",
        "dgc:indices=recent",
        "dgc:indices=recent:reduction=two_stage",
        "local+topk:values=recentsign",
    ]
    text = answer({"dense": 0.0}, **dict.fromkeys(schemes, 1.0))
    said = re.findall("Counted as in a first round, after which its codes are shorter: (.*)[.]", str(text))
    assert said == ["dgc:indices=recent", "local+topk:values=recentsign"]


@pytest.mark.parametrize(("recipe", "optimizer"), [("digits", "sgd"), ("text-gpt", "adamw")])
def test_schemes_are_planned_by_the_ladder_of_what_trains_them(recipe: str, optimizer: str) -> None:
    run: dict[str, Any] = {"batch_size": None, "data": None, "backbone": None, "bf16": False}
    question = command._question(2, recipe=recipe, model=None, schemes=None, **run)
    assert find_recipe(recipe).optimizer == optimizer
    assert question.ladder == LADDERS[optimizer]
    assert list(question.schemes) == list(question.ladder.losses)
    assert any("second_moments=all" in text for text in question.schemes) == (optimizer == "adamw")


def test_the_ladder_knows_a_scheme_however_it_is_written() -> None:
    ladder = Ladder("", "", 0.1, {"local:every=20+quantized": 0.2})
    assert ladder.loss(parse_scheme("local:start_steps=15+quantized:bits=2")) == 0.2
    assert ladder.more_steps(0.2) == 4
    assert ladder.loss(parse_scheme("local+quantized:bits=3")) is None


def test_a_recipe_that_completes_a_scheme_otherwise_has_no_loss_of_it() -> None:
    ladder = Ladder("", "", 0.1, {"dgc:rate=0.001": 0.2})
    losses = [
        ladder.loss(parse_scheme("dgc", find_recipe(name).scheme_defaults)) for name in ("cifar10-resnet20", "digits")
    ]
    assert losses == [0.2, None]


JOB = """
import torch
from torch.nn.functional import cross_entropy

def job():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(64, 10), torch.randn(16, 64), torch.randint(10, (16,))
    return model, lambda model: cross_entropy(model(x), y)
"""


def test_plan_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planned.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ("plan", "--model", "planned:job", "--workers", "8", "--latency", "5ms", "--schemes", "dense,topk")
    printed = lgc(*arguments, "--bandwidth", "10gbit").stdout
    assert "8 ranks, 10gbit: 9.36e+03 Mbit/s of payload, 5 ms" in printed
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
        (["--recipe", "digits", "--schemes", "dense,auto"], "there is no scheme 'auto'"),
        (["--check", "."], "results.json is not a measurement"),
        (["--recipe", "digits", "--workers", "4", "--ranks-per-machine", "3"], "must divide --workers 4"),
        (["--model", "json:dumps", "--bf16"], "are for recipes"),
        (
            ["--recipe", "digits", "--schemes", "local:second_moments=all"],
            "second_moments=all, which is for Adam and AdamW",
        ),
        (["--recipe", "digits", "--optimizer", "sgd"], "--optimizer is for --model; a recipe has its own"),
    ],
)
def test_plan_refuses(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_check_shows_how_far_off_the_predictions_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {  # 1 s of computation; 10 MB without and 10 kB with 0.5 s of compression
        "dense": StageCost("dense", None, 0.0, [Collective("all-reduce", 10**7)]),
        str(parse_scheme("dgc", find_recipe("digits").scheme_defaults)): StageCost(
            "compressed", None, 0.5, [Collective("all-reduce", 10**4)]
        ),
    }
    profile = Profile(2, 1.0, [SchemeCost(scheme, [stage]) for scheme, stage in stages.items()])
    monkeypatch.setattr(command, "_profile_here", lambda question, ranks: profile)
    seconds = {
        "10mbit": {"compute": 1.0, "dense": 9.0, "dgc": 2.0},
        "unshaped": {"compute": 1.0, "dense": 1.1, "dgc": 1.0},
    }
    cells = [
        [rate, 0, arm, "dense", [[1.5 * step, step / 2]], None, None, [1, 1], [1, 1], None, None, None, None, 1]
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
