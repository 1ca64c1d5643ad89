"""Real DistributedDataParallel models on real gloo ranks, through `lgc.attach`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import cases
from ddp_models import (
    MODELS,
    SEVERAL_BUCKETS,
    Trained,
    batch,
    build,
    optimizer_of,
    parameters,
    traffic,
    train,
)
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lgc

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {
    "rate": 0.02,
    "dense_steps": 2,
    "warmup_steps": 3,
    "train_steps": 3,
    "autoencoder_updates": 1,
    "refresh_below": 0.0,
}
SCHEMES: dict[str, Any] = {
    "dense": lgc.Dense(),
    "topk": lgc.TopK(rate=0.02, warmup_steps=4),
    "topk-two-stage": lgc.TopK(rate=0.02, warmup_steps=4, reduction="two_stage"),
    "dgc": lgc.DGC(rate=0.02, warmup_steps=5, clip_norm=1.0),
    "dgc-two-stage": lgc.DGC(rate=0.02, warmup_steps=5, reduction="two_stage"),
    "quantized": lgc.Quantized(reduction="two_stage"),
    "scalecom": lgc.ScaleCom(rate=0.02, momentum=0.9, warmup_steps=5),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ring-paper": lgc.LGCRing(**LEARNED, feedback="paper"),
    "lgc-ps": lgc.LGCServer(**LEARNED),
    "lgc-ps-paper": lgc.LGCServer(**LEARNED, feedback="paper"),
}
LEARNING: dict[str, Any] = {  # an autoencoder needs some values and some steps before it is of use
    "dgc": lgc.DGC(rate=0.1, warmup_steps=10),
    "lgc-ring": lgc.LGCRing(rate=0.1, dense_steps=5, warmup_steps=10, train_steps=40, autoencoder_updates=1),
    "lgc-ps": lgc.LGCServer(rate=0.1, dense_steps=5, warmup_steps=10, train_steps=40, autoencoder_updates=1),
}
COMPRESSING = [name for name in SCHEMES if name != "dense"]
LGC = [name for name in SCHEMES if name.startswith("lgc")]
STEPS = 11

ONE_OF_A_KIND = ("dense", "dgc-two-stage", "quantized", "scalecom", "lgc-ring", "lgc-ps")
every_scheme = cases("scheme", SCHEMES, in_suite=ONE_OF_A_KIND)
Alone = Callable[[str], list[Trained]]


@pytest.fixture(scope="module")
def alone(ranks: RankFactory) -> Alone:
    """`alone(scheme)`: the convolutional model trained by two ranks, with nothing special; every scheme once."""
    return cache(lambda scheme: ranks(2).run(train, "convolutional", SCHEMES[scheme], STEPS))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor has the same bits."""
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor is the same within float tolerance."""
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=tolerance, msg=f"{name}: {{}}".format)


# --- dense against plain DDP ---


def train_both(rank: int, world_size: int, model: str, arguments: dict[str, Any], micro: int) -> list[Trained]:
    return [train(rank, world_size, model, scheme, 8, arguments, micro_batches=micro) for scheme in (None, lgc.Dense())]


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("model", "arguments", "micro_batches"),
    [
        ("wide", SEVERAL_BUCKETS, 1),
        ("wide", {"bucket_cap_mb": 100, "gradient_as_bucket_view": True}, 1),
        ("wide", SEVERAL_BUCKETS | {"static_graph": True}, 1),
        ("convolutional", {"bucket_cap_mb": 0.001, "find_unused_parameters": True}, 2),
        ("transformer", {}, 1),
        ("bfloat16", {"bucket_cap_mb": 0.001}, 1),
    ],
)
def test_dense_equals_plain_ddp_bit_for_bit(
    ranks: RankFactory, model: str, arguments: dict[str, Any], micro_batches: int, world_size: int
) -> None:
    for plain, dense in ranks(world_size).run(train_both, model, arguments, micro_batches):
        assert plain.losses == dense.losses
        assert_same(dense.parameters, plain.parameters)


# --- the same training run whatever DDP does with its buckets ---

VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "several small buckets": (SEVERAL_BUCKETS, 1),
    "a bucket for every tensor": ({"bucket_cap_mb": 0.0001}, 1),
    "static graph": (SEVERAL_BUCKETS | {"static_graph": True}, 1),
    "find unused parameters": (SEVERAL_BUCKETS | {"find_unused_parameters": True}, 1),
    "gradients as bucket views": (SEVERAL_BUCKETS | {"gradient_as_bucket_view": True}, 1),
    "no_sync accumulation": (SEVERAL_BUCKETS, 2),
}


def train_variants(rank: int, world_size: int, scheme: Any) -> dict[str, Trained]:
    everything: dict[str, tuple[dict[str, Any], int]] = {
        "one bucket": ({"bucket_cap_mb": 100}, 1),
        **VARIANTS,
    }
    return {
        name: train(rank, world_size, "wide", scheme, STEPS, arguments, micro_batches)
        for name, (arguments, micro_batches) in everything.items()
    }


@cases("scheme", ["dgc-two-stage", "lgc-ring", "lgc-ps-paper"], in_suite=("dgc-two-stage",))
def test_buckets_do_not_change_the_training_run(ranks: RankFactory, scheme: str) -> None:
    exact: dict[str, Any] = {"values": lgc.Float32()}  # a coded value may turn with the last bit of a sum
    exact |= {"latent": lgc.Float32()} if scheme in LGC else {}
    for variants in ranks(2).run(train_variants, dataclasses.replace(SCHEMES[scheme], **exact)):
        one = variants.pop("one bucket")
        for name, other in variants.items():
            assert other.bytes_by_phase == one.bytes_by_phase, name
            assert other.phases == one.phases, name
            if name == "no_sync accumulation":  # sums the same numbers in another order
                assert_close(other.parameters, one.parameters, tolerance=1e-4)
            else:
                assert_same(other.parameters, one.parameters)


class Skipping(nn.Module):
    """Convolutions, one of which not every step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        h = self.first(x)
        last: Tensor = self.last(h if skip else h + self.middle(h))
        return last


def train_in(rank: int, world_size: int, memory_format: torch.memory_format, scheme: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: nn.Module = Skipping().to(memory_format=memory_format)  # type: ignore[call-overload]
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    lgc.attach(ddp, scheme, optimizer)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=memory_format)
        ddp(x, step % 3 == 2).square().mean().backward()
        optimizer.step()
    return parameters(ddp)


@pytest.mark.parametrize(
    "scheme", ["topk:rate=0.1:unit=kernel", "lgc-ring:rate=0.1:dense_steps=1:warmup_steps=1:train_steps=2"]
)
def test_a_models_memory_format_does_not_matter(ranks: RankFactory, scheme: str) -> None:
    plain, *_ = ranks(2).run(train_in, torch.contiguous_format, scheme)
    channels_last, *_ = ranks(2).run(train_in, torch.channels_last, scheme)
    for name, parameter in plain.items():
        torch.testing.assert_close(channels_last[name], parameter)


class Forked(nn.Module):
    """One layer for rank 0 and one for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.other if dist.get_rank() else self.one)(x)
        return y


def use_one_layer(rank: int, world_size: int, scheme: Any, views: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Forked(), find_unused_parameters=True, gradient_as_bucket_view=views)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if scheme is not None:
        lgc.attach(ddp, scheme, optimizer)
    for step in range(3):
        optimizer.zero_grad(set_to_none=step != 1)
        ddp(torch.full((2, 4), 1.0 + rank)).sum().backward()
        optimizer.step()
    return parameters(ddp)


@pytest.mark.parametrize("views", [True, False])
def test_ranks_may_use_different_parameters(ranks: RankFactory, views: bool) -> None:
    everything = lgc.TopK(rate=1.0, values=lgc.Float32(), low_pass=1.0)
    (plain, _), full = (ranks(2).run(use_one_layer, scheme, views) for scheme in (None, everything))
    for result in full:
        for name, parameter in plain.items():
            torch.testing.assert_close(result[name], parameter)


# --- exactness across ranks, phases, any module ---


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [3, 4])
@every_scheme
def test_parameters_stay_bit_identical_across_ranks(ranks: RankFactory, scheme: str, world_size: int) -> None:
    results = ranks(world_size).run(train, "convolutional", SCHEMES[scheme], STEPS)
    for result in results[1:]:
        assert_same(result.parameters, results[0].parameters)
    assert all(torch.isfinite(tensor).all() for tensor in results[0].parameters.values())


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 2])
@every_scheme
def test_the_handle_crosses_the_phases_at_the_configured_steps(
    ranks: RankFactory, scheme: str, world_size: int
) -> None:
    of = SCHEMES[scheme]
    lengths = {
        "dense": STEPS if scheme == "dense" else getattr(of, "dense_steps", 0),
        "warmup": getattr(of, "warmup_steps", 0),
        "train": getattr(of, "train_steps", 0),
    }
    expected = [phase for phase, length in lengths.items() for _ in range(length)]
    expected += ["compressed"] * (STEPS - len(expected))
    for result in ranks(world_size).run(train, "convolutional", of, STEPS):
        assert result.phases == expected
        counted = {name: steps for name, (steps, _, _) in result.bytes_by_phase.items() if steps}
        assert counted == {phase: expected.count(phase) for phase in set(expected)}


@pytest.mark.parametrize("model", [model for model in MODELS if model != "wider"])
def test_at_rate_one_any_module_trains_as_with_plain_ddp(ranks: RankFactory, model: str) -> None:
    everything = lgc.TopK(rate=1.0, values=lgc.Float32())
    for plain, full in zip(
        ranks(2).run(train, model, None, 10), ranks(2).run(train, model, everything, 10), strict=True
    ):
        for name in plain.parameters:
            assert full.parameters[name].dtype == plain.parameters[name].dtype
            tolerance = 0.05 if plain.parameters[name].dtype == torch.bfloat16 or model == "bfloat16" else 1e-5
            torch.testing.assert_close(full.parameters[name], plain.parameters[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", [lgc.LGCRing, lgc.LGCServer])
def test_the_autoencoder_is_trained_again_after_every_so_many_compressed_steps(
    ranks: RankFactory, scheme: Callable[..., Any]
) -> None:
    refreshed = scheme(**(LEARNED | {"train_steps": 2, "refresh_every": 4, "refresh_steps": 3}))
    results = ranks(3).run(train, "convolutional", refreshed, 21)
    expected = ["dense"] * 2 + ["warmup"] * 3 + ["train"] * 2 + (["compressed"] * 4 + ["train"] * 3) * 2
    for result in results:
        assert result.phases == expected
        assert_same(result.parameters, results[0].parameters)


@pytest.mark.grid
@pytest.mark.parametrize("model", [model for model in MODELS if model not in ("wide", "wider")])
@pytest.mark.parametrize("scheme", LEARNING)
def test_any_module_learns(ranks: RankFactory, scheme: str, model: str) -> None:
    results = ranks(2).run(train, model, LEARNING[scheme], 100)
    for result in results:
        assert_same(result.parameters, results[0].parameters)
    losses = [sum(losses) for losses in zip(*(result.losses for result in results), strict=True)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def frozen_parameters(rank: int, world_size: int) -> dict[str, Tensor]:
    return {k: v for k, v in parameters(build("partly-frozen")).items() if k.startswith("frozen")}


def test_frozen_parameters_are_left_alone(ranks: RankFactory) -> None:
    before = ranks(1).run(frozen_parameters)[0]
    after = ranks(2).run(train, "partly-frozen", SCHEMES["lgc-ring"], STEPS)[0].parameters
    assert_same({name: after[name] for name in before}, before)


@every_scheme
def test_a_single_rank_sends_nothing(ranks: RankFactory, scheme: str) -> None:
    (result,) = ranks(1).run(train, "convolutional", SCHEMES[scheme], STEPS)
    assert all(sent == received == 0 for _, sent, received in result.bytes_by_phase.values())


def parameter_groups(rank: int, world_size: int) -> dict[str, Tensor]:
    ddp = build("convolutional")
    weights = [p for p in ddp.parameters() if p.dim() > 1]
    small = [p for p in ddp.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": small, "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    lgc.attach(ddp, SCHEMES["dgc"], optimizer)
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return parameters(ddp)


def test_several_parameter_groups_train(ranks: RankFactory) -> None:
    results = ranks(2).run(parameter_groups)
    assert_same(results[1], results[0])


def with_adam(rank: int, world_size: int, scheme: Any) -> dict[str, Tensor]:
    ddp = build("convolutional")
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)
    lgc.attach(ddp, scheme, optimizer)
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return parameters(ddp)


def test_adam_trains_with_plain_error_feedback(ranks: RankFactory) -> None:
    results = ranks(2).run(with_adam, lgc.LGCRing(**LEARNED, momentum=0.0))
    assert_same(results[1], results[0])


# --- backward without zero_grad ---


def backward_twice(rank: int, world_size: int, scheme: Any, zero_grad: bool, step_first: bool) -> None:
    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    lgc.attach(ddp, scheme, optimizer)
    for step in range(3):
        x, y = batch(rank, step)
        loss = F.cross_entropy(ddp(x), y)
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()
        if step_first:
            optimizer.step()


@pytest.mark.grid
@pytest.mark.parametrize("step_first", [True, False], ids=["after a step", "before a step"])
@pytest.mark.parametrize("scheme", COMPRESSING)
def test_a_second_backward_without_zero_grad_is_refused_on_every_rank(
    ranks: RankFactory, scheme: str, step_first: bool
) -> None:
    for failure in ranks(2).exceptions(backward_twice, SCHEMES[scheme], False, step_first):
        assert isinstance(failure, RuntimeError)
        assert "zero_grad" in str(failure)


@every_scheme
def test_zero_grad_between_forward_and_backward_is_enough(ranks: RankFactory, scheme: str) -> None:
    assert ranks(2).exceptions(backward_twice, SCHEMES[scheme], True, True) == [None, None]


def zero_in_place(rank: int, world_size: int, scheme: Any) -> dict[str, Tensor]:
    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    lgc.attach(ddp, scheme, optimizer)
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return parameters(ddp)


@every_scheme
def test_gradients_zeroed_in_place_train_as_gradients_set_to_none(
    ranks: RankFactory, alone: Alone, scheme: str
) -> None:
    for in_place, to_none in zip(ranks(2).run(zero_in_place, SCHEMES[scheme]), alone(scheme), strict=True):
        assert_same(in_place, to_none.parameters)


# --- uneven inputs, two models, torch.compile ---


def uneven(rank: int, world_size: int, scheme: Any) -> dict[str, Tensor]:
    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    lgc.attach(ddp, scheme, optimizer)
    with ddp.join():
        for step in range(4 + 3 * rank):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    return parameters(ddp)


@every_scheme
def test_uneven_inputs_under_join_work(ranks: RankFactory, scheme: str) -> None:
    results = ranks(3).run(uneven, SCHEMES[scheme])
    for result in results:
        assert_same(result, results[0])
        assert all(torch.isfinite(tensor).all() for tensor in result.values())


def uneven_and_checked(rank: int, world_size: int, scheme: Any, on_difference: Any) -> dict[str, Tensor]:
    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    lgc.attach(ddp, scheme, optimizer, check_every=1, on_difference=on_difference)
    with ddp.join():
        for step in range(4 + 3 * rank):
            if rank == world_size - 1 and step == 12:
                before = parameters(ddp)
            x, y = batch(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            if rank == world_size - 1 and step == 12:
                assert_same(parameters(ddp), before)  # not those of a rank that is done
            optimizer.step()
    return parameters(ddp)


@pytest.mark.grid
@pytest.mark.parametrize("on_difference", ["raise", "synchronise"])
@pytest.mark.parametrize("scheme", ["dense", "dgc", "lgc-ring"])
def test_ranks_whose_inputs_have_run_out_are_not_compared(ranks: RankFactory, scheme: str, on_difference: str) -> None:
    results = ranks(4).run(uneven_and_checked, SCHEMES[scheme], on_difference)
    for result in results:
        assert_same(result, results[0])


# --- ranks that compute differently ---


def decoding(rank: int, world_size: int, scheme: Any, alike: bool) -> tuple[dict[str, Tensor], bool | None]:
    ddp = build("wide")
    optimizer = optimizer_of(ddp, scheme)
    handle = lgc.attach(ddp, scheme, optimizer, check_every=1)
    torch.backends.mkldnn.set_flags(_enabled=alike or rank > 0)
    try:
        for step in range(STEPS):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
    assert handle.synchronizer is not None
    aggregator: Any = handle.synchronizer.aggregator
    return parameters(ddp), aggregator.watch.exact


@pytest.mark.grid
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs two kinds of kernels")
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("scheme", LGC)
def test_ranks_with_other_hardware_decode_the_same(ranks: RankFactory, scheme: str, alike: bool) -> None:
    (first, exact), *others = ranks(3).run(decoding, SCHEMES[scheme], alike)
    assert exact is not alike
    for other, _ in others:
        assert_same(other, first)


BACKEND_OF_TORCHS_CHOICE = """
import torch, torch.distributed as dist, lgc
dist.init_process_group()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(40, 3))
handle = lgc.attach(model, lgc.LGCRing(rate=0.1, dense_steps=1, warmup_steps=2, train_steps=1))
for _ in range(5):
    model.zero_grad()
    model(torch.ones(2, 40)).sum().backward()
print(handle.phase, handle.wire_summary()["sent_bytes"])
dist.destroy_process_group()
"""


def test_the_backend_may_be_left_to_torch() -> None:
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", BACKEND_OF_TORCHS_CHOICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "compressed 0\n", done.stderr


def used_after_ddp(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    handle = lgc.attach(ddp, SCHEMES["dgc"], optimizer_of(ddp, SCHEMES["dgc"]))
    x, y = batch(rank, 0)
    F.cross_entropy(ddp(x), y).backward()
    module, left = ddp.module, weakref.ref(handle)
    del ddp, handle
    gc.collect()
    assert left() is None
    F.cross_entropy(module(x), y).backward()  # adds to the mean, as is usual without DDP


def test_nothing_is_left_on_a_model_that_is_used_without_ddp(ranks: RankFactory) -> None:
    ranks(2).run(used_after_ddp)


def two_models(rank: int, world_size: int, first: Any, second: Any) -> list[Trained]:
    models = [build("convolutional", seed=0), build("convolutional", seed=0)]
    schemes = [first, second]
    optimizers = [optimizer_of(model, scheme) for model, scheme in zip(models, schemes, strict=True)]
    handles = [
        lgc.attach(model, scheme, optimizer)
        for model, scheme, optimizer in zip(models, schemes, optimizers, strict=True)
    ]
    for step in range(STEPS):
        x, y = batch(rank, step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [Trained(parameters(model), [], [], traffic(handle)) for model, handle in zip(models, handles, strict=True)]


def test_two_models_in_one_process_train_as_each_alone(ranks: RankFactory, alone: Alone) -> None:
    schemes = ["lgc-ring", "dgc"]
    for rank, together in enumerate(ranks(2).run(two_models, *(SCHEMES[scheme] for scheme in schemes))):
        for one, scheme in zip(together, schemes, strict=True):
            assert_same(one.parameters, alone(scheme)[rank].parameters)
            assert one.bytes_by_phase == alone(scheme)[rank].bytes_by_phase


@pytest.mark.grid
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@cases("scheme", ["dense", "topk", "lgc-ring"], in_suite=["topk", "lgc-ring"])
def test_a_compiled_model_trains_as_an_uncompiled_one(ranks: RankFactory, scheme: str, backend: str) -> None:
    plain = ranks(2).run(train, "wider", SCHEMES[scheme], STEPS, {"bucket_cap_mb": 1})
    compiled = ranks(2).run(train, "wider", SCHEMES[scheme], STEPS, {"bucket_cap_mb": 1}, 1, backend)
    for one, other in zip(plain, compiled, strict=True):
        assert_close(other.parameters, one.parameters)
        assert other.bytes_by_phase == one.bytes_by_phase


# --- parameters that get no gradient in some steps ---


class Branches(nn.Module):
    """Two weights of which a step uses one; the loss is linear in them, so gradients are known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(6, 8))
        self.right = nn.Parameter(torch.zeros(6, 8))
        self.both = nn.Parameter(torch.zeros(5, 4))

    def forward(self, coefficients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(getattr(self, name) * c).sum() for name, c in coefficients.items()]).sum()


def coefficients(rank: int, step: int, everyone: bool) -> dict[str, Tensor]:
    """Which branches a rank uses in a step: all ranks the same one (`everyone`), or each its own."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    branch = "left" if (step if everyone else step + rank) % 3 else "right"
    shapes = {branch: (6, 8), "both": (5, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def branches(
    rank: int, world_size: int, scheme: Any, everyone: bool, set_to_none: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the parameters moved by, and what the rank's feedback still holds, at a learning rate of 1."""
    ddp = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    handle = lgc.attach(ddp, scheme, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        ddp(coefficients(rank, step, everyone)).backward()
        optimizer.step()
    assert handle.synchronizer is not None
    slices = scheme.layout(list(ddp.module.named_parameters())).slices
    residual = {name: handle.synchronizer.aggregator.feedback.residual[place].clone() for name, place in slices.items()}
    return {name: -value for name, value in parameters(ddp).items()}, residual


@pytest.mark.parametrize("set_to_none", [True, False], ids=["set to None", "zeroed"])
@pytest.mark.parametrize("everyone", [True, False], ids=["no rank uses it", "some ranks use it"])
@pytest.mark.parametrize(
    "scheme",
    [lgc.TopK(rate=0.1, warmup_steps=0), lgc.ScaleCom(rate=0.1, momentum=0.0, warmup_steps=0)],
    ids=["topk", "scalecom"],
)
def test_what_is_owed_to_a_parameter_without_gradient_is_delivered(
    ranks: RankFactory, scheme: Any, everyone: bool, set_to_none: bool
) -> None:
    """Moved + average residual / low_pass = sum over the steps of the average gradient."""
    world_size = 2
    results = ranks(world_size).run(branches, scheme, everyone, set_to_none)
    for name, moved in results[0][0].items():
        total = torch.zeros_like(moved)
        for step in range(STEPS):
            for rank in range(world_size):
                total += coefficients(rank, step, everyone).get(name, torch.zeros_like(moved)) / world_size
        owed = torch.stack([residual[name] for _, residual in results]).mean(0).view_as(moved)
        torch.testing.assert_close(moved + owed / scheme.low_pass, total, rtol=1e-4, atol=1e-4)
        assert_same(results[1][0], results[0][0])


# --- Adam ---


def same_data(rank: int, world_size: int, scheme: Any) -> dict[str, Tensor]:
    """AdamW after the exchange without a scheme; with one SGD, as the scheme makes Adam's step."""
    ddp = build("wide")
    if scheme is None:
        adamw = torch.optim.AdamW(ddp.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer: torch.optim.Optimizer = adamw
    else:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, weight_decay=0.1)
        lgc.attach(ddp, scheme, optimizer)
    for step in range(STEPS):
        x, y = batch(0, step)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return parameters(ddp)


def test_adams_step_before_the_exchange_is_adamw_where_all_is_sent(ranks: RankFactory) -> None:
    everything = lgc.TopK(rate=1.0, values=lgc.Float32(), momentum=0.9, second_moment=0.95)
    plain = ranks(2).run(same_data, None)[0]
    for result in ranks(2).run(same_data, everything):
        for name, parameter in plain.items():
            torch.testing.assert_close(result[name], parameter, rtol=1e-3, atol=1e-4)


# --- what attach refuses, and what it warns of ---


def attach_to_module(rank: int, world_size: int) -> None:
    lgc.attach(nn.Linear(3, 3), lgc.TopK(rate=0.1))


def attach_to_fsdp1(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu"))
    lgc.attach(sharded, lgc.TopK(rate=0.1))


def attach_to_fsdp2(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Linear(4, 4)
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    lgc.attach(module, lgc.TopK(rate=0.1))


def attach_twice(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    lgc.attach(ddp, lgc.TopK(rate=0.1))
    lgc.attach(ddp, lgc.TopK(rate=0.1))


def attach_over_foreign_hook(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    ddp.register_comm_hook(None, allreduce_hook)
    lgc.attach(ddp, lgc.TopK(rate=0.1))


def attach_with(rank: int, world_size: int, scheme: Any, optimizer: str, arguments: dict[str, Any]) -> None:
    ddp = build("convolutional")
    lgc.attach(ddp, scheme, getattr(torch.optim, optimizer)(ddp.parameters(), **arguments))


def attach_with_two_momenta_in_groups(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    groups = [{"params": [p]} for p in ddp.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[-1]["momentum"] = 0.5
    lgc.attach(ddp, lgc.DGC(rate=0.1), optimizer)


def attach_with_anothers_optimizer(rank: int, world_size: int) -> None:
    lgc.attach(build("convolutional"), lgc.DGC(rate=0.1), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def attach_with_arguments(rank: int, world_size: int, scheme: Any, arguments: dict[str, Any]) -> None:
    lgc.attach(build("convolutional"), scheme, **arguments)


def train_with_momentum_set_later(rank: int, world_size: int) -> None:
    ddp = build("convolutional")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    lgc.attach(ddp, lgc.DGC(rate=0.1), optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    x, y = batch(rank, 0)
    F.cross_entropy(ddp(x), y).backward()


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "words"),
    [
        (attach_to_module, (), TypeError, ("DistributedDataParallel", "Linear")),
        (attach_to_fsdp1, (), TypeError, ("FSDP", "DistributedDataParallel")),
        (attach_to_fsdp2, (), TypeError, ("FSDP", "DistributedDataParallel")),
        (attach_twice, (), RuntimeError, ("attach",)),
        (attach_over_foreign_hook, (), RuntimeError, ("hook",)),
        (
            attach_with,
            (lgc.DGC(rate=0.1), "SGD", {"lr": 0.1, "momentum": 0.9}),
            ValueError,
            ("momentum", "0.9"),
        ),
        (
            attach_with,
            (lgc.LGCRing(rate=0.1), "SGD", {"lr": 0.1, "momentum": 0.5}),
            ValueError,
            ("momentum", "0.5"),
        ),
        (attach_with_two_momenta_in_groups, (), ValueError, ("momentum", "0.5")),
        (attach_with, (lgc.DGC(rate=0.1), "Adam", {}), ValueError, ("Adam", "momentum")),
        (attach_with, (lgc.DGC(second_moment=0.9), "Adam", {}), ValueError, ("makes Adam's step", "Train with SGD")),
        (attach_with, (lgc.TopK(second_moment=0.9), "RMSprop", {}), ValueError, ("RMSprop would make another one",)),
        (attach_with, (lgc.LGCServer(rate=0.1), "AdamW", {}), ValueError, ("AdamW", "momentum")),
        (train_with_momentum_set_later, (), ValueError, ("momentum", "0.95", "scheduler")),
        (attach_with_anothers_optimizer, (), ValueError, ("optimizer", "none of the model's parameters")),
        (attach_with_arguments, (lgc.DGC, {}), TypeError, ("scheme", "such as lgc.DGC()")),
        (attach_with_arguments, ("dgc", {"timeout": "60"}), ValueError, ("timeout", "0.001 to 1e+06 seconds", "'60'")),
        (attach_with_arguments, ("dgc", {"grad_scaler": 1}), TypeError, ("grad_scaler", "got 1")),
        (attach_with_arguments, ("dgc", {"optimizer": "sgd"}), TypeError, ("optimizer", "got str")),
    ],
)
def test_attach_refuses_on_every_rank_and_says_what_to_do(
    ranks: RankFactory,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    kind: type[Exception],
    words: tuple[str, ...],
) -> None:
    for failure in ranks(2).exceptions(function, *arguments):
        assert type(failure) is kind, repr(failure)
        for word in words:
            assert word in str(failure)


def attach_with_arguments_of_rank_one(rank: int, world_size: int, given: str, names: tuple[str, ...]) -> None:
    ddp = build("convolutional")
    arguments: dict[str, Any] = {
        "optimizer": torch.optim.SGD(ddp.parameters(), lr=0.1),
        "grad_scaler": torch.amp.GradScaler("cpu"),
        "buffers_every": 0,
    }
    lgc.attach(ddp, given, **{name: arguments[name] for name in names if rank == 1})


@pytest.mark.parametrize(
    ("scheme", "names", "words"),
    [
        ("dgc", ("optimizer",), "attach: the ranks differ in optimizer: rank 0: [], rank 1: ['SGD']."),
        ("dgc", ("grad_scaler",), "attach: the ranks differ in grad_scaler: rank 0: False, rank 1: True."),
        ("dgc", ("buffers_every",), "attach(buffers_every=...) must be an integer of at least 1, or None, got 0."),
        ("local", ("optimizer",), "attach(optimizer=...) must be the model's under LocalSteps"),
    ],
)
def test_what_only_one_rank_is_given_is_named_on_every_rank(
    ranks: RankFactory, scheme: str, names: tuple[str, ...], words: str
) -> None:
    for failure in ranks(2).exceptions(attach_with_arguments_of_rank_one, scheme, names):
        assert words in str(failure)


class Pair(nn.Module):
    """Two layers of one shape, in either order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


def attach_in_another_order(rank: int, world_size: int) -> None:
    lgc.attach(DistributedDataParallel(Pair(*("qk", "kq")[rank])), lgc.TopK(rate=0.5))


def test_ranks_whose_parameters_are_in_another_order_are_refused(ranks: RankFactory) -> None:
    for failure in ranks(2).exceptions(attach_in_another_order):
        assert type(failure) is RuntimeError
        assert "order of parameters" in str(failure)
        assert "rank 0: parameter q.weight, rank 1: parameter k.weight" in str(failure)


class Root(nn.Module):
    """A parameter of the module itself, complex or not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        self.out = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out((x.to(self.weight.dtype) @ self.weight).real)
        return result


def attach_complex(rank: int, world_size: int, scheme: Any) -> None:
    lgc.attach(DistributedDataParallel(Root(torch.complex64)), scheme)


def test_complex_parameters_are_for_schemes_that_send_everything(ranks: RankFactory) -> None:
    assert ranks(2).exceptions(attach_complex, lgc.Dense()) == [None, None]
    for scheme in (lgc.TopK(rate=0.1), lgc.ScaleCom(rate=0.1)):
        for failure in ranks(2).exceptions(attach_complex, scheme):
            assert type(failure) is ValueError
            assert "complex parameters (weight)" in str(failure)


def ignore_parameters(rank: int, world_size: int, ignored: str) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(0)
    module = Root(torch.float32)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [ignored])
    ddp = DistributedDataParallel(module)
    handle = lgc.attach(ddp, lgc.TopK(rate=1.0, values=lgc.Float32(), low_pass=1))
    ddp(torch.full((3, 2), 1.0 + rank)).sum().backward()
    return {name: p.grad.clone() for name, p in ddp.module.named_parameters() if p.grad is not None}, handle.parameters


@pytest.mark.parametrize(("ignored", "exchanged"), [("weight", 10), (".weight", 6), ("out.weight", 6)])
def test_what_ddp_leaves_out_of_its_buckets_is_left_out(ranks: RankFactory, ignored: str, exchanged: int) -> None:
    (first, count), (second, _) = ranks(2).run(ignore_parameters, ignored)
    assert count == exchanged
    alike = {name for name in first if torch.equal(first[name], second[name])}
    assert alike == set(first) - ({ignored.removeprefix(".")} if exchanged < 10 else set())


def train_one_layer(rank: int, world_size: int, everything_is_zeroed: bool) -> dict[str, Tensor]:
    ddp = build("wide")
    optimizer = torch.optim.SGD(ddp.module.layers[-1].parameters(), lr=0.1)
    with TestCase().assertLogs("lgc.advice") if rank == 0 else nullcontext() as advice:
        lgc.attach(ddp, lgc.DGC(rate=0.1, warmup_steps=0), optimizer)
    assert advice is None or "the optimizer given to attach does not have layers." in advice.output[0]
    for step in range(STEPS):
        x, y = batch(rank, step)
        (ddp if everything_is_zeroed else optimizer).zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return parameters(ddp)


def test_an_optimizer_of_a_part_of_the_model_has_only_that_to_zero(ranks: RankFactory) -> None:
    for part, everything in zip(*(ranks(2).run(train_one_layer, zeroed) for zeroed in (False, True)), strict=True):
        assert_same(part, everything)


def train_beside_double_precision(rank: int, world_size: int, scheme: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    ddp = build("convolutional")
    inputs = [batch(rank, step) for step in range(STEPS)]
    torch.set_default_dtype(dtype)
    try:
        optimizer = optimizer_of(ddp, scheme)
        lgc.attach(ddp, scheme, optimizer)
        for x, y in inputs:
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    return parameters(ddp)


@every_scheme
def test_the_default_dtype_does_not_matter(ranks: RankFactory, scheme: str) -> None:
    (single,), (double,) = (
        ranks(1).run(train_beside_double_precision, SCHEMES[scheme], dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_same(double, single)


def overflow_second_moment(rank: int, world_size: int) -> tuple[bool, float]:
    ddp = build("single-layer")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    handle = lgc.attach(ddp, lgc.TopK(rate=0.5, second_moment=0.9), optimizer, on_nonfinite="propagate")
    x, _ = batch(rank, 0)
    (ddp(x).sum() * (1e25 if rank else 1.0)).backward()
    assert handle.synchronizer is not None
    second = handle.synchronizer.aggregator.feedback.second_moment_buffer
    assert second is not None
    return bool(torch.isnan(ddp.module.only.weight.grad).all()), float(second.abs().max())


def test_a_gradient_whose_square_overflows_is_not_finite_for_adam(ranks: RankFactory) -> None:
    assert ranks(2).run(overflow_second_moment) == [(True, 0.0), (True, 0.0)]


def attach_recording_warnings(rank: int, world_size: int, model: str, broadcast_buffers: bool) -> list[str]:
    ddp = build(model, broadcast_buffers=broadcast_buffers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lgc.attach(ddp, lgc.TopK(rate=0.1))
    return [str(warning.message) for warning in caught]


def test_attach_warns_of_buffers_that_ddp_broadcasts(ranks: RankFactory) -> None:
    assert any(
        "broadcast_buffers" in text for text in ranks(2).run(attach_recording_warnings, "convolutional", True)[0]
    )
    assert ranks(2).run(attach_recording_warnings, "convolutional", False) == [[], []]
    assert ranks(2).run(attach_recording_warnings, "wide", True) == [[], []]


def attach_different(rank: int, world_size: int, schemes: tuple[Any, Any], models: tuple[str, str]) -> None:
    ddp = build(models[0])
    which = int(rank == world_size - 1)
    if models[0] != models[1]:  # the same shapes for DDP's own check, another name
        ddp.module.renamed = ddp.module.head
        if which:
            del ddp.module.head
    lgc.attach(ddp, schemes[which])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("schemes", "words"),
    [
        ((lgc.TopK(rate=0.01), lgc.TopK(rate=0.02)), ("rate", "0.01", "0.02")),
        (
            (lgc.DGC(rate=0.01, warmup_steps=5), lgc.DGC(rate=0.01, warmup_steps=50)),
            ("warmup_steps", "5", "50"),
        ),
        ((lgc.TopK(rate=0.01), lgc.ScaleCom(rate=0.01)), ("scheme", "topk", "scalecom")),
        (
            (lgc.LGCRing(rate=0.01), lgc.LGCRing(rate=0.01, feedback="paper")),
            ("feedback", "paper", "reconstruction"),
        ),
        ((lgc.LGCServer(rate=0.01), lgc.LGCServer(rate=0.01, innovation=0.5)), ("innovation", "0.01", "0.5")),
        ((lgc.LGCRing(rate=0.01, seed=1), lgc.LGCRing(rate=0.01, seed=2)), ("seed", "1", "2")),
        ((lgc.TopK(rate=0.01), lgc.TopK(rate=0.01, roles={"head.*": lgc.Role.DENSE})), ("roles", "head.*")),
        ((lgc.Dense(), lgc.TopK(rate=0.01)), ("scheme", "dense", "topk")),
    ],
)
def test_a_configuration_that_differs_between_ranks_is_refused_on_every_rank(
    ranks: RankFactory, schemes: tuple[Any, Any], words: tuple[str, ...], world_size: int
) -> None:
    for failure in ranks(world_size).exceptions(attach_different, schemes, ("convolutional", "convolutional")):
        assert type(failure) is RuntimeError, repr(failure)
        for word in words:
            assert word in str(failure)


# --- grad_scaler ---


def scaled(rank: int, world_size: int, scheme: Any, scaling: bool) -> tuple[dict[str, Tensor], list[float]]:
    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=2.0**10, growth_interval=3)
    lgc.attach(ddp, scheme, optimizer, grad_scaler=scaler)
    scales = []
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(ddp(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return parameters(ddp), scales


@pytest.mark.grid
@pytest.mark.parametrize("scaling", [True, False])
@every_scheme
def test_a_grad_scaler_whose_scale_changes_does_not_change_the_training_run(
    ranks: RankFactory, alone: Alone, scheme: str, scaling: bool
) -> None:
    for (trained, scales), plain in zip(ranks(2).run(scaled, SCHEMES[scheme], scaling), alone(scheme), strict=True):
        assert scaling == (len(set(scales)) > 3)
        assert_close(trained, plain.parameters)


# --- state ---


def interrupted(rank: int, world_size: int, scheme: Any, stop: int) -> list[dict[str, Tensor]]:
    """Train; at step `stop`, save everything; go on with that, and with a new model, optimizer and handle."""

    def train_on(steps: range) -> dict[str, Tensor]:
        for step in steps:
            x, y = batch(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
        return parameters(ddp)

    ddp = build("convolutional")
    optimizer = optimizer_of(ddp, scheme)
    handle = lgc.attach(ddp, scheme, optimizer)
    train_on(range(stop))
    saved = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), handle.state_dict()))
    straight = train_on(range(stop, STEPS))
    ddp = build("convolutional", seed=1)
    ddp.module.load_state_dict(saved[0])
    optimizer = optimizer_of(ddp, scheme)
    optimizer.load_state_dict(saved[1])
    handle = lgc.attach(ddp, scheme, optimizer)
    handle.load_state_dict(saved[2])
    assert handle.step == stop
    return [straight, train_on(range(stop, STEPS))]


@pytest.mark.grid
@pytest.mark.parametrize("stop", [4, 9])  # in the warm-up and when compressed; tests/test_checkpoint.py has all phases
@every_scheme
def test_a_run_goes_on_from_its_state_dict_as_if_never_interrupted(ranks: RankFactory, scheme: str, stop: int) -> None:
    for straight, resumed in ranks(2).run(interrupted, SCHEMES[scheme], stop):
        assert_same(resumed, straight)
