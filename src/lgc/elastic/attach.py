"""Attach local steps to a model, on ranks that come and go."""

from __future__ import annotations

import re
import socket
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lgc.attach import Handle, attached, require_attachable
from lgc.elastic.lighthouse import Lighthouse
from lgc.elastic.rounds import ElasticRounds, Stateful
from lgc.elastic.transport import ElasticTransport
from lgc.requirements import (
    as_optimizers,
    describe,
    frozen,
    require_module,
    require_seconds,
    require_types,
)
from lgc.schemes import LocalSteps, Quantized, Scheme, TopK, as_scheme
from lgc.sites import Site


@torch.inference_mode(mode=False)
def attach(
    model: nn.Module,
    scheme: LocalSteps | str,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    lighthouse: str,
    ranks: int,
    min_ranks: int | None = None,
    may_split: bool = False,
    carried: Mapping[str, Stateful] | None = None,
    name: str | None = None,
    address: str = "127.0.0.1",
    port: int = 0,
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: float = 60.0,
    connect_timeout: float = 10.0,
    quorum_timeout: float = 300.0,
    heartbeat_every: float = 0.1,
    attempts: int = 10,
) -> ElasticHandle:
    """Exchange what this model moves by local steps with the ranks that are there, which may come and go.

        handle = lgc.elastic.attach(
            model, lgc.LocalSteps(every=20, start_steps=0), optimizer, lighthouse="10.0.0.1:29510", ranks=4
        )

    Not a collective: the ranks meet after their first step. Those that come later, or are not where most are, then
    have the others' state. See docs/elastic.md.

    Args:
        model: a plain module, in no DistributedDataParallel.
        scheme: local steps of `Quantized` or `TopK` that are gathered, or the text form.
        optimizer: the model's, whose steps are counted; a list if there are several, which must step equally often.
        lighthouse: where torchft's lighthouse is, as host:port.
        ranks: how many there are when all are there.
        min_ranks: fewer make no round, and wait; None is more than half of `ranks`.
        may_split: allows fewer than that: two groups that do not see each other may then train apart, and what the
            smaller one has trained is lost when they meet again.
        carried: what else a newcomer must have like all others, by name, such as the learning-rate schedule and the
            `lgc.elastic.Sampler`.
        name: of this rank in messages of the lighthouse; None is that of the machine.
        address: of this machine, on which the other ranks reach it, and on which alone this process listens.
        port: of this rank's store; 0 is any that is free.
        grad_scaler: the one that scales the loss, whose skipped steps count too.
        timeout: seconds in which each rank must take part in a collective, and a newcomer must have the state.
        connect_timeout: seconds for one connection to the lighthouse or to the other ranks.
        quorum_timeout: seconds in which the ranks must meet for a round.
        heartbeat_every: seconds between two signs of life.
        attempts: at one round, before a rank gives up; half as many for a newcomer.

    Raises:
        TypeError, ValueError: a wrong argument, or something that is not done on ranks that come and go.
    """
    method = as_scheme(scheme)
    model = require_module(model)
    require_types(method, grad_scaler, timeout)
    method = _gathered(method)
    optimizers = as_optimizers(optimizer)
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "attach(model=...) is in DistributedDataParallel, whose ranks cannot come and go; give it the module "
            "inside, model.module, or train with a fixed number of ranks by lgc.attach."
        )
    require_attachable(model, method, optimizers, grad_scaler, site=Site())
    least = _majority(ranks, min_ranks, may_split)
    require_seconds(
        timeout=timeout, connect_timeout=connect_timeout, quorum_timeout=quorum_timeout, heartbeat_every=heartbeat_every
    )
    if type(attempts) is not int or attempts < 1:
        raise ValueError(f"attach(attempts=...) must be an integer of at least 1, got {attempts!r}.")
    carried = _carried(carried)
    if not re.fullmatch(r"(https?://)?[^/:\s]+:\d+", lighthouse) and not re.fullmatch(r"\[[^]]+\]:\d+", lighthouse):
        raise ValueError(f"attach(lighthouse=...) must be host:port, such as 10.0.0.1:29510, got {lighthouse!r}.")
    if type(port) is not int or not 0 <= port < 2**16:
        raise ValueError(f"attach(port=...) must be an integer of 0 to {2**16 - 1}, got {port!r}.")
    described = [f"{name}: {type(each).__name__}" for name, each in sorted(carried.items())]
    given = {"optimizer": [type(each).__name__ for each in optimizers], "min_ranks": least, "carried": described}
    rest = frozen(model) | {f"buffer {name}": each for name, each in model.named_buffers()}
    forms = {name: [*each.shape, str(each.dtype)] for name, each in rest.items()}
    waiting = Lighthouse(
        lighthouse,
        name or socket.gethostname(),
        least,
        heartbeat_every=heartbeat_every,
        connect_timeout=connect_timeout,
        quorum_timeout=quorum_timeout,
    )
    transport = ElasticTransport(
        waiting,
        describe(model, method, given, ranks) | forms,
        address,
        port,
        timeout=timeout,
        connect_timeout=connect_timeout,
    )
    caller = ElasticRounds(model, method, transport, optimizers, grad_scaler, carried, attempts)
    attached[model] = weakref.ref(caller), method
    return ElasticHandle(method, Site(), transport, caller, model, broadcasts_buffers=False)


class ElasticHandle(Handle):
    """Local steps on ranks that come and go: `lgc.Handle`, where no call but `finish` and `detach` waits for others.

    Attributes:
        transport: with the byte counts of this rank.
    """

    transport: ElasticTransport
    _caller: ElasticRounds

    @property
    def rounds(self) -> int:
        """Number of rounds that the run has made, also those before this rank came."""
        return self._caller.rounds

    @property
    def rank(self) -> int:
        """Number of this rank among those of the last round."""
        return self.transport.rank

    @property
    def ranks(self) -> list[str]:
        """Names of the ranks of the last round, in order."""
        return [each.name for each in self.transport.ranks]

    @torch.inference_mode(mode=False)
    def finish(self) -> None:
        """Make a last round, and see that every rank that is there has its result; for the end of a run.

        A rank that calls it while others go on makes their rounds with them, and adds nothing, until they call it too.
        If the others have left before this rank could see that they have it too, a warning says so.

        Raises:
            RankError: the round cannot be made.
        """
        self._caller.finish()

    def leave(self) -> None:
        """Take no part any longer: the others go on without what this rank has moved since the last round."""
        self.transport.leave()

    @torch.inference_mode(mode=False)
    def detach(self) -> None:
        """Make a last round, as `finish`, take no part any longer, and leave the model to itself."""
        self._require_attached("detach()")
        self._end()
        self.leave()

    def wire_summary(self, *, of_all: bool = False) -> dict[str, object]:
        """Bytes of this rank; what others have sent is not known, as some of them are gone."""
        if of_all:
            raise ValueError("wire_summary(of_all=...) must be False on ranks that come and go, got True.")
        return super().wire_summary(of_all=False)

    def require_whole(self) -> None:
        raise ValueError(
            "lgc.checkpoint.distributed_state is a collective of a fixed number of ranks; where they come and go, each "
            "saves handle.state_dict() for itself."
        )

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """This rank's state, as `lgc.Handle.state_dict`, for a rank of any number."""
        return super().state_dict(whole=whole) | {"rank": 0, "world_size": 1}


def _gathered(scheme: Scheme) -> LocalSteps:
    """The scheme, with its exchange gathered; raises ValueError for what is not done on ranks that come and go."""
    if not isinstance(scheme, LocalSteps):
        raise ValueError(f"attach(scheme=...) must be LocalSteps on ranks that come and go, got {scheme}.")
    if not isinstance(scheme.every, int):
        raise ValueError(
            f"LocalSteps(every=...) must be a number of steps on ranks that come and go, got {scheme.every}: a round "
            "that is due by time is not tried again."
        )
    exchange = scheme.exchange
    if not isinstance(exchange, Quantized | TopK):
        kind = type(exchange).__name__
        why = "whose indices all ranks must have alike" if kind == "ScaleCom" else "which is not coded"
        raise ValueError(
            f"LocalSteps(exchange=...) must be Quantized or TopK on ranks that come and go, not {kind}, {why}."
        )
    if exchange.reduction == "two_stage":
        raise ValueError(
            f"{type(exchange).__name__}(reduction='two_stage') has each rank serve a part of the model, and keep what "
            "is owed of it, which is lost with the rank; on ranks that come and go use reduction='gather'."
        )
    if isinstance(exchange, TopK) and exchange.values.remembers:
        raise ValueError(
            f"TopK(values={exchange.values}) codes by what each rank has sent before, which a newcomer does not know; "
            "on ranks that come and go use lgc.Sign()."
        )
    refused = {
        "overlap": (False, "a round that is under way cannot be tried again"),
        "fragments": (1, "a newcomer takes all of a state"),
        "start_steps": (0, "every step of the start needs all ranks"),
        "ahead": (0, "what a rank owes is lost with it"),
        "first_moments": ("own", "a newcomer takes another rank's optimizer"),
        "second_moments": ("own", "the number of ranks may change"),
    }
    for name, (only, why) in refused.items():
        if (value := getattr(scheme, name)) != only:
            raise ValueError(
                f"LocalSteps({name}=...) must be {only!r} on ranks that come and go, as {why}, got {value!r}."
            )
    return replace(scheme, exchange=replace(exchange, reduction="gather"))


def _carried(carried: object) -> dict[str, Stateful]:
    """What is carried, by name; raises TypeError for anything else."""
    given = {} if carried is None else carried
    what = "a dict of names and of objects with state_dict() and load_state_dict()"
    if not isinstance(given, Mapping):
        raise TypeError(f"attach(carried=...) must be {what}, got {type(given).__name__}.")
    for name, each in given.items():
        if not (isinstance(name, str) and hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise TypeError(f"attach(carried=...) must be {what}, got {name!r}: {type(each).__name__}.")
    return dict(given)


def _majority(ranks: int, min_ranks: int | None, may_split: bool) -> int:
    for name, value in (("ranks", ranks), ("min_ranks", ranks if min_ranks is None else min_ranks)):
        if type(value) is not int or not 1 <= value <= ranks:
            bound = "an integer of at least 1" if name == "ranks" else f"an integer from 1 to ranks={ranks}"
            raise ValueError(f"attach({name}=...) must be {bound}, got {value!r}.")
    majority = ranks // 2 + 1
    if min_ranks is not None and min_ranks < majority and not may_split:
        raise ValueError(
            f"attach(min_ranks=...) must be at least {majority}, more than half of ranks={ranks}, got {min_ranks}: "
            "two groups that do not see each other would train apart, and what one of them has trained is lost when "
            "they meet again. Where that is what you want, may_split=True."
        )
    return majority if min_ranks is None else min_ranks
