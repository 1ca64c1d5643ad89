"""Local steps in loops as people write them: what a loop may do besides stepping, and what must not go wrong unseen."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from unittest import TestCase

import pytest
import torch
from local_runs import Net, Run, batch, differ, exact, residuals
from ranks import Ranks
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import lgc
from lgc.buffers import Buffers
from lgc.comm.replicas import ReplicaError
from lgc.comm.transport import RankError, Transport

RankFactory = Callable[[int], Ranks]

every_way = pytest.mark.parametrize("ddp", [False, True], ids=["module", "ddp"])


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


# --- what is left behind ---


def let_go(rank: int, _: int, ddp: bool, overlap: bool) -> tuple[list[str], int]:
    threads = threading.active_count()
    run = Run(lgc.LocalSteps(every=2, start_steps=2, overlap=overlap), ddp=ddp).train(rank, range(7))
    kept: dict[str, Any] = {"model": run.model, "optimizer": run.optimizer, "handle": run.handle}
    left = {name: weakref.ref(each) for name, each in (kept | {"weight": run.net.out.weight}).items()}
    run.handle.finish()
    del run, kept
    gc.collect()
    time.sleep(0.2)
    return [name for name, each in left.items() if each() is not None], threading.active_count() - threads


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
@every_way
def test_nothing_of_a_model_stays_when_it_is_let_go_nor_the_thread_of_its_rounds(
    ranks: RankFactory, ddp: bool, overlap: bool
) -> None:
    assert ranks(2).run(let_go, ddp, overlap) == [([], 0)] * 2


def attach_to_a_container(rank: int, _: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 4), nn.Linear(4, 2)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
    lgc.attach(nn.ModuleList([encoder, head]), exact(2), optimizer)  # nobody keeps the list, nor the handle
    gc.collect()
    generator = torch.Generator().manual_seed(rank)
    for _step in range(4):
        optimizer.zero_grad()
        head(encoder(torch.randn(8, 4, generator=generator))).square().sum().backward()
        optimizer.step()
    return copies(nn.ModuleList([encoder, head]))


def test_modules_in_a_list_made_for_attach_are_exchanged(ranks: RankFactory) -> None:
    assert not differ(ranks(2).run(attach_to_a_container))


def copy_everything(rank: int, _: int) -> int:
    run = Run(exact(start_steps=2)).train(rank, range(6))
    with run.handle.anchored():
        copied = copy.deepcopy(run.net)
        torch.save(run.net, io.BytesIO())
    copy.deepcopy(run.optimizer)
    pickle.loads(pickle.dumps(run.optimizer))
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    for step in range(rank):  # on each rank as often as it likes
        x, y = batch(rank, step)
        nn.functional.cross_entropy(copied(x), y).backward()
        optimizer.step()
    return run.train(rank, range(6, 9)).handle.step


def test_copies_of_model_and_optimizer_are_plain_ones(ranks: RankFactory) -> None:
    assert ranks(2).run(copy_everything) == [9, 9]


def attach_again(_: int, __: int) -> str:
    run = Run(exact())
    try:
        lgc.attach(nn.parallel.DistributedDataParallel(run.net), lgc.DGC(momentum=0.0))
    except RuntimeError as error:
        return str(error)
    return "attached"


def attach_what_shares_a_layer(_: int, __: int, frozen: bool) -> str:
    run = Run(exact())
    other = nn.Sequential(run.net.hidden.requires_grad_(not frozen), nn.Linear(16, 2))
    try:
        lgc.attach(other, exact(), torch.optim.SGD(other[1].parameters(), lr=0.1))
    except RuntimeError as error:
        return str(error)
    return "attached"


def test_a_layer_is_trained_by_local_steps_of_one_model(ranks: RankFactory) -> None:
    for message in ranks(2).run(attach_what_shares_a_layer, False):
        assert "trains 'hidden.weight' of a Net that already has the scheme local" in message
        assert "Attach to one module that has all parameters" in message
    assert ranks(2).run(attach_what_shares_a_layer, True) == ["attached"] * 2


def test_a_module_under_local_steps_takes_no_other_scheme_in_ddp(ranks: RankFactory) -> None:
    assert all("already has the scheme local" in message for message in ranks(2).run(attach_again))


# --- where the ranks begin ---


def begin_with(rank: int, _: int, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(exact(2, outer_momentum=0.9), lr=0.0)
    torch.manual_seed(1)
    run.net.hidden.load_state_dict(nn.Linear(8, 16).state_dict())
    with torch.no_grad():
        run.net.out.weight.fill_(3.0)
    run.net.norm.running_mean.fill_(5.0)
    before = run.weights()
    run.train(rank, range(steps))
    with run.handle.anchored():
        return before, run.weights()


@pytest.mark.parametrize("steps", [1, 2], ids=["before-a-round", "after"])
def test_what_is_loaded_or_set_before_the_first_step_is_where_the_ranks_begin(ranks: RankFactory, steps: int) -> None:
    results = ranks(2).run(begin_with, steps)
    assert not differ([weights for _, weights in results])
    for before, weights in results:
        assert torch.equal(weights["hidden.weight"], before["hidden.weight"])
        assert torch.equal(weights["out.weight"], before["out.weight"])
        assert weights["norm.running_mean"].min() > 3  # moved from 5 towards the data's own


def anchored_after_the_start(rank: int, _: int, ddp: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(exact(start_steps=5), ddp=ddp).train(rank, range(5))
    at_start = run.weights()
    run.train(rank, range(5, 6))
    with run.handle.anchored():
        return at_start, run.weights()


@every_way
def test_before_the_first_round_the_anchor_has_the_buffers_of_the_start(ranks: RankFactory, ddp: bool) -> None:
    results = ranks(2).run(anchored_after_the_start, ddp)
    assert not differ([weights for _, weights in results])
    for at_start, weights in results:
        assert torch.equal(weights["hidden.weight"], at_start["hidden.weight"])
        assert not weights["norm.running_mean"].eq(0).all()


def load_part(rank: int, _: int) -> str:
    run = Run(exact()).train(rank, range(6))
    run.net.hidden.load_state_dict(nn.Linear(8, 16).state_dict())
    try:
        run.train(rank, range(6, 7))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_weights_loaded_into_a_part_amid_local_steps_are_an_error_too(ranks: RankFactory) -> None:
    assert all("weights were loaded" in message for message in ranks(2).run(load_part))


def load_within_anchored(rank: int, _: int) -> str:
    run = Run(exact()).train(rank, range(6))
    try:
        with run.handle.anchored():
            run.handle.load_state_dict(run.handle.state_dict())
    except RuntimeError as error:
        return str(error)
    return "loaded"


def test_a_state_is_not_loaded_where_it_would_be_undone(ranks: RankFactory) -> None:
    assert all("within anchored()" in message for message in ranks(2).run(load_within_anchored))


def step_within_anchored(rank: int, _: int, steps: int) -> str:
    run = Run(exact(start_steps=1)).train(rank, range(steps))
    try:
        with run.handle.anchored():
            run.train(rank, range(steps, steps + 1))
    except RuntimeError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["before-the-start", "before-the-first-local-step", "after"])
def test_no_step_is_made_within_anchored(ranks: RankFactory, steps: int) -> None:
    assert all("optimizer.step() within anchored()" in message for message in ranks(2).run(step_within_anchored, steps))


# --- who makes the steps ---


class Decayed(torch.optim.Adam):
    """An optimizer as people derive theirs."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.999)
        return super().step(closure)


def derive_an_optimizer(rank: int, _: int, start_steps: int) -> tuple[int, dict[str, Tensor]]:
    torch.manual_seed(0)
    torch.optim.Adam(nn.Linear(1, 1).parameters())  # from the first of a class on, torch runs the hooks of its steps
    run = Run.__new__(Run)
    run.net = run.model = Net()
    run.optimizer = Decayed(run.net.parameters(), lr=0.01)
    run.handle = lgc.attach(run.net, exact(start_steps=start_steps), run.optimizer)
    run.train(rank, range(start_steps + 6))
    with run.handle.anchored():
        return run.handle.step - start_steps, copies(run.net)


@pytest.mark.parametrize("start_steps", [0, 3])
def test_the_step_of_a_derived_optimizer_counts_once(ranks: RankFactory, start_steps: int) -> None:
    results = ranks(2).run(derive_an_optimizer, start_steps)
    assert [steps for steps, _ in results] == [6, 6]
    assert not differ([weights for _, weights in results])


def step_by_another(rank: int, _: int) -> None:
    run = Run(exact(start_steps=2))
    handle, run.optimizer = run.handle, torch.optim.SGD(run.net.parameters(), lr=0.1)
    run.train(rank, range(4))
    handle.finish()


def test_finish_notices_that_another_optimizer_has_made_the_steps(ranks: RankFactory) -> None:
    for error in ranks(2).exceptions(step_by_another):
        assert isinstance(error, ReplicaError)
        assert "rows.weight" in str(error)


def change_weights_after_the_last_round(
    rank: int, _: int, arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(exact(2, **arguments)).train(rank, range(4))
    run.handle.finish()
    shared = copies(run.net)
    with torch.no_grad():
        for parameter in run.net.parameters():
            parameter.mul_(1 + rank)  # as Lookahead, a projection, or an optimizer's eval() may
    run.handle.finish()
    after = copies(run.net)
    best = {name: each + 1 for name, each in run.net.state_dict().items()}
    run.net.load_state_dict(best)
    run.handle.detach()
    assert not differ([best, copies(run.net)])  # what was loaded is not what a rank has moved
    return shared, after


@pytest.mark.parametrize("arguments", [{}, {"overlap": True}, {"ahead": 0.5}], ids=str)
def test_finish_exchanges_what_has_changed_after_the_last_round_too(
    ranks: RankFactory, arguments: dict[str, Any]
) -> None:
    results = ranks(2).run(change_weights_after_the_last_round, arguments)
    assert not differ([after for _, after in results])
    for shared, after in results:
        for name in dict(Net().named_parameters()):
            torch.testing.assert_close(after[name], 1.5 * shared[name])


def load_the_best_on_one_rank(rank: int, _: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What was loaded, the weights after finish, and the anchor."""
    coarse = lgc.Quantized(bits=1)
    run = Run(lgc.LocalSteps(every=2, exchange=coarse, start_steps=0, ahead=0.5)).train(rank, range(4))
    with run.handle.anchored():
        best = {name: each + 1 for name, each in copies(run.net).items()}
    if rank == 0:
        run.net.load_state_dict(best)
    run.handle.finish()
    return best, copies(run.net), run.handle.state_dict()["aggregator"]["replicated"]["anchor"]


def test_ahead_one_rank_may_load_the_best_model_before_the_last_finish(ranks: RankFactory) -> None:
    """It takes part, and keeps what it has loaded."""
    (best, first, _), *others = ranks(3).run(load_the_best_on_one_rank)
    assert not differ([best, first])
    for _, weights, anchor in others:
        assert not differ([{name: weights[name] for name in anchor}, anchor, others[0][2]])


def hooks_of_steps(_: int, __: int) -> list[bool]:
    optimizer = Run(exact()).optimizer
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    return [getattr(hook, "_torchdynamo_disable", False) for hook in (*hooks, *_global_optimizer_pre_hooks.values())]


def test_a_compiled_step_leaves_the_hooks_as_they_are(ranks: RankFactory) -> None:
    """`torch.compile(optimizer.step)` would trace rounds, and fail; to compile one here would take half a minute."""
    assert ranks(1).run(hooks_of_steps) == [[True] * 3]


def alternate(rank: int, _: int, every: int, overlap: bool) -> list[dict[str, Tensor]]:
    """A generator and a discriminator, each with its optimizer and handle."""
    torch.manual_seed(0)
    models = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    scheme = lgc.LocalSteps(every=every, start_steps=2, overlap=overlap)
    handles = [lgc.attach(model, scheme, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    generator = torch.Generator().manual_seed(rank)
    for _step in range(9):
        for sign, optimizer in zip((1, -1), optimizers, strict=True):
            fake = models[1](models[0](torch.randn(8, 4, generator=generator))).sigmoid().mean()
            models[0].zero_grad()
            models[1].zero_grad()
            (sign * fake).backward()
            optimizer.step()
    for handle in handles:
        handle.finish()
    return [copies(model) for model in models]


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
@pytest.mark.parametrize("every", [1, 3])
def test_two_models_with_a_handle_each_train_side_by_side(ranks: RankFactory, every: int, overlap: bool) -> None:
    for of_model in zip(*ranks(2).run(alternate, every, overlap), strict=True):
        assert not differ(list(of_model))


# --- parameters that not all use ---


class Experts(nn.Module):
    """A layer that all inputs use, and one that some do."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, use: float | None) -> Tensor:
        y: Tensor = self.shared(x)
        return y if use is None else y + use * self.expert(x)


USES: dict[str, Callable[[int, int], float | None]] = {
    "one-rank": lambda rank, step: 1.0 if rank == step % 2 else None,
    "without-effect": lambda rank, step: 1.0 if step == 0 else (0.0 if rank == 0 else None),
    "nobody": lambda rank, step: None,
}


def use_experts(rank: int, _: int, use: str, start_steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Experts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    lgc.attach(model, exact(2, start_steps=start_steps, start=lgc.Float32()), optimizer)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator), USES[use](rank, step)).square().sum().backward()
        optimizer.step()
    return copies(model)


@pytest.mark.parametrize("start_steps", [0, 6], ids=["rounds", "start"])
@pytest.mark.parametrize("use", USES)
def test_experts_that_some_ranks_use_stay_the_same_on_all(ranks: RankFactory, use: str, start_steps: int) -> None:
    results = ranks(2).run(use_experts, use, start_steps)
    assert not differ(results)
    if use == "nobody":  # no gradient, so no decay
        torch.manual_seed(0)
        assert torch.equal(results[0]["expert.weight"], Experts().expert.weight)


def freeze_amid_the_start(rank: int, _: int) -> tuple[Tensor, Tensor]:
    run = Run(lgc.LocalSteps(every=4, start_steps=20)).train(rank, range(5))
    run.net.hidden.requires_grad_(False)
    before = run.net.hidden.weight.detach().clone()
    return before, run.train(rank, range(5, 8)).net.hidden.weight.detach()


def test_what_is_frozen_amid_the_start_rests_whatever_feedback_owes_it(ranks: RankFactory) -> None:
    for before, after in ranks(2).run(freeze_amid_the_start):
        assert torch.equal(before, after)


def train_odd_shapes(_: int, __: int, fragments: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(4, 4), torch.tensor(2.0), torch.zeros(0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = lgc.attach(model, lgc.LocalSteps(every=2, start_steps=2, fragments=fragments), optimizer)
    for _step in range(6):
        optimizer.zero_grad()
        (model[0].square().sum() * model[1] + model[2].sum()).backward()
        optimizer.step()
    handle.finish()
    return copies(model)


@pytest.mark.parametrize("fragments", [1, 2])
def test_numbers_and_empty_tensors_are_parameters_too(ranks: RankFactory, fragments: int) -> None:
    assert not differ(ranks(2).run(train_odd_shapes, fragments))


# --- buffers of all kinds ---


class Counting(nn.Module):
    """Buffers of many types that change in every forward pass, one that grows, and one that nobody saves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.mean: Tensor
        self.cache: Tensor
        for name, dtype in (("mean", torch.bfloat16), ("phase", torch.complex64), ("count", torch.int32)):
            self.register_buffer(name, torch.zeros(3, dtype=dtype), persistent=name != "mean")
        for number in range(4):
            self.register_buffer(f"mask{number}", torch.zeros(number + 1, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                if name != "cache":
                    buffer.copy_(buffer + x.shape[0])
            self.cache = torch.cat([self.cache, x[:, 0].detach()])
        y: Tensor = self.layer(x)
        return y


def count(rank: int, _: int, overlap: bool) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(0)
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = lgc.attach(model, exact(2, overlap=overlap), optimizer)
    for _step in range(5):
        optimizer.zero_grad()
        model(torch.randn(rank + 1, 4)).sum().backward()
        optimizer.step()
    handle.finish()
    return {name: each.clone() for name, each in model.named_buffers() if name != "cache"}, len(model.cache)


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
def test_buffers_of_every_type_come_together_and_what_grows_stays_each_ranks_own(
    ranks: RankFactory, overlap: bool
) -> None:
    results = ranks(3).run(count, overlap)
    assert not differ([buffers for buffers, _ in results])
    assert [length for _, length in results] == [6, 11, 16]


class Recorded:
    """A transport of one rank that notes what is broadcast."""

    rank = 0

    def __init__(self) -> None:
        self.order: list[tuple[int, ...]] = []

    def all_gather(self, tensor: Tensor, _: str) -> Tensor:
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: Tensor, _: str, *, source: int) -> Tensor:
        self.order.append(tuple(tensor.shape))
        return tensor


def test_masks_are_broadcast_in_the_order_that_all_ranks_have() -> None:
    model = nn.Module()
    for number in range(1, 9):  # the order of a set would differ from process to process
        model.register_buffer(f"mask{number}", torch.zeros(number, dtype=torch.bool))
    buffers, transport = Buffers(model), Recorded()
    current = {name: ~buffer for name, buffer in buffers.current().items()}
    states: Any = buffers.states(current)
    recorded: Any = transport
    assert list(buffers.combine(current, states, recorded)) == list(current)
    assert transport.order == [(number,) for number in range(1, 9)]


# --- what is said ---


def warnings_of(action: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return len(caught)


def say_of_parts(rank: int, _: int) -> list[int]:
    overlapped = Run(exact(2, overlap=True)).train(rank, range(4))
    part, in_ddp = Run(exact()).train(rank, range(2)), Run(exact(), ddp=True).train(rank, range(2))
    counts = [warnings_of(each) for each in (overlapped.net.state_dict, part.net.hidden.state_dict)]
    counts.append(warnings_of(in_ddp.model.state_dict))
    together = Run(exact(2, overlap=True)).train(rank, range(4))
    together.handle.finish()
    overlapped.handle.finish()
    return [*counts, warnings_of(together.net.state_dict)]


def test_own_weights_are_warned_of_in_part_in_ddp_and_while_a_round_is_under_way(ranks: RankFactory) -> None:
    assert ranks(2).run(say_of_parts) == [[1, 1, 1, 0]] * 2


def count_while_under_way(rank: int, _: int) -> list[Any]:
    run = Run(lgc.LocalSteps(every=2, start_steps=2, overlap=True, exchange=lgc.TopK(rate=0.1, warmup_steps=3)))
    seen: list[Any] = []
    for step in range(12):
        run.train(rank, range(step, step + 1))
        seen.append((run.handle.phase, run.handle.wire.to_json()))
        if step == 7:
            seen.append(run.handle.wire_summary())
    run.handle.finish()
    return seen


def test_phase_and_bytes_do_not_depend_on_how_fast_a_round_is(
    ranks: RankFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ranks(2).run(count_while_under_way)
    assert first == ranks(2).run(delayed, 0.05)


def delayed(rank: int, world_size: int, seconds: float) -> list[Any]:
    open_round = Transport.open_round

    def slowly(transport: Transport, step: int, **state: Any) -> Any:
        time.sleep(seconds)
        return open_round(transport, step, **state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "open_round", slowly)
        return count_while_under_way(rank, world_size)


def finish_after_resuming(rank: int, _: int, overlap: bool) -> tuple[str, str]:
    scheme = lgc.LocalSteps(every=4, start_steps=2, overlap=overlap)
    whole = Run(scheme).train(rank, range(6))
    resumed = Run(scheme).load(whole.state())
    for run in (whole, resumed):
        run.handle.finish()
    return whole.handle.wire.to_json(), resumed.handle.wire.to_json()


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
def test_finish_right_after_resuming_counts_all_its_bytes(ranks: RankFactory, overlap: bool) -> None:
    for whole, resumed in ranks(2).run(finish_after_resuming, overlap):
        assert whole == resumed


def state_keys(state: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Paths, shapes and dtypes of all that is in a nested state."""
    found: list[tuple[str, Any]] = []
    for key, value in state.items():
        here = f"{path}/{key}"
        if isinstance(value, Mapping):
            found += [(here, None), *state_keys(value, here)]
        else:
            found.append((here, (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)))
    return found


def keys_at_every_step(rank: int, _: int, overlap: bool) -> list[list[tuple[str, Any]]]:
    run = Run(lgc.LocalSteps(every=4, start_steps=2, fragments=2, overlap=overlap))
    return [state_keys(run.train(rank, range(step, step + 1)).handle.state_dict()) for step in range(9)]


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
def test_a_state_has_the_same_keys_at_every_step(ranks: RankFactory, overlap: bool) -> None:
    for first, *others in ranks(2).run(keys_at_every_step, overlap):
        assert all(each == first for each in others)


# --- models, precisions and loops ---


class Transformer(nn.Module):
    """A block of GPT-2's kind, with a causal mask that is not saved, and the embedding for its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(8, 8).triu(1).bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        normed = self.norm(h)
        y: Tensor = self.head(h + self.attention(normed, normed, normed, attn_mask=self.mask, need_weights=False)[0])
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(32, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embedding(x))[0].to(self.head.weight.dtype))
        return y


def run_loop(rank: int, _: int, kind: str, way: str, scheme: lgc.LocalSteps) -> dict[str, Tensor]:
    """Accumulate over two batches, clip, step, and cycle learning rate and momentum."""
    torch.manual_seed(0)
    net: nn.Module = Recurrent() if kind == "lstm" else Transformer()
    if kind == "bf16":
        net = net.bfloat16()
    if kind == "lstm":
        net.head.double()
    ddp = nn.parallel.DistributedDataParallel(net) if way == "ddp" else None
    model: Any = ddp or (torch.compile(net, backend="eager") if way == "compiled" else net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    handle = lgc.attach(model, scheme, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=20)
    generator = torch.Generator().manual_seed(rank)
    for _step in range(11):
        for last in (False, True):
            x = torch.randint(32, (4, 8), generator=generator)
            with ddp.no_sync() if ddp and not last else contextlib.nullcontext():
                nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    handle.finish()
    return copies(net)


@pytest.mark.grid
@pytest.mark.parametrize(
    "scheme",
    [
        lgc.LocalSteps(every=3, start_steps=3),
        lgc.LocalSteps(every=1, start_steps=0),
        lgc.LocalSteps(every=4, start_steps=2, fragments=2, overlap=True),
        lgc.LocalSteps(every=2, start_steps=0, decay=0.9, exchange=lgc.ScaleCom(rate=0.1, warmup_steps=2)),
    ],
    ids=["start", "every-step", "overlap", "scalecom"],
)
@pytest.mark.parametrize("way", ["module", "ddp", "compiled"])
@pytest.mark.parametrize("kind", ["transformer", "bf16", "lstm"])
def test_a_usual_loop_needs_no_change(ranks: RankFactory, kind: str, way: str, scheme: lgc.LocalSteps) -> None:
    first = ranks(2).run(run_loop, kind, way, scheme)
    assert not differ(first)
    second = ranks(2).run(run_loop, kind, way, scheme)  # and gives the same every time
    assert not differ([first[0], second[0]])


def scale_gradients(rank: int, _: int, start_steps: int, given: bool) -> tuple[int, str, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net()
    model, optimizer = nn.parallel.DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    handle = lgc.attach(model, exact(start_steps=start_steps), optimizer, grad_scaler=scaler if given else None)
    try:
        for step in range(12):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            overflows = rank == 1 and step in (2, 7)
            torch.autograd.backward(scaler.scale(loss * torch.inf if overflows else loss))
            scaler.step(optimizer)
            scaler.update()
        handle.finish()
    except (RuntimeError, FloatingPointError) as error:
        return handle.step, str(error), {}
    return handle.step, "", copies(net)


@pytest.mark.parametrize("start_steps", [0, 5])
def test_what_a_grad_scaler_skips_in_ddp_counts_where_it_is_given(ranks: RankFactory, start_steps: int) -> None:
    results = ranks(2).run(scale_gradients, start_steps, True)
    assert [steps for steps, _, _ in results] == [12, 12]
    assert not differ([weights for _, _, weights in results])


@pytest.mark.parametrize(("start_steps", "message"), [(0, "different steps"), (5, "not finite on rank 1")])
def test_and_is_an_error_where_it_is_not(ranks: RankFactory, start_steps: int, message: str) -> None:
    assert all(message in error for _, error, _ in ranks(2).run(scale_gradients, start_steps, False))


def skip_a_step(rank: int, _: int) -> str:
    run = Run(exact())
    try:
        for step in range(11):
            if (rank, step) != (1, 5):  # as a check of this rank's loss alone may have it
                run.train(rank, range(step, step + 1))
        run.handle.finish()
    except RankError as error:
        return str(error)
    return "went on"


def test_a_step_that_one_rank_leaves_out_is_an_error_by_count_at_the_end(ranks: RankFactory) -> None:
    for message in ranks(3).run(skip_a_step):
        assert "different steps: [11, 10, 11]" in message


def evaluate_on_one_rank(rank: int, _: int) -> dict[str, Tensor]:
    run = Run(exact()).train(rank, range(6))
    own = run.weights()
    if rank == 0:  # the others go on, and wait at the next round
        with contextlib.suppress(KeyError), run.handle.anchored():
            run.net(batch(0, 0)[0])
            raise KeyError
    assert not differ([own, run.weights()])
    return run.train(rank, range(6, 8)).weights()


def test_one_rank_may_evaluate_alone_and_an_error_there_puts_its_weights_back(ranks: RankFactory) -> None:
    assert not differ(ranks(2).run(evaluate_on_one_rank))


def sum_of_steps(rank: int, _: int, scheme: lgc.LocalSteps) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By parameter: what this rank's optimizer has moved, what the anchor has, and what this rank owes."""
    run = Run(scheme)
    initial = run.weights()
    moved = {name: torch.zeros_like(parameter) for name, parameter in run.net.named_parameters()}
    for number in range(12):
        before = run.weights()
        x, y = batch(rank, number)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        alone = copy.deepcopy(run.net)  # takes the same step without a round
        optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.0)
        optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for parameter, own in zip(alone.parameters(), run.net.parameters(), strict=True):
            parameter.grad = None if own.grad is None else own.grad.clone()
        optimizer.step()
        for name, parameter in alone.named_parameters():
            moved[name] += before[name] - parameter.detach()
        run.optimizer.step()
    state = run.handle.state_dict()
    with run.handle.anchored():
        weights = run.weights()
    return {
        name: (moved[name], initial[name] - weights[name], torch.stack(residuals(state, name)).sum(0)) for name in moved
    }


OWING = {
    "gather": lgc.Quantized(reduction="gather"),
    "two_stage": lgc.Quantized(reduction="two_stage"),
    "topk": lgc.TopK(rate=0.1),
    "scalecom": lgc.ScaleCom(rate=0.1),
}


@pytest.mark.parametrize(("ahead", "outer_lr"), [(0.0, 1.0), (0.5, 2.5)])
@pytest.mark.parametrize("exchange", OWING.values(), ids=OWING)
def test_what_the_ranks_have_moved_is_what_the_anchor_has_and_what_is_owed(
    ranks: RankFactory, exchange: Any, ahead: float, outer_lr: float
) -> None:
    scheme = lgc.LocalSteps(every=3, exchange=exchange, start_steps=0, outer_lr=outer_lr, outer_momentum=0, ahead=ahead)
    results = ranks(3).run(sum_of_steps, scheme)
    for name in results[0]:
        moved, by_anchor, owed = (sum(of[name][part] for of in results) / 3 for part in range(3))
        torch.testing.assert_close(by_anchor / outer_lr + owed, moved, rtol=1e-4, atol=1e-5)


# --- several optimizers, one after the other or side by side, and what they have ---

ALL = lgc.LocalSteps(
    every=2,
    exchange=lgc.Quantized(values=lgc.Largest(0.1)),
    outer_lr=1.4,
    start_steps=0,
    first_moments=0.5,
    second_moments="all",
    ahead=0.5,
)


def forget_use_optimizer(rank: int, _: int) -> str:
    run = Run(exact(2))
    try:
        for epoch in range(8):  # the optimizer of the epoch before is collected
            run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.01)
            run.train(rank, range(5 * epoch, 5 * epoch + 5))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_an_optimizer_made_anew_every_epoch_is_noticed(ranks: RankFactory) -> None:
    for message in ranks(2).run(forget_use_optimizer):
        assert "call handle.use_optimizer(optimizer) on every rank" in message


def take_two_in_the_start(rank: int, _: int) -> str:
    run = Run(exact(start_steps=4)).train(rank, range(2))
    halves = [[*run.net.rows.parameters()], [*run.net.out.parameters()]]
    try:
        run.handle.use_optimizer([torch.optim.SGD(each, lr=0.1) for each in halves])
    except ValueError as error:
        return str(error)
    return "taken"


def test_several_optimizers_are_refused_in_the_start_of_a_module_also_when_they_come_later(ranks: RankFactory) -> None:
    for message in ranks(2).run(take_two_in_the_start):
        assert "has 2 optimizers, and the start of local steps" in message


def scale_two(rank: int, _: int) -> tuple[list[int], bool, list[bool]]:
    """Steps of two models under one GradScaler, which skips one of each on rank 1, and what is left of them."""
    scaler = torch.amp.GradScaler("cpu")
    nets = [Net(), Net()]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in nets]
    handles = [
        lgc.attach(net, exact(2), optimizer, grad_scaler=scaler)
        for net, optimizer in zip(nets, optimizers, strict=True)
    ]

    def train(steps: range, of: slice) -> None:
        for step in steps:
            x, y = batch(rank, step)
            for net, optimizer in zip(nets[of], optimizers[of], strict=True):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y) * (torch.inf if rank == 1 and step in (1, 5) else 1)
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
            scaler.update()

    train(range(4), slice(0, 2))
    handles[0].detach()
    train(range(4, 8), slice(1, 2))
    handles[1].detach()
    left = [weakref.ref(each) for each in nets]
    nets.clear()
    optimizers.clear()
    steps = [each.step for each in handles]
    handles.clear()
    gc.collect()
    return steps, "step" in vars(scaler), [each() is not None for each in left]


def test_two_models_under_one_grad_scaler_count_its_skipped_steps_until_they_are_detached(ranks: RankFactory) -> None:
    assert ranks(2).run(scale_two) == [([4, 8], False, [False, False])] * 2


def freeze_for_the_other(_: int, __: int) -> list[Tensor]:
    """The discriminator after three rounds, trained in its own steps, and then with it frozen in the generator's."""
    ends = []
    for freezes in (False, True):
        torch.manual_seed(0)
        discriminator = nn.Linear(4, 1)
        nets = nn.ModuleDict({"d": discriminator, "g": nn.Linear(4, 4)})
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in nets.values()]
        lgc.attach(nets, exact(1, outer_lr=2.0, outer_momentum=0.9), optimizers)
        x = torch.ones(1, 4)
        for _step in range(3):
            for name, optimizer in zip(nets, optimizers, strict=True):
                nets["d"].requires_grad_(name == "d" or not freezes)
                loss = nets["d"](x if name == "d" else nets["g"](x)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        ends.append(discriminator.weight.detach().clone())
    return ends


def test_what_is_frozen_while_another_optimizer_steps_does_not_rest(ranks: RankFactory) -> None:
    for never, meanwhile in ranks(2).run(freeze_for_the_other):
        torch.testing.assert_close(meanwhile, never)


def freeze_on_one_rank(rank: int, _: int) -> str:
    run = Run(exact(outer_momentum=0.9)).train(rank, range(6))
    run.net.hidden.requires_grad_(rank == 0)
    try:
        run.train(rank, range(6, 12))
    except RankError as error:
        return str(error)
    return "went on"


def test_freezing_on_one_rank_alone_is_an_error_on_all(ranks: RankFactory) -> None:
    for message in ranks(2).run(freeze_on_one_rank):
        assert "have frozen different parameters" in message


def thaw_for_a_while(rank: int, _: int) -> str:
    net = Net()
    net.hidden.requires_grad_(False)
    run = Run.__new__(Run)
    run.net = run.model = net
    run.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run.handle = lgc.attach(net, exact(4), run.optimizer)
    run.train(rank, range(4))
    net.hidden.requires_grad_(True)
    run.train(rank, range(4, 6))
    net.hidden.requires_grad_(False)
    try:
        run.train(rank, range(6, 9))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_what_was_frozen_at_attach_and_trained_for_a_while_is_noticed_at_the_round(
    ranks: RankFactory,
) -> None:
    for message in ranks(2).run(thaw_for_a_while):
        assert "is trained now and was frozen" in message


def roll_back_between(rank: int, _: int) -> int:
    nets = nn.ModuleList([Net(), Net()])
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in nets]
    handle = lgc.attach(nets, exact(2), optimizers)

    def train(number: int, step: int) -> None:
        x, y = batch(rank, step)
        optimizers[number].zero_grad()
        nn.functional.cross_entropy(nets[number](x), y).backward()
        optimizers[number].step()

    for step in range(3):
        for number in range(2):
            train(number, step)
    with handle.anchored():
        saved = copies(nets)
    state = copy.deepcopy(handle.state_dict())
    train(0, 3)
    nets.load_state_dict(saved)
    handle.load_state_dict(state)
    train(0, 3)
    train(1, 3)
    return handle.step


def test_one_can_go_back_to_a_state_between_the_steps_of_two_optimizers(ranks: RankFactory) -> None:
    assert ranks(2).run(roll_back_between) == [4, 4]


SCHEMES = [lgc.LocalSteps(every=2, start_steps=2), ALL, exact(2), lgc.LocalSteps(every=2, exchange=lgc.TopK(rate=0.1))]


def train_with_a_default_device(rank: int, _: int, scheme: lgc.LocalSteps) -> dict[str, Tensor]:
    run = Run(scheme)
    for step in range(6):
        x, y = batch(rank, step)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.net(x), y).backward()
        with torch.device("meta"):  # whatever device that is, it is not that of the codes
            run.optimizer.step()
    with torch.device("meta"):
        run.handle.finish()
        assert run.handle.state_dict()["step"] == 6
    return run.weights()


@pytest.mark.parametrize("scheme", SCHEMES, ids=["quantized", "all", "dense", "topk"])
def test_a_default_device_of_the_script_is_left_to_the_script(ranks: RankFactory, scheme: lgc.LocalSteps) -> None:
    assert not differ(ranks(2).run(train_with_a_default_device, scheme))


def attach_without_the_loss(rank: int, _: int, of_another: bool) -> None:
    net, criterion = Net(), nn.Linear(2, 2)
    if of_another:
        other = lgc.attach(criterion, exact(2), torch.optim.SGD(criterion.parameters(), lr=0.1))
    optimizer = torch.optim.SGD([*net.parameters(), *criterion.parameters()], lr=0.1)
    if rank == 0 and not of_another:
        with TestCase().assertLogs("lgc.advice") as said:
            lgc.attach(net, exact(2), optimizer)
        assert "2 tensors that are not in this model" in said.output[0]
    else:
        with TestCase().assertNoLogs("lgc.advice"):
            lgc.attach(net, exact(2), optimizer)
    if of_another:
        other.detach()


@pytest.mark.parametrize("of_another", [False, True], ids=["nobody", "another model"])
def test_what_only_the_optimizer_has_is_pointed_out_unless_it_is_of_another_attached_model(
    ranks: RankFactory, of_another: bool
) -> None:
    ranks(2).run(attach_without_the_loss, of_another)
