"""Local steps: rounds after every so many steps of the optimizer, on what the ranks have moved since the last one."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lgc.buffers import Buffers
from lgc.caller import Caller, RoundTime
from lgc.comm.replicas import ReplicaError
from lgc.comm.transport import RankError, Transport, clock
from lgc.ddp import CollectedBuckets
from lgc.requirements import trained
from lgc.rounds.schedule import FOREVER, Schedule
from lgc.schemes import Dense, LocalSteps, RoundScheme
from lgc.synchronizer import Policy, Synchronizer, require_same_form

logger = logging.getLogger("lgc")

_callers: "weakref.WeakKeyDictionary[nn.Module, LocalRounds]" = weakref.WeakKeyDictionary()


class Result(NamedTuple):
    """What a round gave: the mean of what was moved, and the buffers that some rank had changed, by name."""

    mean: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Fragment:
    """Parameters that are exchanged together: their anchor, and the outer optimizer that moves it.

    Attributes:
        anchor: where all ranks were after the last round, by name, float32 or wider.
        momentum: of the outer optimizer, like the anchor.
        rounds: number of rounds begun.
        step: of the optimizer, at the last of them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], scheme: LocalSteps, transport: Transport, policy: Policy
    ) -> None:
        self.parameters = dict(parameters)
        self.anchor = {name: _wide(parameter) for name, parameter in parameters.items()}
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in self.anchor.items()}
        self.rounds = 0
        self.step = scheme.start_steps
        self._outer_lr, self._outer_momentum = scheme.outer
        replicas = {f"anchor of {name}": tensor for name, tensor in self.anchor.items()}
        self.synchronizer = Synchronizer(scheme.exchange, self.anchor, transport, policy, replicas)
        aggregator = self.synchronizer.aggregator
        aggregator.feedback.decay = scheme.decay
        if isinstance(scheme.exchange, Dense):
            aggregator.schedule = Schedule(1.0)  # rounds are what compresses

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights, which are the same on all ranks, as the anchor."""
        for name, parameter in self.parameters.items():
            self.anchor[name].copy_(parameter)

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """What this rank has moved since the last round, `anchor - weights`, by name."""
        return {
            name: self.anchor[name].to(own.dtype) - own.to(self.anchor[name].dtype)
            for name, own in self.parameters.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's own weights, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def apply(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor], *, finite: bool) -> None:
        """Move the anchor by the mean, and the weights to it, with what they have moved since they were `before`."""
        for name, parameter in self.parameters.items():
            anchor, m, d = self.anchor[name], self.momentum[name], mean[name]
            m.mul_(self._outer_momentum if parameter.requires_grad else 0.0).add_(d)  # what is frozen comes to rest
            anchor.sub_(self._outer_lr * (d + self._outer_momentum * m) if parameter.requires_grad else d)
            parameter.copy_(anchor + (parameter.to(anchor.dtype) - before[name]) if finite else anchor)


class _Launched(NamedTuple):
    """A round that is under way: what this rank brings to it, and what it will give."""

    fragment: Fragment
    weights: dict[str, Tensor]  # this rank's, when it began
    buffers: dict[str, Tensor]  # the same
    result: "Task[Result]"
    finite: bool


class LocalRounds(Caller):
    """Counts the optimizer's steps, and makes a round whenever one is due.

    Args:
        model: in DDP or not.
        scheme: how often, and how.
        transport: between the ranks.
        policy: what is done when something is wrong.
        optimizer: whose steps are counted.
        grad_scaler: whose skipped steps are counted too.
    """

    synchronizer: Synchronizer

    def __init__(
        self,
        model: nn.Module,
        scheme: LocalSteps,
        transport: Transport,
        policy: Policy,
        optimizer: Optimizer,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        ddp = model if isinstance(model, DistributedDataParallel) else None
        module: nn.Module = model if ddp is None else ddp.module
        if ddp is None:
            _copy({each: transport.broadcast(each.detach(), "weights", source=0) for each in _state_of(module)})
        self._scheme = scheme
        self._model = weakref.ref(model)  # which keeps this
        self._trainable = {id(each) for each in model.parameters() if each.requires_grad}
        self._policy = policy
        self._optimizer = optimizer
        self._parameters = dict(trained(model))
        self._transport = transport
        self._executor: ThreadPoolExecutor | None = None
        if scheme.overlap:  # the model's own group stays free for what the loop does meanwhile
            self._transport = transport.of_new_group()
            self._executor = ThreadPoolExecutor(1, "lgc")
        self._start = self._make_start(ddp, transport, grad_scaler) if scheme.start_steps else None
        self._buffers = Buffers(module)
        groups = fragmented(self._parameters, scheme.fragments)
        self._fragments = [Fragment(group, scheme, self._transport, policy) for group in groups]
        self.synchronizer = self._fragments[0].synchronizer
        self.phase = self._start.phase if self._start else self.synchronizer.phase(0)
        self._last_round = scheme.start_steps  # the step of the last round
        self._launched: _Launched | None = None
        self._own: dict[Tensor, Tensor] | None = None  # what `anchored` has put aside
        self._replaced = False  # the weights are not those of this anchor
        self._warned = False
        optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before_step(args, kwargs))
        optimizer.register_step_post_hook(lambda *_: self._count_step())
        if grad_scaler is not None and grad_scaler.is_enabled():
            self._count_skipped_steps(grad_scaler)
        _callers[module] = self
        module.register_state_dict_pre_hook(_on_state_dict)  # a function, which a copy of the module may keep
        module.register_load_state_dict_post_hook(_on_load_state_dict)

    def _make_start(
        self, ddp: DistributedDataParallel | None, transport: Transport, grad_scaler: torch.amp.GradScaler | None
    ) -> "Start":
        exchange = self._scheme.start_exchange
        start: Start
        if ddp is None:
            start = OptimizedGradients(self._parameters, exchange, transport, self._policy)
        else:
            start = CollectedBuckets(ddp, exchange, transport, self._policy, self._optimizer, grad_scaler)
        if not isinstance(exchange, Dense):
            start.synchronizer.aggregator.schedule = Schedule(1.0, warmup_steps=FOREVER)
        start.phase = start.synchronizer.phase(0)
        return start

    @property
    def _is_starting(self) -> bool:
        return self.step < self._scheme.start_steps

    def exchange(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        """Exchange one of DDP's buckets during the start, and leave it this rank's own from then on: its hook."""
        ddp = self._model()
        if isinstance(ddp, DistributedDataParallel) and ddp._join_config.enable:
            raise RuntimeError(
                "lgc: local steps count the steps of all ranks, which join() lets differ; leave join() out, and give "
                "every rank the same number of batches, or stop all ranks at the shortest and call handle.finish()."
            )
        if self._is_starting:
            assert isinstance(self._start, CollectedBuckets)
            return self._start.exchange(None, bucket)
        device = bucket.buffer().device
        future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else [])
        future.set_result(bucket.buffer())
        return future

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._transport.announcing(RankError, ReplicaError, FloatingPointError):
            if self._own is not None:
                raise RuntimeError("lgc: optimizer.step() within anchored(), whose end would undo it; leave it before.")
            if self._replaced:
                raise RuntimeError(
                    "lgc: the model's weights were loaded after local steps had begun, which would count as what this "
                    "rank has moved. Load the handle's state too, after the model's, or attach after loading."
                )
            if self._is_starting and isinstance(self._start, OptimizedGradients):
                if any(argument is not None for argument in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
                    raise RuntimeError(
                        "lgc: an optimizer with a closure makes its gradients within the step, where the start of "
                        "local steps cannot exchange them; use start_steps=0, or wrap the model in DDP."
                    )
                self._start.exchange_gradients()

    def _count_step(self) -> None:
        self.step += 1
        scheme = self._scheme
        since_start = self.step - scheme.start_steps
        if since_start <= 0:
            assert self._start is not None
            self.phase, self.round_time = self._start.phase, self._start.round_time
        if since_start == 0:
            for fragment in self._fragments:
                fragment.begin()
        elif since_start > 0:
            self.phase = self.synchronizer.phase(self._fragments[0].rounds)
            if since_start % scheme.period == 0:
                number = since_start // scheme.period - 1
                self._round(self._fragments[number % scheme.fragments])

    def _count_skipped_steps(self, grad_scaler: torch.amp.GradScaler) -> None:
        # A scaler that found infinities does not call the optimizer, and only on this rank.
        make_step = grad_scaler.step

        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
            before = self.step
            result = make_step(optimizer, *args, **kwargs)
            if optimizer is self._optimizer and self.step == before:
                self._count_step()
            return result

        grad_scaler.step = step  # type: ignore[method-assign]

    def _round(self, fragment: Fragment) -> None:
        started, communicated = clock(self._transport.device), self._transport.seconds
        with self._transport.announcing(RankError, ReplicaError, FloatingPointError):
            self._complete()
            self._launch(fragment, wait=self._executor is None)
            if self._executor is None:
                self._complete()
        seconds = clock(self._transport.device) - started
        communication = self._transport.seconds - communicated if self._executor is None else seconds
        self.round_time = RoundTime(seconds - communication, communication)

    def _launch(self, fragment: Fragment, *, wait: bool) -> None:
        """Begin a round with what this rank has moved."""
        error = self._unfrozen()
        distance, steps = fragment.moved(), self.step - self._last_round
        finite = all(bool(each.isfinite().all()) for each in distance.values())
        buffers = {name: buffer.clone() for name, buffer in self._buffers.current().items()}
        exchange = partial(self._exchange, fragment, distance, buffers, self.step, steps, finite=finite, error=error)
        result: Task[Result] = Task()
        weights = fragment.weights()
        if wait or self._executor is None:
            result.set_result(exchange())
        else:
            result = self._executor.submit(exchange)
        fragment.step = self._last_round = self.step
        self._launched = _Launched(fragment, weights, buffers, result, finite)

    def _exchange(
        self,
        fragment: Fragment,
        distance: dict[str, Tensor],
        buffers: dict[str, Tensor],
        step: int,
        steps: int,
        *,
        finite: bool,
        error: Exception | None,
    ) -> Result:
        """Make a round; a collective. All ranks first say which step they are at, and whether they are finite."""
        phase = fragment.synchronizer.phase(fragment.rounds)
        self._transport.begin(phase, steps=steps - 1)  # the round itself counts as one
        states = self._buffers.states(buffers) if fragment is self._fragments[0] else []
        opening = self._transport.open_round(step, finite=finite, vote=any(states), error=error)
        counting = opening.finite.count(True)
        self._report_nonfinite(opening.finite, step)
        scale = len(opening.finite) / counting
        shares = {name: each * scale if finite else torch.zeros_like(each) for name, each in distance.items()}
        mean = fragment.synchronizer.synchronize(shares, fragment.rounds)
        fragment.rounds += 1
        combined = self._buffers.combine(buffers, states, self._transport) if any(opening.votes) else {}
        return Result(mean, combined)

    def _report_nonfinite(self, finite: list[bool], step: int) -> None:
        ranks = ", ".join(str(rank) for rank, each in enumerate(finite) if not each)
        if not ranks:
            return
        message = f"step {step}: the weights are not finite on rank {ranks}"
        if not any(finite):
            raise FloatingPointError(f"lgc: {message}, so there is no mean; go on from a checkpoint.")
        if self._policy.on_nonfinite == "raise":
            raise FloatingPointError(
                f"lgc: {message}. No state has changed; go on from a checkpoint, or attach with "
                'on_nonfinite="propagate": such a rank then counts for nothing in the round and goes on from the mean.'
            )
        if self._transport.rank == 0:
            logger.warning("%s; it goes on from the mean of the others.", message)

    def _complete(self) -> None:
        """Wait for the round that is under way, if any, and apply it."""
        if self._launched is None:
            return
        fragment, before, buffers, task, finite = self._launched
        result = task.result()
        self._launched = None
        fragment.apply(result.mean, before, finite=finite)
        self._buffers.apply(result.buffers, buffers)
        if not finite:
            for tensor in _tensors_of(self._optimizer):
                torch.nan_to_num_(tensor, 0.0, 0.0, 0.0)

    def _unfrozen(self) -> Exception | None:
        """The error of parameters that are trained now and were not when this was attached."""
        model = self._model()
        assert model is not None
        names = [
            name for name, each in model.named_parameters() if each.requires_grad and id(each) not in self._trainable
        ]
        if not names:
            return None
        return RuntimeError(
            f"{names[0]} is trained now and was frozen when attach was called (parameters like it: {len(names)}); no "
            "round would exchange it. Attach while all that will ever be trained requires gradients, and freeze after."
        )

    @contextlib.contextmanager
    def anchored(self) -> Iterator[None]:
        """Have the anchor, and the buffers of the last round, in the model for a while: for evaluation and export.

        What is changed there meanwhile is lost.
        """
        if self._own is not None or self.step <= self._scheme.start_steps:
            yield
            return
        shared: dict[Tensor, Tensor] = {}
        for fragment in self._fragments:
            shared |= {parameter: fragment.anchor[name] for name, parameter in fragment.parameters.items()}
        shared |= {own: self._buffers.shared[name] for name, own in self._buffers.current().items()}
        self._own = {own: own.detach().clone() for own in shared}
        _copy(shared)
        try:
            yield
        finally:
            _copy(self._own)
            self._own = None

    def finish(self) -> None:
        """Exchange what has been moved since the last round, at any step, the same on every rank; a collective.

        All ranks have the same weights then. Nothing that an exchange has not sent is lost: it stays in the residual.

        Raises:
            RankError: on every rank, if the ranks are at different steps.
        """
        if self._own is not None:
            raise RuntimeError("lgc: handle.finish() within anchored(), whose end would undo it; leave it before.")
        if self.step <= self._scheme.start_steps:
            return
        with self._transport.announcing(RankError, ReplicaError, FloatingPointError):
            self._complete()
            self._transport.open_round(self.step, finite=True)
            for fragment in self._fragments:
                if fragment.step < self.step:
                    self._launch(fragment, wait=True)
                    self._complete()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, in three parts: see `Aggregator.state_dict`.

        A round that is under way is waited for, and what it gave is part of the state.
        """
        under_way = self._launched
        given = Result({}, {}) if under_way is None else under_way.result.result()
        parts = {name: each.state_dict() for name, each in self._synchronizers().items()}
        weights = {name: self._of_this_rank(each) for name, each in self._parameters.items()}
        buffers = {name: self._of_this_rank(each) for name, each in self._buffers.current().items()}
        anchors: dict[str, Tensor] = {}
        momenta: dict[str, Tensor] = {}
        rounds: dict[str, int] = {}
        steps: dict[str, int] = {}
        for number, fragment in enumerate(self._fragments):
            anchors |= {name: each.clone() for name, each in fragment.anchor.items()}
            momenta |= {name: each.clone() for name, each in fragment.momentum.items()}
            rounds[str(number)], steps[str(number)] = fragment.rounds, fragment.step
        per_rank = {name: part["per_rank"] for name, part in parts.items()}
        replicated = {name: part["replicated"] for name, part in parts.items()}
        per_rank |= {"weights": weights, "buffers": buffers}
        replicated |= {"anchor": anchors, "outer_momentum": momenta, "rounds": rounds, "round_steps": steps}
        replicated |= {"buffers": {name: each.clone() for name, each in self._buffers.shared.items()}}
        replicated |= {"last_round": self._last_round}
        if self._executor:  # the same keys at every step
            before = weights | (under_way.weights if under_way else {})
            per_rank["before"] = {"weights": before, "buffers": under_way.buffers if under_way else buffers}
            mean = {name: torch.zeros_like(each) for name, each in anchors.items()}
            replicated["under_way"] = {
                "fragment": self._fragments.index(under_way.fragment) + 1 if under_way else 0,
                "mean": mean | {name: each.clone() for name, each in given.mean.items()},
                "buffers": replicated["buffers"] | given.buffers,
            }
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def load_state_dict(self, state: Any, step: int, *, resharded: bool) -> None:
        """Go on from a state before `step`. On another number of ranks, a rank starts from the mean of the weights and
        residuals that its share of the old ranks had, so that the mean of what is owed stays."""
        here = self.state_dict()
        if resharded:
            state = {**state, "server": {}}
        require_same_form(here, state, "aggregator")
        self._launched = None
        for name, synchronizer in self._synchronizers().items():
            part = {"per_rank": state["per_rank"][name], "replicated": state["replicated"][name], "server": {}}
            synchronizer.load_state_dict(part, step, resharded=resharded)
        per_rank, replicated = state["per_rank"], state["replicated"]
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(per_rank["weights"][name])
            for name, buffer in self._buffers.current().items():
                buffer.copy_(per_rank["buffers"][name])
        for number, fragment in enumerate(self._fragments):
            for name, anchor in fragment.anchor.items():
                anchor.copy_(replicated["anchor"][name])
                fragment.momentum[name].copy_(replicated["outer_momentum"][name])
            fragment.rounds, fragment.step = replicated["rounds"][str(number)], replicated["round_steps"][str(number)]
        self._buffers.shared = {
            name: each.to(self._buffers.shared[name].device, copy=True) for name, each in replicated["buffers"].items()
        }
        self._last_round = replicated["last_round"]
        if isinstance(self._start, Caller):
            self._start.step = min(step, self._scheme.start_steps)
        self._replaced = False
        if self._executor and replicated["under_way"]["fragment"]:
            self._set_under_way(per_rank["before"], replicated["under_way"])

    def _set_under_way(self, before: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        fragment = self._fragments[given["fragment"] - 1]
        device = self.synchronizer.aggregator.feedback.residual.device
        weights, mean = (
            {name: of[name].to(device, copy=True) for name in fragment.anchor}
            for of in (before["weights"], given["mean"])
        )
        task: Task[Result] = Task()
        buffers = {name: each.to(device, copy=True) for name, each in given["buffers"].items()}
        task.set_result(Result(mean, buffers if fragment is self._fragments[0] else {}))
        finite = all(bool(each.isfinite().all()) for each in weights.values())
        self._launched = _Launched(
            fragment, weights, {n: b.to(device, copy=True) for n, b in before["buffers"].items()}, task, finite
        )

    def warn_of_own_weights(self) -> None:
        """Warn, once, that the model has weights of this rank alone."""
        if (
            self._own is not None
            or self._warned
            or self.step == self._last_round
            or self.step <= self._scheme.start_steps
        ):
            return
        self._warned = True
        warnings.warn(
            "between rounds model.state_dict() has this rank's own weights, which no other rank has; take it within "
            "`with handle.anchored():`, also for a checkpoint: the handle's state has this rank's own.",
            stacklevel=4,
        )

    def take_replaced_weights(self) -> None:
        """Take weights that were just loaded into the model as the anchor, where no steps have been made from it."""
        if self.step == self._scheme.start_steps:
            for fragment in self._fragments:
                fragment.begin()
        self._replaced = self.step > self._scheme.start_steps and self._own is None

    def _synchronizers(self) -> dict[str, Synchronizer]:
        rounds = {f"round {number}": fragment.synchronizer for number, fragment in enumerate(self._fragments)}
        return rounds | ({"start": self._start.synchronizer} if self._start else {})

    def _of_this_rank(self, tensor: Tensor) -> Tensor:
        return (self._own or {}).get(tensor, tensor).detach().clone()


class OptimizedGradients(Caller):
    """Exchanges a plain module's gradients right before the optimizer uses them.

    Args:
        parameters: by name.
        scheme: how.
        transport: between the ranks.
        policy: what is done when something is wrong.
    """

    synchronizer: Synchronizer

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], scheme: RoundScheme, transport: Transport, policy: Policy
    ) -> None:
        self._parameters = parameters
        replicas = {f"parameter {name}": parameter for name, parameter in parameters.items()}
        self.synchronizer = Synchronizer(scheme, parameters, transport, policy, replicas)

    @torch.no_grad()
    def exchange_gradients(self) -> None:
        """Replace every gradient by its mean over the ranks; a collective."""
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._parameters.items()
        }
        means = self.synchronizer.synchronize(gradients, self.step)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.copy_(means[name])
            elif means[name].any():  # what another rank used, or what feedback still owed
                parameter.grad = means[name].to(parameter.dtype, copy=True)
        self.step += 1


Start = CollectedBuckets | OptimizedGradients


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float32, or in float64 if it is that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def fragmented(parameters: Mapping[str, nn.Parameter], number: int) -> list[dict[str, nn.Parameter]]:
    """The parameters in their order, in `number` groups of about the same size."""
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(number)]
    total, before = sum(parameter.numel() for parameter in parameters.values()), 0
    for name, parameter in parameters.items():
        groups[int((before + parameter.numel() / 2) * number / total)][name] = parameter
        before += parameter.numel()
    if not all(groups):
        raise ValueError(
            f"LocalSteps(fragments=...) must leave no fragment without a tensor, got {number} for {len(parameters)} "
            "tensors, some of which are large; use fewer."
        )
    return groups


def _state_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)


def _tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    for of_parameter in optimizer.state.values():
        for value in of_parameter.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value


def _on_state_dict(module: nn.Module, *_: object) -> None:
    caller = _callers.get(module)
    if caller is not None:
        caller.warn_of_own_weights()


def _on_load_state_dict(module: nn.Module, *_: object) -> None:
    caller = _callers.get(module)
    if caller is not None:
        caller.take_replaced_weights()
