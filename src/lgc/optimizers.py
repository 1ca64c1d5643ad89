"""Which optimizers step with a model's parameters, whoever made them, and one state of theirs for all ranks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lgc.comm.transport import Transport

FEW_STEPS = 20  # of one optimizer, in which what should come with each of them may fail to come
NUMBER = "number"  # in an optimizer's state, beside tensors of these types
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = {str(dtype): dtype for dtype in (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)}

_Watch = tuple[set[int], "weakref.WeakMethod[Callable[[Optimizer], None]]"]  # ids of parameters, and what is called


_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
_within_steps: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Streak:
    """Counts the steps of one optimizer, the first that makes one, until something ends them.

    Once that is gone, those of the next count with them, as where every epoch makes a new one.
    """

    _of: weakref.ref[Optimizer] | None = None
    _steps = 0

    def add(self, optimizer: Optimizer) -> int:
        """Count a step, if it is of that optimizer; the number of its steps."""
        if self._of is None or self._of() is None:
            self._of = weakref.ref(optimizer)
        self._steps += self._of() is optimizer
        return self._steps

    def end(self) -> None:
        """Begin anew."""
        self._of, self._steps = None, 0


def parameters_of(*optimizers: Optimizer) -> set[int]:
    """The ids of all parameters that some optimizers have."""
    return {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}


def watch_steps(model: nn.Module, parameters: Iterable[Tensor], before: Callable[[Optimizer], None]) -> None:
    """Call `before(optimizer)` before every step of any optimizer of torch's kind that has one of the parameters.

    Args:
        model: that has them; the watch ends with it.
        parameters: to look for.
        before: a method, whose object is not kept alive.
    """
    _watches[model] = {id(parameter) for parameter in parameters}, weakref.WeakMethod(before)
    _look_at_every_step()


def end_watch(model: nn.Module) -> None:
    """End the watch over a model's parameters, if there is one."""
    _watches.pop(model, None)


@functools.cache
def _look_at_every_step() -> None:
    # Once and for good: torch fails if a hook is removed while it calls them, as collecting a model then would.
    # A step may be compiled (`torch.compile(optimizer.step)`), its hooks are not. Every optimizer has imported dynamo.
    register_optimizer_step_pre_hook(torch.compiler.disable(_look))
    register_optimizer_step_post_hook(torch.compiler.disable(lambda optimizer, *_: _within_steps.discard(optimizer)))


def is_within_step() -> bool:
    """Whether an optimizer is making a step, whose closure may make several backward passes."""
    return len(_within_steps) > 0


def _look(optimizer: Optimizer, _: Any, __: Any) -> None:
    if not _watches:
        return
    _within_steps.add(optimizer)
    own = parameters_of(optimizer)
    for watched, method in list(_watches.values()):
        call = method()
        if call is not None and not watched.isdisjoint(own):
            call(optimizer)


class CountsSteps(Protocol):
    """What counts the steps of an optimizer, also those that a GradScaler leaves out."""

    step: int

    def count_skipped_step(self, optimizer: Optimizer, since: int) -> None:
        """Count a step that was not made since there were so many."""


class _Counters(weakref.WeakSet[CountsSteps]):
    """Those that count what a GradScaler leaves out; a copy of the scaler has none."""

    def __reduce__(self) -> tuple[type[set[CountsSteps]], tuple[()]]:
        return set, ()


_scaled: weakref.WeakKeyDictionary[torch.amp.GradScaler, _Counters] = weakref.WeakKeyDictionary()


def watch_skips(grad_scaler: torch.amp.GradScaler, counter: CountsSteps) -> None:
    """Have the steps counted that a GradScaler leaves out; neither it nor the counter is kept alive."""
    if grad_scaler not in _scaled:
        _scaled[grad_scaler] = _Counters()
        scaled = functools.partial(_make_scaled_step, _scaled[grad_scaler], grad_scaler.step)
        grad_scaler.step = scaled  # type: ignore[method-assign]
    _scaled[grad_scaler].add(counter)


def end_watch_over_skips(grad_scaler: torch.amp.GradScaler, counter: CountsSteps) -> None:
    """Leave a GradScaler to itself, unless others count its steps too."""
    _scaled[grad_scaler].discard(counter)
    if not _scaled[grad_scaler]:
        del _scaled[grad_scaler], grad_scaler.step


def _make_scaled_step(
    counters: Iterable[CountsSteps],
    make: Callable[..., float | None],
    optimizer: Optimizer,
    *args: Any,
    **kwargs: Any,
) -> float | None:
    before = [(counter, counter.step) for counter in counters]
    result = make(optimizer, *args, **kwargs)
    for counter, steps in before:
        counter.count_skipped_step(optimizer, steps)
    return result


@torch.no_grad()
def share_state(optimizer: Optimizer, transport: Transport) -> None:
    """Give all ranks the same state of an optimizer that each has used by itself; a collective.

    Of floats in a parameter's shape, its moments, that is the mean over the ranks that have them; of everything else,
    as of a count of steps, what the first of these ranks has.

    Raises:
        ValueError: on every rank, for a state that is neither a tensor nor a number, or of another form on another
            rank; nothing has been changed then.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [{name: _form(value) for name, value in optimizer.state.get(each, {}).items()} for each in parameters]
    ranks = transport.all_gather_json(own, "agreement")
    entries = [
        (parameter, name, {rank: forms[number][name] for rank, forms in enumerate(ranks) if name in forms[number]})
        for number, parameter in enumerate(parameters)
        for name in dict.fromkeys(name for forms in ranks for name in forms[number])
    ]
    for _, name, forms in entries:
        kinds = {form["kind"] for form in forms.values()}
        shapes = {tuple(form.get("shape", ())) for form in forms.values()}
        if len(kinds) > 1 or len(shapes) > 1 or not kinds <= {NUMBER, *DTYPES}:
            raise ValueError(
                f"lgc: the {type(optimizer).__name__} has {name!r} in its state, of which the ranks "
                f"({', '.join(kinds)}) have no mean; make a new optimizer instead, and give it to "
                "handle.use_optimizer() before."
            )
    for parameter, name, forms in entries:
        state, source = optimizer.state[parameter], min(forms)
        form = forms[source]
        if form["kind"] == NUMBER:
            state[name] = form["value"]
            continue
        shape, dtype = form["shape"], DTYPES[form["kind"]]
        if name not in state:
            device = parameter.device if form["beside"] else torch.device("cpu")
            state[name] = torch.zeros(shape, dtype=dtype, device=device)
        if dtype.is_floating_point and shape == list(parameter.shape) and parameter.dim():
            wide = state[name].to(torch.promote_types(dtype, torch.float32))
            state[name].copy_(transport.all_reduce(wide, "moments") / len(forms))
        else:
            state[name].copy_(transport.broadcast(state[name], "moments", source=source))


def _form(value: object) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"kind": str(value.dtype), "shape": list(value.shape), "beside": value.device.type != "cpu"}
    return {"kind": NUMBER, "value": value} if isinstance(value, int | float | None) else {"kind": type(value).__name__}


def share_scale(grad_scaler: torch.amp.GradScaler, transport: Transport) -> None:
    """Give all ranks the state of the GradScaler with the smallest scale; a collective."""
    states = transport.all_gather_json(grad_scaler.state_dict(), "agreement")
    grad_scaler.load_state_dict(min(states, key=lambda state: state["scale"]))
