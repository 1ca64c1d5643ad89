"""Local steps: rounds after every so many steps of the optimizer, on what the ranks have moved since the last one."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lgc.buffers import Buffers
from lgc.caller import Caller, Detached, RoundTime
from lgc.comm.replicas import ReplicaCheck, ReplicaError
from lgc.comm.transport import FINISH, ROUND, Opening, RankError, Transport, clock
from lgc.ddp import CollectedBuckets
from lgc.fragments import Fragment, fragmented
from lgc.gradients import OptimizedGradients, all_zero
from lgc.optimizers import FEW_STEPS, Streak, end_watch, share_scale, share_state, uncompiled, watch_steps
from lgc.pace import Pace, Progress, Work, scale_of, weights_of
from lgc.requirements import frozen, require_optimizers_of, trained
from lgc.rounds.schedule import FOREVER, Schedule
from lgc.schemes import Dense, LocalSteps, Seconds
from lgc.sites import Site
from lgc.synchronizer import Policy, Synchronizer, require_same_form

logger = logging.getLogger("lgc")

Start = CollectedBuckets | OptimizedGradients
Change = Callable[[Mapping[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
OF_ALL_RANKS = (RankError, ReplicaError, FloatingPointError)  # errors that every rank raises by itself

_callers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LocalRounds]] = weakref.WeakKeyDictionary()


class Result(NamedTuple):
    """What a round gave: the mean of what was moved, and the buffers that some rank had changed, by name; and whether
    the weights of this rank's site were finite."""

    mean: dict[str, Tensor]
    buffers: dict[str, Tensor]
    finite: bool


class Launched(NamedTuple):
    """A round that is under way.

    Attributes:
        fragment: that is exchanged.
        weights: this rank's when it began, where they go on moving.
        buffers: the same.
        result: of the round, once it is done.
    """

    fragment: Fragment
    weights: dict[str, Tensor] | None
    buffers: dict[str, Tensor]
    result: Task[Result]


class LocalRounds(Caller):
    """Counts the optimizer's steps, and makes a round whenever one is due.

    Args:
        model: in DDP or not. DDP is taken over, unless it makes the mean gradient of a site.
        scheme: how often, and how.
        site: whose ranks have the model together.
        transport: between the sites.
        policy: what is done when something is wrong.
        optimizers: whose steps are counted, and which keep this. One step is one of each.
        grad_scaler: whose skipped steps are counted too.
    """

    synchronizer: Synchronizer

    def __init__(
        self,
        model: nn.Module,
        scheme: LocalSteps,
        site: Site,
        transport: Transport,
        policy: Policy,
        optimizers: Sequence[Optimizer],
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        ddp = model if isinstance(model, DistributedDataParallel) and site.inside is None else None
        module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        site.rest(module)
        if ddp is None:
            site.take_first(_state_of(module), transport)
        self._scheme = scheme
        self._module = module
        self._ddp = weakref.ref(model)  # whose hook keeps this
        self._policy = policy
        self._optimizers = optimizers
        self._grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._parameters = dict(trained(model))
        active = [each for each in module.parameters() if each.requires_grad]
        self._trainable = {id(each) for each in (*active, *self._parameters.values())}
        self._site = site
        self._transport = transport
        self._round_transport = transport
        self._executor: ThreadPoolExecutor | None = None
        if scheme.overlap:  # the model's own group stays free for what the loop does meanwhile
            self._round_transport = transport.of_new_group()
            self._site = site.of_new_group()
            self._executor = ThreadPoolExecutor(1, "lgc")
        self._start = self._make_start(ddp, transport, grad_scaler) if scheme.start_steps else None
        self._buffers = Buffers(module)
        groups = fragmented(self._parameters, scheme.fragments)
        rest = frozen(model)
        self._fragments = [
            Fragment(group, scheme, self._site, self._round_transport, policy, {} if number else rest)
            for number, group in enumerate(groups)
        ]
        self._pace = Pace(scheme.every.number) if isinstance(scheme.every, Seconds) else None
        self.synchronizer = self._fragments[0].synchronizer
        self.phase = self._start.phase if self._start else self.synchronizer.phase(0)
        self._in_step = False  # between an optimizer's two hooks
        self._stepped: list[Optimizer] = []  # since the last step that was counted
        self._last_round = scheme.start_steps  # the step of the last round
        self._launched: Launched | None = None
        self._own: dict[Tensor, Tensor] | None = None  # what `anchored` has put aside
        self._replaced = False  # the weights are not those of this anchor
        self._warned = False
        self._step_hooks: list[RemovableHandle] = []
        self.use_optimizers(optimizers)
        self._steps_of_another = Streak()  # since the last one that counts
        self._most_of_another = FEW_STEPS if self._pace else max(scheme.steps_a_round, FEW_STEPS)
        watch_steps(module, self._parameters.values(), self._before_any_step)
        if self._grad_scaler is not None:
            scaled = partial(_make_scaled_step, self, self._grad_scaler.step)
            self._grad_scaler.step = scaled  # type: ignore[method-assign]
        self._module_hooks: list[RemovableHandle] = []
        for each in module.modules():  # functions, which a copy of the module may keep
            _callers[each] = weakref.ref(self)
            self._module_hooks.append(each.register_state_dict_pre_hook(_on_state_dict))
            self._module_hooks.append(each.register_load_state_dict_post_hook(_on_load_state_dict))

    def use_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        require_optimizers_of(self._parameters, optimizers)
        for hook in self._step_hooks:
            hook.remove()
        self._optimizers = optimizers
        self._stepped.clear()
        if isinstance(self._start, CollectedBuckets):
            self._start.use_optimizers(optimizers)
        self._step_hooks = [
            hook
            for each in optimizers
            for hook in (
                each.register_step_pre_hook(uncompiled(self._before_step)),
                each.register_step_post_hook(uncompiled(lambda optimizer, *_: self._after_step(optimizer))),
            )
        ]

    def _before_any_step(self, optimizer: Optimizer) -> None:
        if optimizer in self._optimizers:
            self._steps_of_another.end()
        elif (steps := self._steps_of_another.add(optimizer)) > self._most_of_another:
            raise RuntimeError(
                f"lgc: {type(optimizer).__name__} has made {steps - 1} steps with this model's "
                f"parameters, and the {type(self._optimizers[0]).__name__} given to attach none meanwhile, whose steps "
                "are those that local steps count: no round would bring the ranks together. When you replace an "
                "optimizer, call handle.use_optimizer(optimizer) on every rank."
            )

    def _make_start(
        self, ddp: DistributedDataParallel | None, transport: Transport, grad_scaler: torch.amp.GradScaler | None
    ) -> Start:
        exchange = self._scheme.start_exchange
        start: Start
        if ddp is None:
            start = OptimizedGradients(self._parameters, exchange, self._site, transport, self._policy)
        else:
            start = CollectedBuckets(ddp, exchange, transport, self._policy, self._optimizers, grad_scaler)
            start.rounds = self._scheme.start_steps
        if not isinstance(exchange, Dense):
            start.synchronizer.aggregator.schedule = Schedule(1.0, warmup_steps=FOREVER)
        start.phase = start.synchronizer.phase(0)
        return start

    @property
    def _is_starting(self) -> bool:
        return self.step < self._scheme.start_steps

    @property
    def _has_begun(self) -> bool:
        """Whether there have been steps that each rank has made by itself."""
        return self.step > self._scheme.start_steps

    @property
    def _is_together(self) -> bool:
        """Whether all ranks have the same weights now."""
        rounds_done = self._launched is None and all(each.step == self.step for each in self._fragments)
        return rounds_done or not self._has_begun

    @property
    def _number(self) -> int:
        """What all ranks must agree on before a round: how many steps they have made, or by time, how many rounds."""
        return self._fragments[0].rounds if self._pace else self.step

    @property
    def progress(self) -> Progress:
        if self._pace is None:
            return Progress(self.step)
        together = min(self.step, self._scheme.start_steps)
        return Progress(together + self._pace.steps_done, self._pace.samples_done, self._pace.work)

    def count(self, samples: int) -> None:
        if self._pace is None:
            super().count(samples)
        else:
            self._pace.count(samples)

    def exchange(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Exchange one of DDP's buckets during the start, and leave it this rank's own from then on: its hook."""
        self._refuse_join()
        if self._is_starting:
            assert isinstance(self._start, CollectedBuckets)
            return self._start.exchange(bucket)
        device = bucket.buffer().device
        future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else [])
        future.set_result(bucket.buffer())
        return future

    def _refuse_join(self) -> None:
        ddp = self._ddp()
        if isinstance(ddp, DistributedDataParallel) and ddp._join_config.enable:
            raise RuntimeError(
                "lgc: local steps count the steps of all ranks, which join() lets differ; leave join() out, and give "
                "every rank the same number of batches, or stop all ranks at the shortest and call handle.finish()."
            )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._announcing():
            self._require_own_weights("optimizer.step()")
            self._refuse_join()
            if optimizer in self._stepped and not self._in_step:
                waiting = next(each for each in self._optimizers if each not in self._stepped)
                raise RuntimeError(
                    f"lgc: the {type(optimizer).__name__} makes two steps, and the {type(waiting).__name__} given to "
                    "attach beside it none: under local steps all of them must step equally often. Give attach the one "
                    "that steps least often."
                )
            if self._replaced:
                raise RuntimeError(
                    "lgc: the model's weights were loaded after local steps had begun, which would count as what this "
                    "rank has moved. Load the handle's state too, after the model's, or attach after loading; to "
                    "evaluate with other weights, load them within anchored()."
                )
            if self._launched is not None and self._launched.result.done():
                self._launched.result.result()  # its error is raised now, and not when the next round is due
            if self._is_starting and isinstance(self._start, OptimizedGradients) and self._start.step == self.step:
                if any(argument is not None for argument in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
                    raise RuntimeError(
                        "lgc: an optimizer with a closure makes its gradients within the step, where the start of "
                        "local steps cannot exchange them; use start_steps=0, or wrap the model in DDP."
                    )
                self._start.exchange_gradients()
            if self.step == self._scheme.start_steps and not (self._in_step or self._stepped):
                self._begin()
        self._in_step = True

    def _require_own_weights(self, what: str) -> None:
        if self._own is not None:
            raise RuntimeError(
                f"lgc: {what} within anchored(), whose end would undo it; leave it before. (torch's get_state_dict "
                "makes a step where the optimizer has no state yet: call get_optimizer_state_dict before anchored().)"
            )

    def _announcing(self, *known: type[Exception]) -> AbstractContextManager[None]:
        return self._site.announcing(self._transport, *OF_ALL_RANKS, *known)

    def _begin(self) -> None:
        """Take the weights, which are the same on all ranks, as the anchor, and bring the buffers together."""
        for fragment in self._fragments:
            fragment.begin()
        self._forget_start()
        if self._pace:
            opening = self._call_roll(work=Work(0, self._pace.samples_of_start))
            self._pace.take([Work(*each) for each in opening.numbers], self._transport.rank)
            self._pace.start()
        self._combine_buffers()

    def _forget_start(self) -> None:
        """Give back the memory of what the start still owed, which nothing sends any more."""
        if self._start is not None:
            self._start.synchronizer.aggregator.feedback.forget()

    def _combine_buffers(self) -> None:
        buffers = self._buffers.current()
        states = self._buffers.states(buffers)
        if states and any(self._call_roll(vote=any(states)).votes):
            with self._site.together(self.step):
                combined = self._site.combine(self._buffers, buffers, states, self._transport)
            self._buffers.apply(combined, buffers)

    def _call_roll(self, *, vote: bool = False, work: Work | None = None, operation: str = ROUND) -> Opening:
        """What all sites say, which must be at the same step; a collective, which meets rounds that others open."""
        self._round_transport.begin(self.phase, steps=0)
        self._site.begin(self.phase, steps=0)
        number, numbers = self._number, work or ()
        _, vote = self._site.agree(self._round_transport, number, vote=vote, operation=operation)
        return self._round_transport.open_round(number, finite=True, vote=vote, numbers=numbers, operation=operation)

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._in_step:  # of a class that calls its base class's step, for which torch runs the hooks as well
            return
        self._in_step = False
        self._stepped.append(optimizer)
        if len(self._stepped) < len(self._optimizers):
            return
        self._stepped.clear()
        self.step += 1
        if self._pace:
            with self._announcing():
                self._pace.take_step(self.step)
        if not self._has_begun:
            assert self._start is not None
            self.phase, self.round_time = self._start.phase, self._start.round_time
            if self._pace:
                self._pace.samples_of_start = self._pace.samples
            return
        fragment, is_due = self._next_round()
        self.phase = fragment.synchronizer.phase(fragment.rounds)
        if is_due:
            self._round(fragment)

    def _next_round(self) -> tuple[Fragment, bool]:
        """The fragment that is exchanged next, and whether its round is due."""
        if self._pace:
            return self._fragments[0], self._pace.is_due()
        number, place = divmod(self.step - self._scheme.start_steps - 1, self._scheme.period)
        return self._fragments[number % self._scheme.fragments], place == self._scheme.period - 1

    def count_skipped_step(self, optimizer: Optimizer, since: int) -> None:
        """Count a step that a GradScaler has not made: it found infinities, and only on this rank."""
        if optimizer in self._optimizers and optimizer not in self._stepped and self.step == since:
            self._before_step(optimizer, (), {})
            self._after_step(optimizer)

    def _round(self, fragment: Fragment) -> None:
        started, communicated = clock(self._transport.device), self._transport.seconds
        with self._announcing():
            self._complete()
            self._launch(fragment, wait=self._executor is None)
            if self._executor is None:
                self._complete()
        seconds = clock(self._transport.device) - started
        communication = self._transport.seconds - communicated if self._executor is None else seconds
        self.round_time = RoundTime(seconds - communication, communication)

    def _launch(self, fragment: Fragment, *, wait: bool) -> None:
        """Begin a round with what this rank has moved."""
        self._site.rest(self._module)
        fragment.look()
        distance = fragment.moved()
        finite = all(bool(each.isfinite().all()) for each in distance.values())
        buffers = self._buffers.current()
        weights = None
        if not wait:
            weights = fragment.weights()
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        exchange = partial(
            self._exchange,
            fragment,
            distance,
            buffers,
            number=fragment.rounds,
            resting=all_zero(distance),
            step=self._number,
            steps=self.step - self._last_round,
            finite=finite,
            error=self._unfrozen(),
        )
        fragment.rounds += 1
        fragment.step = self._last_round = self.step
        result: Task[Result] = Task()
        if wait or self._executor is None:
            result.set_result(exchange())
        else:
            result = self._executor.submit(exchange)
        self._launched = Launched(fragment, weights, buffers, result)

    def _exchange(
        self,
        fragment: Fragment,
        distance: dict[str, Tensor],
        buffers: dict[str, Tensor],
        *,
        number: int,
        resting: list[str],
        step: int,
        steps: int,
        finite: bool,
        error: Exception | None,
    ) -> Result:
        """Make a fragment's round; a collective. All ranks first say which step they are at, and if they are finite."""
        transport, phase = self._round_transport, fragment.synchronizer.phase(number)
        with self._site.announcing(transport, *OF_ALL_RANKS):
            transport.begin(phase, steps=steps - 1)  # the round itself counts as one
            self._site.begin(phase, steps=steps)
            states = self._buffers.states(buffers) if fragment is self._fragments[0] else []
            finite, vote = self._site.agree(transport, step, finite=finite, vote=any(states), error=error)
            work = Work(steps, self._pace.samples) if self._pace else ()
            opening = transport.open_round(step, finite=finite, vote=vote, numbers=work)
            self._report_nonfinite(opening.finite, step)
            done = [Work(*each) for each in opening.numbers]
            scale = scale_of(transport.rank, weights_of(done, transport.member), opening.finite)
            if scale == 0:
                distance = {name: torch.zeros_like(each) for name, each in distance.items()}
            elif scale != 1:
                distance = {name: each * scale for name, each in distance.items()}
            with self._site.together(step):
                mean = fragment.synchronizer.synchronize(distance, number, resting=resting)
                fragment.synchronizer.aggregator.feedback.release()  # but for the mean, until it has been applied
                changed = any(opening.votes)
                combined = self._site.combine(self._buffers, buffers, states, transport) if changed else {}
            if self._pace:
                self._pace.take(done, transport.rank)
            return Result(mean, combined, finite)

    def _report_nonfinite(self, finite: list[bool], step: int) -> None:
        ranks = ", ".join(str(rank) for rank, each in enumerate(finite) if not each)
        if not ranks:
            return
        member = self._transport.member
        message = f"step {step}: the weights are not finite on {member} {ranks}"
        if not any(finite):
            raise FloatingPointError(f"lgc: {message}, so there is no mean; go on from a checkpoint.")
        if self._policy.on_nonfinite == "raise":
            raise FloatingPointError(
                f"lgc: {message}. No state has changed; go on from a checkpoint, or attach with "
                f'on_nonfinite="propagate": such a {member} then counts for nothing in the round and goes on from the '
                "mean."
            )
        if self._transport.rank == self._site.place == 0:
            logger.warning("%s; it goes on from the mean of the others.", message)

    def settle(self) -> None:
        """Wait for the round that is under way, if any, and count its bytes."""
        if self._launched is not None:
            self._launched.result.result()
        if self._round_transport is not self._transport:
            self._transport.wire.take(self._round_transport.wire)

    def _complete(self) -> None:
        """Wait for the round that is under way, if any, and apply it."""
        self.settle()
        if self._launched is None:
            return
        fragment, weights, buffers, task = self._launched
        self._launched = None
        result = task.result()
        self._site.rest(self._module)
        fragment.apply(result.mean, weights if result.finite else None)
        self._buffers.apply(result.buffers, buffers)
        if not result.finite:
            for tensor in _tensors_of(self._optimizers):
                torch.nan_to_num_(tensor, 0.0, 0.0, 0.0)
        if self._pace:
            self._pace.start()

    def _unfrozen(self) -> Exception | None:
        """The error of parameters that are trained now and were not when this was attached."""
        named = self._module.named_parameters()
        names = [name for name, each in named if each.requires_grad and id(each) not in self._trainable]
        if not names:
            return None
        return RuntimeError(
            f"{names[0]} is trained now and was frozen, or not in the model, when attach was called (parameters like "
            f"it: {len(names)}); no round would exchange it. Attach when all that will ever be trained is in the model "
            "and requires gradients, and freeze after. To replace parameters, call handle.detach() before, and make "
            "the optimizer, and attach, anew after."
        )

    @contextlib.contextmanager
    def anchored(self) -> Iterator[None]:
        """Have the anchor, and the buffers of the last round, in the model for a while: for evaluation and export.

        What is changed there meanwhile is lost. During the start the weights are shared anyway, and buffers are not.
        """
        if self._own is not None:
            yield
            return
        self._own = self._show_anchor() if self._has_begun else {}
        try:
            yield
        finally:
            self._site.rest(self._module)
            _copy(self._own)
            self._own = None

    def _show_anchor(self) -> dict[Tensor, Tensor]:
        """Put the anchor, and the buffers of the last round, into the model; copies of what was there."""
        if self._site.inside is not None:
            self.settle()
            self._site.agree(self._transport, self.step, operation="handle.anchored")
        self._site.rest(self._module)
        buffers = {own: self._buffers.shared[name] for name, own in self._buffers.current().items()}
        put_aside = {own: own.detach().clone() for own in (*self._parameters.values(), *buffers)}
        for fragment in self._fragments:
            self._site.fill(fragment.parameters, fragment.anchor)
        _copy(buffers)
        return put_aside

    def finish(self) -> None:
        """Exchange what has been moved since the last round, at any step, the same on every rank; a collective.

        Where rounds are opened by time, each rank may be at another step.

        All ranks have the same weights then. Nothing that an exchange has not sent is lost: it stays in the residual.
        Weights that were loaded after the last round, as of the best model, stay as they are.

        Raises:
            RankError: on every rank, if the ranks are at different steps.
            ReplicaError: on every rank, if the ranks' weights differ and no step of the optimizer was a local one.
        """
        self._require_own_weights("handle.finish()")
        with self._announcing():
            self._complete()
            self._site.rest(self._module)
            moved = self._has_begun and not self._replaced and self._has_moved_since()
            if self._pace:  # by their own count, not all ranks know that some have made steps since the last round
                moved |= self.step > self._last_round
            votes = self._call_roll(vote=moved, operation=FINISH if self._pace else ROUND).votes
            if not self._has_begun:  # the weights are the same, unless something else than this optimizer moves them
                weights = {f"parameter {name}": own for name, own in self._site.part(self._parameters).items()}
                with self._site.together(self.step):
                    ReplicaCheck(self._transport, 1, self._policy.on_difference).run(self.step, weights)
                self._combine_buffers()
                return
            for fragment in self._fragments:
                if fragment.step < self.step or any(votes):
                    self._launch(fragment, wait=True)
                    self._complete()

    def _has_moved_since(self) -> bool:
        """Whether a loop has changed what was just brought together, as Lookahead may after a step."""
        done = [fragment.moved() for fragment in self._fragments if fragment.step == self.step]
        moved = any(len(all_zero(each)) < len(each) for each in done)
        return moved or (bool(done) and any(self._buffers.states(self._buffers.current())))

    def detach(self) -> None:
        self.finish()
        with self._announcing(ValueError):
            if self._has_begun and self._site.inside is None and isinstance(self._ddp(), DistributedDataParallel):
                # DDP's replicas stay equal only if their optimizers' steps are.
                for optimizer in self._optimizers:
                    share_state(optimizer, self._transport)
                if self._grad_scaler is not None:
                    share_scale(self._grad_scaler, self._transport)
        if isinstance(self._start, CollectedBuckets):
            self._start.detach()
        for hook in (*self._step_hooks, *self._module_hooks):
            hook.remove()
        for each in self._module.modules():
            _callers.pop(each, None)
        end_watch(self._module)
        if self._grad_scaler is not None:
            del self._grad_scaler.step
        if self._executor is not None:
            self._executor.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, in three parts: see `Aggregator.state_dict`.

        A round that is under way is waited for, and what it gave is part of the state.
        """
        self.settle()
        parts = {name: each.state_dict() for name, each in self._synchronizers().items()}
        per_rank: dict[str, Any] = {name: part["per_rank"] for name, part in parts.items()}
        replicated: dict[str, Any] = {name: part["replicated"] for name, part in parts.items()}
        numbered = {str(number): fragment for number, fragment in enumerate(self._fragments)}
        anchor = {name: each.clone() for part in self._fragments for name, each in part.anchor.items()}
        per_rank |= {
            "weights": {name: own for fragment in self._fragments for name, own in self._own_part(fragment).items()},
            "buffers": {name: self._of_this_rank(each) for name, each in self._buffers.current().items()},
        }
        replicated |= {
            "anchor": anchor,
            "outer_momentum": {n: each.clone() for part in self._fragments for n, each in part.momentum.items()},
            "buffers": {name: each.clone() for name, each in self._buffers.shared.items()},
            "rounds": {number: fragment.rounds for number, fragment in numbered.items()},
            "round_steps": {number: fragment.step for number, fragment in numbered.items()},
            "last_round": self._last_round,
        }
        if self._pace:
            replicated["pace"] = self._pace.state_dict()
        if self._executor:  # the same keys at every step
            launched = self._launched
            given = Result({}, {}, True) if launched is None else launched.result.result()
            weights, buffers = ({}, {}) if launched is None else (launched.weights or {}, launched.buffers)
            if not given.finite:  # of this rank's part they may be
                weights = {name: torch.full_like(each, torch.nan) for name, each in weights.items()}
            per_rank["before"] = {
                "weights": _copies(per_rank["weights"] | weights),
                "buffers": _copies(per_rank["buffers"] | buffers),
            }
            replicated["under_way"] = {
                "fragment": 0 if launched is None else self._fragments.index(launched.fragment) + 1,
                "mean": {name: torch.zeros_like(each) for name, each in anchor.items()} | _copies(given.mean),
                "buffers": _copies(replicated["buffers"] | given.buffers),
            }
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def require_form(self, state: Any, *, resharded: bool) -> None:
        self._require_own_weights("handle.load_state_dict()")
        here = self.state_dict()
        if resharded:
            state = {**state, "server": {}, "per_rank": self._adapted(state)}
        require_same_form(here, state, "aggregator")

    def _adapted(self, state: Any) -> dict[str, Any]:
        """What is per rank in a resharded state, as these ranks have it."""
        per_rank = dict(state["per_rank"])
        for name, synchronizer in self._synchronizers().items():
            if name in per_rank:
                part = {"per_rank": per_rank[name], "replicated": state["replicated"].get(name), "server": {}}
                per_rank[name] = synchronizer.adapted(part, self.step)["per_rank"]
        return per_rank

    def whole(self, state: Any) -> Any:
        site = self._site.uncounted()
        return self._regrouped(state, lambda group, parts: site.whole({name: group[name] for name in parts}, parts))

    def part(self, state: Any) -> Any:
        return self._regrouped(state, lambda _, tensors: self._site.part(tensors))

    def _regrouped(self, state: Any, change: Change, *, together: bool = False) -> Any:
        """A nested state, where what is by names of parameters is changed in the groups that a site cuts together.

        These are the fragments, and for the start all parameters.
        """
        if not isinstance(state, Mapping):
            return state
        tensors = {name: each for name, each in state.items() if isinstance(each, Tensor)}
        if not tensors or len(tensors) < len(state) or not tensors.keys() <= self._parameters.keys():
            return {
                key: self._regrouped(each, change, together=together or key == "start") for key, each in state.items()
            }
        groups = [self._parameters] if together else [fragment.parameters for fragment in self._fragments]
        changed: dict[str, Tensor] = {}
        for group in groups:
            changed |= change(group, {name: tensors[name] for name in group if name in tensors})
        return changed

    def load_state_dict(self, state: Any, step: int, *, resharded: bool) -> None:
        """Go on from a state before `step`. On another number of ranks, a rank starts from the mean of the weights and
        residuals that its share of the old ranks had, so that the mean of what is owed stays."""
        self._site.rest(self._module)
        self._launched = None
        for name, synchronizer in self._synchronizers().items():
            part = {"per_rank": state["per_rank"][name], "replicated": state["replicated"][name], "server": {}}
            synchronizer.load_state_dict(part, step, resharded=resharded)
        per_rank, replicated = state["per_rank"], state["replicated"]
        for fragment in self._fragments:
            self._site.fill(fragment.parameters, per_rank["weights"])
        _copy({each: per_rank["buffers"][name] for name, each in self._buffers.current().items()})
        _copy({each: replicated["buffers"][name] for name, each in self._buffers.shared.items()})
        for number, fragment in enumerate(self._fragments):
            _copy({each: replicated["anchor"][name] for name, each in fragment.anchor.items()})
            _copy({each: replicated["outer_momentum"][name] for name, each in fragment.momentum.items()})
            fragment.rounds, fragment.step = replicated["rounds"][str(number)], replicated["round_steps"][str(number)]
        self._last_round = replicated["last_round"]
        if self._pace:
            self._pace.load_state_dict(replicated["pace"])
        if step > self._scheme.start_steps:
            self._forget_start()
        if isinstance(self._start, Caller):
            self._start.step = min(step, self._scheme.start_steps)
        self._replaced = self._in_step = False
        if self._executor and replicated["under_way"]["fragment"]:
            self._set_under_way(per_rank["before"], replicated["under_way"])

    def _set_under_way(self, before: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        fragment = self._fragments[given["fragment"] - 1]
        names, of_first = fragment.anchor, fragment is self._fragments[0]
        device = self.synchronizer.aggregator.feedback.residual.device
        weights = _copies({name: before["weights"][name] for name in names}, device)
        mean = _copies({name: given["mean"][name] for name in names}, device)
        result: Task[Result] = Task()
        finite = all(bool(each.isfinite().all()) for each in weights.values())
        result.set_result(Result(mean, _copies(given["buffers"], device) if of_first else {}, finite))
        self._launched = Launched(fragment, weights, _copies(before["buffers"], device), result)

    def warn_of_own_weights(self) -> None:
        """Warn, once, that the model has weights of this rank alone."""
        if self._own is not None or self._warned or self._is_together:
            return
        self._warned = True
        warnings.warn(
            "between rounds model.state_dict() has this rank's own weights, which no other rank has; take it within "
            "`with handle.anchored():`, also for a checkpoint: the handle's state has this rank's own.",
            stacklevel=4,
        )

    def refuse_replaced_weights(self) -> None:
        """Refuse the next step if weights were just loaded into the model after local steps had begun."""
        self._replaced = self._has_begun and self._own is None

    def _synchronizers(self) -> dict[str, Synchronizer]:
        rounds = {f"round {number}": fragment.synchronizer for number, fragment in enumerate(self._fragments)}
        return rounds | ({"start": self._start.synchronizer} if self._start else {})

    def _own_part(self, fragment: Fragment) -> dict[str, Tensor]:
        own = {name: (self._own or {}).get(each, each) for name, each in fragment.parameters.items()}
        return {name: part.detach().clone() for name, part in self._site.part(own).items()}

    def _of_this_rank(self, tensor: Tensor) -> Tensor:
        return (self._own or {}).get(tensor, tensor).detach().clone()


def _state_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: each.to(device, copy=True) for name, each in tensors.items()}


def _tensors_of(optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    for of_parameter in (each for optimizer in optimizers for each in optimizer.state.values()):
        for value in of_parameter.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value


def _make_scaled_step(
    caller: LocalRounds | Detached, make: Callable[..., float | None], optimizer: Optimizer, *args: Any, **kwargs: Any
) -> float | None:
    if isinstance(caller, Detached):  # of a copy of the scaler
        return make(optimizer, *args, **kwargs)
    before = caller.step
    result = make(optimizer, *args, **kwargs)
    caller.count_skipped_step(optimizer, before)
    return result


def _caller_of(module: nn.Module) -> LocalRounds | None:
    return _callers[module]() if module in _callers else None


def _on_state_dict(module: nn.Module, *_: object) -> None:
    if (caller := _caller_of(module)) is not None:
        caller.warn_of_own_weights()


def _on_load_state_dict(module: nn.Module, *_: object) -> None:
    if (caller := _caller_of(module)) is not None:
        caller.refuse_replaced_weights()
