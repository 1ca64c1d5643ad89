"""The peers: 16-bit all-reduce and torch's PowerSGD, against torch's own hooks on real ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from click.testing import CliRunner
from ddp_models import SEVERAL_BUCKETS, Trained, batch, build, optimizer_of, parameters, train
from ranks import Ranks
from runs import SMALL
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.schemes.powersgd import one_bucket_mb
from lgc_lab.cli import main
from lgc_lab.training.run_folder import SUMMARY

RankFactory = Callable[[int], Ranks]

STEPS = 8
START = 3
ONE_BUCKET: dict[str, Any] = {"bucket_cap_mb": 25}


def register_torch_hook(ddp: DistributedDataParallel, scheme: str) -> None:
    if scheme.startswith("powersgd"):
        rank = int(scheme.rpartition("=")[2])
        state = powerSGD_hook.PowerSGDState(dist.group.WORLD, rank, start_powerSGD_iter=START)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return
    compress = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}[scheme]

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return compress(state, bucket)  # under another name: DDP refuses bf16_compress_hook by its own without CUDA

    hook.__annotations__ = {}  # DDP does not accept text
    ddp.register_comm_hook(None, hook)


def train_by_torch(rank: int, world_size: int, scheme: str, arguments: dict[str, Any]) -> Trained:
    """As `ddp_models.train`, with torch's own hook in place of `attach`."""
    ddp = build("wide", **arguments)
    register_torch_hook(ddp, scheme)
    optimizer = optimizer_of(ddp, None)
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return Trained(parameters(ddp), [], [], {})


@pytest.mark.grid
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("fp16", SEVERAL_BUCKETS),
        ("bf16", SEVERAL_BUCKETS),
        ("powersgd:rank=1", ONE_BUCKET),
        ("powersgd:rank=4", ONE_BUCKET),
    ],
)
def test_parameters_are_those_of_torchs_hook(
    ranks: RankFactory, scheme: str, arguments: dict[str, Any], world_size: int
) -> None:
    text = f"{scheme}:start_steps={START}" if scheme.startswith("powersgd") else scheme
    ours = ranks(world_size).run(train, "wide", text, STEPS, arguments)
    torchs = ranks(world_size).run(train_by_torch, scheme, arguments)
    for here, there in zip(ours, torchs, strict=True):
        for name, parameter in here.parameters.items():
            assert torch.equal(parameter, ours[0].parameters[name]), name
            if scheme.startswith("powersgd"):  # not repeatable by itself: products round by where tensors lie in memory
                torch.testing.assert_close(parameter, there.parameters[name], rtol=0, atol=1e-6)
            else:
                assert torch.equal(parameter, there.parameters[name]), name


def count_bytes(rank: int, world_size: int, scheme: str) -> tuple[int, dict[str, dict[str, int]], dict[str, Any]]:
    """Number of parameters, bytes sent by phase and content, and the parameters' shapes."""
    ddp = build("wide", **ONE_BUCKET)
    handle = lgc.attach(ddp, scheme, check_every=0)
    for step in range(STEPS):
        x, y = batch(rank, step)
        ddp.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
    sent = {str(phase): dict(traffic.contents) for phase, traffic in handle.wire.phases.items() if traffic.steps}
    return handle.parameters, sent, {name: tuple(p.shape) for name, p in ddp.module.named_parameters()}


def mean_of_exact_gradients(rank: int, world_size: int, scheme: str) -> torch.Tensor:
    """Of gradients whose share, and every sum of shares, both 16-bit formats can hold."""
    ddp = DistributedDataParallel(nn.Linear(7, 5, bias=False))
    lgc.attach(ddp, scheme)
    x = torch.eye(7)
    (ddp(x) * (torch.arange(35).view(7, 5) + 20 * rank) * world_size).sum().backward()
    gradient = ddp.module.weight.grad
    assert isinstance(gradient, torch.Tensor)
    return gradient


@pytest.mark.grid
@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_16_bit_mean_is_exact_where_the_format_is(ranks: RankFactory, scheme: str, world_size: int) -> None:
    expected = world_size * torch.arange(35.0).view(7, 5).T + 10 * world_size * (world_size - 1)
    for gradient in ranks(world_size).run(mean_of_exact_gradients, scheme):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected)


@pytest.mark.grid
@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_16_bit_sends_two_bytes_a_parameter(ranks: RankFactory, scheme: str, world_size: int) -> None:
    for size, sent, _ in ranks(world_size).run(count_bytes, scheme):
        assert sent == {"dense": {"values": STEPS * (2 * (world_size - 1) * 2 * size // world_size)}}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_power_sgd_sends_its_factors_and_biases(ranks: RankFactory, rank: int) -> None:
    for size, sent, shapes in ranks(4).run(count_bytes, f"powersgd:rank={rank}:start_steps={START}"):
        numbers = 0
        for shape in shapes.values():
            elements, factors = math.prod(shape), min(rank, *shape) * sum(shape)
            numbers += factors if len(shape) == 2 and 2 * factors < elements else elements
        assert sent == {
            "dense": {"values": START * 6 * size},  # 2 (K-1)/K times 4 bytes
            "compressed": {"factors": (STEPS - START) * 6 * numbers},
        }


def test_power_sgd_refuses_several_buckets_on_every_rank(ranks: RankFactory) -> None:
    for exception in ranks(2).exceptions(train, "wide", "powersgd:rank=1", STEPS, SEVERAL_BUCKETS):
        assert isinstance(exception, RuntimeError)
        assert "several buckets" in str(exception)
        assert "bucket_cap_mb" in str(exception)


def test_power_sgd_refuses_a_search_for_unused_parameters_on_every_rank(ranks: RankFactory) -> None:
    for exception in ranks(2).exceptions(train, "wide", "powersgd:rank=1", 1, {"find_unused_parameters": True}):
        assert isinstance(exception, ValueError)
        assert "find_unused_parameters=True, with which torch's PowerSGD hook aborts" in str(exception)


def train_then_resume(rank: int, world_size: int) -> tuple[int, list[str]]:
    scheme = lgc.PowerSGD(start_steps=2)
    first, second = (build("wide", **ONE_BUCKET) for _ in range(2))
    handles = [lgc.attach(ddp, scheme) for ddp in (first, second)]
    phases = []
    for ddp, handle in zip((first, second), handles, strict=True):
        handle.load_state_dict(handles[0].state_dict() if handle is handles[1] else handle.state_dict())
        for step in range(3):
            x, y = batch(rank, step)
            ddp.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            phases.append(str(handle.phase))
    return handles[1].step, phases


def test_resumed_power_sgd_starts_uncompressed_again(ranks: RankFactory) -> None:
    for step, phases in ranks(2).run(train_then_resume):
        assert step == 6
        assert phases == ["dense", "dense", "compressed"] * 2


def test_bounds() -> None:
    with pytest.raises(ValueError, match=r"PowerSGD\(rank=\.\.\.\) must be at least 1, got 0"):
        lgc.PowerSGD(rank=0)
    with pytest.raises(ValueError, match=r"PowerSGD\(start_steps=\.\.\.\) must be at least 2, got 1"):
        lgc.parse_scheme("powersgd:start_steps=1")
    with pytest.raises(ValueError, match=r"fp16 has no argument 'rate'"):
        lgc.parse_scheme("fp16:rate=0.1")
    assert str(lgc.parse_scheme("powersgd:rank=2")) == "powersgd:rank=2"


def test_one_bucket_mb_counts_trained_parameters_only() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 4096).requires_grad_(False))
    assert one_bucket_mb(model) == 5


def test_train_command_takes_the_peers(tmp_path: Path) -> None:
    command = ["compare", "--recipe", SMALL, "--workers", "2", "--schemes", "bf16,powersgd:rank=2:start_steps=3"]
    command += ["--steps", "6", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bf16" / SUMMARY).exists()
    assert (tmp_path / "powersgd,rank=2,start_steps=3" / SUMMARY).exists()
