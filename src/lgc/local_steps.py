"""Local steps: rounds after every so many steps of the optimizer, on what the ranks have moved since the last one."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lgc.caller import RoundTime
from lgc.comm.replicas import ReplicaCheck, ReplicaError
from lgc.comm.transport import FINISH, ROUND, Opening, RankError, Transport, clock
from lgc.ddp import CollectedBuckets
from lgc.fragments import Fragment, fragmented
from lgc.gradients import OptimizedGradients, all_zero
from lgc.local_state import Launched, LocalState, Result, Start
from lgc.moments import SecondMoments, take_first_moments
from lgc.optimizers import (
    FEW_STEPS,
    Streak,
    end_watch,
    end_watch_over_skips,
    share_scale,
    share_state,
    watch_skips,
    watch_steps,
)
from lgc.pace import Progress, Work, counted, scale_of, weights_of
from lgc.requirements import frozen, require_one_in_start, require_optimizers_of, require_own_updates, trained
from lgc.rounds.schedule import FOREVER, Schedule
from lgc.schemes import Dense, LocalSteps
from lgc.sites import Site
from lgc.synchronizer import Policy

logger = logging.getLogger("lgc")

OF_ALL_RANKS = (RankError, ReplicaError, FloatingPointError)  # errors that every rank raises by itself


class LocalRounds(LocalState):
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
            site.take_first(chain(module.parameters(), module.buffers()), transport)
        parameters, round_transport = dict(trained(model)), transport
        if scheme.overlap:  # the model's own group stays free for what the loop does meanwhile
            round_transport, site = transport.of_new_group(), site.of_new_group()
        start = _start(ddp, parameters, scheme, site, transport, policy, optimizers, grad_scaler)
        rest = frozen(model)
        fragments = [
            Fragment(group, scheme, site, round_transport, policy, {} if number else rest)
            for number, group in enumerate(fragmented(parameters, scheme.fragments))
        ]
        super().__init__(module, scheme, site, transport, start, fragments)
        self.phase = start.phase if start else self.synchronizer.phase(0)
        self._ddp = weakref.ref(model)  # whose hook keeps this
        self._policy = policy
        self._optimizers = optimizers
        self._grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        active = [each for each in module.parameters() if each.requires_grad]
        self._trainable = {id(each) for each in (*active, *parameters.values())}
        self._round_transport = round_transport
        self._executor = ThreadPoolExecutor(1, "lgc") if scheme.overlap else None
        self._second_moments = None
        if scheme.second_moments == "all":
            self._second_moments = SecondMoments(transport.world_size, parameters.values())
        self._thawed: Exception | None = None  # a parameter that no round exchanges was trained, and may rest again
        self._in_step = False  # between an optimizer's two hooks
        self._stepped: list[Optimizer] = []  # since the last step that was counted
        self._step_hooks: list[RemovableHandle] = []
        self.use_optimizers(optimizers)
        self._steps_of_another = Streak()  # since the last one that counts
        self._most_of_another = FEW_STEPS
        if not self._pace:
            self._most_of_another = max(FEW_STEPS, scheme.steps_a_round)
        watch_steps(module, parameters.values(), self._before_any_step)
        if self._grad_scaler is not None:
            watch_skips(self._grad_scaler, self)

    def _round(self, fragment: Fragment) -> None:
        """Make a round; with overlap, apply the one that is under way, and begin this one."""
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
            weights = {name: own.clone() for name, own in fragment.part().items()}
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        exchange = partial(
            self._exchange,
            fragment,
            distance,
            buffers,
            number=fragment.rounds,
            resting=all_zero(distance),
            at_rest=fragment.at_rest(),
            step=self._number,
            steps=self.step - self._last_round,
            finite=finite,
            error=self._thawed,
        )
        fragment.rounds += 1
        fragment.step = self._last_round = self.step
        moved = distance if fragment.rates else {}
        result: Task[Result] = Task()
        if wait or self._executor is None:
            result.set_result(exchange())
        else:
            result = self._executor.submit(exchange)
        self._launched = Launched(fragment, moved, weights, buffers, result)

    def _exchange(
        self,
        fragment: Fragment,
        distance: dict[str, Tensor],
        buffers: dict[str, Tensor],
        *,
        number: int,
        resting: list[str],
        at_rest: list[str],
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
            digest = zlib.crc32(" ".join(at_rest).encode())
            opening = transport.open_round(step, finite=finite, vote=vote, numbers=work, past=digest)
            self._report_nonfinite(opening.finite, step)
            if len(set(opening.pasts)) > 1:
                raise RankError(
                    f"lgc: step {step}: the {transport.member}s have frozen different parameters, here "
                    f"{', '.join(at_rest) or 'none'}: what is frozen moves by another rule, so that the weights would "
                    "differ. Freeze the same on all, by what all know, such as handle.step or an all-reduced loss."
                )
            done = [Work(*each) for each in opening.numbers]
            weights = counted(weights_of(done, transport.member), opening.finite)
            scale = scale_of(transport.rank, weights)
            if scale == 0:
                distance = {name: torch.zeros_like(each) for name, each in distance.items()}
            elif scale != 1:
                distance = {name: each * scale for name, each in distance.items()}
            with self._site.together(step):
                mean = fragment.synchronizer.synchronize(distance, number, resting=resting)
                fragment.synchronizer.aggregator.feedback.release()  # but for the mean, until it has been applied
                combined = {}
                if any(opening.votes):
                    counts = [weight > 0 for weight in weights]
                    combined = self._site.combine(self._buffers, buffers, states, transport, counts)
            if self._pace:
                self._pace.take(done, transport.rank)
            return Result(mean, combined, finite)

    def _complete(self) -> None:
        """Wait for the round that is under way, if any, and apply it."""
        self.settle()
        if self._launched is None:
            return
        fragment, moved, weights, buffers, task = self._launched
        self._launched = None
        result = task.result()
        self._site.rest(self._module)
        if fragment.rates:
            fragment.mix_rates()
            if result.finite:
                take_first_moments(fragment, moved, result.mean, self._optimizers, self._scheme.common_momentum)
            fragment.rates = dict.fromkeys(fragment.rates, 0.0)
        fragment.apply(result.mean, weights if result.finite else None)
        self._buffers.apply(result.buffers, buffers)
        if not result.finite:
            for other in self._fragments:
                if other is not fragment:  # or it would make the others not finite again
                    other.come_back()
            _restart_nonfinite(self._parameters.values(), self._optimizers)
        if self._pace:
            self._pace.start()

    def settle(self) -> None:
        """Wait for the round that is under way, if any, and count its bytes."""
        if self._launched is not None:
            self._launched.result.result()
        if self._round_transport is not self._transport:
            self._transport.wire.take(self._round_transport.wire)

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

    def _before_any_step(self, optimizer: Optimizer) -> None:
        if optimizer in self._optimizers:
            self._steps_of_another.end()
        elif (steps := self._steps_of_another.add(optimizer)) > self._most_of_another:
            with self._announcing():
                raise RuntimeError(
                    f"lgc: {type(optimizer).__name__} has made {steps - 1} steps with this model's "
                    f"parameters, and the {type(self._optimizers[0]).__name__} given to attach none meanwhile, whose "
                    "steps are those that local steps count: no round would bring the ranks together. When you replace "
                    "an optimizer, call handle.use_optimizer(optimizer) on every rank."
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
            if not self._is_starting:
                require_own_updates(optimizer, self._scheme)  # what was loaded, or added, may be of another kind
                if self._second_moments:
                    self._second_moments.before_step(optimizer)
            self._thawed = self._thawed or self._unfrozen()
            for each in self._fragments:
                each.look_at_flags(optimizer)
        self._in_step = True

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._in_step:  # of a class that calls its base class's step, for which torch runs the hooks as well
            return
        self._in_step = False
        if self._second_moments and not self._is_starting:
            are_common = self._scheme.common_momentum == 1
            steps = self._scheme.steps_a_round if are_common else None
            self._second_moments.after_step(optimizer, steps)
        if not self._is_starting:
            for each in self._fragments:
                each.add_rates(optimizer)
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
        number, place = divmod(self.step - 1 - self._scheme.start_steps, self._scheme.period)
        return self._fragments[number % self._scheme.fragments], place == self._scheme.period - 1

    def count_skipped_step(self, optimizer: Optimizer, since: int) -> None:
        """Count a step that a GradScaler has not made: it found infinities, and only on this rank."""
        if optimizer in self._optimizers and optimizer not in self._stepped and self.step == since:
            self._before_step(optimizer, (), {})
            self._after_step(optimizer)

    @property
    def _is_starting(self) -> bool:
        return self.step < self._scheme.start_steps

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

    def _combine_buffers(self) -> None:
        buffers = self._buffers.current()
        states = self._buffers.states(buffers)
        if not states:
            return
        opening = self._call_roll(vote=any(states))
        if any(opening.votes):
            with self._site.together(self.step):
                combined = self._site.combine(self._buffers, buffers, states, self._transport, opening.finite)
            self._buffers.apply(combined, buffers)

    def _call_roll(self, *, vote: bool = False, work: Work | None = None, operation: str = ROUND) -> Opening:
        """What all sites say, which must be at the same step; a collective, which meets rounds that others open."""
        self._round_transport.begin(self.phase, steps=0)
        self._site.begin(self.phase, steps=0)
        number, numbers = self._number, work or ()
        _, vote = self._site.agree(self._round_transport, number, vote=vote, operation=operation)
        return self._round_transport.open_round(number, finite=True, vote=vote, numbers=numbers, operation=operation)

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

    def use_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        require_optimizers_of(self._parameters, optimizers)
        if isinstance(self._start, OptimizedGradients) and self._is_starting:
            require_one_in_start(optimizers)
        for hook in self._step_hooks:
            hook.remove()
        self._optimizers = optimizers
        self._stepped.clear()
        if isinstance(self._start, CollectedBuckets):
            self._start.use_optimizers(optimizers)
        before = torch.compiler.disable(self._before_step)  # as a step may be compiled, but not its hooks
        after = torch.compiler.disable(lambda optimizer, *_: self._after_step(optimizer))
        self._step_hooks = [each.register_step_pre_hook(before) for each in optimizers]
        self._step_hooks += [each.register_step_post_hook(after) for each in optimizers]

    def finish(self) -> None:
        """Exchange what has been moved since the last round, at any step, the same on every rank; a collective.

        Where rounds are opened by time, each rank may be at another step.

        All ranks have the same weights then: the anchor, which with `ahead` moves to the mean of where they are.
        Nothing that an exchange has not sent is lost: it stays in the residual.
        Weights that were loaded after the last round, as of the best model, stay as they are.

        Raises:
            RankError: on every rank, if the ranks are at different steps.
            ReplicaError: on every rank, if the ranks' weights differ and no step of the optimizer was a local one.
        """
        self._require_own_weights("handle.finish()")
        with self._announcing():
            self._complete()
            self._site.rest(self._module)
            if self._replaced and any(fragment.step < self.step for fragment in self._fragments):
                raise RuntimeError(
                    "lgc: the model's weights were loaded amid a round, so that what this rank had moved is lost; call "
                    "handle.finish() before loading them, as well as after."
                )
            moved = self._has_begun and not self._replaced and self._has_moved_since()
            if self._pace:  # by their own count, not all ranks know that some have made steps since the last round
                moved |= self.step > self._last_round
            votes = self._call_roll(vote=moved, operation=FINISH if self._pace else ROUND).votes
            if not self._has_begun:  # the weights are the same, unless something else than this optimizer moves them
                weights = {f"parameter {name}": own for name, own in self._site.part(self._parameters).items()}
                with self._site.together(self.step):
                    ReplicaCheck(self._transport, 1, self._policy.on_difference).run(self.step, weights)
                self._combine_buffers()
                if self.step and self._transport.rank == self._site.place == 0:
                    logger.warning(
                        "all %d steps were of the start, which exchanges gradients; no step was a local one: make "
                        "LocalSteps(start_steps=%d) about a tenth of the steps.",
                        self.step,
                        self._scheme.start_steps,
                    )
                return
            for fragment in self._fragments:
                if fragment.step < self.step or any(votes):
                    self._launch(fragment, wait=True)
                    self._complete()
                if fragment.apart:
                    with self._site.together(self.step):
                        fragment.come_together(keep=self._replaced)

    def _has_moved_since(self) -> bool:
        """Whether a loop has changed what was just brought together, as Lookahead may after a step."""
        done = [fragment.moved() for fragment in self._fragments if fragment.step == self.step]
        moved = any(len(all_zero(each)) < len(each) for each in done)
        return moved or (bool(done) and any(self._buffers.states(self._buffers.current())))

    def load_state_dict(self, state: Any, step: int, *, resharded: bool) -> None:
        super().load_state_dict(state, step, resharded=resharded)
        self._in_step = False
        self._stepped.clear()

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
        super().detach()
        for hook in self._step_hooks:
            hook.remove()
        end_watch(self._module)
        if self._grad_scaler is not None:
            end_watch_over_skips(self._grad_scaler, self)
        if self._executor is not None:
            self._executor.shutdown()


def _start(
    ddp: DistributedDataParallel | None,
    parameters: Mapping[str, nn.Parameter],
    scheme: LocalSteps,
    site: Site,
    transport: Transport,
    policy: Policy,
    optimizers: Sequence[Optimizer],
    grad_scaler: torch.amp.GradScaler | None,
) -> Start | None:
    """What exchanges the gradients of the first steps, if there are any."""
    if not scheme.start_steps:
        return None
    start: Start
    if ddp is None:
        start = OptimizedGradients(parameters, scheme.start_exchange, site, transport, policy)
    else:
        start = CollectedBuckets(ddp, scheme.start_exchange, transport, policy, optimizers, grad_scaler)
        start.rounds = scheme.start_steps
    if not isinstance(scheme.start_exchange, Dense):
        start.synchronizer.aggregator.schedule = Schedule(1.0, warmup_steps=FOREVER)
    start.phase = start.synchronizer.phase(0)
    return start


def _restart_nonfinite(parameters: Iterable[Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Have nothing but zeros where a parameter's state is not finite, its number of steps, which Adam has, included."""
    for of_parameter in (optimizer.state.get(each, {}) for optimizer in optimizers for each in parameters):
        tensors = [each for each in of_parameter.values() if isinstance(each, Tensor) and each.is_floating_point()]
        if not all(bool(each.isfinite().all()) for each in tensors):
            for each in tensors:
                each.zero_()
