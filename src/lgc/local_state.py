"""What local steps keep from one round to the next: as the model shows it, and as checkpoints have it."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future as Task
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lgc.buffers import Buffers
from lgc.caller import Caller
from lgc.comm.transport import Transport
from lgc.ddp import CollectedBuckets
from lgc.fragments import Fragment
from lgc.gradients import OptimizedGradients
from lgc.pace import Pace
from lgc.schemes import LocalSteps, Seconds
from lgc.sites import Site
from lgc.synchronizer import Synchronizer, require_same_form

Start = CollectedBuckets | OptimizedGradients
Change = Callable[[Mapping[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]

_states: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LocalState]] = weakref.WeakKeyDictionary()


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
        moved: by this rank, by name, where it is asked for after the exchange.
        weights: this rank's when it began, where they go on moving.
        buffers: the same.
        result: of the round, once it is done.
    """

    fragment: Fragment
    moved: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    buffers: dict[str, Tensor]
    result: Task[Result]


class LocalState(Caller):
    """What a rank keeps from one round of local steps to the next.

    Args:
        module: that has the parameters.
        scheme: how often they are exchanged, and how.
        site: whose ranks have them together.
        transport: between the sites.
        start: exchanges the gradients of the first steps, if any.
        fragments: the parameters.
    """

    synchronizer: Synchronizer

    def __init__(
        self,
        module: nn.Module,
        scheme: LocalSteps,
        site: Site,
        transport: Transport,
        start: Start | None,
        fragments: Sequence[Fragment],
    ) -> None:
        self._module = module
        self._scheme = scheme
        self._site = site
        self._transport = transport
        self._start = start
        self._fragments = fragments
        self._parameters = {name: each for fragment in fragments for name, each in fragment.parameters.items()}
        self._buffers = Buffers(module)
        self._pace = Pace(scheme.every.number) if isinstance(scheme.every, Seconds) else None
        self.synchronizer = fragments[0].synchronizer
        self._last_round = scheme.start_steps  # the step of the last round
        self._launched: Launched | None = None
        self._own: dict[Tensor, Tensor] | None = None  # what `anchored` has put aside
        self._replaced = False  # the weights are not those of this anchor
        self._warned = False
        self._module_hooks: list[RemovableHandle] = []
        for each in module.modules():  # functions, which a copy of the module may keep
            _states[each] = weakref.ref(self)
            self._module_hooks.append(each.register_state_dict_pre_hook(_on_state_dict))
            self._module_hooks.append(each.register_load_state_dict_post_hook(_on_load_state_dict))

    def detach(self) -> None:
        for hook in self._module_hooks:
            hook.remove()
        for each in self._module.modules():
            _states.pop(each, None)

    @property
    def _has_begun(self) -> bool:
        """Whether there have been steps that each rank has made by itself."""
        return self.step > self._scheme.start_steps

    @property
    def _is_together(self) -> bool:
        """Whether all ranks have the same weights now."""
        at_anchor = all(each.step == self.step and not each.ahead for each in self._fragments)
        return (self._launched is None and at_anchor) or not self._has_begun

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

    def _require_own_weights(self, what: str) -> None:
        if self._own is not None:
            raise RuntimeError(
                f"lgc: {what} within anchored(), whose end would undo it; leave it before. (torch's get_state_dict "
                "makes a step where the optimizer has no state yet: call get_optimizer_state_dict before anchored().)"
            )

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, in three parts: see `Aggregator.state_dict`.

        A round that is under way is waited for, and what it gave is part of the state.
        """
        self.settle()
        parts = {name: each.state_dict() for name, each in self._synchronizers().items()}
        per_rank: dict[str, Any] = {name: part["per_rank"] for name, part in parts.items()}
        replicated: dict[str, Any] = {name: part["replicated"] for name, part in parts.items()}
        numbered = {str(number): fragment for number, fragment in enumerate(self._fragments)}
        per_rank |= {
            "weights": _copies(_joined(self._site.part(self._of_rank(each.parameters)) for each in self._fragments)),
            "buffers": _copies(self._of_rank(self._buffers.current())),
        }
        replicated |= {
            "anchor": _copies(_joined(fragment.anchor for fragment in self._fragments)),
            "outer_momentum": _copies(_joined(fragment.momentum for fragment in self._fragments)),
            "buffers": _copies(self._buffers.shared),
            "rounds": {number: fragment.rounds for number, fragment in numbered.items()},
            "round_steps": {number: fragment.step for number, fragment in numbered.items()},
            "last_round": self._last_round,
        }
        if self._scheme.ahead:
            ahead = frozenset[str]().union(*(fragment.ahead for fragment in self._fragments))
            replicated["ahead"] = {name: int(name in ahead) for name in self._parameters}
        if self._scheme.common_momentum:
            replicated["rates"] = dict(ChainMap(*(each.rates for each in self._fragments)))
            replicated["owed_rates"] = dict(ChainMap(*(each.owed_rates for each in self._fragments)))
        if self._pace:
            replicated["pace"] = self._pace.state_dict()
        if self._scheme.overlap:
            self._add_under_way(per_rank, replicated)
        return {"per_rank": per_rank, "replicated": replicated, "server": {}}

    def _add_under_way(self, per_rank: dict[str, Any], replicated: dict[str, Any]) -> None:
        """Add the round that is under way, once it is done; the same keys where there is none."""
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
            "mean": {name: torch.zeros_like(each) for name, each in replicated["anchor"].items()} | _copies(given.mean),
            "buffers": _copies(replicated["buffers"] | given.buffers),
        }

    def require_form(self, state: Any, *, resharded: bool) -> None:
        self._require_own_weights("handle.load_state_dict()")
        here = self.state_dict()
        if resharded:
            state = {**state, "server": {}, "per_rank": self._adapted(state)}
        require_same_form(here, state, "aggregator")
        for name, synchronizer in self._synchronizers().items():
            synchronizer.aggregator.read_pasts({"replicated": state["replicated"][name]})

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
            fragment.rounds = replicated["rounds"][str(number)]
            fragment.step = replicated["round_steps"][str(number)]
            fragment.rates = {name: replicated["rates"][name] for name in fragment.rates}
            fragment.owed_rates = {name: replicated["owed_rates"][name] for name in fragment.owed_rates}
            if self._scheme.ahead:
                ahead = [name for name in fragment.anchor if replicated["ahead"][name]]
                fragment.go_ahead(ahead, per_rank[f"round {number}"]["residual"])
        self._last_round = replicated["last_round"]
        if self._pace:
            self._pace.load_state_dict(replicated["pace"])
        if step > self._scheme.start_steps:
            self._forget_start()
        if self._start is not None:
            self._start.step = min(step, self._scheme.start_steps)
        self._replaced = False
        if self._scheme.overlap and replicated["under_way"]["fragment"]:
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
        self._launched = Launched(fragment, {}, weights, _copies(before["buffers"], device), result)

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

    def _forget_start(self) -> None:
        """Give back the memory of what the start still owed, which nothing sends any more."""
        if self._start is not None:
            self._start.synchronizer.aggregator.feedback.forget()

    def _synchronizers(self) -> dict[str, Synchronizer]:
        rounds = {f"round {number}": fragment.synchronizer for number, fragment in enumerate(self._fragments)}
        return rounds | ({"start": self._start.synchronizer} if self._start else {})

    def _of_rank(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's own values of the model's tensors, by name, also while it shows the anchor's."""
        return {name: (self._own or {}).get(each, each) for name, each in tensors.items()}


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: each.detach().to(device, copy=True) for name, each in tensors.items()}


def _joined(groups: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: each for group in groups for name, each in group.items()}


def _kept_for(module: nn.Module) -> LocalState | None:
    return _states[module]() if module in _states else None


def _on_state_dict(module: nn.Module, *_: object) -> None:
    if (state := _kept_for(module)) is not None:
        state.warn_of_own_weights()


def _on_load_state_dict(module: nn.Module, *_: object) -> None:
    if (state := _kept_for(module)) is not None:
        state.refuse_replaced_weights()
