"""Training loops that do more with gradients and models than one backward pass a step, on real ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import TestCase

import pytest
import torch
from cases import cases
from ddp_models import seeded
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lgc
from lgc.comm.replicas import ReplicaCheck, ReplicaError
from lgc.comm.transport import RankError, Transport

RankFactory = Callable[[int], Ranks]

SCHEMES = {"dense": "dense", "dgc": "dgc:rate=0.1", "local": "local:every=2:start_steps=2+dense"}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
every_hook = pytest.mark.parametrize("scheme", [SCHEMES["dense"], SCHEMES["dgc"]], ids=["dense", "dgc"])


def network(seed: int = 0, outputs: int = 3) -> DistributedDataParallel:
    with seeded(seed):
        return DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs)))


def inputs(rank: int, step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def attached(scheme: str, **policy: Any) -> tuple[DistributedDataParallel, torch.optim.SGD, lgc.Handle]:
    ddp = network()
    optimizer = sgd(ddp)
    return ddp, optimizer, lgc.attach(ddp, scheme, optimizer, **policy)


def train(rank: int, ddp: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    for step in steps:
        optimizer.zero_grad()
        ddp(inputs(rank, step)).square().mean().backward()
        optimizer.step()
    return weights(ddp)


def assert_alike(results: list[Tensor]) -> None:
    assert all(torch.equal(each, results[0]) for each in results)
    assert bool(results[0].isfinite().all())


# --- several optimizers ---


def train_with_two(rank: int, _: int, scheme: str, listed: bool) -> tuple[Tensor, int]:
    """A body and a head with optimizers of their own, which step one after the other, or one for both."""
    ddp = network()
    body, head = ddp.module[0], ddp.module[2]
    parts = [torch.optim.SGD(body.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), lr=0.1)]
    optimizers = parts if listed else [sgd(ddp)]
    handle = lgc.attach(ddp, scheme, optimizers)
    for step in range(9):
        ddp.zero_grad()
        ddp(inputs(rank, step)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    handle.finish()
    return weights(ddp), handle.step


@every_scheme
def test_optimizers_that_step_together_are_as_one(ranks: RankFactory, scheme: str) -> None:
    apart, together = ranks(2).run(train_with_two, scheme, True), ranks(2).run(train_with_two, scheme, False)
    assert_alike([each for each, _ in apart + together])
    assert {steps for _, steps in apart + together} == {9}


def step_unequally(rank: int, _: int) -> None:
    ddp = network()
    body = torch.optim.SGD(ddp.module[0].parameters(), lr=0.1)
    head = torch.optim.Adam(ddp.module[2].parameters(), lr=0.1)
    lgc.attach(ddp, SCHEMES["local"], [body, head])
    for step in range(4):
        ddp.zero_grad()
        ddp(inputs(rank, step)).square().mean().backward()
        body.step()
        if step % 2:
            head.step()


def attach_two_to_a_module(_: int, __: int) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lgc.attach(net, SCHEMES["local"], [sgd(net[0]), sgd(net[1])])


def attach_a_word(_: int, __: int) -> None:
    ddp = network()
    lgc.attach(ddp, "dgc", [sgd(ddp), "adam"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (step_unequally, "the SGD makes two steps, and the Adam given to attach beside it none"),
        (attach_two_to_a_module, "use LocalSteps(start_steps=0), or wrap the model in DistributedDataParallel"),
        (attach_a_word, "attach(optimizer=...) must be an optimizer, a list of them, or None, got str; of a wrapper"),
    ],
    ids=["unequal", "module", "type"],
)
def test_optimizers_that_no_scheme_can_have_are_refused(
    ranks: RankFactory, function: Callable[..., None], words: str
) -> None:
    assert all(words in str(failure) for failure in ranks(2).exceptions(function))


# --- copies ---


def copy_and_go_on(rank: int, _: int, scheme: str, copies: bool) -> Tensor:
    ddp, optimizer, handle = attached(scheme)
    ddp.module.handle = handle  # as modules of some frameworks keep it
    train(rank, ddp, optimizer, range(3))
    if copies:
        with handle.anchored():
            AveragedModel(ddp).update_parameters(ddp)
            copied, again = copy.deepcopy(ddp), copy.deepcopy(ddp)
        with pytest.raises(RuntimeError, match=r"copy of a model.*original's handle for finish"):
            copied.module.handle.finish()
        plain = network()
        plain.module.load_state_dict(copied.module.state_dict())
        for each in (copied, plain):
            train(rank, each, sgd(each), range(2))
        assert torch.equal(weights(copied), weights(plain))
        optimizer_of_copy = sgd(again)
        assert lgc.attach(again, "topk:rate=0.5", optimizer_of_copy).step == 0
        train(rank, again, optimizer_of_copy, range(2))
    return train(rank, ddp, optimizer, range(3, 6))


@every_scheme
def test_a_copy_is_a_plain_model_and_leaves_the_original_as_it_is(ranks: RankFactory, scheme: str) -> None:
    for copying, plain in zip(*(ranks(2).run(copy_and_go_on, scheme, copies) for copies in (True, False)), strict=True):
        assert torch.equal(copying, plain)


def save_whole(rank: int, _: int, scheme: str) -> Tensor:
    ddp, optimizer, handle = attached(scheme)
    train(rank, ddp, optimizer, range(3))
    file = io.BytesIO()
    with handle.anchored():
        torch.save(ddp, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(TypeError, match=r"save handle\.state_dict\(\)"):
        torch.save(handle, io.BytesIO())
    return train(rank, loaded, sgd(loaded), range(2))


@every_scheme
def test_a_whole_model_can_be_saved_and_is_a_plain_one_when_loaded(ranks: RankFactory, scheme: str) -> None:
    assert_alike(ranks(2).run(save_whole, scheme))


def copy_a_scaler(rank: int, _: int) -> tuple[int, int]:
    model = nn.Linear(8, 3)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    handle = lgc.attach(model, "local:every=1:start_steps=0+dense", optimizer, grad_scaler=scaler)
    for step, each in enumerate((copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler)), scaler)):
        optimizer.zero_grad()
        each.scale(model(inputs(rank, step)).sum() * (torch.inf if each is scaler else 1)).backward()
        each.step(optimizer)
        each.update()
    return handle.step, int(scaler.get_scale())


def test_a_copy_of_a_scaler_steps_by_itself(ranks: RankFactory) -> None:
    assert ranks(2).run(copy_a_scaler) == [(3, 2**15)] * 2


# --- gradients that others compute ---


def train_beside_probes(rank: int, _: int, scheme: str, probes: bool) -> Tensor:
    ddp = network()
    first, second = (sgd(layer) for layer in (ddp.module[0], ddp.module[2]))
    with TestCase().assertLogs("lgc.advice") if rank == 0 else contextlib.nullcontext():
        lgc.attach(ddp, scheme, first)
    for step in range(5):
        first.zero_grad()
        second.zero_grad()
        ddp(inputs(rank, step)).square().mean().backward()
        first.step()
        if probes:  # GradNorm, a penalty: the gradients are returned, none is accumulated
            torch.autograd.grad(ddp.module(inputs(rank, step)).sum(), list(ddp.parameters()))
        second.step()
        if probes:
            first.zero_grad()
            with ddp.no_sync():  # accumulated, looked at, and thrown away
                ddp(inputs(rank, step)).sum().backward()
    return weights(ddp)


@pytest.mark.parametrize("scheme", ["dgc:rate=0.1", "local:every=2:start_steps=3+dense"], ids=["dgc", "local"])
def test_gradients_computed_for_something_else_change_nothing(ranks: RankFactory, scheme: str) -> None:
    for probing, plain in zip(*(ranks(2).run(train_beside_probes, scheme, p) for p in (True, False)), strict=True):
        assert torch.equal(probing, plain)


def probe_without_zeroing(rank: int, _: int, zeroes: bool) -> Tensor:
    ddp, optimizer, _handle = attached("dgc:rate=0.1")
    train(rank, ddp, optimizer, range(1))
    with ddp.no_sync():
        ddp(inputs(rank, 1)).sum().backward()  # on top of the last mean
    if zeroes:
        optimizer.zero_grad()
    ddp(inputs(rank, 1)).square().mean().backward()
    optimizer.step()
    return weights(ddp)


def test_the_last_mean_is_refused_in_what_is_exchanged_and_only_there(ranks: RankFactory) -> None:
    assert_alike(ranks(2).run(probe_without_zeroing, True))
    for failure in ranks(2).exceptions(probe_without_zeroing, False):
        assert isinstance(failure, RuntimeError)
        assert "the last step's mean still in the gradient of '0.weight'" in str(failure)


# --- one model's loss through another ---


def train_adversaries(rank: int, _: int, scheme: str, switches_off: bool) -> tuple[int, Tensor]:
    critic, generator = network(0), network(1, outputs=8)
    critic_optimizer, generator_optimizer = sgd(critic), sgd(generator)
    handle = lgc.attach(critic, scheme, critic_optimizer)
    lgc.attach(generator, scheme, generator_optimizer)
    for step in range(4):
        noise = inputs(rank, step)
        critic_optimizer.zero_grad()
        (critic(noise).mean() - critic(generator(noise).detach()).mean()).backward()
        critic_optimizer.step()
        generator_optimizer.zero_grad()
        critic.requires_grad_(not switches_off)
        critic(generator(noise)).mean().backward()
        critic.requires_grad_(True)
        generator_optimizer.step()
    return handle.step, torch.cat([weights(critic), weights(generator)])


@every_scheme
def test_a_model_that_is_switched_off_lets_anothers_loss_through(ranks: RankFactory, scheme: str) -> None:
    (steps, trained), (_, other) = ranks(2).run(train_adversaries, scheme, True)
    assert steps == 4
    assert_alike([trained, other])


def test_a_model_that_anothers_loss_goes_through_says_to_switch_it_off(ranks: RankFactory) -> None:
    for failure in ranks(2).exceptions(train_adversaries, "dgc:rate=0.1", False):
        assert "generator's through its discriminator" in str(failure)
        assert "requires_grad_(False)" in str(failure)


@contextlib.contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """What lgc has warned of meanwhile."""
    said: list[str] = []
    with TestCase().assertLogs("lgc", logging.WARNING) as logged:
        logging.getLogger("lgc").warning("begin")
        yield said
    said.extend(logged.output[1:])


def change_the_mean(rank: int, _: int, scheme: str, loop: str) -> list[str]:
    ddp, optimizer, _handle = attached(scheme)
    with warnings_logged() as said:
        for step in range(4):
            optimizer.zero_grad()
            ddp(inputs(rank, step)).square().sum().backward()
            if loop == "clipped":
                nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
            elif loop == "unscaled":  # as by a GradScaler that attach has not been given
                for parameter in ddp.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= 1024
            optimizer.step()
    return said


@cases("loop", ["clipped", "unscaled", "as it was"], in_suite=["clipped", "unscaled"])
def test_clipping_after_a_momentum_that_acted_before_is_noticed_once(ranks: RankFactory, loop: str) -> None:
    said, nothing = ranks(2).run(change_the_mean, "dgc:rate=0.1", loop)
    assert nothing == []
    assert len(said) == (loop == "clipped")
    assert all("at the SGD's step" in text and "give the scheme clip_norm=..." in text for text in said)
    assert ranks(2).run(change_the_mean, "dgc:rate=0.1:momentum=0", loop) == [[], []]


def attach_where_gradients_are_off(rank: int, _: int, scheme: str, mode: Any) -> Tensor:
    ddp = network()
    optimizer = sgd(ddp)
    with mode():
        lgc.attach(ddp, scheme, optimizer)
    return train(rank, ddp, optimizer, range(3))


@every_scheme
def test_attach_does_not_mind_where_gradients_are_off(ranks: RankFactory, scheme: str) -> None:
    modes = contextlib.nullcontext, torch.no_grad, torch.inference_mode
    usual, *others = (ranks(2).run(attach_where_gradients_are_off, scheme, mode) for mode in modes)
    for other in others:
        assert all(torch.equal(each, expected) for each, expected in zip(other, usual, strict=True))


def train_another_wrapper(rank: int, _: int, scheme: str, accumulates: bool) -> list[str]:
    ddp, optimizer, _handle = attached(scheme)
    trained = ddp if accumulates else DistributedDataParallel(ddp.module)
    with warnings_logged() as said:
        for step in range(3):
            optimizer.zero_grad()
            with ddp.no_sync():
                trained(inputs(rank, step)).square().mean().backward()
            if accumulates:
                ddp(inputs(rank, step)).square().mean().backward()
            optimizer.step()
    return said


@every_hook
def test_a_model_that_is_attached_and_not_trained_is_noticed_at_the_second_step(
    ranks: RankFactory, scheme: str
) -> None:
    said, nothing = ranks(2).run(train_another_wrapper, scheme, False)
    assert nothing == []
    assert len(said) == 1
    assert "step 0: SGD has made its last 2 steps without a round, as no gradient has come from the DDP" in said[0]
    assert "trainer.model_wrapped" in said[0]
    assert ranks(2).run(train_another_wrapper, scheme, True) == [[], []]


def go_on_without_ddp(rank: int, _: int, scheme: str) -> list[str]:
    ddp, optimizer, _handle = attached(scheme)
    train(rank, ddp, optimizer, range(2))
    with warnings_logged() as said:
        train(rank, ddp.module, optimizer, range(2, 30))
    return said


@every_hook
def test_a_model_whose_module_goes_on_without_ddp_is_noticed_once(ranks: RankFactory, scheme: str) -> None:
    said, nothing = ranks(2).run(go_on_without_ddp, scheme)
    assert nothing == []
    assert ["step 2: SGD has made its last 20 steps without a round" in text for text in said] == [True]


def go_on_by_local_steps(rank: int, _: int) -> list[str]:
    ddp, optimizer, _handle = attached(SCHEMES["local"])
    with warnings_logged() as said:
        train(rank, ddp, optimizer, range(30))
    return said


def test_local_steps_after_an_exchanged_start_are_not_mistaken_for_steps_without_rounds(ranks: RankFactory) -> None:
    assert ranks(2).run(go_on_by_local_steps) == [[], []]


def step_each_parameter(rank: int, _: int, scheme: str) -> list[str]:
    """Many optimizers, of which one is given to `attach`, step after each backward pass."""
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    ddp = DistributedDataParallel(net)
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in ddp.parameters()]
    lgc.attach(ddp, scheme, optimizers[0])
    with warnings_logged() as said:
        for step in range(4):
            ddp.zero_grad()
            ddp(inputs(rank, step)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    return [text for text in said if "the optimizer given to attach does not have" not in text]


@every_scheme
def test_optimizers_of_single_parameters_are_not_mistaken_for_steps_without_rounds(
    ranks: RankFactory, scheme: str
) -> None:
    assert ranks(2).run(step_each_parameter, scheme) == [[], []]


def step_by_closures(rank: int, _: int) -> list[str]:
    ddp = network()
    optimizer = torch.optim.LBFGS(ddp.parameters(), max_iter=3)
    lgc.attach(ddp, "topk:rate=0.5", optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = ddp(inputs(rank, 0)).square().mean()
        loss.backward()
        return loss

    with warnings_logged() as said:
        for _step in range(3):
            optimizer.step(closure)
    return said


def test_means_that_a_closure_gives_its_optimizer_are_not_lost(ranks: RankFactory) -> None:
    assert ranks(2).run(step_by_closures) == [[], []]


def throw_means_away(rank: int, _: int, loop: str) -> list[str]:
    ddp, optimizer, _handle = attached("dgc:rate=0.1", on_nonfinite="propagate")
    with warnings_logged() as said:
        for step in range(8):
            optimizer.zero_grad()
            if loop == "two passes":
                ddp(inputs(rank, step)).sum().backward()
                optimizer.zero_grad()
            loss = ddp(inputs(rank, step)).square().mean()
            (loss * torch.nan if loop == "not finite" and step % 2 else loss).backward()
            if loop != "not finite" or step % 2 == 0:
                optimizer.step()
    return [text for text in said if "not finite" not in text]


@pytest.mark.parametrize("loop", ["two passes", "one pass", "not finite"])
def test_means_that_no_step_is_made_with_are_noticed_once(ranks: RankFactory, loop: str) -> None:
    said, nothing = ranks(2).run(throw_means_away, loop)
    assert nothing == []
    assert len(said) == (loop == "two passes")
    assert all("step 7: no optimizer has made a step with the means of 3 rounds" in text for text in said)


# --- replicas are compared, where weights rest ---


def step_within_backward(rank: int, _: int, scheme: str) -> None:
    ddp = network()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in ddp.parameters()}
    lgc.attach(ddp, scheme, check_every=2)

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in ddp.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with torch.no_grad():  # DDP's hooks look at the gradient, which is zero by now
        for number in range(3):
            with torch.enable_grad():
                loss = ddp(inputs(rank, number)).square().mean()
            loss.backward()


@every_hook
def test_ranks_whose_gradients_are_zero_are_compared(ranks: RankFactory, scheme: str) -> None:
    for failure in ranks(2).exceptions(step_within_backward, scheme):
        assert type(failure) is ReplicaError
        assert "step 2: the ranks are no longer the same" in str(failure)
        assert "an optimizer that steps within the backward pass" in str(failure)


def move_an_anchor(rank: int, _: int) -> None:
    ddp, optimizer, handle = attached("local:every=1:start_steps=0+dense", check_every=1)
    optimizer.param_groups[0]["lr"] = 0.0
    train(rank, ddp, optimizer, range(1))
    caller: Any = handle._caller
    with torch.no_grad():
        for tensor in (caller._fragments[0].anchor["0.bias"], ddp.module[0].bias):
            tensor += rank
    train(rank, ddp, optimizer, range(1, 2))


def test_anchors_of_ranks_that_have_not_moved_are_compared(ranks: RankFactory) -> None:
    for failure in ranks(2).exceptions(move_an_anchor):
        assert type(failure) is ReplicaError
        assert "anchor of 0.bias on rank 1" in str(failure)


def train_sharpness_aware(rank: int, _: int, scheme: str | None, **policy: Any) -> Tensor:
    ddp = network()
    optimizer = sgd(ddp)
    if scheme is not None:
        lgc.attach(ddp, scheme, optimizer, check_every=1, **policy)
    for step in range(5):
        x = inputs(rank, step)
        if policy and rank and step == 2:
            ddp.module[0].weight.data += 1
        optimizer.zero_grad()
        with ddp.no_sync():
            ddp(x).square().mean().backward()
        rest = [parameter.detach().clone() for parameter in ddp.parameters()]
        with torch.no_grad():
            for parameter in ddp.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=0.05)  # on each rank another way
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        with torch.no_grad():
            for parameter, value in zip(ddp.parameters(), rest, strict=True):
                parameter.copy_(value)
        optimizer.step()
    return weights(ddp)


@pytest.mark.parametrize(
    "scheme",
    [
        "dense",
        "topk:rate=1.0:low_pass=1.0:values=float32",
        "local:every=1:start_steps=2:start=float32:outer_momentum=0+dense",
    ],
)
def test_weights_that_are_perturbed_while_gradients_are_exchanged_are_the_same_where_they_rest(
    ranks: RankFactory, scheme: str
) -> None:
    plain = ranks(2).run(train_sharpness_aware, None)
    for result in ranks(2).run(train_sharpness_aware, scheme):
        torch.testing.assert_close(result, plain[0], rtol=1e-4, atol=1e-6)


def disturb_and_synchronise(rank: int, _: int) -> None:
    train_sharpness_aware(rank, _, SCHEMES["dgc"], on_difference="synchronise")


def test_weights_that_are_perturbed_cannot_be_synchronised(ranks: RankFactory) -> None:
    for error in ranks(2).exceptions(disturb_and_synchronise):
        assert "step 2: the ranks are no longer the same: parameter 0.weight on rank 1" in str(error)
        assert "changed since the backward pass began, as SAM does" in str(error)


def compare_none(rank: int, _: int) -> list[str]:
    check = ReplicaCheck(Transport(torch.distributed.group.WORLD), 1, "raise")  # type: ignore[arg-type]
    replicas = {"weight": torch.full((3,), float(rank))}
    with TestCase().assertLogs("lgc", logging.WARNING) if rank == 0 else contextlib.nullcontext() as logged:
        for step in range(6):
            check.run(step, replicas, counts=False)
    return [] if logged is None else logged.output


def test_three_comparisons_of_no_rank_are_said_once(ranks: RankFactory) -> None:
    (said,), nothing = ranks(2).run(compare_none)
    assert "step 2: at the last 3 checks no rank could be compared" in said
    assert nothing == []


# --- a batch that is not finite ---


def skip_a_bad_batch(rank: int, _: int, scheme: str, policy: dict[str, Any]) -> Tensor:
    ddp, optimizer, _handle = attached(scheme, **policy)
    for step in range(4):
        optimizer.zero_grad()
        x = inputs(rank, step)
        if step == 1 and rank == 1:
            x[0] = torch.nan
        with contextlib.suppress(FloatingPointError):
            ddp(x).square().mean().backward()
            if bool(nn.utils.get_total_norm([p.grad for p in ddp.parameters() if p.grad is not None]).isfinite()):
                optimizer.step()
    return weights(ddp)


@pytest.mark.parametrize("scheme", ["dgc:rate=0.1", "local:every=2:start_steps=3+dense"], ids=["dgc", "local"])
def test_a_loop_that_catches_the_error_of_a_bad_batch_is_told_how_to_skip_it(ranks: RankFactory, scheme: str) -> None:
    for failure in ranks(2).exceptions(skip_a_bad_batch, scheme, {}):
        assert "DDP cannot run this model again" in str(failure)
        assert "gradient is not finite on rank 1" in str(failure)
        assert 'on_nonfinite="propagate"' in str(failure)
    assert_alike(ranks(2).run(skip_a_bad_batch, scheme, {"on_nonfinite": "propagate"}))


def use_after_an_error(rank: int, _: int) -> Tensor:
    ddp, *_others = attached("dgc:rate=0.1")
    with contextlib.suppress(FloatingPointError):
        ddp(inputs(rank, 0).fill_(torch.nan)).sum().backward()
    with torch.no_grad():
        ddp(inputs(rank, 0))
    copied = copy.deepcopy(ddp)
    torch.save(ddp, io.BytesIO())
    return train(rank, copied, sgd(copied), range(2))


def test_after_an_error_a_model_can_be_evaluated_and_copied(ranks: RankFactory) -> None:
    assert_alike(ranks(2).run(use_after_an_error))


# --- refusals that name the way out ---


def do_something_alone(rank: int, _: int, scheme: str) -> None:
    ddp, optimizer, _handle = attached(scheme, timeout=0.5)
    train(rank, ddp, optimizer, range(3))  # DDP's own messages are sent by now
    if rank == 0:
        time.sleep(2)
    train(rank, ddp, optimizer, range(3, 6))


@cases("scheme", SCHEMES.values(), in_suite=[SCHEMES["local"]])
def test_a_rank_that_does_something_alone_for_too_long_is_told_of_the_timeout(ranks: RankFactory, scheme: str) -> None:
    for failure in ranks(2).exceptions(do_something_alone, scheme):
        assert isinstance(failure, RankError | RuntimeError)
        assert "give attach a timeout= longer than what one rank does alone" in str(failure)


def load_anothers_state(rank: int, _: int) -> None:
    _ddp, _optimizer, handle = attached("dgc:rate=0.1")
    handle.load_state_dict(handle.state_dict() | {"rank": 0})
    train(rank, _ddp, _optimizer, range(1))  # rank 0, which learns of it while it waits


def load_another_steps_state(_: int, __: int) -> None:
    _ddp, _optimizer, handle = attached("dgc:rate=0.1")
    handle.load_state_dict(handle.state_dict(), step=3)


def do_alone(rank: int, action: Callable[[lgc.Handle, DistributedDataParallel], object]) -> None:
    ddp, optimizer, handle = attached("dgc:rate=0.1")
    train(rank, ddp, optimizer, range(2))
    assert handle.wire_summary(of_all=False)["ratio"] == handle.wire_summary()["ratio"]
    if rank == 0:
        action(handle, ddp)
    train(rank, ddp, optimizer, range(2, 4))


def sum_up_alone(rank: int, _: int) -> None:
    do_alone(rank, lambda handle, _: handle.wire_summary())


def save_alone(rank: int, _: int) -> None:
    do_alone(rank, lambda handle, ddp: lgc.checkpoint.save("unused", {}, step=2, group=ddp.process_group))


def detach_alone(rank: int, _: int) -> None:
    do_alone(rank, lambda handle, _: handle.detach())


def attach_a_replicate(_: int, __: int) -> None:
    lgc.attach(replicate(nn.Linear(2, 2)), SCHEMES["local"], torch.optim.SGD([torch.zeros(1)]))


def attach_in_data_parallel(_: int, __: int) -> None:
    lgc.attach(nn.DataParallel(nn.Linear(2, 2)), "dgc")


def attach_around_ddp(_: int, __: int) -> None:
    container = nn.Sequential(network())
    lgc.attach(container, SCHEMES["local"], sgd(container))


def attach_lazy(_: int, __: int) -> None:
    lgc.attach(nn.Sequential(nn.LazyLinear(2)), SCHEMES["local"], torch.optim.SGD([torch.zeros(1)]))


def attach_frozen(_: int, __: int) -> None:
    lgc.attach(nn.Linear(2, 2).requires_grad_(False), SCHEMES["local"], torch.optim.SGD([torch.zeros(1)]))


def attach_lbfgs(_: int, __: int) -> None:
    ddp = network()
    lgc.attach(ddp, SCHEMES["local"], torch.optim.LBFGS(ddp.parameters()))


def start_with_a_sparse_gradient(_: int, __: int) -> None:
    net = nn.Linear(2, 2)
    optimizer = sgd(net)
    lgc.attach(net, SCHEMES["local"], optimizer)
    net.weight.grad = torch.eye(2).to_sparse()
    optimizer.step()


def attach_adafactor(_: int, __: int) -> None:
    ddp = network()
    lgc.attach(ddp, "dgc:momentum=0:second_moment=0.95", torch.optim.Adafactor(ddp.parameters()))


def attach_twice(_: int, __: int) -> None:
    ddp, _optimizer, _handle = attached("dgc")
    lgc.attach(ddp, "topk")


@pytest.mark.parametrize(
    ("function", "failing", "words"),
    [
        (load_anothers_state, [0, 1], "rank was 0, here it is 1; every rank saves and loads its own"),
        (load_another_steps_state, [0, 1], "it is of step 0, and the model's is 3: what is owed at one step"),
        (sum_up_alone, [0, 1], "now there is rank 0 in handle.wire_summary, rank 1 in a round of training"),
        (save_alone, [0, 1], "now there is rank 0 in lgc.checkpoint, rank 1 in a round of training"),
        (detach_alone, [0, 1], "now there is rank 0 in handle.detach, rank 1 in a round of training"),
        (attach_in_data_parallel, [0, 1], "one process for all devices; start a process for each, with torchrun"),
        (attach_a_replicate, [0, 1], "is of replicate(), which keeps its DDP to itself"),
        (attach_around_ddp, [0, 1], "has DistributedDataParallel inside (0), which communicates at every step"),
        (attach_lazy, [0, 1], "has 0.weight without values yet; call a lazy module once"),
        (attach_frozen, [0, 1], "has no parameter that requires gradients; attach before freezing"),
        (attach_lbfgs, [0, 1], "under LocalSteps use another optimizer, such as torch.optim.AdamW, or a scheme that"),
        (start_with_a_sparse_gradient, [0, 1], "the gradient of 'weight' is sparse; make it with sparse=False"),
        (attach_adafactor, [0, 1], "the Adafactor would make another one of it. Train with SGD without momentum"),
        (attach_twice, [0, 1], "already has the scheme dgc; call handle.detach() on every rank to attach another."),
    ],
    ids=[
        "state",
        "step",
        "summary",
        "checkpoint",
        "detach",
        "data-parallel",
        "replicate",
        "around-ddp",
        "lazy",
        "frozen",
        "l-bfgs",
        "sparse",
        "adafactor",
        "twice",
    ],
)
def test_a_refusal_names_the_way_out(
    ranks: RankFactory, function: Callable[..., None], failing: list[int], words: str
) -> None:
    failures = ranks(2).exceptions(function)
    assert [rank for rank, failure in enumerate(failures) if failure is not None] == failing
    assert all(words in str(failures[rank]) for rank in failing)


def test_a_model_with_too_many_parameters_is_told_what_takes_it() -> None:
    tensors = [("weight", torch.empty(2**31, device="meta"))]
    with pytest.raises(ValueError, match=r"LocalSteps\(fragments=\.\.\., start_steps=0\), or dense, bf16"):
        lgc.TopK().layout(tensors)
