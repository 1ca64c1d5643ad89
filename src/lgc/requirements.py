"""Requirements of a model, an optimizer and a scheme that are attached."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgc.caller import Detached
from lgc.comm.transport import LEAST_TIMEOUT, MOST_TIMEOUT, Transport
from lgc.hook import Hook
from lgc.moments import has_first_moments, has_second_moments
from lgc.optimizers import parameters_of
from lgc.schemes import Dense, LocalSteps, RoundScheme, Scheme, Seconds, require_rounds_by_count
from lgc.sites import Site, is_sharded
from lgc.version import __version__

# What Adam, RMSprop, Adadelta, Adagrad, Rprop, torch's and transformers' Adafactor have in their groups.
ADAPTIVE = {"betas", "alpha", "rho", "lr_decay", "etas", "beta2_decay", "decay_rate"}

DDP_SETTLES = 2  # the step in which it makes its buckets anew, in an order that rank 0 tells the others

SHARDS = (
    "lgc takes torch.nn.parallel.DistributedDataParallel or, with LocalSteps between sites and "
    "fully_shard(model, mesh=mesh['shard']) inside each, lgc.attach(..., between=mesh['site']): see docs/sites.md."
)

_in_buckets: weakref.WeakKeyDictionary[DistributedDataParallel, set[int]] = weakref.WeakKeyDictionary()


def as_optimizers(optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers given to `attach`, none, one or several; raises TypeError for anything else."""
    given = () if optimizer is None else tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in given:
        if not isinstance(each, torch.optim.Optimizer):
            kind = type(each).__name__
            raise TypeError(
                f"attach(optimizer=...) must be an optimizer, a list of them, or None, got {kind}; of a wrapper that "
                "is no torch.optim.Optimizer, give the optimizer inside."
            )
    return tuple(dict.fromkeys(given))


def require_types(scheme: object, grad_scaler: object, timeout: float | None) -> None:
    """Raise TypeError or ValueError if an argument of `attach` is not what it must be."""
    if not isinstance(scheme, Scheme):
        raise TypeError(f"attach(scheme=...) must be a scheme, such as lgc.DGC(), or its text form, got {scheme!r}.")
    if not isinstance(grad_scaler, torch.amp.GradScaler | None):
        raise TypeError(f"attach(grad_scaler=...) must be a GradScaler or None, got {grad_scaler!r}.")
    if timeout is not None:
        require_seconds(timeout=timeout)


def require_seconds(**given: float) -> None:
    """Raise ValueError if one of these arguments of `attach` is no time that can be waited for."""
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and LEAST_TIMEOUT <= value <= MOST_TIMEOUT):
            raise ValueError(f"attach({name}=...) must be {LEAST_TIMEOUT} to {MOST_TIMEOUT:g} seconds, got {value!r}.")


def is_collected(scheme: Scheme) -> TypeGuard[RoundScheme]:
    """Whether DDP's buckets are collected into one round; those of dense are reduced one by one, as DDP does."""
    return isinstance(scheme, RoundScheme) and not isinstance(scheme, Dense)


def require_ddp(model: nn.Module) -> DistributedDataParallel:
    """The DDP model, out of torch.compile's wrapper; raises TypeError if there is none."""
    model = require_module(model)
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"attach(model=...) must be a DistributedDataParallel model, got {type(model).__name__}; wrap it first: "
            "model = torch.nn.parallel.DistributedDataParallel(model), or take what a framework has wrapped and "
            "trains: trainer.model_wrapped, trainer.strategy.model, or what accelerator.prepare returned. Only "
            "LocalSteps takes other modules."
        )
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model, out of torch.compile's wrapper if it is in one."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def require_module(model: nn.Module, *, shards: bool = False) -> nn.Module:
    """The model, out of torch.compile's wrapper; raises TypeError if it is none, or sharded, or spread over devices.

    Args:
        model: as given to `attach`.
        shards: whether one after `fully_shard` will do.
    """
    model = uncompiled(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and loaded if the model is of it
    if fsdp is not None and isinstance(model, fsdp.FullyShardedDataParallel):
        raise TypeError(
            f"attach(model=...) is in FullyShardedDataParallel (FSDP), whose shards have no parameters' names; {SHARDS}"
        )
    if not shards and isinstance(model, nn.Module) and any(map(is_sharded, model.parameters())):
        raise TypeError(f"attach(model=...) is sharded (FSDP), and a rank then never has the whole gradient; {SHARDS}")
    if any(kind.__module__ == "torch.distributed._composable.replicate" for kind in type(model).__mro__):
        raise TypeError(
            "attach(model=...) is of replicate(), which keeps its DDP to itself; make it "
            "torch.nn.parallel.DistributedDataParallel(model) instead."
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "attach(model=...) is in DataParallel, which has one process for all devices; start a process for each, "
            "with torchrun, and use torch.nn.parallel.DistributedDataParallel."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach(model=...) must be a module, in DistributedDataParallel, got {type(model).__name__}.")
    return model


def announcing(model: nn.Module) -> AbstractContextManager[None]:
    """Leave an error of this rank where others of its process group, if it has one, find it."""
    has_group = isinstance(model, DistributedDataParallel) or dist.group.WORLD is not None
    return Transport(group_of(model)).announcing() if has_group else contextlib.nullcontext()


def group_of(model: nn.Module) -> dist.ProcessGroup:
    """The process group of a DDP model, else the default one; raises RuntimeError if there is none."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    if dist.group.WORLD is None:
        raise RuntimeError("attach: there is no process group; call torch.distributed.init_process_group() before.")
    return dist.group.WORLD


def require_exchangeable(model: nn.Module, *, between: dist.ProcessGroup | None) -> None:
    """Raise if DDP is set to something, or the model has something, that lgc cannot do.

    Args:
        model: in DDP or not.
        between: the group that joins sites, inside of which DDP may do as it is told.
    """
    if isinstance(model, DistributedDataParallel):
        of_others = [
            each for _, each in model._comm_hooks if not isinstance(each, Detached | Hook)
        ]  # a copy has Detached
        if (of_others and between is None) or model.mixed_precision is not None:
            raise RuntimeError(
                "attach: this model already has a communication hook (register_comm_hook or mixed_precision=), and DDP "
                "allows one; make DDP anew without it, and use autocast for mixed precision."
            )
        require_exchanged(model)
        frozen = [name for name, parameter in trained(model) if not parameter.requires_grad]
        if frozen and not model.find_unused_parameters:
            raise ValueError(
                f"attach(model=...) has {frozen[0]} frozen since DistributedDataParallel was made, which waits for its "
                f"gradient (parameters like it: {len(frozen)}); make DDP after freezing, or, if it will be trained "
                "again, with find_unused_parameters=True."
            )
    devices = {parameter.device for _, parameter in trained(model)}
    if not devices:
        raise ValueError("attach(model=...) has no parameter that requires gradients; attach before freezing.")
    if len(devices) > 1:
        raise ValueError("attach(model=...) must have its trained parameters on one device; move them before DDP.")
    shapeless = [name for name, each in model.named_parameters() if nn.parameter.is_lazy(each) or each.is_meta]
    if shapeless:
        raise ValueError(
            f"attach(model=...) has {shapeless[0]} without values yet; call a lazy module once, and give one on the "
            "meta device its weights, before attach and before the optimizer is made."
        )
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse for module in model.modules()):
        raise ValueError("attach(model=...) has an embedding with sparse=True; make it with sparse=False.")


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, by name; of a DDP model, those that did when DDP was made."""
    if not isinstance(model, DistributedDataParallel):
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    exchanged = _exchanged(model)
    return [(name, each) for name, each in model.module.named_parameters() if id(each) in exchanged]


def _exchanged(model: DistributedDataParallel) -> set[int]:
    """The ids of the parameters that DDP exchanges, which it keeps."""
    if model not in _in_buckets:
        buckets = model.reducer._get_zeros_like_grad_buckets()
        _in_buckets[model] = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    return _in_buckets[model]


def left_out(model: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """The parameters that DDP does not exchange, and was not told to ignore, by name: frozen, or new in the model."""
    exchanged = _exchanged(model)
    # To be ignored, a parameter of the root module must have been named with a dot before.
    return {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if id(parameter) not in exchanged and (name if "." in name else f".{name}") not in model.parameters_to_ignore
    }


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not exchanged, which all ranks have alike: by name, but for those of a type of their own,
    as quantised ones are."""
    if isinstance(model, DistributedDataParallel):
        parameters = left_out(model)
    else:
        parameters = {name: each for name, each in model.named_parameters() if not each.requires_grad}
    return {f"frozen {name}": each for name, each in parameters.items() if type(each.data) is Tensor}


def require_exchanged(model: DistributedDataParallel) -> None:
    """Raise RuntimeError if a parameter that DDP has left out is trained now."""
    names = [name for name, parameter in left_out(model).items() if parameter.requires_grad]
    if names:
        raise RuntimeError(
            f"lgc: {names[0]} is trained now and was frozen, or not in the model, when DistributedDataParallel was "
            f"made, which does not exchange its gradient (parameters like it: {len(names)}). Make DDP, and attach, "
            "while all that will ever be trained requires gradients, with find_unused_parameters=True, and freeze "
            "after. To replace parameters, call handle.detach() before, and make DDP and the optimizer, and attach, "
            "anew after."
        )


def require_real(model: nn.Module, scheme: Scheme) -> None:
    """Raise ValueError for complex parameters under a scheme that flattens gradients to float32."""
    complex_ones = [name for name, parameter in trained(model) if parameter.is_complex()]
    if complex_ones and (is_collected(scheme) or isinstance(scheme, LocalSteps)):
        raise ValueError(
            f"attach(model=...) has complex parameters ({', '.join(complex_ones)}), of which {scheme.name} would see "
            "one half; only dense, bf16, fp16 and powersgd take them."
        )


def require_optimizers_of(parameters: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError if an optimizer is of another model."""
    for optimizer in optimizers:
        if parameters_of(optimizer).isdisjoint(map(id, parameters.values())):
            raise ValueError(
                "attach(optimizer=...) has none of the model's parameters; make it from this model's parameters(), "
                "after the model is on its device."
            )


def require_sites(between: object, scheme: Scheme, on_difference: str) -> None:
    """Raise ValueError if there are to be sites, and something that is not done between them."""
    if between is None:
        return
    require_rounds_by_count(scheme, "attach(between=...)")
    if not isinstance(scheme, LocalSteps):
        raise ValueError(
            f"attach(between=...) is for local steps between sites, and {scheme.name} exchanges every step; use "
            "lgc.LocalSteps(), or leave between out, with the model in DistributedDataParallel over all."
        )
    if on_difference != "raise":
        raise ValueError(
            f"attach(on_difference={on_difference!r}) would set this rank's part of the weights, and not what "
            "the others of its site have of it; with between= leave it out, and go on from a checkpoint."
        )


def require_local_steps(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    grad_scaler: object,
    scheme: LocalSteps,
    buffers_every: int | None,
    *,
    site: Site,
) -> None:
    """Raise if there is something that local steps cannot do."""
    if buffers_every is not None:
        raise ValueError(
            "attach(buffers_every=...) is for schemes that exchange every step; LocalSteps bring buffers together at "
            "every round, so leave it out."
        )
    if not optimizers:
        raise ValueError("attach(optimizer=...) must be the model's under LocalSteps, which count its steps, got None.")
    for optimizer in optimizers:
        require_own_updates(optimizer, scheme)
    require_independent(model, None if site.inside is None else site.inside.group)
    start_steps = scheme.start_steps
    if isinstance(scheme.every, Seconds) and isinstance(model, DistributedDataParallel) and start_steps < DDP_SETTLES:
        raise ValueError(
            f"attach(model=...) is in DistributedDataParallel, which communicates in step {DDP_SETTLES}, when "
            f"ranks may have opened a round; with every={scheme.every} use start_steps={DDP_SETTLES} or more, or give "
            "attach the module without DDP, model.module, which under LocalSteps needs none."
        )
    if not isinstance(model, DistributedDataParallel) or site.inside is not None:
        if start_steps:
            require_one_in_start(optimizers)
        if start_steps and isinstance(grad_scaler, torch.amp.GradScaler) and grad_scaler.is_enabled():
            raise ValueError(
                "attach(grad_scaler=...) decides on each rank alone whether a step is made, while the start of local "
                "steps exchanges gradients; use LocalSteps(start_steps=0), or wrap the model in "
                "DistributedDataParallel."
            )


def require_one_in_start(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError if several optimizers are to make the start of local steps of a module without DDP."""
    if len(optimizers) > 1:
        raise ValueError(
            f"attach(optimizer=...) has {len(optimizers)} optimizers, and the start of local steps exchanges a "
            "module's gradients before the first of them steps, when those for the next may not be there; use "
            "LocalSteps(start_steps=0), or wrap the model in DistributedDataParallel."
        )


def require_own_updates(optimizer: torch.optim.Optimizer, scheme: LocalSteps) -> None:
    """Raise ValueError if an optimizer communicates at every step, or counts on nobody else's moving the weights.

    And if it has not the moments that local steps are to correct.
    """
    for name, has, which in (
        ("first_moments", has_first_moments, "torch.optim.SGD with momentum, and Adam and AdamW without amsgrad"),
        ("second_moments", has_second_moments, "torch.optim.Adam and AdamW without amsgrad"),
    ):
        if getattr(scheme, name) not in ("own", 0) and not has(optimizer):
            settings = [each for each in ("momentum", "amsgrad") if each in optimizer.defaults]
            given = [f"{each}={max(group[each] for group in optimizer.param_groups)}" for each in settings]
            kind = f"{type(optimizer).__name__}({', '.join(given)})"
            raise ValueError(
                f'LocalSteps({name}=...) is for {which}, got {kind}; use {name}="own", which is for any optimizer.'
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "attach(optimizer=...) is an LBFGS, which takes what rounds move the weights by for a step of its own, and "
            "its idea of the curvature is wrong from then on; under LocalSteps use another optimizer, such as "
            "torch.optim.AdamW, or a scheme that exchanges every gradient."
        )
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "attach(optimizer=...) is a ZeroRedundancyOptimizer, which sends every rank's updates to the others at "
            "every step; under LocalSteps every rank needs an optimizer of its own, such as torch.optim.AdamW."
        )


def take_buffers(model: nn.Module, scheme: Scheme, every: int | None) -> None:
    """Switch DDP's broadcast of buffers off where rounds bring them together: the local ones, or every so many."""
    local = isinstance(scheme, LocalSteps)
    if not isinstance(model, DistributedDataParallel) or not (local or every):
        return
    if local and model.broadcast_buffers and any(True for _ in model.module.buffers()):
        logging.getLogger("lgc").info("DDP's broadcast_buffers is off: buffers are brought together at every round.")
    model.broadcast_buffers = False


def require_independent(model: nn.Module, inside: dist.ProcessGroup | None = None) -> None:
    """Raise ValueError if the model communicates at every step by itself, but with the ranks of its site, if any."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    wrapped = [name for name, each in module.named_modules() if isinstance(each, DistributedDataParallel)]
    if wrapped:
        raise ValueError(
            f"attach(model=...) has DistributedDataParallel inside ({wrapped[0]}), which communicates at every step; "
            "under LocalSteps give attach the modules without it."
        )
    synchronised = [
        name
        for name, each in model.named_modules()
        if isinstance(each, nn.SyncBatchNorm) and (inside is None or each.process_group is not inside)
    ]
    if synchronised:
        raise ValueError(
            f"attach(model=...) has SyncBatchNorm ({synchronised[0]}), which communicates at every step; under "
            "LocalSteps use BatchNorm, whose statistics are averaged at every round, or inside a site give it the "
            "site's process_group."
        )
    if inside is None and isinstance(model, DistributedDataParallel) and model.find_unused_parameters:
        raise ValueError(
            "attach(model=...) has find_unused_parameters=True, for which DDP communicates at every step; give attach "
            "the module without DDP, model.module, which under LocalSteps needs none."
        )


def require_single_momentum(scheme: Scheme, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if both have a momentum, or both make Adam's step."""
    if not (scheme.corrected_momentum or scheme.makes_adams_step):
        return
    name, optimizer_name = type(scheme).__name__, type(optimizer).__name__
    for group in optimizer.param_groups:
        own = group.get("momentum", 0) or (group["betas"][0] if "betas" in group else 0)
        if scheme.makes_adams_step and (own or ADAPTIVE & set(group)):
            second_moment = scheme.arguments()["second_moment"]
            raise ValueError(
                f"{name}(second_moment={second_moment}) makes Adam's step before sending, and the {optimizer_name} "
                "would make another one of it. Train with SGD without momentum, with Adam's learning rate, or give the "
                "scheme second_moment=0 and momentum=0."
            )
        if own:
            raise ValueError(
                f"{name}(momentum={scheme.corrected_momentum}) corrects the momentum before sending, and the "
                f"{optimizer_name} has one of its own ({own}): it would act twice. Give the optimizer none "
                "(SGD: momentum=0, weight_decay divided by 1 - momentum; also after load_state_dict, and under a "
                "scheduler that cycles it), or the scheme momentum=0 (Adam)."
            )


def advise(
    model: nn.Module,
    scheme: Scheme,
    optimizers: Sequence[torch.optim.Optimizer],
    ranks: int,
    *,
    others: Iterable[nn.Module],
) -> None:
    """Warn of what is allowed and seldom meant: buffers broadcast at every step, a weight decay as beside momentum.

    Args:
        model, scheme, optimizers: as given to `attach`.
        ranks: number of those that train this model together.
        others: models that have a scheme.
    """
    if (
        isinstance(model, DistributedDataParallel)
        and model.broadcast_buffers
        and not isinstance(scheme, Dense | LocalSteps)
        and (advice := _advice_on_buffers(model.module))
    ):
        warnings.warn(advice, stacklevel=4)
    local = isinstance(scheme, LocalSteps)
    if local and ranks < dist.get_world_size():
        logging.getLogger("lgc.advice").warning(
            "%d of the %d ranks take local steps together, and the others without them. Where these are sites of one "
            "run, join them by between=, with DDP or fully_shard inside each (docs/sites.md); where they are runs of "
            "their own there is nothing to do.",
            ranks,
            dist.get_world_size(),
        )
    if local:
        known = {id(parameter) for each in (model, *others) for parameter in each.parameters()}
        if foreign := len(parameters_of(*optimizers) - known):
            logging.getLogger("lgc.advice").warning(
                "the optimizer given to attach also has %d tensors that are not in this model, such as those of a loss "
                "that learns, which no round exchanges: every rank trains its own. Attach to a module that has them "
                "too, torch.nn.ModuleList([model, loss]).",
                foreign,
            )
    if (is_collected(scheme) or local) and optimizers:
        optimized = parameters_of(*optimizers)
        lacking = [name for name, each in trained(model) if each.requires_grad and id(each) not in optimized]
        if lacking:
            logging.getLogger("lgc.advice").warning(
                "the optimizer given to attach does not have %s (trained parameters that it lacks: %d); %s",
                lacking[0],
                len(lacking),
                "rounds exchange them too, but count the steps of this optimizer alone, so what optimizes them must "
                "step after it, and as often."
                if local
                else "their gradients are zeroed before every backward pass, so what optimizes them must step after "
                "each, without a momentum on top of the scheme's.",
            )
    if scheme.corrected_momentum:
        decay = max((group.get("weight_decay", 0) for each in optimizers for group in each.param_groups), default=0)
        if decay:
            logging.getLogger("lgc.advice").warning(
                "weight_decay=%g under %s, which has the momentum, does what weight_decay=%.3g does beside momentum=%g "
                "in the optimizer; where that is what you meant there is nothing to do.",
                decay,
                scheme.name,
                decay * (1 - scheme.corrected_momentum),
                scheme.corrected_momentum,
            )


def _advice_on_buffers(model: nn.Module) -> str:
    """What to do about DDP's broadcast, by the kinds of buffers that there are; nothing if there is none."""
    statistics: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        of_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        named = [f"{name}.{each}" if name else each for each, _ in module.named_buffers(recurse=False)]
        (statistics if of_norm else others).extend(named)
    if not statistics and not others:
        return ""
    first = ", ".join([*others[:2], *statistics[:1]])
    advice = (
        f"DDP broadcasts rank 0's buffers ({first}: {len(statistics) + len(others)} in all) at every forward pass, "
        "outside lgc and not counted, which may be more bytes than the gradients. attach(buffers_every=100) switches "
        "that off and brings them together at that interval, counted."
    )
    if statistics:
        advice += (
            " Batch norm's statistics can also wait until evaluation: ddp_model.broadcast_buffers = False before "
            "attach, and a broadcast of them before evaluation and checkpoints."
        )
    if others:
        advice += (
            f" If the forward pass changes {others[0]}, as it does a codebook that is kept as a moving average, do not "
            "only switch the broadcast off: every rank would then have one of its own."
        )
    return advice


def describe(model: nn.Module, scheme: Scheme, given: Mapping[str, object], world_size: int) -> dict[str, object]:
    """Describe everything that must be the same on all ranks, as flat JSON."""
    arguments = {f"{scheme.name}.{name}": text for name, text in scheme.arguments().items()}
    shapes = {f"parameter {name}": [*tensor.shape, str(tensor.dtype)] for name, tensor in trained(model)}
    versions = {"lgc version": __version__, "torch version": torch.__version__}
    return {**versions, "world size": world_size, "scheme": scheme.name, **arguments, **given, **shapes}
