"""Gradients and models at the edge of what the schemes are defined for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cases
from ranks import Ranks
from reference import Config, Reference, Weights, count_at, make_layout, phase_at
from rounds import SHAPES, Run, Shapes, gradient, joined, run_rounds, scheme_of
from torch import Tensor

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {"momentum": 0.9, "dense_steps": 2, "warmup_steps": 3, "train_steps": 3}
CONFIGS: dict[str, Config] = {
    "topk": Config(scheme="topk", rate=0.02, warmup_steps=3),
    "topk-two-stage": Config(scheme="topk", rate=0.02, warmup_steps=3, reduction="two_stage"),
    "dgc": Config(scheme="dgc", rate=0.02, momentum=0.9, clip_norm=1.0, warmup_steps=3),
    "scalecom": Config(scheme="scalecom", rate=0.02, warmup_steps=3),
    "lgc-ring": Config(scheme="lgc-ring", rate=0.02, **LEARNED),
    "lgc-ring-paper": Config(scheme="lgc-ring", rate=0.02, feedback="paper", **LEARNED),
    "lgc-ps": Config(scheme="lgc-ps", rate=0.02, **LEARNED),
    "lgc-ps-paper": Config(scheme="lgc-ps", rate=0.02, feedback="paper", **LEARNED),
}
LOSSLESS = [name for name, config in CONFIGS.items() if config.feedback != "paper"]
STEPS = 11  # three of them compressed, so that every rank leads once
WORLD_SIZE = 3

SOME = ("topk-two-stage", "lgc-ring", "lgc-ps-paper")
every_scheme = cases("scheme", CONFIGS, in_suite=SOME)

MODELS: dict[str, Shapes] = {
    "empty and one-element tensors": {
        "a": (0, 3),
        "b": (0,),
        "c": (1, 1),
        "d": (1,),
        "e": (),
        "f": (4, 0),
        "g": (6, 7),
        "h": (1, 2),
    },
    "one weight": {"only.weight": (7, 9)},
    "one weight and its bias": {"only.weight": (7, 9), "only.bias": (7,)},
    "one element": {"only": (1,)},
    "no weights": {"scale": (31,), "shift": (31,)},
    "only empty tensors": {"nothing": (0,), "nowhere": (0, 5)},
    "a shared part shorter than 16": {"first": (6, 6), "second": (8, 8), "third": (9, 8), "last": (4, 9)},
}


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def assert_equals_reference(config: Config, shapes: Shapes, real: list[Run]) -> None:
    """Mean and residual of every rank and step, for gradients of `gradient`."""
    world_size = len(real)
    frozen = None
    if config.learned:
        assert real[0].frozen is not None
        frozen = Weights.of(real[0].frozen, world_size if config.scheme == "lgc-ps" else 1)
    reference = Reference(config, shapes, world_size, frozen=frozen)
    for t in range(len(real[0].steps)):
        expected = reference.step([gradient(shapes, k, t) for k in range(world_size)])
        for k, run in enumerate(real):
            where = f"step {t} ({expected.phase}), rank {k}"
            for what, actual, wanted in (
                ("mean", run.steps[t].mean, joined(expected.mean)),
                ("residual", run.steps[t].residual, joined(reference.v[k])),
            ):
                tolerance = 1e-5 * max(1e-3, wanted.abs().max().item() if wanted.numel() else 0.0)
                torch.testing.assert_close(
                    actual, wanted, rtol=1e-4, atol=tolerance, msg=f"{what}, {where}: {{}}".format
                )


@pytest.mark.grid
@every_scheme
@pytest.mark.parametrize("model", MODELS)
def test_models_of_unusual_shapes_equal_the_reference(ranks: RankFactory, model: str, scheme: str) -> None:
    config, shapes = CONFIGS[scheme], MODELS[model]
    assert_equals_reference(
        config, shapes, ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), shapes, list(range(STEPS)))
    )


def test_the_short_shared_part_is_short_and_there() -> None:
    shapes = MODELS["a shared part shorter than 16"]
    for scheme in ("lgc-ring", "lgc-ps"):
        config = CONFIGS[scheme]
        mu = sum(count_at(config, segment, STEPS) for segment in make_layout(config, shapes).shared)
        assert 0 < mu < 16


@every_scheme
def test_at_a_tiny_rate_every_segment_sends_one_value(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1e-7, warmup_steps=0, small=None)
    shapes = {name: shape for name, shape in SHAPES.items() if name != "body2.weight"}
    real = ranks(2).run(run_rounds, scheme_of(config), shapes, list(range(STEPS)))
    assert_equals_reference(config, shapes, real)
    layout = make_layout(config, shapes)
    assert layout.dense == ()
    for run in real:
        for t in range(STEPS):
            if phase_at(config, t) != "dense":
                assert int((run.steps[t].sent != 0).sum()) == len(layout.own) + len(layout.shared)


@pytest.mark.parametrize("scheme", ["topk", "topk-two-stage", "dgc", "scalecom"])
def test_at_rate_one_a_linear_scheme_is_dense(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1.0, warmup_steps=0, momentum=0.0, clip_norm=None)
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, list(range(5)))
    for run in real:
        for t in range(5):
            average = torch.stack([joined(gradient(SHAPES, k, t)) for k in range(WORLD_SIZE)]).mean(0)
            torch.testing.assert_close(run.steps[t].mean, average)
            assert not run.steps[t].residual.any()


@every_scheme
def test_at_rate_one_everything_still_equals_the_reference(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1.0)
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, list(range(STEPS)))
    assert_equals_reference(config, SHAPES, real)


@every_scheme
def test_zero_gradients_give_a_zero_mean_and_leave_nothing_behind(ranks: RankFactory, scheme: str) -> None:
    nothing = [zeros(SHAPES)] * WORLD_SIZE
    for run in ranks(WORLD_SIZE).run(run_rounds, scheme_of(CONFIGS[scheme]), SHAPES, [nothing] * STEPS):
        for step in run.steps:
            assert not step.mean.any()
            assert not step.sent.any()
            assert not step.residual.any()


@every_scheme
def test_a_rank_without_gradient_takes_part(ranks: RankFactory, scheme: str) -> None:
    """Rank 0, which leads and serves, has nothing: everything stays finite and the same on all ranks."""
    given = [[zeros(SHAPES), *(gradient(SHAPES, rank, t) for rank in range(1, WORLD_SIZE))] for t in range(STEPS)]
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(CONFIGS[scheme]), SHAPES, given)
    for t in range(STEPS):
        assert torch.isfinite(real[0].steps[t].mean).all()
        for run in real:
            assert torch.equal(run.steps[t].mean, real[0].steps[t].mean)
            assert torch.isfinite(run.steps[t].residual).all()


def tied(rank: int) -> dict[str, Tensor]:
    """Every coordinate of a rank has the same magnitude."""
    return {name: torch.full(shape, 0.5 + 0.25 * rank) for name, shape in SHAPES.items()}


@every_scheme
def test_of_ties_exactly_k_are_sent(ranks: RankFactory, scheme: str) -> None:
    config = CONFIGS[scheme]
    layout = make_layout(config, SHAPES)
    given = [[tied(rank) for rank in range(WORLD_SIZE)]] * STEPS
    for run in ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, given):
        for t in range(STEPS):
            segments = (*layout.own, *layout.shared)
            expected = sum(count_at(config, segment, t) for segment in segments)
            if phase_at(config, t) == "dense":
                expected = run.steps[t].sent.numel()
            assert int((run.steps[t].sent != 0).sum()) == expected


@cases("scheme", LOSSLESS, in_suite=SOME)
def test_of_ties_none_is_lost(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], momentum=0.0, clip_norm=None)
    given = [[tied(rank) for rank in range(WORLD_SIZE)]] * STEPS
    for rank, run in enumerate(ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, given)):
        delivered = torch.stack([step.sent for step in run.steps]).sum(0)
        torch.testing.assert_close(delivered + run.steps[-1].residual, STEPS * joined(tied(rank)))


@every_scheme
def test_gradients_of_any_magnitude_stay_finite(ranks: RankFactory, scheme: str) -> None:
    """From far below to far above what float32 can square."""
    for scale in (1e-30, 1e15, 1e20):
        given = [
            [{name: scale * g for name, g in gradient(SHAPES, rank, t).items()} for rank in range(2)]
            for t in range(STEPS)
        ]
        config = dataclasses.replace(CONFIGS[scheme], clip_norm=None)
        for run in ranks(2).run(run_rounds, scheme_of(config), SHAPES, given):
            for t, step in enumerate(run.steps):
                assert torch.isfinite(step.mean).all(), f"step {t}"
                assert torch.isfinite(step.residual).all(), f"step {t}"
                assert math.isfinite(step.reconstruction_error or 0), f"step {t}"
