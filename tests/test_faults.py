"""What happens when something goes wrong on one rank: every rank learns it, by name, and nothing is lost."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import cases
from ddp_models import batch, build, optimizer_of, parameters
from ranks import Ranks, start_fork_server

import lgc
from lgc.coding import PayloadError
from lgc.comm.replicas import ReplicaError
from lgc.comm.transport import RankError

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {"rate": 0.05, "dense_steps": 2, "warmup_steps": 2, "train_steps": 2}
SCHEMES: dict[str, Any] = {
    "dgc": lgc.DGC(rate=0.05, warmup_steps=4),
    "quantized": lgc.Quantized(),
    "scalecom": lgc.ScaleCom(rate=0.05, warmup_steps=4),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ps": lgc.LGCServer(**LEARNED),
}
STEPS = 12
SEVERAL_BUCKETS = {"bucket_cap_mb": 0.001}

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


class Training:
    """A small model in training; `step` makes one step."""

    def __init__(self, rank: int, scheme: Any, of_ddp: Mapping[str, Any] = MappingProxyType({}), **attach: Any) -> None:
        self.rank = rank
        self.ddp = build("convolutional", **of_ddp)
        self.optimizer = optimizer_of(self.ddp, scheme)
        self.handle = lgc.attach(self.ddp, scheme, self.optimizer, **attach)

    def step(self) -> None:
        x, y = batch(self.rank, self.handle.step)
        self.optimizer.zero_grad()
        F.cross_entropy(self.ddp(x), y).backward()
        self.optimizer.step()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


def aggregator_of(handle: lgc.Handle) -> Any:
    assert handle.synchronizer is not None
    return handle.synchronizer.aggregator


# --- a rank that fails ---


def fail_while_preparing(rank: int, world_size: int, scheme: Any, failing: int, at: int) -> None:
    training = Training(rank, scheme)
    aggregator = aggregator_of(training.handle)
    part: Any = aggregator.own if hasattr(aggregator, "own") else aggregator.reduced
    prepare = part.prepare

    def fails(*args: Any) -> Any:
        if rank == failing and training.handle.step == at:
            raise ValueError("out of luck")
        return prepare(*args)

    part.prepare = fails
    for _ in range(STEPS):
        training.step()


def fail_and_go_on(rank: int, world_size: int) -> bool:
    training = Training(rank, SCHEMES["dgc"])
    transport = training.handle.transport
    if rank == 1:
        transport.announce(ValueError("out of luck"))
    announced = transport._store().check([transport._error_key(1)])
    training.step()
    training.step()
    return announced and not transport._store().check([transport._error_key(1)])


def test_an_error_after_which_all_ranks_went_on_is_forgotten(ranks: RankFactory) -> None:
    assert ranks(2).run(fail_and_go_on)[1]


def announce_too_much(rank: int, world_size: int, scheme: Any, length: int) -> None:
    training = Training(rank, scheme)
    transport: Any = training.handle.transport
    open_round = transport.open_round

    def exaggerate(*args: Any, **kwargs: Any) -> Any:
        own, leader = (*kwargs["numbers"], 0, 0)[:2]
        lengths = (own, leader)
        if rank == 1 and training.handle.step == 9:  # compressed, and led by rank 1
            lengths = (length, leader) if isinstance(scheme, lgc.DGC | lgc.Quantized) else (own, length)
        return open_round(*args, **kwargs | {"numbers": lengths})

    transport.open_round = exaggerate
    for _ in range(STEPS):
        training.step()


@pytest.mark.grid
@pytest.mark.parametrize("length", [2**40, -1])
@every_scheme
def test_a_payload_of_impossible_length_is_refused_before_memory_is_taken_for_it(
    ranks: RankFactory, scheme: str, length: int
) -> None:
    for failure in ranks(2).exceptions(announce_too_much, SCHEMES[scheme], length):
        assert f"bytes, as announced, got {length}" in str(failure)


@pytest.mark.grid
@pytest.mark.parametrize("at", [3, 5, 8])
@every_scheme
def test_a_rank_that_cannot_prepare_its_round_is_named_on_every_rank(ranks: RankFactory, scheme: str, at: int) -> None:
    for failure in ranks(3).exceptions(fail_while_preparing, SCHEMES[scheme], 1, at):
        assert type(failure) is RankError
        assert str(failure) == f"lgc: step {at}: rank 1: ValueError: out of luck"


def fail_amid_round(rank: int, world_size: int, scheme: Any, failing: int, timeout: float = 4.0) -> None:
    training = Training(rank, scheme, timeout=timeout)  # this process lives on, and with it its connections
    aggregator: Any = aggregator_of(training.handle)
    close = aggregator._close

    def fails(*args: Any) -> Any:
        if rank == failing and training.handle.step == 7:
            raise PayloadError("checksum", "0x1", "0x2")
        return close(*args)

    aggregator._close = fails
    for _ in range(STEPS):
        training.step()


@cases("scheme", ["dgc", "lgc-ps"], in_suite=["dgc"])
def test_a_rank_that_fails_amid_a_round_is_named_by_the_others(ranks: RankFactory, scheme: str) -> None:
    failures = ranks(3).exceptions(fail_amid_round, SCHEMES[scheme], 2)
    assert "payload field checksum must be 0x1, got 0x2" in str(failures[2])
    for failure in failures[:2]:
        assert type(failure) is RankError
        assert "rank 2: PayloadError: payload field checksum must be 0x1, got 0x2" in str(failure)


def fail_in_a_process_of_its_own(rank: int, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    fail_amid_round(rank, 2, SCHEMES["lgc-ring"], 1, 600.0)


def test_when_its_process_ends_the_others_do_not_wait_for_the_timeout() -> None:
    start_fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = mp.start_processes(
        fail_in_a_process_of_its_own, (store.port,), nprocs=2, join=False, start_method="forkserver"
    )
    try:
        with pytest.raises(mp.ProcessRaisedException, match="payload field checksum must be 0x1, got 0x2"):
            started.join(timeout=120)
    finally:
        for process in started.processes:
            process.kill()


def stop_one_rank(rank: int, world_size: int, stopping: int, seconds: float) -> float:
    training = Training(rank, SCHEMES["dgc"], timeout=seconds)
    for _ in range(3):
        training.step()
    started = time.monotonic()
    if rank == stopping:
        time.sleep(3 * seconds)
        return 0.0
    try:
        training.step()
    except RuntimeError:
        return time.monotonic() - started
    return -1.0


def test_a_rank_that_hangs_is_given_up_after_the_timeout(ranks: RankFactory) -> None:
    waited = ranks(2).run(stop_one_rank, 1, 3.0)[0]
    assert 2 < waited < 9


def kill_one_rank(rank: int, world_size: int, killed: int) -> float:
    training = Training(rank, SCHEMES["lgc-ring"])
    for _ in range(8):
        training.step()
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        training.step()
    except RuntimeError:
        return time.monotonic() - started
    return -1.0


def test_a_killed_rank_is_noticed_at_once(ranks: RankFactory) -> None:
    from ranks import RankError as RankDiedError

    with pytest.raises(RankDiedError, match="rank 1 died"):
        ranks(3).run(kill_one_rank, 1)


def lose_count(rank: int, world_size: int, scheme: Any) -> None:
    training = Training(rank, scheme)
    for step in range(STEPS):
        training.handle._caller.step += (rank, step) == (1, 7)
        x, y = batch(rank, step)
        training.optimizer.zero_grad()
        F.cross_entropy(training.ddp(x), y).backward()
        training.optimizer.step()


@every_scheme
def test_ranks_at_different_steps_are_an_error_everywhere(ranks: RankFactory, scheme: str) -> None:
    for failure in ranks(2).exceptions(lose_count, SCHEMES[scheme]):
        assert type(failure) is RankError
        assert "lgc: the ranks are at different steps: [7, 8] (by rank)." in str(failure)


# --- non-finite gradients ---


def raise_on_nan(rank: int, world_size: int, bad_rank: int, at: int) -> None:
    disabled = torch.amp.GradScaler("cpu", enabled=False)  # as scripts have it that may use float16
    training = Training(rank, SCHEMES["lgc-ring"], grad_scaler=disabled if at % 2 else None)
    for step in range(STEPS):
        x, y = batch(rank, step)
        training.optimizer.zero_grad()
        loss = F.cross_entropy(training.ddp(x), y)
        (loss * float("nan") if (rank, step) == (bad_rank, at) else loss).backward()
        training.optimizer.step()


@pytest.mark.parametrize(("at", "bad_rank"), [(1, 0), (2, 1), (5, 0), (8, 1)])
def test_without_a_grad_scaler_a_nan_is_an_error_that_names_its_rank_everywhere(
    ranks: RankFactory, at: int, bad_rank: int
) -> None:
    for failure in ranks(2).exceptions(raise_on_nan, bad_rank, at):
        assert type(failure) is FloatingPointError
        assert str(failure).startswith(f"lgc: step {at}: the gradient is not finite on rank {bad_rank}. ")
        assert 'on_nonfinite="propagate"' in str(failure)


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state.values() for tensor in tensors_of(part)] if isinstance(state, dict) else []


NONFINITE = {0: (0, math.nan), 2: (1, math.inf), 4: (2, math.nan), 7: (1, -math.inf)}  # by step, one in every phase
EVERY_STATE = SCHEMES | {
    "topk-two-stage": lgc.TopK(rate=0.05, warmup_steps=4, reduction="two_stage"),
    "lgc-ring-paper": lgc.LGCRing(**LEARNED, feedback="paper"),
    "lgc-ps-paper": lgc.LGCServer(**LEARNED, feedback="paper"),
}


def pass_over_nan(rank: int, world_size: int, scheme: Any) -> None:
    training = Training(rank, scheme, SEVERAL_BUCKETS, on_nonfinite="propagate")
    for step in range(STEPS):
        if step not in NONFINITE:
            training.step()
            assert all(torch.isfinite(p.grad).all() for p in training.ddp.parameters() if p.grad is not None)
            continue
        bad_rank, value = NONFINITE[step]
        before = tensors_of(training.handle.state_dict())
        x, y = batch(rank, step)
        training.optimizer.zero_grad()
        loss = F.cross_entropy(training.ddp(x), y)
        (loss * value if rank == bad_rank else loss).backward()
        where = f"step {step}, rank {bad_rank}"
        assert all(torch.isnan(p.grad).all() for p in training.ddp.parameters() if p.grad is not None), where
        after = tensors_of(training.handle.state_dict())
        assert len(after) == len(before), where
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), where
    assert all(torch.isfinite(p).all() for p in training.ddp.parameters())


@pytest.mark.parametrize("scheme", EVERY_STATE)
def test_a_nan_on_any_rank_in_any_phase_reaches_all_gradients_and_no_state(ranks: RankFactory, scheme: str) -> None:
    ranks(3).run(pass_over_nan, EVERY_STATE[scheme])


# --- replicas ---


def flip_a_bit(
    rank: int, world_size: int, scheme: Any, what: str, flipping: int, policy: dict[str, Any]
) -> dict[str, torch.Tensor]:
    training = Training(rank, scheme, check_every=4, **policy)
    for step in range(STEPS):
        if step == 9 and rank == flipping:
            tensor = training.ddp.module.conv2.weight if what == "parameter" else autoencoder_of(training.handle)
            with torch.no_grad():
                tensor.view(torch.int32).view(-1)[5] ^= 1 << 20
        training.step()
    for _ in range(5):
        training.step()
    return parameters(training.ddp)


def autoencoder_of(handle: Any) -> torch.Tensor:
    weight: torch.Tensor = aggregator_of(handle).autoencoder.encoder.downs[1].weight
    return weight


@pytest.mark.grid
@pytest.mark.parametrize("flipping", [0, 1, 2])
@pytest.mark.parametrize("scheme", ["dense", *SCHEMES])
def test_a_flipped_bit_of_a_parameter_is_named_within_the_interval(
    ranks: RankFactory, scheme: str, flipping: int
) -> None:
    of = SCHEMES.get(scheme, lgc.Dense())
    for failure in ranks(3).exceptions(flip_a_bit, of, "parameter", flipping, {}):
        assert type(failure) is ReplicaError
        assert f"step 12: the ranks are no longer the same: parameter conv2.weight on rank {flipping}" in str(failure)


@cases("scheme", ["lgc-ring", "lgc-ps"], in_suite=["lgc-ring"])
def test_a_flipped_bit_of_the_autoencoder_is_named(ranks: RankFactory, scheme: str) -> None:
    for failure in ranks(3).exceptions(flip_a_bit, SCHEMES[scheme], "autoencoder", 2, {}):
        assert type(failure) is ReplicaError
        assert "autoencoder encoder.downs.1.weight on rank 2" in str(failure)


@pytest.mark.parametrize("flipping", [0, 1])
def test_on_request_replicas_are_made_the_same_again_as_those_of_most(ranks: RankFactory, flipping: int) -> None:
    policy = {"on_difference": "synchronise"}
    results = ranks(3).run(flip_a_bit, SCHEMES["dgc"], "parameter", flipping, policy)
    for result in results[1:]:
        assert_same(result, results[0])
    wrong, right = (ranks(3).run(flip_and_look, flips, flipping)[2] for flips in (True, False))
    assert_same(wrong, right)


def flip_and_look(rank: int, world_size: int, flips: bool, flipping: int) -> dict[str, torch.Tensor]:
    """Parameters after a check that has found the flipped bit, where there was one."""
    training = Training(rank, lgc.Dense(), check_every=1, on_difference="synchronise")
    training.step()
    if flips and rank == flipping:
        with torch.no_grad():
            training.ddp.module.conv2.weight.view(torch.int32).view(-1)[5] ^= 1
    x, y = batch(rank, 1)
    training.optimizer.zero_grad()
    (0 * F.cross_entropy(training.ddp(x), y) + 1e-30 * training.ddp.module.conv2.weight.sum()).backward()
    return parameters(training.ddp)


def test_without_the_check_a_flipped_bit_goes_unnoticed(ranks: RankFactory) -> None:
    results = ranks(2).run(flip_without_check)
    assert not torch.equal(results[0]["conv2.weight"], results[1]["conv2.weight"])


def flip_without_check(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    training = Training(rank, SCHEMES["dgc"], check_every=0)
    training.step()
    if rank == 1:
        with torch.no_grad():
            training.ddp.module.conv2.weight.view(torch.int32).view(-1)[5] ^= 1 << 20
    for _ in range(3):
        training.step()
    return parameters(training.ddp)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("check_every", -1, "attach(check_every=...) must be an integer of at least 0, got -1"),
        ("on_difference", "ignore", "attach(on_difference=...) must be raise or synchronise, got 'ignore'"),
        ("on_nonfinite", "skip", "attach(on_nonfinite=...) must be propagate or raise, got 'skip'"),
        ("timeout", 0.0, "attach(timeout=...) must be 0.001 to 1e+06 seconds, got 0.0"),
        ("timeout", float("inf"), "attach(timeout=...) must be 0.001 to 1e+06 seconds, got inf"),
    ],
)
def test_wrong_policies_are_refused(ranks: RankFactory, argument: str, value: Any, words: str) -> None:
    (failure,) = ranks(1).exceptions(attach_with, argument, value)
    assert type(failure) is ValueError
    assert words in str(failure)


def attach_with(rank: int, world_size: int, argument: str, value: Any) -> None:
    Training(rank, SCHEMES["dgc"], **{argument: value})


# --- the autoencoder ---


def break_autoencoder(
    rank: int, world_size: int, scheme: Any, factor: float
) -> tuple[list[str], dict[str, torch.Tensor]]:
    training = Training(rank, scheme, check_every=0)
    phases = []
    for step in range(24):
        if step == 8:
            with torch.no_grad():
                for name, parameter in aggregator_of(training.handle).autoencoder.named_parameters():
                    if ".out." in name and "decoder" in name:
                        parameter.copy_(parameter * factor if factor == factor else torch.full_like(parameter, factor))
                        parameter.add_(3.0 if factor == factor else 0.0)
        training.step()
        phases.append(str(training.handle.phase))
        assert all(torch.isfinite(p).all() for p in training.ddp.parameters()), f"step {step}"
        assert torch.isfinite(aggregator_of(training.handle).feedback.residual).all(), f"step {step}"
    return phases, parameters(training.ddp)


@cases("scheme", ["lgc-ring", "lgc-ps"], in_suite=["lgc-ring"])
def test_an_autoencoder_that_gives_nan_is_replaced_by_the_values_in_the_same_step(
    ranks: RankFactory, scheme: str
) -> None:
    results = ranks(3).run(break_autoencoder, SCHEMES[scheme], float("nan"))
    for phases, trained in results:
        assert phases[8:10] == ["compressed", "train"]
        assert_same(trained, results[0][1])


def train_with_a_bad_loss(rank: int, world_size: int, scheme: Any) -> None:
    training = Training(rank, scheme)
    aggregator: Any = aggregator_of(training.handle)
    training_exchange = aggregator.others[lgc.Phase.TRAIN]
    loss_of = training_exchange.loss
    bad = [False]
    training_exchange.loss = lambda x, step: loss_of(x, step) * (float("inf") if bad[0] else 1.0)
    for step in range(STEPS):
        bad[0] = step == 4
        before = [tensor.clone() for tensor in aggregator.autoencoder.parameters()]
        training.step()
        changed = [not torch.equal(*pair) for pair in zip(aggregator.autoencoder.parameters(), before, strict=True)]
        if step in (4, 5) and rank == 0:
            assert any(changed) == (step == 5)
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(training.handle.state_dict()))


@cases("scheme", ["lgc-ring", "lgc-ps"], in_suite=["lgc-ring"])
def test_a_training_step_of_the_autoencoder_whose_loss_is_not_finite_is_skipped(
    ranks: RankFactory, scheme: str
) -> None:
    ranks(2).run(train_with_a_bad_loss, SCHEMES[scheme])


def train_with(rank: int, world_size: int, scheme: Any) -> dict[str, torch.Tensor]:
    training = Training(rank, scheme, check_every=0)
    for step in range(STEPS):
        training.step()
        assert all(torch.isfinite(tensor).all() for tensor in training.ddp.parameters()), f"step {step}"
    return parameters(training.ddp)


@pytest.mark.parametrize("scheme", [lgc.LGCRing, lgc.LGCServer])
def test_an_autoencoder_that_diverges_while_it_is_trained_ends_no_run(ranks: RankFactory, scheme: Any) -> None:
    one, other = ranks(2).run(train_with, scheme(**LEARNED, autoencoder_optimizer="sgd", autoencoder_lr=1e4))
    assert_same(one, other)


def train_on_unequal_gradients(rank: int, world_size: int, scheme: Any) -> None:
    training = Training(rank, scheme)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(STEPS):
        x, y = batch(rank, step)
        training.optimizer.zero_grad()
        (F.cross_entropy(training.ddp(x), y) * (1e12 if rank else 1e-30)).backward()
        training.optimizer.step()
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(training.handle.state_dict()))


@cases("scheme", ["lgc-ring", "lgc-ps"], in_suite=["lgc-ring"])
def test_gradients_that_differ_by_more_than_float32_can_divide_end_no_run(ranks: RankFactory, scheme: str) -> None:
    ranks(2).run(train_on_unequal_gradients, SCHEMES[scheme])


@cases("scheme", ["lgc-ring", "lgc-ps"], in_suite=["lgc-ring"])
def test_an_autoencoder_that_is_worse_than_sending_nothing_is_noticed_by_all_ranks_in_the_same_step(
    ranks: RankFactory, scheme: str
) -> None:
    results = ranks(3).run(break_autoencoder, SCHEMES[scheme], -10.0)
    for phases, trained in results:
        assert phases == results[0][0]
        assert "train" in phases[9:]
        assert_same(trained, results[0][1])
