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
from lgc_lab.plan import command, ladder
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
    assert (dense["loss_bits_per_byte"], local["loss_bits_per_byte"]) == (0.0, ladder.find_loss("local+quantized"))
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


def test_what_lost_least_of_the_fast_ones_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"dense": 0.0, "quantized": 0.1, "local:every=20+dense": -0.01, "local:every=50+quantized": 0.02}
    monkeypatch.setattr(ladder, "LOSSES", measured | {"topk": None})
    names = {"far": "local+dense", "unknown": "topk", "every_step": "quantized", "seldom": "local:every=50+quantized"}
    labels = {"dense": "dense", **names}
    rows = predicted(dense=9, far=1.2, unknown=1, every_step=1.05, seldom=1.09)
    best = command._recommend(rows, labels)
    assert best.scheme == "seldom"
    assert command._reason(best, rows, labels) == (
        "topk and quantized are within 10% of the fastest as well. It lost least of those measured, +0.020 bits per "
        "byte over the best dense, in 3,000 steps of text-gpt with AdamW; what was not measured comes last. "
        "lgc compare tells what your model loses."
    )
    rows = predicted(dense=1.2, far=1.19, unknown=1.15)
    assert command._recommend(rows, labels).scheme == "dense"  # a gain may be chance
    rows = predicted(dense=9, unknown=1)
    reason = command._reason(command._recommend(rows, labels), rows, labels)
    assert reason.startswith("Nothing else is within 10% of the fastest. Its loss was not measured;")


def test_codes_that_know_earlier_rounds_are_said_to_be_counted_as_in_the_first() -> None:
    schemes = [
        "dense",
        "dgc",
        "dgc:indices=recent",
        "dgc:indices=recent:reduction=two_stage",
        "local+topk:values=recentsign",
    ]
    rows = predicted(**dict.fromkeys(schemes, 1.0))
    text = command._as_text(
        "10mbit", Link.parse("10mbit"), Profile(4, 1.0, []), rows, dict(zip(schemes, schemes, strict=True))
    )
    said = re.findall("Counted as in a first round, after which its codes are shorter: (.*)[.]", text)
    assert said == ["dgc:indices=recent", "local+topk:values=recentsign"]


@pytest.mark.parametrize(("recipe", "optimizer"), [("digits", "sgd"), ("text-gpt", "adamw")])
def test_schemes_for_adam_are_planned_where_it_trains(recipe: str, optimizer: str) -> None:
    run: dict[str, Any] = {"batch_size": None, "data": None, "backbone": None, "bf16": False}
    schemes = command._question(2, recipe=recipe, model=None, schemes=None, **run).schemes
    assert find_recipe(recipe).optimizer == optimizer
    assert any("second_moments=all" in text for text in schemes) == (optimizer == "adamw")


def test_the_ladder_knows_a_scheme_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ladder.LOSSES, "local:every=20+quantized", 0.5)
    assert ladder.find_loss("local+quantized:bits=2") == 0.5
    assert ladder.find_loss("local+quantized:bits=3") is None


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
