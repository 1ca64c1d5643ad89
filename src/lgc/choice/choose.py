"""`lgc.choose`: which scheme makes a step the shortest, found out before one is attached."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgc.choice.cost import TOLERANCE, Link, as_fast, predict
from lgc.choice.profile import Job, Profiler, stand_in, wrap
from lgc.choice.rehearsal import knows_past
from lgc.comm.replicas import require_agreement
from lgc.comm.transport import SERVER, Transport
from lgc.fragments import fragmented
from lgc.requirements import require_independent, require_real, trained, uncompiled
from lgc.schemes import Dense, LocalSteps, PowerSGD, RoundScheme, Scheme, as_scheme, require_rounds_by_count

logger = logging.getLogger("lgc")

BRIEF = 0.5  # seconds after which a scheme is not measured again
PATIENCE = 2.0  # a first round that takes so many times what there is to win ends a candidate's rehearsal


def choose(
    model: nn.Module,
    make_loss: Callable[[nn.Module], Tensor],
    candidates: Sequence[Scheme | str],
    *,
    link: Link | None = None,
    group: dist.ProcessGroup | None = None,
) -> Scheme:
    """Find the scheme with which a training step takes least time. A collective: all ranks call it, before `attach`.

        scheme = lgc.choose(ddp_model, lambda model: cross_entropy(model(x), y), ["bf16", "dgc:rate=0.01"])
        handle = lgc.attach(ddp_model, scheme, optimizer)

    It measures steps of a copy of the model without and with dense exchange, then rounds of the candidates with that
    copy's gradients, by all ranks over their real link. **Speed alone decides**: give only candidates that the model
    trains well with, the one that loses least first. A candidate keeps its momentum; the optimizer for `attach` must
    go with what is returned. A step of local steps has its part of a round, and their start is left out.

    The model, its gradients and buffers, and torch's random state are left as they were. Until it returns, it takes the
    memory of a second model with its gradients, DDP's buckets and SGD's momentum, of what the scheme in turn keeps, and
    for PowerSGD of a third one. What it sends is in no handle's counts.

    Args:
        model: a DistributedDataParallel model, or the module that will be made one; also under torch.compile. Its
            mode, `train()` or `eval()`, is that in which it is measured.
        make_loss: calls the model it is given, which is a copy, and returns the loss of one batch, a finite number;
            called at least twenty times. What else it changes, such as an iterator over data, stays changed.
        candidates: schemes, or their text forms, at least one; dense is always among them.
        link: decide as if the link were no faster than this; None is the link as it is.
        group: of a module's ranks, the default one unless given; a DDP model has its own.

    Returns:
        Dense where nothing is more than 5 % faster, else the first of the candidates, in their order, that takes no
        more than 5 % longer than the fastest; the same on every rank. Rank 0 logs why at level INFO, logger `lgc`.
        One rank alone has nothing to exchange, and gets dense.

    Raises:
        TypeError, ValueError: an argument of this rank is wrong, or this model cannot have a candidate.
        RankError: an argument of another rank is wrong.
        RuntimeError: the ranks differ in candidates, link or model; raised on every rank.
    """
    inner = uncompiled(model)
    group, device = _place_of(inner, group)
    transport = Transport(group, device)
    with transport.failing_together():
        schemes = _checked(candidates, link)
    parameters = {f"parameter {name}": [*p.shape, str(p.dtype)] for name, p in inner.named_parameters()}
    described = {"candidates": [str(scheme) for scheme in schemes], "link": repr(link)}
    require_agreement(transport, "choose", {**described, **parameters})
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        make_job = partial(_copied, model, make_loss, transport)
        profiler = Profiler(make_job, transport, transport.world_size, enough=BRIEF)
        for scheme in schemes:
            _require_possible(scheme, inner, profiler)
        best, reason = _fastest(schemes, profiler, link or Link(math.inf))
    if transport.rank == SERVER:
        if profiler.unsteady:
            logger.warning("choose: %s Do not trust the choice.", profiler.unsteady)
        logger.info("choose: %s. %s.", best, reason)
    return best


def _fastest(schemes: Sequence[Scheme], profiler: Profiler, link: Link) -> tuple[Scheme, str]:
    """Measure the schemes, and choose one or dense by what has been measured of all ranks; and why."""
    dense = predict(profiler.profile, link)[0]
    measured: list[Scheme] = [Dense()]
    given_up = []
    for scheme in schemes if dense.communication > TOLERANCE * dense.compute else ():
        if scheme == Dense():
            continue
        if profiler.add(scheme, early=False, limit=PATIENCE * dense.communication):
            measured.append(scheme)
        else:
            given_up.append(str(scheme))
    predictions = predict(profiler.profile, link)
    reason = f"A dense step takes {dense.step:.3g} s, {dense.communication:.3g} s of it for the exchange; "
    if len(predictions) == 1 and not given_up:
        reason += "no candidate can win that back"
    else:
        reason += "per step: " + ", ".join(f"{one.scheme} {one.step:.3g} s" for one in predictions)
    if given_up:
        reason += f"; slower at once, and given up: {', '.join(given_up)}"
    if remembering := [str(scheme) for scheme in measured if knows_past(scheme)]:
        reason += f"; counted as in a first round, after which its codes are shorter: {', '.join(remembering)}"
    return measured[predictions.index(as_fast(predictions)[0])], reason


def _place_of(model: nn.Module, group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, torch.device]:
    """Find the ranks that a model is trained by, and the device that it is on here."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"choose(model=...) must be a module, got {model!r}.")
    if isinstance(model, DistributedDataParallel):
        if group is not None:
            raise ValueError("choose(group=...) must be None with a DistributedDataParallel model, which has its own.")
        group = model.process_group
    if not isinstance(group, dist.ProcessGroup | None):
        raise TypeError(f"choose(group=...) must be a process group or None, got {group!r}.")
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("choose(group=...) must be a process group, got None and there is no default one.")
    devices = {parameter.device for parameter in model.parameters() if parameter.requires_grad}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no trained parameters"
        raise ValueError(f"choose(model=...) must have its trained parameters on one device, got {found}.")
    return group, devices.pop()


def _checked(candidates: Sequence[Scheme | str], link: Link | None) -> list[Scheme]:
    """Read the candidates as schemes."""
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
        raise ValueError(f"choose(candidates=...) must be a sequence of at least one scheme, got {candidates!r}.")
    if not isinstance(link, Link | None):
        raise TypeError(f'choose(link=...) must be None or a link, such as lgc.Link.parse("10mbit"), got {link!r}.')
    schemes = []
    for candidate in candidates:
        try:
            scheme = as_scheme(candidate)
        except ValueError as error:
            raise ValueError(f"choose(candidates=...): {error}") from None
        if not isinstance(scheme, Scheme):
            raise TypeError(f"choose(candidates=...) must be schemes, or their text forms, got {candidate!r}.")
        require_rounds_by_count(scheme, "choose(candidates=...)")
        schemes.append(scheme)
    return schemes


def _require_possible(scheme: Scheme, model: nn.Module, profiler: Profiler) -> None:
    """Raise ValueError, alike on every rank, if `attach` would refuse this scheme for this model."""
    try:
        require_real(profiler.ddp, scheme)
        if isinstance(scheme, LocalSteps):
            require_independent(model)
            fragmented(dict(trained(profiler.ddp)), scheme.fragments)
        exchange = scheme.exchange if isinstance(scheme, LocalSteps) else scheme
        if isinstance(exchange, RoundScheme):
            exchange.layout(trained(profiler.ddp))
    except ValueError as error:
        raise ValueError(f"choose(candidates=...): {error}") from None
    dtypes = {bucket.dtype for bucket in profiler.buckets}
    buckets = len(profiler.buckets if isinstance(model, DistributedDataParallel) else dtypes)
    if isinstance(scheme, PowerSGD) and profiler.local.device.type == "cpu" and buckets > 1:
        raise ValueError(
            f"choose(candidates=...): on gloo {scheme} needs a model with one bucket: in one dtype, and built as "
            "DistributedDataParallel(model, bucket_cap_mb=lgc.schemes.powersgd.one_bucket_mb(model))."
        )


def _copied(
    model: nn.Module, make_loss: Callable[[nn.Module], Tensor], transport: Transport, bucket_cap_mb: int | None
) -> Job:
    """Make a job of a copy of the model, in DDP as the model is, or will be by default; a collective."""
    inner = uncompiled(model)
    arguments, module = {}, inner
    if isinstance(inner, DistributedDataParallel):
        module = inner.module
        arguments = {
            "device_ids": inner.device_ids,
            "bucket_cap_mb": None if inner.bucket_bytes_cap_default else inner.bucket_bytes_cap / 2**20,
            "find_unused_parameters": inner.find_unused_parameters or inner.static_graph,
            "gradient_as_bucket_view": inner.gradient_as_bucket_view,
        }
    if bucket_cap_mb is not None:
        arguments["bucket_cap_mb"] = bucket_cap_mb
    with transport.failing_together():
        copied = copy.deepcopy(module)
    ddp = wrap(copied, transport.group, **arguments)
    called = ddp if inner is model else copy.deepcopy(model, {id(inner): ddp})  # torch.compile's wrapper, of the copy
    with transport.failing_together():
        _require_gradients(ddp, make_loss)
    return Job(ddp, lambda: make_loss(called), partial(stand_in, ddp))


def _require_gradients(ddp: DistributedDataParallel, make_loss: Callable[[nn.Module], Tensor]) -> None:
    """Raise unless the loss of this rank is a finite number with a finite gradient of every parameter."""
    calls: list[nn.Module] = []
    noting = ddp.register_forward_pre_hook(lambda module, _: calls.append(module))
    with ddp.no_sync():
        if not callable(make_loss):
            raise TypeError(f"choose(make_loss=...) must be a function of the model, got {type(make_loss).__name__}.")
        loss = make_loss(ddp)
        if not calls:
            raise ValueError("choose(make_loss=...) must call the model that it is given, not another one.")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"choose(make_loss=...) must return a tensor of one number, with a gradient, got {loss!r}; call choose "
                "where gradients are enabled, as the training step is."
            )
        if not bool(loss.isfinite()):
            raise ValueError(f"choose(make_loss=...) must return a finite loss, got {loss.item()}.")
        torch.autograd.backward(loss)
    noting.remove()
    for name, parameter in ddp.module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise ValueError(f"choose(make_loss=...) must have a finite gradient, that of {name!r} is not.")
        expected = parameter.requires_grad and not ddp.find_unused_parameters and name not in ddp.parameters_to_ignore
        if parameter.grad is None and expected:
            raise ValueError(
                f"choose(make_loss=...) must give every trained parameter a gradient, {name!r} has none; if that "
                "is meant, build the model as DistributedDataParallel(model, find_unused_parameters=True)."
            )
    ddp.zero_grad()
