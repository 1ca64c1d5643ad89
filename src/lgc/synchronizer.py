"""Named tensors in, their mean over the ranks out: one round after the other, whoever the tensors come from."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from lgc.comm.replicas import OnDifference, ReplicaCheck, ReplicaError, require_agreement
from lgc.comm.transport import RankError, Transport
from lgc.phase import Phase
from lgc.rounds.aggregator import Round
from lgc.schemes import RoundScheme, as_scheme

logger = logging.getLogger("lgc")

OnNonfinite = Literal["propagate", "raise"]


@dataclass(frozen=True)
class Policy:
    """Reactions to what goes wrong; see `attach`."""

    check_every: int = 100
    on_difference: OnDifference = "raise"
    on_nonfinite: OnNonfinite = "raise"
    buffers_every: int | None = None

    def __post_init__(self) -> None:
        every = self.buffers_every
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"attach(buffers_every=...) must be an integer of at least 1, or None, got {every!r}.")
        if type(self.check_every) is not int or self.check_every < 0:
            raise ValueError(f"attach(check_every=...) must be an integer of at least 0, got {self.check_every!r}.")
        for name, options in (("on_difference", get_args(OnDifference)), ("on_nonfinite", get_args(OnNonfinite))):
            if getattr(self, name) not in options:
                raise ValueError(f"attach({name}=...) must be {' or '.join(options)}, got {getattr(self, name)!r}.")


class Observer(Protocol):
    """Is shown every round of one rank."""

    def before_round(self, step: int, gradient: Tensor) -> None:
        """Look at what a round is about to take in, flat, float32, shape (N,), unscaled."""

    def after_round(self, step: int, result: Round) -> None:
        """Look at what it gave."""


class Synchronizer:
    """One rank's side of a scheme for named tensors. All ranks make one, of the same scheme and tensors.

        synchronizer = Synchronizer(lgc.DGC(rate=0.01), gradients, Transport(group))
        means = synchronizer.synchronize(gradients, step)

    Args:
        scheme: how they are exchanged.
        tensors: with the names, shapes and device of all that will be exchanged; their values are not looked at.
        transport: between the ranks.
        policy: what is done when something is wrong.
        replicas: what all ranks must have the same of, by name; compared at the policy's interval.
        unit: what a step is called in messages.

    Raises:
        TypeError, ValueError: a wrong argument.
        RuntimeError: on every rank, naming the field, if the ranks differ in scheme, names, shapes or their order.

    Attributes:
        aggregator: the scheme at work: its layout, schedule, residual and momentum.
        observers: are shown every round.
        was_finite: whether what the ranks gave to the last round was.
    """

    def __init__(
        self,
        scheme: RoundScheme | str,
        tensors: Mapping[str, Tensor],
        transport: Transport,
        policy: Policy | None = None,
        replicas: Mapping[str, Tensor] | None = None,
        *,
        unit: str = "step",
    ) -> None:
        method = as_scheme(scheme)
        if not isinstance(method, RoundScheme):
            raise TypeError(f"Synchronizer(scheme=...) must have rounds, as lgc.DGC() has, got {scheme!r}.")
        if not isinstance(transport, Transport):
            raise TypeError(f"Synchronizer(transport=...) must be a Transport, got {type(transport).__name__}.")
        if not tensors:
            raise ValueError("Synchronizer(tensors=...) must have at least one tensor, got none.")
        shapes = {f"tensor {name}": str(list(tensor.shape)) for name, tensor in tensors.items()}
        require_agreement(transport.uncounted(), "Synchronizer", {"scheme": method.name} | method.arguments() | shapes)
        self.policy = policy or Policy()
        self.transport = transport
        device = next(iter(tensors.values())).device
        self.aggregator = method.build(method.layout(tensors.items()), transport, device=device)
        self.aggregator.on_difference = self.policy.on_difference
        self.observers: list[Observer] = []
        self._replicas = replicas or {}
        self._check = ReplicaCheck(transport, self.policy.check_every, self.policy.on_difference, unit)
        self.was_finite = True

    def phase(self, step: int) -> Phase:
        """The phase of the round of `step`, counted from 0."""
        return self.aggregator.schedule.at(step).phase

    def look(self, step: int) -> None:
        """Take the replicas as they are now for the comparison in the round of `step`, if there is one.

        For callers whose weights may be disturbed by then, as SAM disturbs them; else they are taken in the round.
        """
        self._check.look(step, self._replicas)

    def synchronize(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        *,
        scale: float | None = None,
        counts: bool = True,
        resting: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """The mean over the ranks, by name: float32, valid until the next round; a collective.

        Args:
            tensors: this rank's, all of them; not changed.
            step: of the round, the same on every rank.
            scale: what a GradScaler has multiplied them by, and the means are too. What is kept between rounds is in
                unscaled units. None without one.
            counts: whether the replicas of this rank are compared, when it is time.
            resting: names that take no part on this rank, as they are frozen or unused: nothing of them is sent, and
                what they are owed stays. Where all ranks have them, the mean is zero.

        Raises:
            ValueError: the tensors are not those that this was made for.
            RankError: on every rank, if one failed to prepare, or the ranks are at different steps.
            ReplicaError: on every rank, if replicas differ and the policy is to raise.
            FloatingPointError: on every rank, if a tensor of one has a NaN or Inf and the policy is to raise. No state
                has changed. With "propagate" all means are NaN.
        """
        with self.transport.announcing(RankError, ReplicaError, FloatingPointError):
            return self._synchronize(tensors, step, scale, counts, resting)

    def _synchronize(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        scale: float | None,
        counts: bool,
        resting: Collection[str],
    ) -> dict[str, Tensor]:
        layout, flat = self.aggregator.layout, self.aggregator.feedback.intake
        if tensors.keys() != layout.slices.keys():
            names = ", ".join(sorted(tensors.keys() ^ layout.slices.keys()))
            raise ValueError(f"synchronize(tensors=...) must be those this was made for, what differs is {names}.")
        for name, view in layout.by_name(flat).items():
            if tensors[name].shape != view.shape or not tensors[name].is_floating_point():
                found = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
                raise ValueError(f"synchronize(tensors=...): {name} must be floats {tuple(view.shape)}, got {found}.")
            view.copy_(tensors[name])
        places = [layout.slices[name] for name in resting]
        for place in places:
            flat[place] = 0
        if scale not in (None, 1.0):
            flat /= scale
        for observer in self.observers:
            observer.before_round(step, flat)
        result = self.aggregator.aggregate(flat, step, places)
        if self._check.is_due(step):  # once the opening has shown that it is for all ranks
            replicas = {**self._replicas, **self.aggregator.replicas()}
            self._check.run(step, replicas, counts=counts)
        for observer in self.observers:
            observer.after_round(step, result)
        self._report_nonfinite(result.nonfinite_ranks, step, warn=scale is None)
        return layout.by_name(result.mean if scale in (None, 1.0) else result.mean * scale)

    def _report_nonfinite(self, ranks: tuple[int, ...], step: int, *, warn: bool) -> None:
        message = f"step {step}: the gradient is not finite on {self.transport.member} {', '.join(map(str, ranks))}"
        if ranks and self.policy.on_nonfinite == "raise":
            raise FloatingPointError(
                f"lgc: {message}. No state has changed; DDP cannot run this model again: go on from a checkpoint. To "
                'skip such steps, attach with on_nonfinite="propagate": all ranks then get NaN gradients.'
            )
        if ranks and self.was_finite and warn and self.transport.rank == 0:
            logger.warning("%s, so it is NaN on all, and so is every parameter after a step with it.", message)
        self.was_finite = not ranks

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, in three parts: see `Aggregator.state_dict`."""
        return self.aggregator.state_dict()

    def load_state_dict(self, state: Any, step: int, *, resharded: bool = False) -> None:
        """Go on from a state before the round of `step`.

        Args:
            state: of the same rank; or, with `resharded`, one that `lgc.checkpoint` has made of those of another number
                of ranks, for a new synchronizer only: it has, for the decoders that belong to ranks, what they start
                from.
            step: of the next round.
            resharded: which of them it is.

        Raises:
            ValueError: naming the first field that does not fit; nothing has been changed then.
        """
        if resharded:
            state = self.adapted(state, step)
        require_same_form(self.aggregator.state_dict(), state, "aggregator")
        self.aggregator.load_state_dict(state)

    def adapted(self, state: Any, step: int) -> Any:
        """A resharded state as these ranks have it: see `Aggregator.adapt_state`."""
        try:
            return self.aggregator.adapt_state(state, step)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state_dict: aggregator, resharded, is not in its three parts: {error!r}.") from None


def require_same_form(here: object, state: object, where: str) -> None:
    """Raise ValueError, naming the first difference, unless `state` has the keys, types and shapes of `here`."""
    if isinstance(here, Mapping):
        keys = set(state) if isinstance(state, Mapping) else None
        if keys != set(here):
            raise ValueError(f"state_dict: {where} has {sorted(keys or [])}, here it is {sorted(here)}.")
        for key, value in here.items():
            assert isinstance(state, Mapping)
            require_same_form(value, state[key], f"{where}.{key}")
    elif isinstance(here, Tensor):
        if not isinstance(state, Tensor) or (state.shape, state.dtype) != (here.shape, here.dtype):
            form = f"{tuple(state.shape)} {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state_dict: {where} is {form}, here it is {tuple(here.shape)} {here.dtype}.")
    elif type(state) is not type(here) or (type(state) is int and state < 0):  # all of them are counts
        raise ValueError(f"state_dict: {where} is {state!r}, here it is {here!r}.")
