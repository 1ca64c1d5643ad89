"""Sites: ranks that hold one copy of the model between them, and take part in the rounds of local steps as one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
from local_runs import differ, exact
from ranks import Ranks
from site_runs import Inside, Net, NetWithStatistics, Place, SiteRun, batch, whole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc.comm.transport import RankError

RankFactory = Callable[[int], Ranks]

EXCHANGES = {
    "dense": lgc.Dense(),
    "quantized": lgc.Quantized(),
    "two-stage": lgc.Quantized(reduction="two_stage"),
    "topk": lgc.TopK(rate=0.1),
    "scalecom": lgc.ScaleCom(rate=0.1, warmup_steps=2),
}
UNCODED = exact(start_steps=2, start=lgc.Float32())
every_inside = pytest.mark.parametrize("inside", ["ddp", "fsdp"])


def train(
    rank: int, world_size: int, places: int, scheme: lgc.LocalSteps, inside: Inside, steps: int
) -> tuple[dict[str, Tensor], list[float], dict[str, Any]]:
    """Weights, losses and byte counts after a run that has been finished."""
    run = SiteRun(Place(rank, world_size, places), scheme, inside).train(range(steps))
    run.handle.finish()
    return run.weights(), run.losses, run.handle.wire_summary()


@every_inside
@pytest.mark.parametrize("moments", ["own", "all"])
def test_sites_train_as_single_ranks_with_all_of_a_sites_samples(
    ranks: RankFactory, inside: Inside, moments: Any
) -> None:
    scheme = replace(UNCODED, first_moments=moments)
    of_sites, of_ranks = ranks(4).run(train, 2, scheme, inside, 9), ranks(2).run(train, 1, scheme, "plain", 9)
    assert not differ([weights for weights, _, _ in of_sites])
    for name, each in of_ranks[0][0].items():
        torch.testing.assert_close(of_sites[0][0][name], each, rtol=1e-4, atol=1e-5)
    for site in (0, 1):
        for step, loss in enumerate(of_ranks[site][1]):
            halves = [of_sites[2 * site + place][1][step] for place in (0, 1)]
            assert sum(halves) / 2 == pytest.approx(loss, abs=1e-4)


@pytest.mark.grid
@every_inside
@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"overlap": True}, {"fragments": 2, "overlap": True}, {"ahead": 0.5, "first_moments": "all"}],
    ids=str,
)
def test_all_ranks_of_all_sites_have_the_same_weights_at_the_end(
    ranks: RankFactory, exchange: Any, arguments: dict[str, Any], inside: Inside
) -> None:
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=2, **arguments)
    results = ranks(4).run(train, 2, scheme, inside, 11)
    assert not differ([weights for weights, _, _ in results])
    torch.manual_seed(0)
    assert torch.equal(results[0][0]["rows.weight"][16:], Net().rows.weight[16:])  # rows that no rank has seen


class Wide(nn.Module):
    """Larger, so that what a round sends is more than its headers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(64, 128)
        self.hidden = nn.Linear(128, 512)
        self.out = nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.hidden(self.rows(x)).relu())
        return logits


def count(rank: int, world_size: int, places: int, inside: Inside) -> tuple[dict[str, Any], dict[str, Any]]:
    scheme = lgc.LocalSteps(every=2, start_steps=1)
    run = SiteRun(Place(rank, world_size, places), scheme, inside, net=Wide, check_every=0).train(range(5))
    return run.handle.wire_summary(), run.handle.wire_summary(of_all=False)


@every_inside
def test_between_two_sites_travels_what_two_ranks_send_whatever_is_inside(ranks: RankFactory, inside: Inside) -> None:
    (of_sites, own), *others = ranks(4).run(count, 2, inside)
    of_ranks, _ = ranks(2).run(count, 1, "plain")[0]
    assert all(summary == of_sites for summary, _ in others)
    assert of_sites["sent_bytes"] == sum(each["sent_bytes"] for _, each in [(of_sites, own), *others])
    phases = [phase["sent_bytes"] for phase in of_sites["phases"]]
    assert phases == pytest.approx([phase["sent_bytes"] for phase in of_ranks["phases"]], rel=0.05)
    assert of_sites["ratio_compressed_phase"] == pytest.approx(of_ranks["ratio_compressed_phase"], rel=0.05)
    weights = 4 * sum(each.numel() for each in Wide().parameters())
    inside_bytes = sum(phase["sent_bytes"] for phase in of_sites["inside"]["phases"] if phase["name"] != "setup")
    rounds = 3  # of the start, and two
    assert (inside_bytes >= rounds * 2 * weights) == (inside == "ddp")
    assert "inside" not in of_ranks


def alone(rank: int, world_size: int, scheme: lgc.LocalSteps, inside: Inside, between: bool) -> dict[str, Tensor]:
    run = SiteRun(Place(rank, world_size, 1), scheme, inside, between=between).train(range(11))
    run.handle.finish()
    return run.weights()


@pytest.mark.grid
@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
@pytest.mark.parametrize("inside", ["plain", "ddp", "fsdp"])
def test_one_rank_a_site_is_what_local_steps_are_without_sites(
    ranks: RankFactory, inside: Inside, exchange: Any
) -> None:
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=2)
    without = ranks(2).run(alone, scheme, "plain", False)
    for with_sites in ranks(2).run(alone, scheme, inside, True):
        assert not differ([with_sites, without[0]])


def one_site(rank: int, world_size: int, inside: Inside) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A site that is alone, and the same training with what one rank's local steps do by hand."""
    where = Place(rank, world_size, 2)
    run = SiteRun(where, exact(outer_lr=0.7, outer_momentum=0.9), inside).train(range(8))
    by_hand = SiteRun(where, lgc.LocalSteps(every=100, start_steps=0), inside)
    anchor = by_hand.weights()
    momentum = {name: torch.zeros_like(each) for name, each in anchor.items()}
    for first in (0, 4):
        by_hand.train(range(first, first + 4))
        for name, each in by_hand.net.named_parameters():
            moved = anchor[name] - whole(each)
            momentum[name] = 0.9 * momentum[name] + moved
            anchor[name] -= 0.7 * (moved + 0.9 * momentum[name])
            with torch.no_grad():
                target: Any = each
                if inside == "fsdp":
                    from torch.distributed.tensor import distribute_tensor

                    target.copy_(distribute_tensor(anchor[name], target.device_mesh, target.placements))
                else:
                    target.copy_(anchor[name])
    return run.weights(), by_hand.weights()


@every_inside
def test_one_site_alone_does_what_one_rank_does(ranks: RankFactory, inside: Inside) -> None:
    for weights, by_hand in ranks(2).run(one_site, inside):
        assert not differ([weights, by_hand])


def interrupted(rank: int, world_size: int, scheme: lgc.LocalSteps, inside: Inside, stop: int) -> list[Any]:
    where = Place(rank, world_size, 2)
    whole_run = SiteRun(where, scheme, inside, adam=True).train(range(13))
    first = SiteRun(where, scheme, inside, adam=True).train(range(stop))
    second = SiteRun(where, scheme, inside, adam=True).load(first.state()).train(range(stop, 13))
    return [(run.weights(), run.handle.wire, run.handle.step) for run in (whole_run, second)]


@pytest.mark.grid
@every_inside
@pytest.mark.parametrize(
    ("arguments", "stop"),
    [({}, 1), ({}, 8), ({"overlap": True}, 9), ({"ahead": 0.5, "first_moments": "all"}, 8)],
    ids=str,
)
def test_a_run_of_sites_goes_on_from_its_state_with_the_same_bits(
    ranks: RankFactory, inside: Inside, arguments: dict[str, Any], stop: int
) -> None:
    scheme = lgc.LocalSteps(every=4, start_steps=2, **arguments)
    for uninterrupted, resumed in ranks(4).run(interrupted, scheme, inside, stop):
        assert uninterrupted[1:] == resumed[1:]
        assert not differ([uninterrupted[0], resumed[0]])


def save(rank: int, world_size: int, folder: Path, inside: Inside, steps: int) -> tuple[dict[str, Tensor], ...]:
    """What all share at the end of it, and the weights of a run that goes on."""
    where = Place(rank, world_size, 2)
    run = SiteRun(where, lgc.LocalSteps(every=4, start_steps=2), inside, adam=True).train(range(steps))
    lgc.checkpoint.save(folder, run.state(), step=steps, group=where.everyone)
    with run.handle.anchored():
        shared = run.weights()
    run.train(range(steps, 13)).handle.finish()
    return shared, run.weights()


def resume(rank: int, world_size: int, folder: Path, inside: Inside) -> tuple[dict[str, Tensor], ...]:
    where = Place(rank, world_size, 2)
    run = SiteRun(where, lgc.LocalSteps(every=4, start_steps=2), inside, adam=True)
    if inside == "fsdp":
        with pytest.raises(lgc.checkpoint.CheckpointError, match=r"a shard of model/rows.weight: give load\(mesh="):
            lgc.checkpoint.resume(folder, group=where.everyone)
    state = lgc.checkpoint.resume(folder, group=where.everyone, mesh=where.mesh["shard"])
    assert state is not None
    run.load(state)
    with run.handle.anchored():
        shared = run.weights()
    run.train(range(run.handle.step, 13)).handle.finish()
    return shared, run.weights()


@every_inside
def test_files_of_all_ranks_bring_a_run_back_and_one_of_another_number_of_sites(
    ranks: RankFactory, inside: Inside, tmp_path: Path
) -> None:
    saved, resumed = ranks(4).run(save, tmp_path, inside, 8), ranks(4).run(resume, tmp_path, inside)
    for before, after in zip(saved, resumed, strict=True):
        assert not differ([before[0], after[0]])
        assert not differ([before[1], after[1]])
    alone = ranks(2).run(resume, tmp_path, inside)
    assert not differ([saved[0][0], *(shared for shared, _ in alone)])
    assert not differ([weights for _, weights in alone])


def keep(
    rank: int, world_size: int, folder: Path, places: int, inside: Inside, scheme: lgc.LocalSteps, load: bool
) -> tuple[dict[str, Tensor], Any]:
    """Train and save, or load, by torch's checkpoint: what a handle has, whole, and all bytes between sites."""
    from torch.distributed import checkpoint  # seconds, which only these ranks need

    where = Place(rank, world_size, places)
    run = SiteRun(where, scheme, inside, net=NetWithStatistics)
    if load:
        lgc.checkpoint.load_distributed(run.handle, checkpoint_id=folder)
    else:
        state = {"handle": lgc.checkpoint.distributed_state(run.train(range(8)).handle)}
        checkpoint.save(state, checkpoint_id=folder)
    return flat(run.handle.state_dict(whole=True)["aggregator"]), run.handle.wire_summary()["sent_bytes"]


def flat(state: Any, path: str = "") -> dict[str, Tensor]:
    """Copies of what is in a nested state, whole, by its path."""
    if isinstance(state, dict):
        return {key: each for name in state for key, each in flat(state[name], f"{path}/{name}").items()}
    return {path: whole(state if isinstance(state, Tensor) else torch.tensor(state))}


@pytest.mark.parametrize(
    ("inside", "reduction", "arguments"),
    [
        pytest.param("ddp", "two_stage", {"overlap": True}, marks=pytest.mark.exhaustive),
        pytest.param("ddp", "gather", {"ahead": 0.5, "first_moments": "all"}, marks=pytest.mark.exhaustive),
        pytest.param("fsdp", "gather", {"ahead": 0.5, "first_moments": "all"}, marks=pytest.mark.exhaustive),
        ("fsdp", "two_stage", {"overlap": True}),
    ],
    ids=str,
)
def test_torchs_checkpoint_brings_the_state_to_other_numbers_of_sites_and_ranks(
    ranks: RankFactory, inside: Inside, reduction: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    exchange = lgc.Quantized(reduction=reduction)
    scheme = lgc.LocalSteps(every=4, exchange=exchange, start_steps=2, fragments=2, outer_momentum=0.9, **arguments)
    saved = ranks(4).run(keep, tmp_path, 2, inside, scheme, False)
    served = any("server_residual" in path and each.any() for path, each in saved[0][0].items())
    assert served == (reduction == "two_stage")
    taken_over = {(2, 2): [[0], [1], [2], [3]], (2, 1): [[0, 1], [2, 3]], (1, 4): [[0, 1, 2, 3]] * 4}
    for (sites, places), takes in taken_over.items():
        for rank, (state, sent) in enumerate(ranks(sites * places).run(keep, tmp_path, places, inside, scheme, True)):
            assert sent == saved[0][1]
            if places == 2:
                assert not differ([state, saved[rank][0]])
            for path, each in owed(state).items():
                own = "per_rank/buffers" in path or "before/buffers" in path  # a rank's, and all else a site's
                old = [rank] if own and sites * places == 4 else takes[rank]
                mean = torch.stack([owed(saved[of][0])[path].double() for of in old]).mean(0)
                torch.testing.assert_close(each, mean.to(each.dtype))


def owed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `flat` gives, with what a rank owes as a server among its residual."""
    servers = {path.replace("/server_", "/"): each for path, each in state.items() if "/server_residual/" in path}
    return {path: each + servers.get(path, 0) for path, each in state.items() if "/server_" not in path}


def know(rank: int, world_size: int, folder: Path, places: int, inside: Inside, load: bool) -> tuple[bytes, bytes]:
    """What codes know of earlier rounds at first, and once a run has trained and saved, or loaded; then it goes on."""
    from torch.distributed import checkpoint

    def past() -> bytes:
        known: bytes = run.handle.state_dict()["aggregator"]["replicated"]["round 0"]["past"]["own"]
        return known

    exchange = lgc.TopK(rate=0.1, indices=lgc.Recent(), values=lgc.RecentSign())
    where = Place(rank, world_size, places)
    run = SiteRun(where, lgc.LocalSteps(every=2, exchange=exchange, start_steps=0), inside)
    at_first = past()
    if load:
        lgc.checkpoint.load_distributed(run.handle, checkpoint_id=folder)
    else:
        handle = lgc.checkpoint.distributed_state(run.train(range(8)).handle)
        checkpoint.save({"handle": handle}, checkpoint_id=folder)
    known = past()
    run.train(range(8, 12)).handle.finish()
    return at_first, known


@pytest.mark.parametrize("inside", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_what_codes_know_is_of_a_place_in_all_sites_and_forgotten_where_the_model_is_cut_otherwise(
    ranks: RankFactory, inside: Inside, tmp_path: Path
) -> None:
    saved = [known for _, known in ranks(4).run(know, tmp_path, 2, inside, False)]
    assert saved[0] == saved[2] != saved[1] == saved[3]
    assert [known for _, known in ranks(4).run(know, tmp_path, 2, inside, True)] == saved
    for (at_first, known), of_two in zip(ranks(2).run(know, tmp_path, 2, inside, True), saved, strict=False):
        assert len(known) < len(of_two)  # of one site
        assert known != at_first
    for at_first, known in ranks(2).run(know, tmp_path, 1, "plain", True):
        assert known == at_first


def keep_on(
    rank: int, world_size: int, folder: Path, places: int, inside: Inside, load: bool
) -> tuple[dict[str, Tensor], int]:
    """A run that saves amid a round, or one from there; its weights at the end."""
    from torch.distributed import checkpoint

    where = Place(rank, world_size, places)
    scheme = exact(start_steps=2, start=lgc.Float32(), outer_momentum=0.9)
    run = SiteRun(where, scheme, inside)
    key = f"optimizer {where.site}"
    if load:
        moments = {name: torch.zeros_like(each) for name, each in run.net.named_parameters()}
        checkpoint.load({key: moments}, checkpoint_id=folder)
        for name, each in run.net.named_parameters():
            run.optimizer.state[each]["momentum_buffer"] = moments[name]
        lgc.checkpoint.load_distributed(run.handle, checkpoint_id=folder)
    else:
        run.train(range(8))
        moments = {name: run.optimizer.state[each]["momentum_buffer"] for name, each in run.net.named_parameters()}
        handle = lgc.checkpoint.distributed_state(run.handle)
        checkpoint.save({key: moments, "handle": handle}, checkpoint_id=folder)
    first = run.handle.step
    run.train(range(first, 12)).handle.finish()
    return run.weights(), first


@pytest.mark.parametrize("inside", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_a_run_goes_on_from_it_with_one_rank_a_site_as_with_two(
    ranks: RankFactory, inside: Inside, tmp_path: Path
) -> None:
    undisturbed, *_ = ranks(4).run(keep_on, tmp_path, 2, inside, False)
    for weights, first in ranks(2).run(keep_on, tmp_path, 1, "plain", True):
        assert first == 8
        for name, each in weights.items():
            torch.testing.assert_close(each, undisturbed[0][name], rtol=1e-4, atol=1e-5)


def look_at_the_anchor(rank: int, world_size: int, inside: Inside) -> list[dict[str, Tensor]]:
    run = SiteRun(Place(rank, world_size, 2), exact(), inside).train(range(4))
    at_round, own = run.weights(), run.train(range(4, 6)).weights()
    with run.handle.anchored():
        anchored = run.weights()
    return [at_round, anchored, own, run.weights()]


@every_inside
def test_anchored_shows_on_all_ranks_what_the_last_round_left(ranks: RankFactory, inside: Inside) -> None:
    results = ranks(4).run(look_at_the_anchor, inside)
    for at_round, anchored, own, after in results:
        assert not differ([anchored, at_round])
        assert not differ([own, after])
    assert not differ([results[0][2], results[1][2]])
    assert "hidden.weight" in differ([results[0][2], results[2][2]])


def poison(rank: int, world_size: int, inside: Inside, on_nonfinite: Any, at: str) -> tuple[str, dict[str, Tensor]]:
    run = SiteRun(Place(rank, world_size, 2), exact(start_steps=2), inside, on_nonfinite=on_nonfinite)
    run.train(range(1 if at == "start" else 4))
    if at == "start":
        run.gradients(1)
        if rank == 3:
            gradient: Any = run.net.out.bias.grad
            (gradient.to_local() if inside == "fsdp" else gradient)[-1] = torch.nan
    elif rank == 3:
        weight: Any = run.net.hidden.weight.detach()
        (weight.to_local() if inside == "fsdp" else weight)[-1] = torch.nan
    try:
        if at == "start":
            run.optimizer.step()
        run.train(range(4, 6))
    except FloatingPointError as error:
        return str(error), {}
    run.handle.finish()
    return "", run.weights()


@every_inside
@pytest.mark.parametrize("at", ["start", "round"])
def test_what_is_not_finite_on_one_rank_is_an_error_on_every_rank(ranks: RankFactory, inside: Inside, at: str) -> None:
    for message, _ in ranks(4).run(poison, inside, "raise", at):
        assert "not finite on site 1" in message


@every_inside
def test_or_its_site_counts_for_nothing_in_the_round_and_goes_on(ranks: RankFactory, inside: Inside) -> None:
    results = ranks(4).run(poison, inside, "propagate", "round")
    assert not differ([weights for _, weights in results])
    assert all(each.isfinite().all() for each in results[0][1].values())


def go_wrong(rank: int, world_size: int, what: str) -> None:
    run = SiteRun(Place(rank, world_size, 2), exact(), "ddp").train(range(4))
    if rank == 3 and what == "unfrozen":
        run.net.late = nn.Parameter(torch.zeros(2))
    if rank == 3 and what == "coding":
        run.handle.synchronizer.aggregator.exchanges = None  # type: ignore[method-assign,union-attr]
    if rank > 1 and what == "another step":
        run.handle._caller.step += 1
    run.train(range(4, 9)).handle.finish()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfrozen", "lgc: step 8: site 1: RankError: lgc: step 8: rank 1: RuntimeError: late is trained now"),
        ("another step", "different steps"),
        ("coding", "'NoneType' object is not callable"),
    ],
)
def test_an_error_of_one_rank_reaches_its_site_and_its_peers(ranks: RankFactory, what: str, message: str) -> None:
    for error in ranks(4).exceptions(go_wrong, what):
        assert message in str(error)


def keep_statistics(rank: int, world_size: int) -> tuple[dict[str, Tensor], int, float]:
    where = Place(rank, world_size, 2)
    run = SiteRun(where, exact(), "ddp", net=NetWithStatistics).train(range(10))
    run.handle.finish()
    sent = run.handle.wire.phases["compressed"].contents
    return run.weights(), sent.get("buffers", 0), run.net.norm.running_mean.abs().sum().item()


def test_buffers_are_brought_together_between_all_ranks_and_sent_once_a_site(ranks: RankFactory) -> None:
    results = ranks(4).run(keep_statistics)
    assert not differ([weights for weights, _, _ in results])
    assert results[0][2] > 0
    assert [sent > 0 for _, sent, _ in results] == [True, False, True, False]


def freeze(rank: int, world_size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    run = SiteRun(Place(rank, world_size, 2), exact(outer_momentum=0.9), "fsdp")
    run.train(range(6)).net.hidden.requires_grad_(False)
    at_round = run.train(range(6, 8)).weights()["hidden.weight"]
    weights = run.train(range(8, 16)).weights()
    return weights, at_round, weights["hidden.weight"]


def test_what_is_frozen_comes_together_at_the_next_round_and_rests(ranks: RankFactory) -> None:
    results = ranks(4).run(freeze)
    assert not differ([weights for weights, _, _ in results])
    for _, at_round, at_end in results:
        assert torch.equal(at_round, at_end)


def clip_in_half_precision(rank: int, world_size: int) -> tuple[dict[str, Tensor], list[float], float]:
    """A sharded run whose parameters stay gathered after a forward pass without a backward one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    where = Place(rank, world_size, 2)
    torch.manual_seed(0)
    net: Any = Net()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(net, mesh=where.mesh["shard"], mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheme = lgc.LocalSteps(every=2, start_steps=2)
    handle = lgc.attach(net, scheme, optimizer, between=where.mesh["site"])
    x, y = batch(where.site, where.place, 0)
    losses, norm = [], 0.0
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).float(), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1).full_tensor().item()  # type: ignore[attr-defined]
        optimizer.step()
        with handle.anchored(), torch.no_grad():
            losses.append(nn.functional.cross_entropy(net(x).float(), y).item())
    handle.finish()
    return {name: whole(each) for name, each in net.named_parameters()}, losses, norm


def test_a_sharded_model_may_clip_and_compute_in_half_precision(ranks: RankFactory) -> None:
    results = ranks(4).run(clip_in_half_precision)
    assert not differ([weights for weights, _, _ in results])
    for _, losses, norm in results:
        assert losses[-1] < losses[0]
        assert norm > 0
        assert losses[2] != losses[4] != losses[6]  # what is seen within anchored() is that of the last round


def detach(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    run = SiteRun(Place(rank, world_size, 2), exact(), "ddp").train(range(6))
    run.handle.detach()
    return [run.weights(), run.train(range(6, 8)).weights()]


def test_after_detach_each_site_is_left_to_its_ddp(ranks: RankFactory) -> None:
    results = ranks(4).run(detach)
    assert not differ([at_once for at_once, _ in results])
    assert not differ([later for _, later in results[:2]])
    assert "out.weight" in differ([later for _, later in results[1:3]])


def attach_what_cannot_be(rank: int, world_size: int, what: str) -> str:
    where = Place(rank, world_size, 2)
    net: Any = Net()
    inside = where.mesh["shard"].get_group()
    between: Any = where.mesh["site"].get_group()
    scheme: Any = exact()
    arguments: dict[str, Any] = {}
    if what in ("without between", "two dimensions", "ignored"):
        from torch.distributed.fsdp import fully_shard

        ignored = {net.out.bias} if what == "ignored" else set()
        mesh = where.mesh if what == "two dimensions" else where.mesh["shard"]
        fully_shard(net, mesh=mesh, ignored_params=ignored)
    else:
        net = DistributedDataParallel(net, process_group=None if what == "all of DDP" else inside)
    if what == "a scheme of every step":
        scheme = lgc.DGC()
    if what == "synchronise":
        arguments = {"on_difference": "synchronise"}
    if what == "a mesh of two dimensions":
        between = where.mesh
    if what == "another rank's group":
        between = dist.GroupMember.NON_GROUP_MEMBER
    if what == "crossed":
        crossed = [dist.new_group(each) for each in ([0, 3], [1, 2])]
        between = crossed[rank in (1, 2)]
    if what == "uneven":
        uneven = [dist.new_group(each) for each in ([0, 2], [1], [3])]
        between = uneven[[0, 1, 0, 2][rank]]
    if what != "without between":
        arguments |= {"between": between}
    try:
        lgc.attach(net, scheme, torch.optim.SGD(net.parameters(), lr=0.1), **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return "attached"


REFUSED = {
    "without between": "lgc.attach(..., between=mesh['site'])",
    "two dimensions": "fully_shard(model, mesh=mesh['shard'])",
    "ignored": "out.bias on every rank of the site",
    "all of DDP": "and no other in common",
    "a scheme of every step": "use lgc.LocalSteps()",
    "synchronise": "go on from a checkpoint",
    "a mesh of two dimensions": "must have one dimension",
    "another rank's group": "that this rank is in",
    "crossed": "the sites differ in place in its site",
    "uneven": "differ in number of sites: rank 0: 2, rank 1: 1",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_site_is_refused_by_name_on_every_rank(ranks: RankFactory, what: str) -> None:
    for message in ranks(4).run(attach_what_cannot_be, what):
        assert REFUSED[what] in message


def forget_sites(rank: int, world_size: int, what: str) -> None:
    where = Place(rank, world_size, 2)
    inside, between = (where.mesh[name].get_group() for name in ("shard", "site"))
    forgotten = what == "between"
    model = DistributedDataParallel(Net(), process_group=inside) if forgotten else Net()
    optimizer, group = torch.optim.SGD(model.parameters(), lr=0.1), inside if forgotten else between
    with TestCase().assertLogs("lgc.advice") if dist.get_rank(group) == 0 else nullcontext() as advice:
        lgc.attach(model, exact(), optimizer, between=None if forgotten else between)
    assert advice is None or "2 of the 4 ranks take local steps together" in advice.output[0]


@pytest.mark.parametrize("what", ["between", "DDP"])
def test_ranks_that_train_apart_from_the_others_are_told(ranks: RankFactory, what: str) -> None:
    ranks(4).run(forget_sites, what)


def lose_a_rank(rank: int, world_size: int, fate: str) -> None:
    run = SiteRun(Place(rank, world_size, 2), exact(), "ddp", timeout=2).train(range(5))
    if rank == 3 and fate == "dies":
        raise RuntimeError("died")
    if rank == 3:
        time.sleep(8)
    run.train(range(5, 9))


@pytest.mark.parametrize("fate", ["dies", pytest.param("hangs", marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_lost_inside_a_site_ends_all_of_them(ranks: RankFactory, fate: str) -> None:
    *others, peer, _ = ranks(4).exceptions(lose_a_rank, fate)
    assert isinstance(peer, RuntimeError)  # of DDP, which waits for it
    for error in others:
        assert isinstance(error, RankError)
        assert "as seen by site 0, an exchange with the others has failed" in str(error)
