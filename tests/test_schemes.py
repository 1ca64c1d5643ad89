"""Every scheme, on one to four real ranks: the reference, the contract, and exactness across ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from ranks import Ranks
from reference import (
    Config,
    Reference,
    Weights,
    count_at,
    decode,
    encode,
    make_layout,
    make_pieces,
    phase_at,
)
from rounds import SHAPES, Run, gradient, joined, run_rounds, scheme_of
from torch import Tensor

RankFactory = Callable[[int], Ranks]
Runs = Callable[[str, int], list[Run]]

STEPS = 20  # four of them compressed, so that each of four ranks leads once
LEARNED: dict[str, Any] = {"momentum": 0.9, "dense_steps": 3, "warmup_steps": 7, "train_steps": 6}
TWO_STAGE: Any = {"reduction": "two_stage"}
CASES: dict[str, Config] = {
    "topk": Config(scheme="topk", rate=0.02),
    "topk-momentum-warmup": Config(scheme="topk", rate=0.02, momentum=0.9, warmup_steps=9, pooled_rate=0.3),
    "topk-two-stage": Config(scheme="topk", rate=0.02, warmup_steps=4, **TWO_STAGE),
    "topk-two-stage-coded": Config(scheme="topk", rate=0.1, mean_values="lloyd2", **TWO_STAGE),
    "dgc": Config(scheme="dgc", rate=0.005, momentum=0.9, warmup_steps=11),
    "dgc-clipped": Config(scheme="dgc", rate=0.02, momentum=0.9, warmup_steps=6, clip_norm=2.0),
    "dgc-two-stage": Config(
        scheme="dgc", rate=0.02, momentum=0.9, warmup_steps=6, clip_norm=2.0, reduction="two_stage"
    ),
    "scalecom": Config(scheme="scalecom", rate=0.02, warmup_steps=6),
    "scalecom-momentum": Config(scheme="scalecom", rate=0.02, momentum=0.9, warmup_steps=6),
    "lgc-ring": Config(scheme="lgc-ring", rate=0.05, **LEARNED),
    "lgc-ring-paper": Config(scheme="lgc-ring", rate=0.1, feedback="paper", **LEARNED),
    "lgc-ring-roles": Config(
        scheme="lgc-ring",
        rate=0.05,
        last="shared",
        small="dense",
        roles={"stem.weight": "dense", "body1.*": "own", "norm2.weight": "shared"},
        **LEARNED,
    ),
    "lgc-ps": Config(scheme="lgc-ps", rate=0.1, clip_norm=3.0, **LEARNED),
    "lgc-ps-paper": Config(scheme="lgc-ps", rate=0.05, innovation=0.05, feedback="paper", **LEARNED),
    "topk-kernels": Config(scheme="topk", rate=0.05, unit="kernel", warmup_steps=4),
    "dgc-sign": Config(scheme="dgc", rate=0.02, momentum=0.9, warmup_steps=6, values="sign"),
    "scalecom-uniform": Config(scheme="scalecom", rate=0.05, warmup_steps=6, values="uniform4", unit=8),
    "lgc-ring-coded": Config(scheme="lgc-ring", rate=0.1, unit="kernel", values="sign", latent="uniform4", **LEARNED),
    "topk-low-pass": Config(scheme="topk", rate=0.02, warmup_steps=4, low_pass=0.3, values="sign"),
    "scalecom-low-pass": Config(scheme="scalecom", rate=0.02, momentum=0.9, warmup_steps=6, low_pass=0.1),
    "dgc-two-stage-low-pass": Config(
        scheme="dgc", rate=0.02, momentum=0.9, warmup_steps=6, low_pass=0.6, reduction="two_stage"
    ),
    "lgc-ring-adam": Config(scheme="lgc-ring", rate=0.1, second_moment=0.95, **LEARNED),
    "lgc-ps-adam": Config(scheme="lgc-ps", rate=0.1, second_moment=0.9, low_pass=0.3, **LEARNED),
    "lgc-ring-low-pass": Config(scheme="lgc-ring", rate=0.1, low_pass=0.2, **LEARNED),
    "lgc-ring-paper-low-pass": Config(scheme="lgc-ring", rate=0.1, feedback="paper", low_pass=0.2, **LEARNED),
    "lgc-ps-low-pass": Config(scheme="lgc-ps", rate=0.1, clip_norm=3.0, low_pass=0.5, **LEARNED),
    "lgc-ps-coded": Config(scheme="lgc-ps", rate=0.1, values="sign", latent="uniform8", **LEARNED),
    "dgc-lloyd": Config(scheme="dgc", rate=0.1, momentum=0.9, warmup_steps=6, values="lloyd2"),
}
ALONE = ("topk-two-stage", "dgc", "scalecom-momentum", "lgc-ring", "lgc-ps", "lgc-ps-paper")
LINEAR = [name for name, config in CASES.items() if not config.learned and config.reduction == "gather"]
NEVER_ZERO = [name for name, config in CASES.items() if not config.values.startswith("uniform")]
IN_TWO_STAGES = [name for name, config in CASES.items() if config.reduction == "two_stage" and not config.mean_values]
LGC = [name for name, config in CASES.items() if config.learned]
LOSSLESS = [name for name, config in CASES.items() if config.feedback != "paper"]
PAPER = [name for name, config in CASES.items() if config.feedback == "paper"]


def on_ranks(cases: Iterable[str]) -> pytest.MarkDecorator:
    """These cases by turns on two or three ranks, some of them on one; in `make test-all` all on one and on four."""
    world_sizes = {case: (1, 2 + number % 2, 4) for number, case in enumerate(CASES)}
    left_out = [(case, 1) for case in CASES if case not in ALONE] + [(case, 4) for case in CASES]
    return pytest.mark.parametrize(
        ("case", "world_size"),
        [
            pytest.param(case, world_size, marks=pytest.mark.exhaustive if (case, world_size) in left_out else ())
            for case in cases
            for world_size in world_sizes[case]
        ],
    )


@pytest.fixture(scope="module")
def runs(ranks: RankFactory) -> Runs:
    """What every rank saw of a case; each case and world size runs once."""
    done: dict[tuple[str, int], list[Run]] = {}

    def run(case: str, world_size: int) -> list[Run]:
        if (case, world_size) not in done:
            scheme = scheme_of(CASES[case])
            done[case, world_size] = ranks(world_size).run(run_rounds, scheme, SHAPES, list(range(STEPS)))
        return done[case, world_size]

    return run


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Equal within float tolerance, measured against the largest magnitude of the vector."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale + 1e-12, f"{what}: differs by {error:.3g} at a scale of {scale:.3g}"


def accumulated(config: Config, run: Run, rank: int, world_size: int, step: int) -> Tensor:
    """The residual of a rank after the gradient came in and before anything was sent."""

    def clipped(t: int) -> Tensor:
        g = joined(gradient(SHAPES, rank, t))
        if config.clip_norm is None:
            return g
        scaled: Tensor = g * min(1.0, config.clip_norm / (math.sqrt(world_size) * g.double().norm().item()))
        return scaled

    before = run.steps[step - 1] if step else None
    if config.second_moment:
        u = adam_step([clipped(t) for t in range(step + 1)], config.momentum, config.second_moment)
    elif before is None or before.momentum is None:
        u = clipped(step)
    else:
        u = config.momentum * before.momentum + clipped(step)
    return u if before is None else before.residual + u


def adam_step(gradients: list[Tensor], *betas: float) -> Tensor:
    """What torch's Adam subtracts at the last of these gradients, at a learning rate of 1."""
    parameter = torch.zeros_like(gradients[0])
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas)  # type: ignore[arg-type]
    for g in gradients:
        parameter.zero_()
        parameter.grad = g
        optimizer.step()
    return -parameter


def unfiltered(config: Config, run: Run, step: int) -> Tensor:
    """What the residual of a rank would be after a step without its low-pass filter."""
    after = run.steps[step].residual
    before = run.steps[step - 1].residual if step else torch.zeros_like(after)
    return before + (after - before) / config.low_pass


def decoders_of(config: Config, world_size: int) -> int:
    return world_size if config.scheme == "lgc-ps" else 1


@on_ranks(CASES)
def test_it_equals_the_reference(runs: Runs, case: str, world_size: int) -> None:
    assert_equals_the_reference(runs(case, world_size), CASES[case], 2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_reference_on_ranks_that_share_a_gpu(ranks: RankFactory, case: str) -> None:
    real = ranks(3).run(run_rounds, scheme_of(CASES[case]), SHAPES, list(range(STEPS)), "cuda")
    assert_equals_the_reference(real, CASES[case], 1e-4)
    for run in real[1:]:
        assert all(torch.equal(step.mean, first.mean) for step, first in zip(run.steps, real[0].steps, strict=True))


def assert_equals_the_reference(real: list[Run], config: Config, tolerance: float) -> None:
    world_size = len(real)
    frozen = None
    if config.learned:
        assert real[0].frozen is not None
        frozen = Weights.of(real[0].frozen, decoders_of(config, world_size))
    reference = Reference(config, SHAPES, world_size, frozen=frozen)
    assert real[0].order == reference.layout.order
    for t in range(STEPS):
        expected = reference.step([gradient(SHAPES, k, t) for k in range(world_size)])
        for k in range(world_size):
            actual = real[k].steps[t]
            where = f"step {t} ({expected.phase}), rank {k}"
            assert_close(actual.mean, joined(expected.mean), f"mean, {where}", tolerance)
            assert_close(actual.sent, joined(expected.sent[k]), f"sent, {where}", tolerance)
            assert_close(actual.residual, joined(reference.v[k]), f"residual, {where}", tolerance)
            if actual.momentum is not None:
                assert_close(actual.momentum, joined(reference.u[k]), f"momentum, {where}", tolerance)
            assert (actual.momentum is None) == (config.momentum == 0)


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("optimizer", "updates"), [("adam", 1), ("sgd", 1), ("sgd", 3)])
@pytest.mark.parametrize("scheme", ["lgc-ring", "lgc-ps"])
def test_the_autoencoder_is_trained_as_in_the_reference(
    ranks: RankFactory, scheme: str, optimizer: str, updates: int, world_size: int
) -> None:
    config = Config(
        scheme=scheme,
        rate=0.05,
        momentum=0.9,
        dense_steps=1,
        warmup_steps=2,
        train_steps=12,
        autoencoder_optimizer=optimizer,
        autoencoder_updates=updates,
    )
    steps = 20
    real = ranks(world_size).run(run_rounds, scheme_of(config), SHAPES, list(range(steps)))
    assert real[0].initial is not None
    assert real[0].frozen is not None
    decoders = decoders_of(config, world_size)
    reference = Reference(config, SHAPES, world_size, initial=Weights.of(real[0].initial, decoders))
    assert reference.weights is not None
    losses = []
    for t in range(steps):
        expected = reference.step([gradient(SHAPES, k, t) for k in range(world_size)])
        losses.append(expected.loss)
        assert real[0].steps[t].loss == (None if expected.loss is None else pytest.approx(expected.loss, rel=1e-3))
        assert_close(real[0].steps[t].mean, joined(expected.mean), f"mean, step {t}", tolerance=1e-3)
    assert [loss is not None for loss in losses] == [False] * 3 + [True] * 12 + [False] * 5
    initial, trained, expected_weights = (
        torch.cat([tensor.detach().flatten() for tensor in weights.tensors()])
        for weights in (Weights.of(real[0].initial, decoders), Weights.of(real[0].frozen, decoders), reference.weights)
    )
    # Adam moves a weight whose gradient is mere rounding as far as any other, and rounding decides which way.
    tolerance = 0.2 if optimizer == "adam" else 1e-3
    assert (trained - expected_weights).norm() < tolerance * (expected_weights - initial).norm()


@on_ranks(LGC)
def test_every_rank_ends_up_with_the_same_trained_autoencoder(runs: Runs, case: str, world_size: int) -> None:
    real = runs(case, world_size)
    initial, frozen = real[0].initial, real[0].frozen
    assert initial is not None
    assert frozen is not None
    assert any(not torch.equal(initial[name], frozen[name]) for name in frozen)
    for run in real:
        assert run.frozen is not None
        assert list(run.frozen) == list(frozen)
        assert all(torch.equal(run.frozen[name], frozen[name]) for name in frozen)


@on_ranks(CASES)
def test_the_mean_is_bit_identical_on_all_ranks(runs: Runs, case: str, world_size: int) -> None:
    real = runs(case, world_size)
    for t in range(STEPS):
        for run in real[1:]:
            assert torch.equal(run.steps[t].mean, real[0].steps[t].mean), f"step {t}"


@on_ranks(LOSSLESS)
def test_sent_plus_residual_equals_what_came_in(runs: Runs, case: str, world_size: int) -> None:
    """Of what came in and was not sent, the residual takes the part `low_pass`; by default that is all."""
    config = CASES[case]
    for rank, run in enumerate(runs(case, world_size)):
        for t in range(STEPS):
            v = accumulated(config, run, rank, world_size, t)
            kept = unfiltered(config, run, t)
            assert_close(run.steps[t].sent + kept, v, f"step {t}, rank {rank}", tolerance=1e-6 / config.low_pass)


@on_ranks(PAPER)
def test_in_paper_mode_exactly_the_loss_of_the_codec_is_lost(runs: Runs, case: str, world_size: int) -> None:
    config = CASES[case]
    real = runs(case, world_size)
    layout = make_layout(config, SHAPES)
    shared_names = {name for segment in layout.shared for name in segment.names}
    shared = joined({name: torch.full(shape, float(name in shared_names)) for name, shape in SHAPES.items()}) > 0
    assert real[0].frozen is not None
    weights = Weights.of(real[0].frozen, decoders_of(config, world_size))
    codec = Reference(config, SHAPES, world_size, frozen=weights)
    for t in range(STEPS):
        leader = t % world_size
        positions = torch.nonzero(shared & (real[leader].steps[t].sent != 0)).flatten()
        before = [accumulated(config, run, rank, world_size, t) for rank, run in enumerate(real)]
        scale = before[leader][positions].square().mean().sqrt()
        for rank, run in enumerate(real):
            expected = torch.zeros_like(before[rank])
            if phase_at(config, t) == "compressed":
                x = before[rank][positions]
                if config.scheme == "lgc-ring":
                    y = decode(weights, 0, encode(weights, x / scale), len(x))
                else:
                    z = encode(weights, before[leader][positions] / scale)
                    y = decode(weights, rank, z, len(x), codec.innovation(x / scale))
                expected[positions] = x - scale * y
                assert expected[positions].norm() > 0.05 * x.norm()  # the codec does lose something
            lost = before[rank] - (run.steps[t].sent + unfiltered(config, run, t))
            tolerance = 1e-5 / config.low_pass * before[rank].abs().max()
            assert (lost - expected).abs().max() <= tolerance, f"step {t}, rank {rank}"


@on_ranks(LINEAR)
def test_the_mean_of_a_linear_scheme_is_the_average_of_what_was_sent(runs: Runs, case: str, world_size: int) -> None:
    real = runs(case, world_size)
    for t in range(STEPS):
        average = torch.stack([run.steps[t].sent for run in real]).double().mean(0)
        assert_close(real[0].steps[t].mean, average, f"step {t}", tolerance=1e-6)


@on_ranks(LGC)
def test_before_the_compressed_phase_the_mean_is_the_average_of_what_was_sent(
    runs: Runs, case: str, world_size: int
) -> None:
    real = runs(case, world_size)
    for t in range(3 + 7 + 6):
        average = torch.stack([run.steps[t].sent for run in real]).double().mean(0)
        assert_close(real[0].steps[t].mean, average, f"step {t}", tolerance=1e-6)


@on_ranks(IN_TWO_STAGES)
def test_the_servers_keep_what_they_were_sent_and_did_not_send_on(runs: Runs, case: str, world_size: int) -> None:
    """mean + change of their residual = average of what was sent; the residual is zero where it was sent on."""
    config = CASES[case]
    real = runs(case, world_size)
    pieces = [piece for of_segment in make_pieces(config, SHAPES, world_size) for piece in of_segment]
    residual = torch.zeros(real[0].steps[0].mean.numel(), dtype=torch.float64)
    size = residual.abs()
    for t in range(STEPS):
        average = torch.stack([run.steps[t].sent for run in real]).double().mean(0)
        mean = real[0].steps[t].mean.double()
        selected = mean != 0
        size = size + average.abs()
        residual = residual + average - mean
        assert (residual[selected].abs() <= 1e-5 * size[selected]).all(), f"step {t}"
        residual[selected] = 0
        assert int(selected.sum()) == sum(count_at(config, piece.segment, t) for piece in pieces), f"step {t}"
    if world_size > 1:
        assert residual.abs().sum() > 0  # K ranks send more than the servers pass on


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "sign", "uniform4"])
def test_what_the_codec_of_the_mean_loses_stays_at_the_servers(
    ranks: RankFactory, values: str, world_size: int
) -> None:
    """Everything sent = everything sent on + what the servers still have."""
    config = Config(scheme="dgc", rate=0.02, momentum=0.9, warmup_steps=6, values=values, reduction="two_stage")
    real = ranks(world_size).run(run_rounds, scheme_of(config), SHAPES, list(range(STEPS)))
    received = torch.stack([step.sent for run in real for step in run.steps]).double().sum(0) / world_size
    sent_on = torch.stack([step.mean for step in real[0].steps]).double().sum(0)
    owed = torch.stack([run.server_residual for run in real if run.server_residual is not None])
    assert len(owed) == world_size
    assert_close(sent_on + owed.mean(0), received, "everything", tolerance=1e-5)


@on_ranks(NEVER_ZERO)
def test_phases_are_crossed_at_exactly_the_configured_steps(runs: Runs, case: str, world_size: int) -> None:
    """Seen from what was sent: everything while dense, then what each segment sends at the step's rate."""
    config = CASES[case]
    layout = make_layout(config, SHAPES)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    ends = dict(zip(SHAPES, torch.tensor(list(sizes.values())).cumsum(0).tolist(), strict=True))
    for run in runs(case, world_size):
        for t in range(STEPS):
            sent = {name: int((run.steps[t].sent[ends[name] - sizes[name] : ends[name]] != 0).sum()) for name in SHAPES}
            if phase_at(config, t) == "dense":
                assert sent == sizes, f"step {t}"
                continue
            for name in layout.dense:
                assert sent[name] == sizes[name], f"step {t}, {name}"
            for segment in (*layout.own, *layout.shared):
                expected = count_at(config, segment, t)
                assert sum(sent[name] for name in segment.names) == expected, f"step {t}, {segment.names}"


@pytest.mark.parametrize("case", ["lgc-ring", "lgc-ps"])
def test_the_result_does_not_depend_on_when_the_process_runs(ranks: RankFactory, runs: Runs, case: str) -> None:
    again = ranks(2).run(run_rounds, scheme_of(dataclasses.replace(CASES[case])), SHAPES, list(range(STEPS)))
    assert torch.equal(again[0].steps[-1].mean, runs(case, 2)[0].steps[-1].mean)
