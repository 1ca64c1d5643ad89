"""Which parameters take part, and who steps them: freezing, zeros, buffers, and optimizers that are replaced.

A scheme's whole story is one run of the ranks, and every test looks at a part of it.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lgc

LEARNED: dict[str, Any] = {"rate": 0.2, "dense_steps": 1, "warmup_steps": 0, "train_steps": 1}
LEARNED |= {"first": "shared", "last": "shared"}
SCHEMES: dict[str, Any] = {
    "dense": lgc.Dense(),
    "dgc": lgc.DGC(rate=0.2, warmup_steps=0),
    "dgc-adam": lgc.DGC(rate=0.2, warmup_steps=0, second_moment=0.9, values=lgc.LloydMax()),
    "topk-two-stage": lgc.TopK(rate=0.4, reduction="two_stage", unit=4, values=lgc.LloydMax(bits=1)),
    "scalecom": lgc.ScaleCom(rate=0.2, warmup_steps=0),
    "scalecom-unit": lgc.ScaleCom(rate=0.4, warmup_steps=0, unit=4, momentum=0.0),
    "quantized": lgc.Quantized(reduction="two_stage", values=lgc.Sign()),
    "lgc-ring": lgc.LGCRing(**LEARNED),
    "lgc-ps": lgc.LGCServer(**LEARNED, innovation=0.5, unit=4),
}
ROUNDS: dict[str, Any] = {"every": 2, "start_steps": 1}
LOCAL: dict[str, Any] = {
    "local": lgc.LocalSteps(**ROUNDS, exchange=lgc.Quantized(reduction="two_stage"), outer_momentum=0.5),
    "local-topk": lgc.LocalSteps(**ROUNDS, exchange=lgc.TopK(rate=0.2)),
    "local-scalecom": lgc.LocalSteps(**ROUNDS, exchange=lgc.ScaleCom(rate=0.2, warmup_steps=0)),
}
ALL = SCHEMES | LOCAL


class Net(nn.Module):
    """Rows of which some are never seen, a weight of which some elements are masked, and two branches."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(40, 8)
        self.masked = nn.Linear(8, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.register_buffer("mask", (torch.arange(64).view(8, 8) % 3 > 0).float())

    def forward(self, x: Tensor, branch: str = "left") -> Tensor:
        h = nn.functional.linear(self.rows(x), self.masked.weight * self.mask, self.masked.bias)
        y: Tensor = getattr(self, branch)(h.tanh())
        return y


class Loop:
    """One rank's model and loop."""

    def __init__(self, rank: int, scheme: Any, *, before_attach: Callable[[Net], object] = id, **ddp: Any) -> None:
        self.rank = rank
        self.net = Net()
        self.step = 0
        local = isinstance(scheme, lgc.LocalSteps)
        self.model: Any = self.net if local else DistributedDataParallel(self.net, **ddp)
        if not local:
            self.model.broadcast_buffers = False
        before_attach(self.net)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.handle = lgc.attach(self.model, scheme, self.optimizer)

    def train(self, steps: int, branch: str = "left") -> Loop:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 * self.step + self.rank)
            x = torch.randint(20, (4,), generator=generator) + 10 * self.rank  # no rank sees rows 30 to 39
            self.optimizer.zero_grad()
            self.model(x, branch).square().sum().backward()
            self.optimizer.step()
            self.step += 1
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.net.named_parameters()}

    def residual(self, name: str) -> Tensor:
        state = self.handle.state_dict()["aggregator"].get("per_rank", {})
        own: Tensor = state.get("round 0", state).get("residual", {}).get(name, torch.zeros(0))
        return own.clone()


UNUSED: dict[str, Any] = {"find_unused_parameters": True}


class Seen(NamedTuple):
    """Weights at some moment, and what this rank owed to the left branch then."""

    weights: dict[str, Tensor]
    owed: Tensor


def use_and_freeze(rank: int, _: int, name: str) -> dict[str, Seen]:
    """A branch that is used, then by no rank, then again, then frozen, then trained again."""
    loop = Loop(rank, ALL[name], **UNUSED)
    seen = {}
    for moment, steps, branch, trained in (
        ("start", 0, "left", True),
        ("used", 3, "left", True),
        ("unused", 2, "right", True),
        ("used again", 2, "left", True),
        ("frozen", 4, "left", False),
        ("trained again", 2, "left", True),
    ):
        loop.net.left.requires_grad_(trained)
        loop.train(steps, branch)
        seen[moment] = Seen(loop.weights(), loop.residual("left.weight"))
    return seen


def message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def freeze_left(net: Net) -> None:
    net.left.requires_grad_(False)


def freeze_before_attach(rank: int) -> dict[str, Any]:
    refused = message_of(lambda: Loop(rank, "dgc:rate=0.2", before_attach=freeze_left))
    loop = Loop(rank, "dgc:rate=0.2:warmup_steps=0", before_attach=freeze_left, **UNUSED)
    weights = [loop.weights(), loop.train(2).weights()]
    loop.net.left.requires_grad_(True)
    return {"refused": refused, "weights": [*weights, loop.train(2).weights()]}


def unfreeze_what_ddp_left_out(rank: int, scheme: Any, *, before_attach: bool) -> str:
    net = Net()
    net.left.requires_grad_(False)
    ddp = DistributedDataParallel(net, **UNUSED)
    ddp.broadcast_buffers = False

    def attach_and_train() -> None:
        if before_attach:
            net.left.requires_grad_(True)
        lgc.attach(ddp, scheme)
        net.left.requires_grad_(True)
        ddp(torch.arange(4)).sum().backward()

    return message_of(attach_and_train)


def rebuild_the_optimizer(rank: int) -> list[dict[str, Tensor]]:
    """After freezing, from what is still trained, so that nobody zeroes the last gradient of the rest."""
    loop = Loop(rank, SCHEMES["dgc"], **UNUSED).train(2)
    loop.net.left.requires_grad_(False)
    loop.optimizer = torch.optim.SGD([each for each in loop.net.parameters() if each.requires_grad], lr=0.05)
    return [loop.weights(), loop.train(2).weights()]


def replace_the_optimizer(rank: int, scheme: Any, *, told: bool) -> tuple[str, dict[str, Tensor]]:
    loop = Loop(rank, scheme, **UNUSED).train(2)

    def go_on() -> None:
        new = torch.optim.SGD(loop.net.parameters(), lr=0.05, momentum=0.9)
        if told:
            loop.handle.use_optimizer(new)
        loop.optimizer = new
        loop.train(6 if told else 22)
        loop.handle.finish()

    return message_of(go_on), loop.weights()


class Codebook(nn.Module):
    """A codebook that every forward pass moves towards what it has seen, beside batch norm."""

    codes: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("codes", torch.zeros(3))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("constant", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.codes.mul_(0.5).add_(x.mean(), alpha=0.5)
            self.seen.add_(len(x))
        y: Tensor = self.norm(self.first(x))
        return y


def attach_local_with_buffers(net: Net) -> None:
    lgc.attach(net, LOCAL["local"], torch.optim.SGD(net.parameters(), lr=0.1), buffers_every=2)


def buffers(rank: int, scheme: Any) -> dict[str, Any]:
    net = Codebook()
    ddp = DistributedDataParallel(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lgc.attach(DistributedDataParallel(Codebook()), lgc.TopK(rate=0.5))
    handle = lgc.attach(ddp, scheme, buffers_every=2)
    states = []
    for step in range(3):
        ddp(torch.full((4, 4), 1.0 + rank + step)).sum().backward()
        net.zero_grad()
        states.append({name: each.clone() for name, each in net.named_buffers()})
    handle.finish()
    return {
        "advice": [str(each.message) for each in caught],
        "by step": states,
        "finished": {name: each.clone() for name, each in net.named_buffers()},
        "bytes": sum(phase.contents.get("buffers", 0) for phase in handle.wire.phases.values()),
        "refused": message_of(lambda: attach_local_with_buffers(Net())),
    }


def ddp_of(net: Net) -> DistributedDataParallel:
    ddp = DistributedDataParallel(net, **UNUSED)
    ddp.broadcast_buffers = False
    return ddp


def replace_a_module(rank: int, scheme: Any, *, detached: bool) -> tuple[str, dict[str, Tensor]]:
    """A head for a new task, as in fine-tuning, or new rows of an embedding."""
    loop = Loop(rank, scheme, **UNUSED).train(3)
    if detached:
        loop.handle.detach()
    torch.manual_seed(1)
    loop.net.left = nn.Linear(8, 8)
    loop.optimizer = torch.optim.SGD(loop.net.parameters(), lr=0.05)
    if detached:
        loop.model = loop.net if isinstance(scheme, lgc.LocalSteps) else ddp_of(loop.net)
        loop.handle = lgc.attach(loop.model, scheme, loop.optimizer)
    else:
        loop.handle.use_optimizer(loop.optimizer)
    message = message_of(lambda: loop.train(4))
    if detached:
        loop.handle.finish()
    return message, loop.weights()


def freeze_elsewhere(rank: int, _: int) -> dict[str, Any]:
    found: dict[str, Any] = {"before attach": freeze_before_attach(rank), "rebuilt": rebuild_the_optimizer(rank)}
    for name in ("dense", "dgc", "local"):
        for detached in (False, True):
            found[f"{name} replaced {detached}"] = replace_a_module(rank, ALL[name], detached=detached)
    for scheme in ("dense", "dgc"):
        for before in (False, True):
            found[f"{scheme} {before}"] = unfreeze_what_ddp_left_out(rank, scheme, before_attach=before)
    return found


def replace_optimizers(rank: int, _: int) -> dict[str, Any]:
    return {
        f"{name} {told}": replace_the_optimizer(rank, ALL[name], told=told)
        for name in ("dgc", "local")
        for told in (False, True)
    }


def buffers_of_both(rank: int, _: int) -> dict[str, Any]:
    return {name: buffers(rank, SCHEMES[name]) for name in ("dense", "dgc")}


RankFactory = Callable[[int], Ranks]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=list(ALL))
def seen(ranks: RankFactory, request: pytest.FixtureRequest) -> list[dict[str, Seen]]:
    """Of both ranks, by scheme."""
    found: list[dict[str, Seen]] = ranks(2).run(use_and_freeze, request.param)
    return found


@pytest.fixture(scope="module")
def frozen(ranks: RankFactory) -> Found:
    return list(ranks(2).run(freeze_elsewhere))


@pytest.fixture(scope="module")
def replaced(ranks: RankFactory) -> Found:
    return list(ranks(2).run(replace_optimizers))


@pytest.fixture(scope="module")
def averaged(ranks: RankFactory) -> Found:
    return list(ranks(2).run(buffers_of_both))


def same(left: dict[str, Tensor], right: dict[str, Tensor], part: str = "") -> bool:
    return all(torch.equal(left[name], right[name]) for name in left if name.startswith(part))


@pytest.mark.parametrize(
    "moments", [("used again", "frozen", "trained again"), ("used", "unused", "used again")], ids=["frozen", "unused"]
)
def test_what_has_no_part_rests_keeps_what_it_is_owed_and_goes_on_later(
    seen: list[dict[str, Seen]], moments: tuple[str, str, str]
) -> None:
    for each in seen:
        before, after, later = (each[moment] for moment in moments)
        assert same(before.weights, after.weights, "left.")
        assert torch.equal(before.owed, after.owed)
        assert not torch.equal(later.weights["left.weight"], after.weights["left.weight"])
        assert not torch.equal(before.weights["masked.weight"], after.weights["masked.weight"])


def test_what_is_zero_on_every_rank_does_not_move(seen: list[dict[str, Seen]]) -> None:
    for each in seen:
        before, after = each["start"].weights, each["trained again"].weights
        assert torch.equal(before["rows.weight"][30:], after["rows.weight"][30:])
        assert not torch.equal(before["rows.weight"][:30], after["rows.weight"][:30])
        masked = Net().mask == 0
        assert torch.equal(before["masked.weight"][masked], after["masked.weight"][masked])


def test_the_ranks_stay_together(seen: list[dict[str, Seen]]) -> None:
    for moment in seen[0]:
        assert same(seen[0][moment].weights, seen[1][moment].weights)


def test_what_is_frozen_between_ddp_and_attach_joins_later_or_is_refused_by_name(frozen: Found) -> None:
    for each in frozen:
        run = each["before attach"]
        assert "left.weight frozen since DistributedDataParallel was made" in run["refused"]
        assert "find_unused_parameters=True" in run["refused"]
        start, resting, joined = run["weights"]
        assert same(start, resting, "left.")
        assert not torch.equal(joined["left.weight"], resting["left.weight"])
        assert same(joined, frozen[0]["before attach"]["weights"][2])


@pytest.mark.parametrize("before_attach", [False, True])
@pytest.mark.parametrize("scheme", ["dense", "dgc"])
def test_what_ddp_left_out_and_is_trained_later_is_refused_by_name(
    frozen: Found, scheme: str, before_attach: bool
) -> None:
    for each in frozen:
        message = each[f"{scheme} {before_attach}"]
        assert "left.weight is trained now and was frozen, or not in the model, when DistributedDataPara" in message
        assert "freeze after" in message


@pytest.mark.parametrize("scheme", ["dense", "dgc", "local"])
def test_what_replaces_a_parameter_is_refused_by_name_and_joins_where_it_is_attached_anew(
    frozen: Found, scheme: str
) -> None:
    for each in frozen:
        message, _ = each[f"{scheme} replaced False"]
        assert "left.weight is trained now and was frozen, or not in the model" in message
        assert "To replace parameters, call handle.detach() before" in message
        message, weights = each[f"{scheme} replaced True"]
        assert message == "no error"
        assert same(weights, frozen[0][f"{scheme} replaced True"][1])


def average_frozen_weights(rank: int, _: int, anchored: bool) -> dict[str, Tensor]:
    """A teacher that is in the model, frozen, and a moving average of it, as in BYOL."""
    loop = Loop(rank, ALL["local"], before_attach=lambda net: net.right.requires_grad_(False))
    for _step in range(6):
        loop.train(1)
        with loop.handle.anchored() if anchored else contextlib.nullcontext(), torch.no_grad():
            for name, each in loop.net.right.named_parameters():
                each.data = each.data.lerp(loop.net.left.get_parameter(name), 0.5)
    loop.handle.finish()
    return loop.weights()


def test_frozen_weights_that_each_rank_averages_by_itself_are_named_and_belong_to_the_anchor(
    ranks: RankFactory,
) -> None:
    assert same(*ranks(2).run(average_frozen_weights, True))
    for error in ranks(2).exceptions(average_frozen_weights, False):
        assert "round 0: the ranks are no longer the same: frozen right.weight on rank 1" in str(error)
        assert "a moving average that is kept in a frozen parameter: make it a buffer" in str(error)
        assert "or move it within handle.anchored()" in str(error)


def keep_a_codebook_frozen(rank: int, _: int) -> None:
    """A codebook in a frozen parameter, which no broadcast of buffers reaches, and each rank moves by its own data."""
    net = Codebook()
    codes = net.codes
    del net.codes
    net.codes = nn.Parameter(codes, requires_grad=False)
    ddp = DistributedDataParallel(net)
    lgc.attach(ddp, SCHEMES["dgc"], buffers_every=2)
    ddp(torch.full((4, 4), 1.0 + rank)).sum().backward()


def test_a_codebook_in_a_frozen_parameter_is_named(ranks: RankFactory) -> None:
    for error in ranks(2).exceptions(keep_a_codebook_frozen):
        assert "step 0: the ranks are no longer the same: frozen codes on rank 1" in str(error)


def test_an_optimizer_that_is_rebuilt_after_freezing_goes_on_without_what_is_frozen(frozen: Found) -> None:
    for each in frozen:
        before, after = each["rebuilt"]
        assert same(before, after, "left.")
        assert not same(before, after, "masked.")


@pytest.mark.parametrize("told", [False, True])
def test_another_optimizer_with_a_momentum_of_its_own_is_refused_before_it_steps(replaced: Found, told: bool) -> None:
    for each in replaced:
        message, weights = each[f"dgc {told}"]
        assert "ValueError: DGC(momentum=0.9) corrects the momentum" in message
        assert same(weights, each["dgc True"][1])


def test_local_steps_notice_that_the_optimizer_they_count_no_longer_steps(replaced: Found) -> None:
    for each in replaced:
        assert "call handle.use_optimizer(optimizer) on every rank" in each["local False"][0]
        message, weights = each["local True"]
        assert message == "no error"
        assert same(weights, replaced[0]["local True"][1])


@pytest.mark.parametrize("name", ["dense", "dgc"])
def test_buffers_are_brought_together_at_an_interval_and_counted(averaged: Found, name: str) -> None:
    first, second = (each[name] for each in averaged)
    apart, together, _ = zip(first["by step"], second["by step"], strict=True)
    assert not same(*apart)
    assert same(*together)
    expected = torch.full((3,), (0.5 * (0.5 * 1 + 2) + 0.5 * (0.5 * 2 + 3)) / 2)
    torch.testing.assert_close(together[0]["codes"], expected)
    assert int(together[0]["seen"]) == 8
    assert same(first["finished"], second["finished"])
    assert first["bytes"] > 0
    assert "LocalSteps bring buffers together at every round" in first["refused"]


def test_the_advice_on_buffers_names_them_by_their_kind(averaged: Found) -> None:
    (advice,) = averaged[0]["dgc"]["advice"]
    assert "rank 0's buffers (codes, seen, norm.running_mean: 6 in all)" in advice
    assert "attach(buffers_every=100)" in advice
    assert "Batch norm's statistics can also wait until evaluation" in advice
    assert "If the forward pass changes codes, as it does a codebook" in advice


def collect_an_earlier_model_amid_a_step(rank: int, world_size: int) -> bool:
    """A model that is garbage is collected while torch calls the hooks of a step, as it may be at any time."""

    def attached() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = lgc.attach(model, lgc.LocalSteps(every=2, start_steps=0), optimizer)
        model.__dict__["cycle"] = (model, handle)
        return model, optimizer

    def collect(*_: object) -> None:
        gc.collect()

    collect()
    gc.disable()
    hook = register_optimizer_step_pre_hook(collect)
    try:
        garbage = weakref.ref(attached()[0])
        model, optimizer = attached()
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    finally:
        gc.enable()
        hook.remove()
    return garbage() is None


def test_an_earlier_model_may_be_collected_amid_a_step(ranks: RankFactory) -> None:
    assert ranks(1).run(collect_an_earlier_model_amid_a_step) == [True]
