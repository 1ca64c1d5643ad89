"""Checkpoints on disk and resuming from them, at the same and at another number of ranks."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import cases
from ddp_models import MODELS, batch, optimizer_of, parameters, seeded
from ranks import Ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lgc
from lgc import checkpoint

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {
    "rate": 0.02,
    "dense_steps": 2,
    "warmup_steps": 3,
    "train_steps": 3,
    "refresh_below": 0.0,
}
SCHEMES: dict[str, Any] = {
    "dense": lgc.Dense(),
    "dgc": lgc.DGC(rate=0.02, warmup_steps=6, clip_norm=1.0),
    "dgc-adam": lgc.DGC(rate=0.02, warmup_steps=6, second_moment=0.95),
    "dgc-recent": lgc.DGC(rate=0.02, warmup_steps=6, indices=lgc.Recent(), values=lgc.RecentSign()),
    "dgc-two-stage": lgc.DGC(rate=0.02, warmup_steps=6, reduction="two_stage"),
    "quantized": lgc.Quantized(reduction="two_stage"),
    "scalecom": lgc.ScaleCom(rate=0.02, momentum=0.9, warmup_steps=6),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ring-sgd": lgc.LGCRing(**LEARNED, autoencoder_optimizer="sgd"),
    "lgc-ps": lgc.LGCServer(**LEARNED, second_moment=0.95),
}
PHASES = {"dense": 1, "warmup": 4, "train": 7, "compressed": 9}  # after so many steps, in the middle of each
STEPS = 11


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Run:
    """A model with its optimizer and its handle, trained step by step."""

    def __init__(self, scheme: Any, seed: int = 0) -> None:
        with seeded(seed):
            self.ddp = DistributedDataParallel(MODELS["convolutional"]())
        self.ddp.broadcast_buffers = False
        self.optimizer = optimizer_of(self.ddp, scheme)
        self.handle = lgc.attach(self.ddp, scheme, self.optimizer)

    def train(self, rank: int, until: int) -> None:
        for step in range(self.handle.step, until):
            x, y = batch(rank, step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.ddp(x), y).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.ddp.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.ddp.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])


def flatten(state: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a nested state by their path."""
    if isinstance(state, dict):
        return {key: leaf for k, v in state.items() for key, leaf in flatten(v, f"{name}/{k}").items()}
    if isinstance(state, list | tuple):
        return flatten(dict(enumerate(state)), f"{name}:{type(state).__name__}")
    return {name: state}


def assert_same(actual: Any, expected: Any) -> None:
    """Two nested states have the same form and the same bits."""
    one, other = flatten(actual), flatten(expected)
    assert list(one) == list(other)
    for name, value in other.items():
        if isinstance(value, Tensor):
            assert one[name].dtype == value.dtype, name
            assert torch.equal(one[name], value), name
        else:
            assert type(one[name]) is type(value), name
            assert one[name] == value or value != value, name


# --- resuming at the same world size ---


def interrupted(rank: int, world_size: int, scheme: Any, directory: Path) -> dict[str, Any]:
    """What a run ends with that is saved in every phase, and what the runs end with that go on from there."""
    run = Run(scheme)
    for stop in PHASES.values():
        run.train(rank, stop)
        checkpoint.save(directory, run.state(), step=stop, group=world(), keep=len(PHASES))
    run.train(rank, STEPS)
    ends = {"straight": run.state()}
    for phase, path in zip(PHASES, reversed(checkpoint.available(directory)), strict=True):
        resumed = Run(scheme, seed=1)
        resumed.load(checkpoint.load(path, group=world()))
        assert resumed.handle.step == PHASES[phase]
        resumed.train(rank, STEPS)
        ends[phase] = resumed.state()
    return ends


@cases("scheme", SCHEMES, in_suite=("dgc-two-stage", "quantized", "scalecom", "lgc-ring", "lgc-ps"))
def test_a_run_goes_on_from_its_checkpoint_as_if_never_interrupted(
    ranks: RankFactory, scheme: str, tmp_path: Path
) -> None:
    for ends in ranks(2).run(interrupted, SCHEMES[scheme], tmp_path):
        straight = ends.pop("straight")
        assert list(ends) == list(PHASES)
        for resumed in ends.values():
            assert_same(resumed, straight)


# --- resuming at another world size ---


def save_at(rank: int, world_size: int, scheme: Any, stop: int, directory: Path) -> dict[str, Any]:
    run = Run(scheme)
    run.train(rank, stop)
    checkpoint.save(directory, run.state(), step=stop, group=world())
    return run.state()


def load_and_go_on(rank: int, world_size: int, scheme: Any, path: Path, steps: int) -> tuple[Any, Any, list[str]]:
    run = Run(scheme, seed=1)
    run.load(checkpoint.load(path, group=world()))
    loaded = copy.deepcopy(run.state())
    phases = []
    for step in range(run.handle.step, run.handle.step + steps):
        run.train(rank, step + 1)
        phases.append(str(run.handle.phase))
    return loaded, parameters(run.ddp), phases


def per_rank(states: list[dict[str, Any]], kind: str) -> list[dict[str, Tensor]]:
    """Residual, with what the rank owes as a server, or a moment of every rank."""
    parts = [state["handle"]["aggregator"]["per_rank"] for state in states]
    if kind != "residual" or "server_residual" not in parts[0]:
        return [part[kind] for part in parts]
    return [{name: tensor + part["server_residual"][name] for name, tensor in part[kind].items()} for part in parts]


def owed(states: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """Mean over the ranks of residual or a moment."""
    ranks = per_rank(states, kind)
    return {name: torch.stack([rank[name].double() for rank in ranks]).mean(dim=0) for name in ranks[0]}


def sum_of_counts(states: list[dict[str, Any]]) -> dict[str, int]:
    """Byte counts of all ranks together; steps of the first."""
    counts: dict[str, int] = {}
    for state in states:
        for name, count in flatten(json.loads(state["handle"]["wire"])).items():
            if not name.endswith("/steps") or state is states[0]:
                counts[name] = counts.get(name, 0) + count
    return counts


def assert_owed_stays(saved: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    for kind in saved[0]["handle"]["aggregator"]["per_rank"].keys() & {"residual", "momentum", "second_moment"}:
        expected = owed(saved, kind)
        assert any(bool(mean.any()) for mean in expected.values())
        for name, mean in owed(loaded, kind).items():
            largest = max(float(rank[name].abs().max()) for rank in per_rank(loaded, kind))
            torch.testing.assert_close(mean, expected[name], rtol=0, atol=1e-7 * largest)  # float32 rounding


@pytest.mark.parametrize(
    ("scheme", "before", "after"),
    [
        *(("lgc-ring", before, after) for before, after in [(2, 4), (4, 3)]),
        *(pytest.param("lgc-ring", *sizes, marks=pytest.mark.exhaustive) for sizes in [(4, 2), (3, 4)]),
        *(("dgc-two-stage", before, after) for before, after in [(4, 2), (1, 2)]),
        ("dgc-adam", 3, 2),
        ("quantized", 4, 3),
    ],
)
def test_at_another_world_size_the_owed_update_and_what_is_replicated_stay(
    ranks: RankFactory, scheme: str, before: int, after: int, tmp_path: Path
) -> None:
    saved = ranks(before).run(save_at, SCHEMES[scheme], PHASES["compressed"], tmp_path)
    results = ranks(after).run(load_and_go_on, SCHEMES[scheme], checkpoint.latest(tmp_path), 2)
    loaded = [state for state, _, _ in results]
    assert_owed_stays(saved, loaded)
    for state in loaded:
        assert_same(parameters_of(state["model"]), parameters_of(saved[0]["model"]))
        assert_same(state["optimizer"], saved[0]["optimizer"])
        assert_same(state["handle"]["aggregator"]["replicated"], saved[0]["handle"]["aggregator"]["replicated"])
    assert_same(loaded[0]["handle"]["aggregator"]["server"], saved[0]["handle"]["aggregator"]["server"])
    assert sum_of_counts(loaded) == sum_of_counts(saved)
    for _, trained, phases in results:
        assert phases == ["compressed", "compressed"]
        assert_same(trained, results[0][1])


@pytest.mark.parametrize(
    ("phase", "before", "after"),
    [
        *(pytest.param(phase, 2, 3, marks=pytest.mark.exhaustive) for phase in ("warmup", "train")),
        ("compressed", 4, 2),
    ],
)
def test_decoders_bound_to_ranks_are_trained_again_at_another_world_size(
    ranks: RankFactory, phase: str, before: int, after: int, tmp_path: Path
) -> None:
    stop = PHASES[phase]
    saved = ranks(before).run(save_at, SCHEMES["lgc-ps"], stop, tmp_path)
    results = ranks(after).run(load_and_go_on, SCHEMES["lgc-ps"], checkpoint.latest(tmp_path), 10)
    warmup_end = LEARNED["dense_steps"] + LEARNED["warmup_steps"]
    train_end = max(stop, warmup_end) + LEARNED["train_steps"]
    assert_owed_stays(saved, [state for state, _, _ in results])
    encoder = autoencoder(saved[0], "encoder.")
    decoders = autoencoder(ranks(after).run(state_at_start, SCHEMES["lgc-ps"])[0], "decoders.")
    for state, trained, phases in results:
        assert_same(autoencoder(state, "encoder."), encoder)
        assert_same(autoencoder(state, "decoders."), decoders)
        assert state["handle"]["aggregator"]["replicated"]["updates"] == stop
        steps = range(stop, stop + 10)
        assert phases == ["warmup" if s < warmup_end else "train" if s < train_end else "compressed" for s in steps]
        assert_same(trained, results[0][1])


def autoencoder(state: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    weights = state["handle"]["aggregator"]["replicated"]["autoencoder"]
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def parameters_of(module_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the statistics of the normalisation, which are each rank's own here."""
    return {name: tensor for name, tensor in module_state.items() if "running" not in name and "num_" not in name}


def state_at_start(rank: int, world_size: int, scheme: Any) -> dict[str, Any]:
    return Run(scheme, seed=1).state()


def handle_state(rank: int, world_size: int, residual: Tensor, server: dict[str, Any]) -> dict[str, Any]:
    """A handle's state with one parameter, as saved."""
    traffic = {"steps": 5, "sent_bytes": 10 * rank + 1, "received_bytes": 3, "upload_bytes": 0}
    return {
        "version": 1,
        "scheme": "topk",
        "world_size": world_size,
        "rank": rank,
        "step": 5,
        "wire": json.dumps({"compressed": traffic | {"contents": {"entries": 10 * rank + 1}}}),
        "aggregator": {
            "per_rank": {"residual": {"w": residual}},
            "replicated": {"train_end": 3},
            "server": server if rank == 0 else {},
        },
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),  # the means of pairs
        (2, 4, [[1, 0], [1, 0], [0, 1], [0, 1]]),  # copies: the mean stays, the sum need not
        (3, 2, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
        (2, 3, [[1, 0], [0.5, 0.5], [0, 1]]),
        (3, 1, [[1 / 3, 1 / 3, 1 / 3]]),
    ],
)
def test_a_new_rank_takes_over_the_average_of_the_old_ranks_in_its_share(
    before: int, after: int, expected: list[list[float]]
) -> None:
    states = [handle_state(rank, before, torch.eye(before)[rank], {"s": torch.ones(2)}) for rank in range(before)]
    new = [checkpoint.reshard(states, rank=rank, world_size=after) for rank in range(after)]
    residuals = torch.stack([state["aggregator"]["per_rank"]["residual"]["w"] for state in new])
    torch.testing.assert_close(residuals, torch.tensor(expected, dtype=torch.float32))
    assert [list(state["aggregator"]["server"]) for state in new] == [["s"]] + [[]] * (after - 1)
    sent = [json.loads(state["wire"])["compressed"]["sent_bytes"] for state in new]
    assert sum(sent) == sum(10 * rank + 1 for rank in range(before))


@pytest.mark.parametrize(
    ("of_second", "message"),
    [
        ({"places": 0}, r"integers of at least 1, got \(0, 2\) in place of \(1, 2\)"),
        ({"places": "1"}, "integers of at least 1"),
        ({"places": True}, "integers of at least 1"),
        ({"places": 2, "place": 1}, "as many ranks a site"),
        ({"world_size": 0}, "integers of at least 1"),
    ],
    ids=str,
)
def test_numbers_of_ranks_that_cannot_be_are_refused_when_states_are_resharded(
    of_second: dict[str, Any], message: str
) -> None:
    states = [handle_state(rank, 2, torch.zeros(1), {}) for rank in range(2)]
    with pytest.raises(ValueError, match=message):
        checkpoint.reshard([states[0], states[1] | of_second], rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"must be of as many|must be in order"):
        checkpoint.reshard([state | of_second for state in states], rank=0, world_size=2)


def test_sites_are_not_resharded_to_a_part_of_one() -> None:
    state = handle_state(0, 1, torch.zeros(1), {}) | {"places": 2, "place": 0}
    with pytest.raises(ValueError, match=r"must be a multiple of the 2 ranks of a site, got 1; .*distributed_state"):
        checkpoint.reshard([state], rank=0, world_size=1)


def test_resharding_needs_the_state_of_every_rank() -> None:
    states = [handle_state(rank, 3, torch.zeros(1), {}) for rank in range(2)]
    with pytest.raises(ValueError, match="must have the state of every rank, got 2"):
        checkpoint.reshard(states, rank=0, world_size=2)
    with pytest.raises(ValueError, match="must be in order of rank, got 1 in place of 0"):
        checkpoint.reshard(reversed(states), rank=0, world_size=2)


# --- the user's own checkpoint ---


def through_torch_save(rank: int, world_size: int, scheme: Any, directory: Path) -> list[dict[str, Any]]:
    run = Run(scheme)
    run.train(rank, PHASES["train"])
    torch.save(run.state(), directory / f"{rank}.pt")
    other = Run(scheme, seed=1)
    other.load(torch.load(directory / f"{rank}.pt", weights_only=True))
    for each in (run, other):
        each.train(rank, STEPS)
    return [run.state(), other.state()]


def through_dcp(rank: int, world_size: int, scheme: Any, directory: Path) -> list[dict[str, Any]]:
    import torch.distributed.checkpoint as dcp  # seconds, which only these ranks need

    def training(run: Run) -> dict[str, Any]:
        return {"model": run.ddp.module, "optimizer": run.optimizer}

    run = Run(scheme)
    run.train(rank, PHASES["train"])
    handles = {f"handle-{rank}": run.handle, "handle": checkpoint.distributed_state(run.handle)}
    dcp.save(training(run) | handles, checkpoint_id=directory)
    others = [Run(scheme, seed=1), Run(scheme, seed=1)]
    for other in others:
        other.train(rank, 1)  # an optimizer that has stepped has the state that DCP fills in
        dcp.load(training(other), checkpoint_id=directory)
        for name, buffer in run.ddp.module.named_buffers():  # DCP keeps one rank's
            other.ddp.module.get_buffer(name).copy_(buffer)
    dcp.load({f"handle-{rank}": others[0].handle}, checkpoint_id=directory)
    checkpoint.load_distributed(others[1].handle, checkpoint_id=directory)
    for each in (run, *others):
        assert each.handle.step == PHASES["train"]
        each.train(rank, STEPS)
    return [each.state() for each in (run, *others)]


@pytest.mark.grid
@pytest.mark.parametrize("scheme", ["dense", "dgc-recent", "dgc-two-stage", "lgc-ps"])
@pytest.mark.parametrize("through", [through_torch_save, through_dcp])
def test_the_state_fits_in_torchs_own_checkpoints(
    ranks: RankFactory, through: Callable[..., Any], scheme: str, tmp_path: Path
) -> None:
    for straight, *others in ranks(2).run(through, SCHEMES[scheme], tmp_path):
        for resumed in others:
            assert_same(resumed, straight)


def test_the_autoencoder_in_training_is_that_of_rank_0(ranks: RankFactory, tmp_path: Path) -> None:
    for straight, _, resumed in ranks(4).run(through_dcp, SCHEMES["lgc-ring"], tmp_path):
        assert_same(resumed["model"], straight["model"])


def sum_owed(state: Any) -> Tensor:
    """What a state owes in all, as a rank and as a server, but for a start that is over."""
    leaves = {name: each for name, each in flatten(state).items() if "/start/" not in name}
    parts = [each for name, each in leaves.items() if "/residual/" in name or "/server_residual/" in name]
    return torch.stack([part.double().sum() for part in parts]).sum()


def owing(rank: int, world_size: int, scheme: Any, directory: Path, at: str | None) -> dict[str, Any]:
    """What a run owes that is saved in torch's way and in ours; or that has taken such a state."""
    import torch.distributed.checkpoint as dcp

    run = Run(scheme)
    if at is None:
        run.train(rank, 6)
        dcp.save({"handle": checkpoint.distributed_state(run.handle)}, checkpoint_id=directory / "torch")
        checkpoint.save(directory / "own", run.state(), step=6, group=world())
    elif at == "torch":
        checkpoint.load_distributed(run.handle, checkpoint_id=directory / "torch")
    else:
        run.load(checkpoint.load(checkpoint.available(directory / "own")[0], group=world()))
    return {"owed": sum_owed(run.handle.state_dict())}


@pytest.mark.grid
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("scheme", [lgc.Quantized(), lgc.LocalSteps(every=4, start_steps=2)], ids=["every", "local"])
def test_what_servers_owe_stays_where_the_number_of_ranks_decides_if_there_are_any(
    ranks: RankFactory, scheme: Any, before: int, after: int, tmp_path: Path
) -> None:
    def mean(results: list[dict[str, Any]]) -> Tensor:
        return torch.stack([each["owed"] for each in results]).mean()

    expected = mean(ranks(before).run(owing, scheme, tmp_path, None))
    for at in ("torch", "own"):
        torch.testing.assert_close(mean(ranks(after).run(owing, scheme, tmp_path, at)), expected, atol=1e-6, rtol=1e-5)


def phase_after_resuming(rank: int, world_size: int, scheme: Any) -> list[str]:
    run, other = Run(scheme), Run(scheme)
    run.train(rank, PHASES["compressed"])
    assert run.handle.synchronizer is not None
    run.handle.synchronizer.aggregator.schedule.retrain(run.handle.step, 5)  # as at the end of a compressed round
    other.handle.load_state_dict(run.handle.state_dict())
    return [str(run.handle.phase), str(other.handle.phase)]


def test_a_resumed_handle_has_the_phase_of_the_last_round(ranks: RankFactory) -> None:
    assert ranks(1).run(phase_after_resuming, SCHEMES["lgc-ring"]) == [["compressed", "compressed"]]


# --- a state that does not fit ---

Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "scheme": (lambda s: s.update(scheme="dgc"), "scheme was 'dgc', here it is 'lgc-ring"),
    "world size": (lambda s: s.update(world_size=4), "world_size was 4, here it is 2; lgc.checkpoint.load or reshard"),
    "rank": (lambda s: s.update(rank=7), "rank was 7, here it is"),
    "version": (lambda s: s.update(version=99), "version was 99, here it is"),
    "step": (lambda s: s.update(step=-1), "step must be an integer of at least 0, got -1"),
    "no step": (lambda s: s.pop("step"), "step must be an integer of at least 0, got None"),
    "wire": (lambda s: s.update(wire='{"dense": {"bytes": 3}}'), "wire is not the byte counts by phase"),
    "wire's counts": (
        lambda s: s.update(wire='{"dense": {"steps": "x"}}'),
        "wire must have counts of at least 0, got 'x'",
    ),
    "phase": (lambda s: s.update(phase="late"), "phase must be one of dense, .*, got 'late'"),
    "updates": (lambda s: s["aggregator"]["replicated"].update(updates=-1), "replicated.updates is -1, here it is"),
    "no aggregator": (lambda s: s.pop("aggregator"), "aggregator has"),
    "residual's name": (lambda s: s["aggregator"]["per_rank"]["residual"].pop("conv1.weight"), "per_rank.residual has"),
    "residual's shape": (
        lambda s: s["aggregator"]["per_rank"]["residual"].update({"conv1.bias": torch.zeros(9)}),
        r"per_rank.residual.conv1.bias is \(9,\) torch.float32, here it is \(8,\) torch.float32",
    ),
    "momentum's dtype": (
        lambda s: s["aggregator"]["per_rank"]["momentum"].update({"conv1.bias": torch.zeros(8).double()}),
        r"per_rank.momentum.conv1.bias is \(8,\) torch.float64",
    ),
    "frozen": (lambda s: s["aggregator"]["replicated"].update(frozen=1), "replicated.frozen is 1, here it is"),
    "autoencoder": (
        lambda s: s["aggregator"]["replicated"]["autoencoder"].pop("encoder.out.bias"),
        "replicated.autoencoder has",
    ),
    "resharded": (
        lambda s: s.update(resharded_from=4),
        "resharded, goes into a new handle only, this one is at step 7",
    ),
}


def load_wrong(rank: int, world_size: int, scheme: Any) -> list[tuple[str, str]]:
    """What each wrong state is refused with, and whether that left everything as it was."""
    run = Run(scheme)
    run.train(rank, 4)
    good = run.handle.state_dict()
    run.train(rank, PHASES["train"])
    before = copy.deepcopy(run.handle.state_dict())
    refusals = []
    for name, (change, _) in WRONG.items():
        state = copy.deepcopy(good)
        change(state)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller matches it
            run.handle.load_state_dict(state)
        after = run.handle.state_dict()
        assert_same(after, before)
        refusals.append((name, str(caught.value)))
    return refusals


def test_a_state_that_does_not_fit_is_refused_by_its_field_and_changes_nothing(ranks: RankFactory) -> None:
    for refusals in ranks(2).run(load_wrong, SCHEMES["lgc-ring"]):
        assert [name for name, _ in refusals] == list(WRONG)
        for name, message in refusals:
            assert re.search(WRONG[name][1], message), message
