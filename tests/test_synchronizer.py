"""Rounds of named tensors, without a model and without DDP: what every caller of a round can rely on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from rounds import SHAPES, gradient
from torch import Tensor

import lgc
from lgc.comm.transport import Transport
from lgc.rounds.aggregator import Round
from lgc.schemes import RoundScheme
from lgc.synchronizer import Policy

RankFactory = Callable[[int], Ranks]

PLAIN: dict[str, Any] = {"rate": 0.1, "low_pass": 1.0, "values": lgc.Float32(), "indices": lgc.RawIndices()}
SCHEMES: dict[str, RoundScheme] = {
    "dense": lgc.Dense(),
    "bf16": lgc.DenseBF16(),
    "topk": lgc.TopK(**PLAIN),
    "dgc": lgc.DGC(rate=0.1, warmup_steps=2),
    "quantized": lgc.Quantized(),
    "scalecom": lgc.ScaleCom(rate=0.1, warmup_steps=2),
    "lgc-ring": lgc.LGCRing(rate=0.1, dense_steps=1, warmup_steps=1, train_steps=2),
    "lgc-ps": lgc.LGCServer(rate=0.1, dense_steps=1, warmup_steps=1, train_steps=2),
}
STEPS = 6

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(scheme: RoundScheme, policy: Policy | None = None) -> lgc.Synchronizer:
    group = dist.distributed_c10d._get_default_group()
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return lgc.Synchronizer(scheme, tensors, Transport(group), policy)


def train(synchronizer: lgc.Synchronizer, steps: range, rank: int = 0) -> list[dict[str, Tensor]]:
    rounds = [synchronizer.synchronize(gradient(SHAPES, rank, step), step) for step in steps]
    return [{name: mean.clone() for name, mean in means.items()} for means in rounds[-1:]]


def average_of_ranks(rank: int, world_size: int, scheme: RoundScheme) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    synchronizer = make(scheme)
    means = synchronizer.synchronize(gradient(SHAPES, rank, 0), 0)
    residual = synchronizer.aggregator.layout.by_name(synchronizer.aggregator.feedback.residual)
    return {name: mean.clone() for name, mean in means.items()}, {name: part.clone() for name, part in residual.items()}


@pytest.mark.parametrize("scheme", ["dense", "topk", "quantized"])
def test_means_and_what_is_still_owed_add_up_to_what_all_ranks_gave(ranks: RankFactory, scheme: str) -> None:
    results = ranks(3).run(average_of_ranks, SCHEMES[scheme])
    for name in SHAPES:
        given = torch.stack([gradient(SHAPES, rank, 0)[name] for rank in range(3)]).mean(dim=0)
        owed = torch.stack([residual[name] for _, residual in results]).mean(dim=0)
        for means, _ in results:
            assert torch.equal(means[name], results[0][0][name])
            torch.testing.assert_close(means[name] + owed, given)


@every_scheme
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(scheme: RoundScheme) -> None:
    whole, first, second = make(scheme), make(scheme), make(scheme)
    expected = train(whole, range(STEPS))
    train(first, range(3))
    second.load_state_dict(first.state_dict(), 3)
    for got, wanted in zip(train(second, range(3, STEPS)), expected, strict=True):
        assert all(torch.equal(got[name], wanted[name]) for name in SHAPES)


@every_scheme
def test_scaled_tensors_have_scaled_means_and_leave_the_same_state(scheme: RoundScheme) -> None:
    plain, scaled = make(scheme), make(scheme)
    for step in range(2):
        tensors = gradient(SHAPES, 0, step)
        means = plain.synchronize(tensors, step)
        of_scaled = scaled.synchronize({name: 1024 * tensor for name, tensor in tensors.items()}, step, scale=1024.0)
        assert all(torch.equal(of_scaled[name], 1024 * means[name]) for name in SHAPES)
    residuals = [each.aggregator.feedback.residual for each in (plain, scaled)]
    assert torch.equal(*residuals)


@every_scheme
def test_tensors_that_are_not_finite_change_nothing(scheme: RoundScheme) -> None:
    raising, propagating = make(scheme), make(scheme, Policy(on_nonfinite="propagate"))
    bad = gradient(SHAPES, 0, 0) | {"norm1.bias": torch.full((8,), torch.inf)}
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient is not finite on rank 0"):
        raising.synchronize(bad, 0)
    assert all(mean.isnan().all() for mean in propagating.synchronize(bad, 0).values())
    for synchronizer in (raising, propagating):
        assert not synchronizer.aggregator.feedback.residual.any()


class Notes:
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.difference = 0.0

    def before_round(self, step: int, gradient: Tensor) -> None:
        self.steps.append(step)
        self.given = gradient.clone()

    def after_round(self, step: int, result: Round) -> None:
        self.difference = float((self.given - result.mean).abs().max())


def test_an_observer_is_shown_what_a_round_takes_in_and_gives() -> None:
    synchronizer, notes = make(lgc.Dense()), Notes()
    synchronizer.observers.append(notes)
    train(synchronizer, range(3))
    assert notes.steps == [0, 1, 2]
    assert notes.difference == 0.0


def test_other_tensors_than_it_was_made_for_are_refused_by_name() -> None:
    synchronizer = make(lgc.TopK(rate=0.1))
    tensors = gradient(SHAPES, 0, 0)
    with pytest.raises(ValueError, match=r"synchronize\(tensors=...\) must be those .* differs is head.bias, tail"):
        synchronizer.synchronize({"tail" if name == "head.bias" else name: t for name, t in tensors.items()}, 0)
    group = dist.distributed_c10d._get_default_group()
    with pytest.raises(ValueError, match=r"Synchronizer\(tensors=...\) must have at least one tensor"):
        lgc.Synchronizer(lgc.Dense(), {}, Transport(group))


@pytest.mark.parametrize("wrong", [torch.zeros(2, 5), torch.zeros(10, dtype=torch.int64), torch.zeros(())])
def test_a_tensor_of_another_form_is_refused_by_name(wrong: Tensor) -> None:
    tensors = gradient(SHAPES, 0, 0) | {"head.bias": wrong}
    with pytest.raises(ValueError, match=r"synchronize\(tensors=...\): head.bias must be floats \(10,\), got"):
        make(lgc.TopK(rate=0.1)).synchronize(tensors, 0)


def test_a_scheme_may_be_given_as_text_and_must_have_rounds() -> None:
    group = dist.distributed_c10d._get_default_group()
    tensors = {"w": torch.zeros(3)}
    assert lgc.Synchronizer("dense", tensors, Transport(group)).synchronize({"w": torch.ones(3)}, 0)["w"].sum() == 3
    with pytest.raises(TypeError, match=r"Synchronizer\(scheme=...\) must have rounds"):
        lgc.Synchronizer(lgc.PowerSGD(), tensors, Transport(group))  # type: ignore[arg-type]


def make_in_another_order(rank: int, world_size: int) -> None:
    tensors = {name: torch.zeros(4) for name in (("a", "b"), ("b", "a"))[rank]}
    lgc.Synchronizer("topk", tensors, Transport(dist.distributed_c10d._get_default_group()))


def synchronize_other_steps(rank: int, world_size: int) -> None:
    make(lgc.DGC(rate=0.1)).synchronize(gradient(SHAPES, rank, 0), rank)


def test_ranks_that_differ_in_their_tensors_or_steps_are_told_so_on_every_rank(ranks: RankFactory) -> None:
    for failure in ranks(2).exceptions(make_in_another_order):
        assert "Synchronizer: the ranks differ in the order of" in str(failure)
    for failure in ranks(2).exceptions(synchronize_other_steps):  # at step 0 replicas would be compared, at step 1 not
        assert "lgc: the ranks are at different steps: [0, 1] (by rank)." in str(failure)


def test_a_state_of_another_form_is_refused_and_changes_nothing() -> None:
    synchronizer = make(lgc.DGC(rate=0.1))
    train(synchronizer, range(2))
    before = synchronizer.aggregator.feedback.residual.clone()
    state = synchronizer.state_dict()
    state["per_rank"]["residual"]["head.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"residual.head.bias is \(9,\) torch.float32, here it is \(10,\)"):
        synchronizer.load_state_dict(state, 2)
    assert torch.equal(synchronizer.aggregator.feedback.residual, before)
