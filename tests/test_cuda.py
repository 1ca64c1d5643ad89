"""On a GPU: ranks that share one by gloo, and one rank alone, with NCCL. `lgc train` takes a GPU by itself, so that
where there is one all tests of the command line run on it too."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_models import Trained, batch, build, optimizer_of, parameters, train
from ranks import Ranks
from runs import measured
from torch import Tensor

import lgc
from lgc.comm.messages import Sum, ToEach
from lgc.comm.transport import Transport
from lgc_lab.launch.ranks import pick_device
from lgc_lab.training.settings import Output, Settings
from lgc_lab.training.train import run_locally

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {"rate": 0.05, "dense_steps": 3, "warmup_steps": 5, "train_steps": 6, "refresh_below": 0.0}
SCHEMES: dict[str, Any] = {
    "dense": lgc.Dense(),
    "fp16": lgc.DenseFP16(),
    "bf16": lgc.DenseBF16(),
    "powersgd": lgc.PowerSGD(start_steps=3),
    "topk": lgc.TopK(rate=0.05, warmup_steps=4),
    "dgc": lgc.DGC(rate=0.05, warmup_steps=6, clip_norm=1.0),
    "dgc-two-stage": lgc.DGC(rate=0.05, warmup_steps=6, reduction="two_stage"),
    "dgc-adam": lgc.DGC(rate=0.05, warmup_steps=6, second_moment=0.95),
    "scalecom": lgc.ScaleCom(rate=0.05, momentum=0.9, warmup_steps=6),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ring-paper": lgc.LGCRing.paper(**LEARNED),
    "lgc-ps": lgc.LGCServer(**LEARNED),
}
STEPS = 20
# Adam's first step is the sign of a gradient, or of its rounding; and where there is a GPU torch's PowerSGD hook fails
# on a model that is not on it.
OTHERWISE_ON_CPUS = ("dgc-adam", "powersgd")

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def train_deterministically(rank: int, world_size: int, scheme: Any, device: str, backend: str = "gloo") -> Trained:
    """Only with kernels that torch knows to be deterministic; it raises at others."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    try:
        arguments = {"process_group": dist.new_group(backend=backend)}
        return train(rank, world_size, "convolutional", scheme, STEPS, arguments, device=device)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(actual: Trained, expected: Trained) -> None:
    assert actual.losses == expected.losses
    assert actual.bytes_by_phase == expected.bytes_by_phase
    assert all(torch.equal(actual.parameters[name], tensor) for name, tensor in expected.parameters.items())


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in OTHERWISE_ON_CPUS])
def test_ranks_that_share_a_gpu_train_as_on_the_cpu(ranks: RankFactory, scheme: str) -> None:
    on_gpu = ranks(3).run(train_deterministically, SCHEMES[scheme], "cuda")
    on_cpu = ranks(3).run(train_deterministically, SCHEMES[scheme], "cpu")
    for here, there in zip(on_gpu, on_cpu, strict=True):
        assert here.phases == there.phases
        assert here.losses[0] == pytest.approx(there.losses[0], rel=1e-5)
        assert here.losses[:3] == pytest.approx(there.losses[:3], rel=0.02)  # rounding may change what is selected
        assert here.bytes_by_phase.keys() == there.bytes_by_phase.keys()
        for phase, (steps, sent, received) in there.bytes_by_phase.items():  # and with it the length of its code
            assert here.bytes_by_phase[phase][0] == steps
            assert here.bytes_by_phase[phase][1:] == pytest.approx((sent, received), rel=0.05)


@pytest.mark.parametrize("world_size", [2, 3])
@every_scheme
def test_ranks_that_share_a_gpu_stay_bit_identical(ranks: RankFactory, scheme: str, world_size: int) -> None:
    results = ranks(world_size).run(train_deterministically, SCHEMES[scheme], "cuda")
    for result in results:
        assert all(torch.equal(result.parameters[name], tensor) for name, tensor in results[0].parameters.items())


@every_scheme
def test_on_a_gpu_a_run_gives_the_same_bits_again(ranks: RankFactory, scheme: str) -> None:
    runs = [ranks(2).run(train_deterministically, SCHEMES[scheme], "cuda") for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


@every_scheme
def test_one_rank_with_nccl_trains_as_with_gloo(ranks: RankFactory, scheme: str) -> None:
    (nccl,) = ranks(1).run(train_deterministically, SCHEMES[scheme], "cuda", "nccl")
    (gloo,) = ranks(1).run(train_deterministically, SCHEMES[scheme], "cuda", "gloo")
    assert_same(nccl, gloo)


def collectives_over_nccl(rank: int, world_size: int) -> list[Tensor]:
    transport = Transport(dist.new_group(backend="nccl"), torch.device("cuda", 0))
    assert transport.device.type == "cuda"
    host, payload = torch.arange(5.0), torch.arange(7, dtype=torch.uint8)
    gathered = transport.gather(host.cuda(), "values")
    assert gathered is not None
    together = [
        transport.all_reduce(host.cuda(), "values"),
        transport.all_gather(host, "values")[0],
        transport.broadcast(host.cuda(), "values", source=0),
        gathered[0],
    ]
    posts = [ToEach(content="values", payloads=[payload], lengths=[7], limit=7), Sum(content="", tensor=host.cuda())]
    together += [tensor for results in transport.together(posts) for tensor in results]
    assert [tensor.device.type for tensor in together] == ["cuda", "cpu", "cuda", "cuda", "cpu", "cuda"]
    return [tensor.cpu() for tensor in together]


def test_collectives_take_tensors_of_either_device_to_nccl_and_bring_them_back(ranks: RankFactory) -> None:
    (results,) = ranks(1).run(collectives_over_nccl)
    for result in results:
        assert torch.equal(result, torch.arange(len(result)).to(result.dtype))


def in_half_precision(rank: int, world_size: int, scheme: Any) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, scales and parameters of a run under float16 autocast; its first scale overflows."""
    ddp = build("convolutional", device="cuda")
    optimizer = optimizer_of(ddp, scheme)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=30)
    lgc.attach(ddp, scheme, optimizer, grad_scaler=scaler)
    losses, scales = [], []
    for step in range(100):
        x, y = (tensor.cuda() for tensor in batch(rank, step))
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.cross_entropy(ddp(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, scales, parameters(ddp)


@pytest.mark.parametrize("scheme", ["dgc", "scalecom", "lgc-ring", "lgc-ps"])
def test_float16_with_a_grad_scaler_learns_through_an_overflow(ranks: RankFactory, scheme: str) -> None:
    results = ranks(2).run(in_half_precision, SCHEMES[scheme])
    for losses, scales, weights in results:
        assert scales[-1] < 2.0**24
        assert all(torch.equal(weights[name], tensor) for name, tensor in results[0][2].items())
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_rank_for_each_gpu_takes_nccl_and_more_ranks_gloo() -> None:
    gpus = torch.cuda.device_count()
    assert pick_device(0, gpus) == (torch.device("cuda", 0), "nccl")
    assert pick_device(gpus, gpus + 1) == (torch.device("cuda", 0), "gloo")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("scheme", ["dense", "lgc-ring:dense_steps=4:warmup_steps=4:train_steps=4"])
def test_lgc_train_runs_on_the_gpu_and_gives_the_same_numbers_again(tmp_path: Path, scheme: str, workers: int) -> None:
    settings = Settings(recipe="digits", scheme=scheme, world_size=workers, batch_size=8, steps=16, bf16=True)
    for name in ("first", "second"):
        assert run_locally(settings, Output(folder=tmp_path / name), timedelta(seconds=60), overwrite=False)
    assert measured(tmp_path / "first") == measured(tmp_path / "second")
