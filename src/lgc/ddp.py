"""Attach a scheme to a DistributedDataParallel model, whose buckets become one flat gradient here."""

# No `from __future__ import annotations`: DDP compares the hook's annotations by identity.
import json
import logging
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from lgc.choice.auto import Choice
from lgc.comm.replicas import ReplicaError, compare, require_agreement, synchronise
from lgc.comm.traffic import Traffic, Wire, summarise
from lgc.comm.transport import LEAST_TIMEOUT, MOST_TIMEOUT, RankError, Transport, clock
from lgc.phase import Phase
from lgc.powersgd import PowerSGDHook
from lgc.requirements import (
    advise,
    describe,
    parameters_of,
    require_ddp,
    require_exchangeable,
    require_optimizer_of,
    require_possible_candidates,
    require_real,
    require_single_momentum,
    trained,
)
from lgc.rounds.aggregators import Aggregator
from lgc.schemes import Auto, Dense, PowerSGD, Scheme, SparseScheme, parse_scheme

logger = logging.getLogger("lgc")

STATE_VERSION = 3
STATE_HINTS = {
    "world_size": "; lgc.checkpoint.load or reshard adapts it",
    "scheme": "; to change it, load everything but the handle: what was owed is lost",
}

OnDifference = Literal["raise", "synchronise"]
OnNonfinite = Literal["propagate", "raise"]

_attached: "weakref.WeakKeyDictionary[nn.Module, Handle]" = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    scheme: Scheme | str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: float | None = 60.0,
    check_every: int = 100,
    on_difference: OnDifference = "raise",
    on_nonfinite: OnNonfinite | None = None,
) -> "Handle":
    """Exchange this model's gradients by `scheme` from now on. A collective: all ranks call it.

        handle = lgc.attach(ddp_model, lgc.LGCRing(rate=1e-3), optimizer)

    Args:
        model: a DistributedDataParallel model (also under torch.compile) that has no communication hook yet.
        scheme: a scheme, or its text form such as `"dgc:rate=0.01"`; `"auto"` tries several and stays with the fastest.
        optimizer: the model's; checked, now and in every round, for a momentum on top of the scheme's, not changed.
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

    Returns:
        A handle to the phase, the byte counts and the state. The model keeps it alive.

    Raises:
        TypeError: the model is not a DistributedDataParallel model.
        ValueError: a wrong argument, momentum applied twice, or something that DDP is set to and lgc cannot do.
        RuntimeError: already attached, or (on every rank) the ranks differ in scheme, model or version.

    The backward pass then raises, on every rank, ReplicaError when replicas differ and, with schemes that compress,
    RankError when a rank has failed and FloatingPointError for a non-finite gradient.
    """
    ddp = require_ddp(model)
    if ddp in _attached:
        raise RuntimeError(f"attach: this model already has the scheme {_attached[ddp].scheme}.")
    require_exchangeable(ddp)
    if isinstance(scheme, str):
        scheme = parse_scheme(scheme)
    if not isinstance(scheme, Scheme):
        raise TypeError(f"attach(scheme=...) must be a scheme, such as lgc.DGC(), or its text form, got {scheme!r}.")
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        raise TypeError(f"attach(optimizer=...) must be an optimizer or None, got {optimizer!r}.")
    if not isinstance(grad_scaler, torch.amp.GradScaler | None):
        raise TypeError(f"attach(grad_scaler=...) must be a GradScaler or None, got {grad_scaler!r}.")
    skips = grad_scaler is not None and grad_scaler.is_enabled()
    default: OnNonfinite = "propagate" if skips else "raise"
    policy = Policy(check_every, on_difference, default if on_nonfinite is None else on_nonfinite)
    if timeout is not None and not (isinstance(timeout, int | float) and LEAST_TIMEOUT <= timeout <= MOST_TIMEOUT):
        raise ValueError(
            f"attach(timeout=...) must be {LEAST_TIMEOUT} to {MOST_TIMEOUT:g} seconds, or None, got {timeout!r}."
        )
    require_real(ddp, scheme)
    if optimizer is not None:
        require_optimizer_of(ddp, optimizer)
        require_single_momentum(scheme, optimizer)
    transport = Transport(ddp.process_group, trained(ddp)[0][1].device)
    if timeout is not None:
        transport.set_timeout(timeout)
    require_agreement(transport, "attach", describe(ddp, scheme, asdict(policy), transport.world_size))
    require_possible_candidates(ddp, scheme)
    if transport.rank == 0:
        advise(ddp, scheme, optimizer)
    handle = Handle(ddp, scheme, transport, optimizer, grad_scaler, policy)
    _attached[ddp] = handle
    return handle


@dataclass(frozen=True)
class Policy:
    """What a handle does when something is wrong; see `attach`."""

    check_every: int
    on_difference: OnDifference
    on_nonfinite: OnNonfinite

    def __post_init__(self) -> None:
        if not isinstance(self.check_every, int) or self.check_every < 0:
            raise ValueError(f"attach(check_every=...) must be an integer of at least 0, got {self.check_every!r}.")
        for name, options in (("on_difference", get_args(OnDifference)), ("on_nonfinite", get_args(OnNonfinite))):
            if getattr(self, name) not in options:
                raise ValueError(f"attach({name}=...) must be {' or '.join(options)}, got {getattr(self, name)!r}.")


class _Pending(NamedTuple):
    """A bucket whose mean is still being made."""

    buffer: Tensor
    gradients: list[tuple[str, Tensor]]  # views of the buffer
    future: torch.futures.Future[Tensor]


class RoundTime(NamedTuple):
    """Seconds of this rank in one round, from the last gradient to the mean.

    `communication` is that in collectives, waiting for other ranks included; `compression` is the rest.
    """

    compression: float
    communication: float


class Handle:
    """An attached scheme: what it is doing, what it has sent, and its state.

    Attributes:
        scheme: as attached; in place of `Auto`, what it has chosen, once it has.
        step: number of rounds done; each synchronised backward pass is one.
        phase: of the last round; before the first one, of the first.
        wire: bytes of this rank by phase.
        round_time: of the last round; None for the schemes that reduce bucket by bucket, amid the backward pass.
        aggregator: the parts at work; None for the schemes that reduce bucket by bucket (dense, fp16, bf16, powersgd).
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        scheme: Scheme,
        transport: Transport,
        optimizer: torch.optim.Optimizer | None,
        grad_scaler: torch.amp.GradScaler | None,
        policy: Policy,
    ) -> None:
        self.scheme = scheme
        self._asked = scheme
        self.policy = policy
        self.step = 0
        self.round_time: RoundTime | None = None
        self.transport = transport
        self._optimizer = optimizer
        self._optimized = None if optimizer is None else parameters_of(optimizer)
        self._grad_scaler = grad_scaler
        self._parameters = dict(trained(ddp))
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device
        self._unused_possible = ddp.find_unused_parameters or ddp.static_graph
        self._pending: list[_Pending] = []
        self._delivered = False
        self._was_finite = True
        self._has_gradient = False  # in this round
        self.phase = Phase.DENSE
        self.aggregator: Aggregator | None = None
        self._power_sgd = PowerSGDHook(scheme, transport) if isinstance(scheme, PowerSGD) else None
        self._choice = Choice(scheme, transport, self._device) if isinstance(scheme, Auto) else None
        self._chosen_at = 0
        self._install(scheme, self._build(scheme))
        ddp.register_comm_hook(None, self._exchange_bucket)
        if isinstance(scheme, SparseScheme | Auto):
            guard = torch.autograd.graph.register_multi_grad_hook(
                list(self._parameters.values()), self._require_fresh_gradients, mode="any"
            )
            weakref.finalize(ddp, guard.remove)  # the module may be trained on without DDP

    def _build(self, scheme: Scheme, start: int = 0) -> Aggregator | None:
        """A new aggregator whose schedule begins at step `start`; None if the scheme needs none."""
        if not isinstance(scheme, SparseScheme):
            return None
        aggregator = scheme.build(scheme.layout(self._parameters.items()), self.transport, device=self._device)
        aggregator.schedule.delay(start)
        return aggregator

    def _install(self, scheme: Scheme, aggregator: Aggregator | None) -> None:
        self.scheme, self.aggregator = scheme, aggregator
        if aggregator is not None:
            self.layout = aggregator.layout
            self.phase = aggregator.schedule.at(self.step).phase
            self._flat = torch.zeros(self.layout.size, dtype=torch.float32, device=self._device)

    @property
    def wire(self) -> Wire:
        """Bytes of this rank by phase."""
        return self.transport.wire

    @property
    def metrics(self) -> dict[str, float]:
        """What this rank measured in the last round.

        `autoencoder_loss` (rank 0 in phase train) and `reconstruction_error`, |x - y|^2 / |x|^2 (phase compressed).
        """
        return dict(self.aggregator.metrics) if self.aggregator else {}

    @property
    def parameters(self) -> int:
        """Number of trained parameters N."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def wire_summary(self) -> dict[str, object]:
        """Bytes of all ranks together, and the ratios against float32 all-reduce; a collective, not counted.

        The keys are those of the `wire` part of a run's summary.json, see docs/usage.md.
        """
        names = list(self.wire.phases)
        contents = sorted({content for traffic in self.wire.phases.values() for content in traffic.contents})
        table = torch.tensor([_row(self.wire.phases[name], contents) for name in names], dtype=torch.int64)
        tables = Transport(self.transport.group, self._device).all_gather(table, "counts")
        ranks = [
            Wire({name: _traffic(row, contents) for name, row in zip(names, rows, strict=True)})
            for rows in tables.tolist()
        ]
        return summarise(ranks, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be saved by every rank: tensors by parameter name, numbers and strings only.

        It has the same keys at every step, which torch.distributed.checkpoint needs: it fills in those of the state
        that it loads into. That is why the byte counts, one more phase after the other, are one text. The exception is
        `Auto`, whose state is that of the scheme it has chosen: to load with torch.distributed.checkpoint, attach that.
        """
        return {
            "version": STATE_VERSION,
            "scheme": str(self._asked),
            "chosen": str(self.scheme) if self.scheme is not self._asked else "",
            "chosen_at": self._chosen_at,
            "world_size": self.transport.world_size,
            "rank": self.transport.rank,
            "step": self.step,
            "phase": str(self.phase),
            "wire": json.dumps({name: asdict(traffic) for name, traffic in self.wire.phases.items()}),
            "aggregator": self.aggregator.state_dict() if self.aggregator else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of the same rank, or from one that `lgc.checkpoint` has resharded.

        The latter only into a new handle: it has, for the decoders that belong to ranks, what they start from.

        Raises:
            ValueError: naming the first field that does not fit; nothing has been changed then.
        """
        here = self.state_dict()
        for key in ("version", "scheme", "world_size", "rank"):
            if state.get(key) != here[key]:
                hint = STATE_HINTS.get(key, "")
                raise ValueError(f"state_dict: {key} was {state.get(key)!r}, here it is {here[key]!r}{hint}.")
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"state_dict: step must be an integer of at least 0, got {step!r}.")
        phase = state.get("phase")
        if phase not in list(Phase):
            raise ValueError(f"state_dict: phase must be one of {', '.join(Phase)}, got {phase!r}.")
        phases = _read_wire(state.get("wire"))
        scheme, aggregator, chosen_at = self._scheme_of(state)
        saved = state.get("aggregator")
        if "resharded_from" in state and aggregator is not None:
            if self.step:
                raise ValueError(
                    f"state_dict: resharded, goes into a new handle only, this one is at step {self.step}."
                )
            try:
                saved = aggregator.adapt_state(state["aggregator"], step)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"state_dict: aggregator, resharded, is not in its three parts: {error!r}.") from None
        _require_same_form(aggregator.state_dict() if aggregator else {}, saved, "aggregator")
        self._chosen_at = chosen_at
        self._choice = Choice(scheme, self.transport, self._device) if isinstance(scheme, Auto) else None
        self._install(scheme, aggregator)
        if aggregator is not None:
            assert isinstance(saved, Mapping)
            aggregator.load_state_dict(saved)
        self.step = step
        self.phase = Phase(phase)
        self.transport.wire.phases = phases

    def _scheme_of(self, state: Mapping[str, Any]) -> tuple[Scheme, Aggregator | None, int]:
        """What a state goes on with: its scheme, an aggregator for it, and the step at which it was chosen."""
        chosen, chosen_at = state.get("chosen", ""), state.get("chosen_at", 0)
        if type(chosen_at) is not int or chosen_at < 0:
            raise ValueError(f"state_dict: chosen_at must be an integer of at least 0, got {chosen_at!r}.")
        if not isinstance(self._asked, Auto):
            if chosen != "":
                raise ValueError(f"state_dict: chosen is {chosen!r}, {self._asked.name} has nothing to choose.")
            return self.scheme, self.aggregator, chosen_at
        options = {"": self._asked} | {str(scheme): scheme for scheme in (Dense(), *self._asked.candidates)}
        if chosen not in options:
            raise ValueError(f"state_dict: chosen is {chosen!r}, here it may be {', '.join(filter(None, options))}.")
        return options[chosen], self._build(options[chosen], chosen_at), chosen_at

    def _exchange_bucket(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self.aggregator is not None or (self._choice is not None and self._choice.is_due):
            return self._collect_bucket(bucket)
        return self._reduce_bucket(bucket)

    def _reduce_bucket(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP itself or its hooks do, counted."""
        if bucket.index() == 0:
            self._begin_dense()
        if self._check_is_due:
            self._has_gradient |= bool(bucket.buffer().any())
        if bucket.is_last():
            self._check_replicas()
            self.step += 1
        if self._power_sgd:
            return self._power_sgd.reduce(bucket)
        future = self._reduce(bucket.buffer())
        if self._choice is not None:
            self._choice.observe(bucket.buffer(), future, last=bucket.is_last())
        return future

    def _begin_dense(self) -> None:
        self.phase = self._power_sgd.phase if self._power_sgd else Phase.DENSE
        self.transport.begin(self.phase)
        self._has_gradient = False

    def _reduce(self, buffer: Tensor) -> torch.futures.Future[torch.Tensor]:
        """The mean over the ranks into `buffer`, in the background."""
        dtype = self.scheme.dtype if isinstance(self.scheme, Dense) else None
        if dtype is None or dtype == buffer.dtype:
            return self.transport.all_reduce_async(buffer.mul_(1 / self.transport.world_size), "values")
        share = buffer.to(dtype).div_(self.transport.world_size)
        return self.transport.all_reduce_async(share, "values").then(lambda done: buffer.copy_(done.value()))

    def _collect_bucket(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Keep the bucket until the last one is here; then one round makes the mean of all."""
        gradients = [
            (self._names[id(parameter)], gradient)
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        devices: list[int | str | torch.device] = [self._device] if self._device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._pending.append(_Pending(bucket.buffer(), gradients, future))
        if bucket.is_last():
            pending, self._pending = self._pending, []
            try:
                if self.aggregator is None:
                    self._decide(pending)
                self._finish(pending)
            except (RankError, ReplicaError, FloatingPointError):  # raised on every rank
                raise
            except Exception as error:
                self.transport.announce(error)
                raise
        return future

    def _decide(self, pending: list[_Pending]) -> None:
        """Go on with what `Auto` chooses."""
        assert self._choice is not None
        gradients = dict(named for bucket in pending for named in bucket.gradients)
        chosen = self._choice.choose({name: gradients[name] for name in self._parameters})
        if chosen is not None:
            self._choice = None
            self._chosen_at = self.step
            self._install(chosen, self._build(chosen, self.step))

    def _finish(self, pending: list[_Pending]) -> None:
        """One round for all buckets."""
        if self.aggregator is not None:
            started, communicated = clock(self._device), self.transport.seconds
            self._deliver(self._aggregate(pending), pending)
            communication = self.transport.seconds - communicated
            self.round_time = RoundTime(clock(self._device) - started - communication, communication)
            return
        self._begin_dense()
        self._has_gradient = any(bool(bucket.buffer.any()) for bucket in pending)
        self._check_replicas()
        self.step += 1
        for bucket in pending:
            self._reduce(bucket.buffer).wait()
            bucket.future.set_result(bucket.buffer)

    @property
    def _check_is_due(self) -> bool:
        every = self.policy.check_every
        return every > 0 and self.step % every == 0 and self.transport.world_size > 1

    def _check_replicas(self) -> None:
        """If it is due, compare what all ranks must have the same of, as it is before this round.

        A rank whose gradient is zero does not count: once its inputs have run out under `join()`, it goes on giving
        zeros, without updates of its own.
        """
        if not self._check_is_due:
            return
        replicas: dict[str, Tensor] = {f"parameter {name}": tensor for name, tensor in self._parameters.items()}
        if self.aggregator is not None:
            replicas |= self.aggregator.replicas()
        differences = compare(self.transport, replicas, counts=self._has_gradient)
        if not differences:
            return
        found = "; ".join(f"{name} on rank {', '.join(map(str, each.ranks))}" for name, each in differences.items())
        message = f"lgc: step {self.step}: the ranks are no longer the same: {found}"
        if self.policy.on_difference == "raise":
            raise ReplicaError(f"{message}.")
        if self.transport.rank == 0:
            logger.warning("%s; taking those of the others.", message)
        for name, difference in differences.items():
            synchronise(self.transport, replicas[name], source=difference.source)

    def _aggregate(self, pending: list[_Pending]) -> Tensor:
        assert self.aggregator is not None
        if self._optimizer is not None:  # a scheduler or load_state_dict may have given it momentum since attach
            require_single_momentum(self.scheme, self._optimizer)
        flat = self.layout.by_name(self._flat)
        for bucket in pending:
            for name, gradient in bucket.gradients:
                flat[name].copy_(gradient)
        scale = self._grad_scaler.get_scale() if self._grad_scaler is not None else 1.0
        if scale != 1.0:
            self._flat /= scale
        self.phase = self.aggregator.schedule.at(self.step).phase
        self.transport.begin(self.phase, steps=0)
        self._has_gradient = not self._check_is_due or bool(self._flat.any())
        self._check_replicas()
        result = self.aggregator.aggregate(self._flat, self.step)
        self.step += 1
        self._report_nonfinite(result.nonfinite_ranks)
        mean = result.mean
        return mean if scale == 1.0 else mean * scale

    def _report_nonfinite(self, ranks: tuple[int, ...]) -> None:
        message = f"step {self.step - 1}: the gradient is not finite on rank {', '.join(map(str, ranks))}"
        if ranks and self.policy.on_nonfinite == "raise":
            raise FloatingPointError(f"lgc: {message}.")
        if ranks and self._was_finite and self._grad_scaler is None and self.transport.rank == 0:
            logger.warning("%s, so it is NaN on all, and every parameter is after the optimizer's step.", message)
        self._was_finite = not ranks

    def _deliver(self, mean: Tensor, pending: list[_Pending]) -> None:
        means = self.layout.by_name(mean)
        for bucket in pending:
            for name, gradient in bucket.gradients:
                gradient.copy_(means[name])
            bucket.future.set_result(bucket.buffer)
        if self._unused_possible:
            self._deliver_to_unused(means)
        self._delivered = True

    def _deliver_to_unused(self, means: dict[str, Tensor]) -> None:
        # DDP leaves `.grad` of a parameter that no rank used as it was, and with it what feedback still owed.
        nonzero = torch.stack([means[name].any() for name in self._parameters]).tolist()  # one wait for the device
        for (name, parameter), owed in zip(self._parameters.items(), nonzero, strict=True):
            if owed:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(means[name])

    def _require_fresh_gradients(self, _: Tensor) -> None:
        # A second backward would add the last mean to the new gradients, and feedback would count it twice.
        if not self._delivered:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._optimized is not None and id(parameter) not in self._optimized:
                parameter.grad.zero_()  # nobody else does
            elif bool(parameter.grad.any()):
                raise RuntimeError(
                    f"lgc: backward() with the last step's mean still in the gradient of {name!r}; call "
                    "optimizer.zero_grad() between steps, and accumulate under the model's no_sync()."
                )
        self._delivered = False


def _require_same_form(here: object, state: object, where: str) -> None:
    """Raise unless `state` has the keys, types and tensor shapes of `here`."""
    if isinstance(here, Mapping):
        keys = set(state) if isinstance(state, Mapping) else None
        if keys != set(here):
            raise ValueError(f"state_dict: {where} has {sorted(keys or [])}, here it is {sorted(here)}.")
        for key, value in here.items():
            assert isinstance(state, Mapping)
            _require_same_form(value, state[key], f"{where}.{key}")
    elif isinstance(here, Tensor):
        if not isinstance(state, Tensor) or (state.shape, state.dtype) != (here.shape, here.dtype):
            form = f"{tuple(state.shape)} {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state_dict: {where} is {form}, here it is {tuple(here.shape)} {here.dtype}.")
    elif type(state) is not type(here) or (type(state) is int and state < 0):  # all of them are counts
        raise ValueError(f"state_dict: {where} is {state!r}, here it is {here!r}.")


def _read_wire(text: object) -> dict[str, Traffic]:
    """Byte counts by phase from a `state_dict`."""
    try:
        phases = {name: Traffic(**traffic) for name, traffic in json.loads(str(text)).items()}
        counts = [count for traffic in phases.values() for count in (*_row(traffic, []), *traffic.contents.values())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"state_dict: wire is not the byte counts by phase: {error}.") from None
    for count in counts:
        if type(count) is not int or count < 0:
            raise ValueError(f"state_dict: wire must have counts of at least 0, got {count!r}.")
    return phases


def _row(traffic: Traffic, contents: list[str]) -> list[int]:
    counts = [traffic.steps, traffic.sent_bytes, traffic.received_bytes, traffic.upload_bytes]
    return counts + [traffic.contents.get(content, 0) for content in contents]


def _traffic(row: list[int], contents: list[str]) -> Traffic:
    steps, sent, received, upload, *by_content = row
    return Traffic(steps, sent, received, upload, dict(zip(contents, by_content, strict=True)))
