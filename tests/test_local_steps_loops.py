"""Local steps in loops as people write them: what a loop may do besides stepping, and what must not go wrong unseen."""

from __future__ import annotations

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

import pytest
import torch
from local_runs import Net, Run, batch, differ, exact
from ranks import Ranks
from torch import Tensor, nn

import lgc
from lgc.buffers import Buffers
from lgc.comm.replicas import ReplicaError
from lgc.comm.transport import Transport

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
