"""Attach a scheme to a model, and hold what is attached."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lgc.caller import Caller, Detached, RoundTime
from lgc.comm.replicas import OnDifference
from lgc.comm.traffic import Wire, summarise, wire_from_json
from lgc.comm.transport import Transport
from lgc.ddp import Buckets, CollectedBuckets, ReducedBuckets
from lgc.hook import hook_of
from lgc.local_steps import LocalRounds
from lgc.pace import Progress
from lgc.phase import Phase
from lgc.requirements import (
    advise,
    announcing,
    as_optimizers,
    describe,
    group_of,
    is_collected,
    require_ddp,
    require_exchangeable,
    require_local_steps,
    require_module,
    require_optimizers_of,
    require_own_updates,
    require_real,
    require_single_momentum,
    require_sites,
    require_types,
    take_buffers,
    trained,
)
from lgc.schemes import LocalSteps, Scheme, Seconds, as_scheme
from lgc.sites import MEMBER, Site, site_of
from lgc.synchronizer import OnNonfinite, Policy, Synchronizer

STATE_VERSION = 4
STATE_HINTS = {
    "version": "; finish the run with the release of lgc that began it",
    "world_size": "; lgc.checkpoint.load or reshard adapts it",
    "places": "; lgc.checkpoint.distributed_state goes on with another number of ranks a site",
    "rank": "; every rank saves and loads its own, as lgc.checkpoint does, and rank 0's alone is not enough",
    "scheme": "; to change it, load everything but the handle: what was owed is lost",
}

# By model; under local steps by the module in DDP too. The caller, which has parameters, must not be kept from here.
attached: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Caller], Scheme]] = weakref.WeakKeyDictionary()


@torch.inference_mode(mode=False)
def attach(
    model: nn.Module,
    scheme: Scheme | str,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: float | None = 60.0,
    check_every: int = 100,
    on_difference: OnDifference = "raise",
    on_nonfinite: OnNonfinite | None = None,
    buffers_every: int | None = None,
    between: dist.ProcessGroup | DeviceMesh | None = None,
) -> Handle:
    """Exchange this model's gradients by `scheme` from now on. A collective: all ranks call it.

        handle = lgc.attach(ddp_model, lgc.LGCRing(rate=1e-3), optimizer)

    Args:
        model: a DistributedDataParallel model (also under torch.compile) that has no communication hook yet; with
            LocalSteps also a plain module, which starts from rank 0's weights.
        scheme: a scheme, or its text form such as `"dgc:rate=0.01"`.
        optimizer: the model's; checked, now and in every round, for a momentum on top of the scheme's, not changed.
            LocalSteps count its steps and need it. A list if there are several, which under LocalSteps must step
            equally often.
        grad_scaler: the one that scales the loss, so that what is kept between steps is in unscaled units.
        timeout: seconds after which a rank that waits for another in the model's process group gives up; None leaves
            the group's as it is. Longer than anything that one rank does while the others wait, such as a checkpoint.
        check_every: compare parameters and replicated state across ranks every so many rounds; 0 is never.
        on_difference: when they differ, "raise" ReplicaError, or "synchronise" them with a warning: by what most
            ranks have, among equals rank 0 (under `join()`, of the ranks that still have inputs).
        on_nonfinite: when a rank's gradient has a NaN or Inf, "raise" on all ranks, or "propagate" NaN gradients to
            them, as plain DDP does and a GradScaler needs; None is "propagate" with a GradScaler that is enabled, else
            "raise", since the optimizer would make every parameter NaN. No residual, momentum or autoencoder changes
            in that round. For schemes that compress; the others reduce bucket by bucket, as plain DDP does.
        buffers_every: bring what the ranks have changed of their buffers together every so many rounds, counted, and
            switch off that DDP broadcasts rank 0's at every forward pass: floats become their mean, integers their
            maximum. None leaves them to DDP; under LocalSteps every round does it.
        between: for LocalSteps, the group, or the dimension of a mesh, that joins this rank to those at its place in
            other sites. Inside a site the model is in DDP over the site's own group, or after
            `fully_shard(model, mesh=...)`, and between the sites travels one coded copy. A plain module is a site of
            one rank. See docs/sites.md.

    Returns:
        A handle to the phase, the byte counts and the state. The model keeps it alive.

    Raises:
        TypeError: the model is not a DistributedDataParallel model, nor a plain module for LocalSteps.
        ValueError: a wrong argument, momentum applied twice, or something that DDP is set to and lgc cannot do.
        RuntimeError: already attached, or (on every rank) the ranks differ in scheme, arguments, model or version.
        RankError: another rank has raised one of these; its message is in this one's.

    The backward pass then raises, on every rank, ReplicaError when replicas differ and, with schemes that compress,
    RankError when a rank has failed and FloatingPointError for a non-finite gradient.
    """
    model = require_module(model, shards=between is not None)
    with announcing(model):  # the others may wait in attach, where this rank has been given something else
        scheme = as_scheme(scheme)
        require_types(scheme, grad_scaler, timeout)
        require_sites(between, scheme, on_difference)
        site, group = site_of(model, between)
    with announcing(model) if group is None else site.announcing(Transport(group)):
        optimizers = as_optimizers(optimizer)
        model = model if isinstance(scheme, LocalSteps) else require_ddp(model)
        skips = grad_scaler is not None and grad_scaler.is_enabled()
        default: OnNonfinite = "propagate" if skips else "raise"
        policy = Policy(check_every, on_difference, default if on_nonfinite is None else on_nonfinite, buffers_every)
        require_attachable(model, scheme, optimizers, grad_scaler, buffers_every, site=site, between=group)
    device = trained(model)[0][1].device
    transport = Transport(group or group_of(model), device, member="rank" if group is None else MEMBER)
    if timeout is not None:
        transport.set_timeout(timeout)
    given = {"optimizer": [type(each).__name__ for each in optimizers], "grad_scaler": skips, **asdict(policy)}
    site.join(transport, describe(model, scheme, given, transport.world_size), dict(trained(model)), timeout)
    broadcasts_buffers = isinstance(model, DistributedDataParallel) and model.broadcast_buffers
    if group is None:
        take_buffers(model, scheme, buffers_every)
    if transport.rank == site.place == 0:
        advise(model, scheme, optimizers, transport.world_size * site.places, others=list(attached))
    caller = _caller(model, scheme, site, transport, policy, optimizers, grad_scaler)
    if isinstance(model, DistributedDataParallel) and site.inside is None:
        hook_of(model).caller = caller
    module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    for each in (model, module) if isinstance(scheme, LocalSteps) else (model,):
        attached[each] = weakref.ref(caller), scheme
    return Handle(scheme, site, transport, caller, model, broadcasts_buffers=broadcasts_buffers)


def _caller(
    model: nn.Module,
    scheme: Scheme,
    site: Site,
    transport: Transport,
    policy: Policy,
    optimizers: Sequence[torch.optim.Optimizer],
    grad_scaler: torch.amp.GradScaler | None,
) -> LocalRounds | Buckets:
    """The caller that makes the rounds of a scheme."""
    if isinstance(scheme, LocalSteps):
        return LocalRounds(model, scheme, site, transport, policy, optimizers, grad_scaler)
    if is_collected(scheme):
        return CollectedBuckets(require_ddp(model), scheme, transport, policy, optimizers, grad_scaler)
    return ReducedBuckets(require_ddp(model), scheme, transport, policy)


def require_attachable(
    model: nn.Module,
    scheme: Scheme,
    optimizers: Sequence[torch.optim.Optimizer],
    grad_scaler: torch.amp.GradScaler | None,
    buffers_every: int | None = None,
    *,
    site: Site,
    between: dist.ProcessGroup | None = None,
) -> None:
    """Raise unless the scheme can be attached to this model with these optimizers, of a rank of this site."""
    for module in (model, model.module) if isinstance(model, DistributedDataParallel) else (model,):
        caller, there = attached.get(module, (lambda: None, None))
        if caller() is not None:
            raise RuntimeError(
                f"attach: this model already has the scheme {there}; call handle.detach() on every rank to attach "
                "another."
            )
    _require_apart(model)
    require_exchangeable(model, between=between)
    require_real(model, scheme)
    require_optimizers_of(dict(trained(model)), optimizers)
    for own in optimizers:
        require_single_momentum(scheme, own)
    if isinstance(scheme, LocalSteps):
        require_local_steps(model, optimizers, grad_scaler, scheme, buffers_every, site=site)


def _require_apart(model: nn.Module) -> None:
    """Raise if local steps already exchange, for another model, what is trained in this one."""
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for other, (caller, scheme) in list(attached.items()):
        if isinstance(scheme, LocalSteps) and caller() is not None:
            shared = [name for name, each in other.named_parameters() if id(each) in own and each.requires_grad]
            if shared:
                raise RuntimeError(
                    f"attach: this model trains {shared[0]!r} of a {type(other).__name__} that already has the scheme "
                    f"{scheme}, and which of the two brings it together? Attach to one module that has all parameters, "
                    "or call handle.detach() on every rank before."
                )


class Handle:
    """An attached scheme: what it is doing, what it has sent, and its state.

    Attributes:
        scheme: as attached.
        site: this rank's; of one rank unless `attach` was given `between`.
        transport: between the ranks, or the sites, with the byte counts.
        parameters: number of trained parameters N.
        synchronizer: the rounds, of the first fragment under local steps; None for the schemes that reduce bucket by
            bucket (dense, fp16, bf16, powersgd).
        is_detached: whether `detach` has been called, after which there is no state any more.
    """

    def __init__(
        self,
        scheme: Scheme,
        site: Site,
        transport: Transport,
        caller: Caller,
        model: nn.Module,
        *,
        broadcasts_buffers: bool,
    ) -> None:
        self.scheme = scheme
        self.site = site
        self.transport = transport
        self.parameters = sum(parameter.numel() for _, parameter in trained(model))
        self._caller = caller
        self._model = weakref.ref(model)  # which keeps the caller
        self._broadcasts_buffers = broadcasts_buffers
        self.is_detached = False

    @property
    def synchronizer(self) -> Synchronizer | None:
        """What makes the rounds; None where DDP's buckets are reduced one by one, and once this is detached."""
        return self._caller.synchronizer

    def __deepcopy__(self, _: object) -> Detached:
        return Detached()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a handle cannot be pickled, as it belongs to this process's group; save handle.state_dict(), and where a "
            "module that is saved whole has the handle as an attribute, keep it elsewhere."
        )

    def anchored(self) -> AbstractContextManager[None]:
        """Have in the model what all ranks share, for evaluation and export: under local steps that of the last round.

            with handle.anchored():
                evaluate(model)

        What is changed in the model meanwhile is lost under local steps; other schemes share all weights anyway.
        """
        return self._caller.anchored()

    @torch.inference_mode(mode=False)
    def finish(self) -> None:
        """End local steps with a round, at any step; a collective. Under other schemes it is for buffers only.

        All ranks have the same weights and buffers then (with other schemes, buffers if `attach` has `buffers_every`),
        and may go on training.

        Raises:
            RankError: on every rank, if the ranks are at different steps; where rounds are opened by time, if some rank
                is in one meanwhile.
            ReplicaError: on every rank, if their weights differ before the first local step; that is so where another
                optimizer than the one given to `attach` makes the steps.
        """
        self._caller.finish()

    def use_optimizer(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Go on with another optimizer than the one given to `attach`, such as a new one for every stage of training.

        Raises:
            TypeError, ValueError: as `attach` does; nothing has been changed then.
        """
        self._require_attached("use_optimizer()")
        optimizers = as_optimizers(optimizer)
        if not optimizers:
            raise TypeError("use_optimizer(optimizer=...) must be an optimizer, or a list of them, got none.")
        for each in optimizers:
            require_single_momentum(self.scheme, each)
            if isinstance(self.scheme, LocalSteps):
                require_own_updates(each, self.scheme)
        self._caller.use_optimizers(optimizers)

    @torch.inference_mode(mode=False)
    def detach(self) -> None:
        """Leave a DDP model to DDP, which exchanges everything from now on, and any other to itself; a collective.

        Another scheme can be attached then. What a scheme owed, and its momentum, are lost. Local steps make a last
        round, and the inner optimizer goes on with the mean of the ranks' moments, the GradScaler with the smallest
        scale, as DDP's replicas stay equal only if their steps are. Sites are left to themselves. `wire_summary` stays
        what it was.

        Raises:
            RuntimeError: if it has been detached before.
            RankError, ReplicaError, ValueError: as `finish`, or for an optimizer whose state has no mean; nothing has
                been detached then.
        """
        self._require_attached("detach()")
        self.site.meet(self.transport, "handle.detach")
        self._end()

    def _end(self) -> None:
        self._caller.detach()
        model = self._model()
        if isinstance(model, DistributedDataParallel):
            if self.site.inside is None:
                hook_of(model).caller = None
                model.broadcast_buffers = self._broadcasts_buffers
            attached.pop(model.module, None)
        if model is not None:
            attached.pop(model, None)
        done, self._caller = self._caller, Caller()
        self._caller.step, self._caller.phase = done.step, done.phase
        self.is_detached = True

    def _require_attached(self, what: str) -> None:
        if self.is_detached:
            raise RuntimeError(f"lgc: handle.{what} after handle.detach(): nothing is attached any more.")

    @property
    def step(self) -> int:
        """Number of steps done: of the optimizer under local steps, else of synchronised backward passes.

        Where rounds are opened by time it is this rank's own.
        """
        return self._caller.step

    @property
    def progress(self) -> Progress:
        """What all ranks have done, the same on each: to end a loop by, and for learning-rate schedules.

        Its `steps` are those of a rank on average, and `step` unless rounds are opened by time: it then changes at
        rounds alone.
        """
        self._require_attached("progress")
        return self._caller.progress

    def count(self, samples: int) -> None:
        """Count samples that go into this rank's next step, where rounds are opened by time.

            loss.backward()
            handle.count(len(x))
            optimizer.step()

        A rank then counts in a round for its samples in place of its steps. Before every step or before none, on every
        rank; a step with samples after one without is refused, as those would be of the step before.

        Raises:
            ValueError: unless it is an integer of at least 1.
            RuntimeError: under any other scheme, where every rank counts for as much.
        """
        if type(samples) is not int or samples < 1:
            raise ValueError(f"handle.count(samples=...) must be an integer of at least 1, got {samples!r}.")
        self._caller.count(samples)

    @property
    def phase(self) -> Phase:
        """The phase of the last round; before the first one, that of the first."""
        return self._caller.phase

    @property
    def round_time(self) -> RoundTime | None:
        """The time of the last round; None for schemes that reduce bucket by bucket, amid the backward pass."""
        return self._caller.round_time

    @property
    def wire(self) -> Wire:
        """Bytes of this rank by phase; those of a round that is under way once it is done and applied."""
        return self.transport.wire

    @property
    def metrics(self) -> dict[str, float]:
        """This rank's measurements in the last round.

        `autoencoder_loss` (rank 0 in phase train) and `reconstruction_error`, |x - y|^2 / |x|^2 (phase compressed).
        """
        return dict(self.synchronizer.aggregator.metrics) if self.synchronizer else {}

    def wire_summary(self, *, of_all: bool = True) -> dict[str, object]:
        """Bytes of all ranks together, and the ratios against float32 all-reduce; a collective, not counted.

        The keys are those of the `wire` part of a run's summary.json, see docs/usage.md. With sites it is what
        travels between them, against all-reduce of one copy a site, and `inside` what lgc adds to the traffic of DDP or
        FSDP.

        Args:
            of_all: False for the bytes of this rank alone, for which no other has to call, and which lack those of a
                round that is under way.

        Raises:
            RankError: on every rank, if another one is in a round or another collective of lgc.
        """
        if of_all:
            self._caller.settle()
        inside = None if self.site.inside is None else self.site.inside.wire.to_json()
        rows = [[self.wire.to_json(), inside]]
        if of_all:
            uncounted, site = self.transport.uncounted(), self.site.uncounted()
            site.meet(uncounted, "handle.wire_summary")
            rows = site.of_all(uncounted, rows[0], "counts")
        parameters, sites = self.parameters / self.site.places, self.transport.world_size
        summary = summarise([wire_from_json(wire) for wire, _ in rows], parameters, sites)
        if inside is not None:
            counts = summarise([wire_from_json(wire) for _, wire in rows], parameters, sites)
            summary["inside"] = {name: counts[name] for name in ("sent_bytes", "received_bytes", "phases")}
        return summary

    def require_whole(self) -> None:
        """Raise ValueError if the ranks have no state together, as `lgc.checkpoint.distributed_state` has it."""
        if isinstance(self.scheme, LocalSteps) and isinstance(self.scheme.every, Seconds):
            raise ValueError(
                f"lgc.checkpoint.distributed_state has one number of steps for all ranks, and under {self.scheme} each "
                "has made its own; use lgc.checkpoint.save and resume, or save handle.state_dict() for every rank."
            )

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """This rank's state, to be saved by every rank: only tensors by parameter name, numbers, strings and bytes.

        It has the same keys at every step, and tensors of the same shapes, which torch.distributed.checkpoint needs: it
        fills in those of the state that it loads into. That is why the byte counts, one more phase after the other, are
        one text, and what codes know of earlier rounds is bytes.

        Args:
            whole: with whole tensors, DTensors where they are sharded, in place of this rank's part of them; a
                collective of the ranks of a site. See `lgc.checkpoint.distributed_state`.
        """
        self._require_attached("state_dict()")
        aggregator = self._caller.state_dict()  # first: it waits for a round that is under way, whose bytes count
        place: dict[str, Any] = {"whole": True} if whole else {}
        if self.site.inside is not None:
            place |= {"place": self.site.place, "places": self.site.places, "inside": self.site.inside.wire.to_json()}
        return {
            "version": STATE_VERSION,
            "scheme": str(self.scheme),
            "world_size": self.transport.world_size,
            "rank": self.transport.rank,
            "step": self.step,
            "phase": str(self.phase),
            "wire": self.wire.to_json(),
            **place,
            "aggregator": self._caller.whole(aggregator) if whole else aggregator,
        }

    @torch.inference_mode(mode=False)
    def load_state_dict(self, state: Mapping[str, Any], *, step: int | None = None) -> None:
        """Continue from the `state_dict` of the same rank, or from one that `lgc.checkpoint` has resharded.

        The latter only into a new handle: it has, for the decoders that belong to ranks, what they start from.

        Args:
            state: of the same step as the model's, which is to be loaded before.
            step: that the model is at, as `handle.step` counts, where one knows; a state of another is refused.

        Raises:
            ValueError: naming the first field that does not fit; nothing has been changed then. Ranks that wait for
                this one meanwhile learn of it.
        """
        with self.site.announcing(self.transport):
            self._load(state, step)

    def _load(self, state: Mapping[str, Any], expected: int | None) -> None:
        resharded = "resharded_from" in state
        aggregator = state.get("aggregator")
        with self.site.together(self.step, "handle.load_state_dict"):
            step, phase, wires = self._checked(state, expected)
            if resharded and self.synchronizer and self.step:
                raise ValueError(
                    f"state_dict: resharded, goes into a new handle only, this one is at step {self.step}."
                )
            if "whole" in state:
                aggregator = self._caller.part(aggregator)
            self._caller.require_form(aggregator, resharded=resharded)
        self._caller.load_state_dict(aggregator, step, resharded=resharded)
        self._caller.step = step
        self._caller.phase = phase
        self.wire.phases = wires[0].phases
        if self.site.inside is not None:
            self.site.inside.wire.phases = wires[1].phases

    def _checked(self, state: Mapping[str, Any], expected: int | None) -> tuple[int, Phase, list[Wire]]:
        """The step, the phase and the byte counts in a state of this rank; raises ValueError as `load_state_dict`."""
        here = self.state_dict()
        for key in ("version", "scheme", "world_size", "rank", "places", "place"):
            if state.get(key) != here.get(key):
                hint = STATE_HINTS.get(key, "")
                raise ValueError(f"state_dict: {key} was {state.get(key)!r}, here it is {here.get(key)!r}{hint}.")
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"state_dict: step must be an integer of at least 0, got {step!r}.")
        if expected is not None and step != expected:
            raise ValueError(
                f"state_dict: it is of step {step}, and the model's is {expected}: what is owed at one step is not "
                "owed at another. Load both from one checkpoint, lgc.checkpoint.resume(..., step=...), or leave out "
                "the handle's state, and what was owed is lost."
            )
        phase = state.get("phase")
        if phase not in list(Phase):
            raise ValueError(f"state_dict: phase must be one of {', '.join(Phase)}, got {phase!r}.")
        return step, Phase(phase), [wire_from_json(state[key]) for key in ("wire", "inside") if key in here]
