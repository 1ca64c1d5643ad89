"""The schemes as users write them: names, arguments, bounds, and how each is put together."""

from __future__ import annotations

import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lgc.choice.cost import Link
from lgc.coding import (
    BFloat16,
    Float16,
    Float32,
    IndexCoder,
    RangeCoder,
    RawIndices,
    Rice,
    Sign,
    Uniform,
    ValueCodec,
)
from lgc.comm.transport import Transport
from lgc.lgc import LGCAggregator, Refresh, RingAggregator, ServerAggregator, Training
from lgc.rounds.aggregators import Aggregator, Codecs, OwnAggregator, OwnTopK, ServerTopK, SharedAggregator
from lgc.rounds.autoencoder import Optimizer, RingAutoencoder, RingLatent, ServerAutoencoder
from lgc.rounds.feedback import Feedback
from lgc.rounds.layout import Layout, Role, Unit, plan_layout
from lgc.rounds.schedule import Schedule
from lgc.rounds.selection import Region

FeedbackMode = Literal["reconstruction", "paper"]

INDEX_CODERS: dict[str, type[IndexCoder]] = {
    "raw": RawIndices,
    "rice": Rice,
    "range": RangeCoder,
}
VALUE_CODECS: dict[str, type[ValueCodec]] = {
    "float32": Float32,
    "float16": Float16,
    "bfloat16": BFloat16,
    "sign": Sign,
}


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """How gradients are exchanged. An immutable value: the same on every rank."""

    name: ClassVar[str]

    @property
    def corrected_momentum(self) -> float:
        """SGD's, which acts before the exchange, so that the optimizer must have none; 0 is none."""
        return 0.0

    @property
    def makes_adams_step(self) -> bool:
        """Whether it is made before the exchange, so that the optimizer must be SGD without momentum."""
        return False

    def arguments(self) -> dict[str, str]:
        """All arguments as text."""
        return {item.name: _text(getattr(self, item.name)) for item in fields(self)}

    def __str__(self) -> str:
        """The name and the arguments that are not at their default, in the form that `parse_scheme` reads.

        For roles, and the candidates of `auto`, it has no form; they are there to be read.
        """
        changed = [item.name for item in fields(self) if getattr(self, item.name) != _default(item)]
        return ":".join([self.name, *(f"{name}={text}" for name, text in self.arguments().items() if name in changed)])

    @classmethod
    def _adopt(cls, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that this scheme takes."""
        known = {item.name for item in fields(cls)}
        return {name: value for name, value in defaults.items() if name in known}


@dataclass(frozen=True, kw_only=True)
class Dense(Scheme):
    """Uncompressed: DDP's own all-reduce, bucket by bucket while the backward pass goes on."""

    name: ClassVar[str] = "dense"
    dtype: ClassVar[torch.dtype | None] = None  # of what is sent; None is the gradients' own


@dataclass(frozen=True, kw_only=True)
class FP16(Dense):
    """All-reduce in float16, as torch's `fp16_compress_hook`: cast, divided by K, summed, cast back; no residual."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype | None] = torch.float16


@dataclass(frozen=True, kw_only=True)
class BF16(Dense):
    """All-reduce in bfloat16, as torch's `bf16_compress_hook`, also where DDP refuses that: on builds without CUDA."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype | None] = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Scheme):
    """Low-rank factors of the larger weights by torch's own hook, with its error feedback and warm start.

    On gloo that hook hangs with more than one bucket, so build the model as `DistributedDataParallel(model,
    bucket_cap_mb=...)` with room for all gradients; else the first backward pass raises. The optimizer keeps its
    momentum. `state_dict()` has none of the hook's state: a resumed run starts again with `start_steps` uncompressed
    steps, an empty residual and new random factors. A NaN stays in the hook's residual for ever.
    Source: Vogels et al., NeurIPS 2019, arXiv 1905.13727.

    Args:
        rank: of the factors, at least 1.
        start_steps: uncompressed steps at the start, at least 2, which is when DDP's buckets are final.
    """

    name: ClassVar[str] = "powersgd"
    rank: int = 1
    start_steps: int = 10

    def __post_init__(self) -> None:
        _within(self, "rank", "at least 1", _integer(self, "rank") >= 1)
        _within(self, "start_steps", "at least 2", _integer(self, "start_steps") >= 2)


@dataclass(frozen=True, kw_only=True)
class SparseScheme(Scheme, ABC):
    """What every top-k scheme takes.

    Args:
        rate: fraction of each weight that is sent, in (0, 1].
        pooled_rate: the same for the pool of all small tensors; by default four times `rate`, at most 1.
        momentum: of the momentum correction, in [0, 1); 0 is error feedback alone. The optimizer must then
            have none of its own.
        second_moment: Adam's second beta, in [0, 1); 0 is SGD. Every rank then makes Adam's step (with `momentum` as
            the first beta) of its own gradient, and that is what is sent; the optimizer must be SGD without momentum,
            with the learning rate and weight decay of AdamW.
        clip_norm: clip the local gradient's norm to this times K^-1/2; None is off.
        low_pass: the residual takes this part of every change, in (0, 1]: with 0.1 what has accumulated leaves over
            some ten rounds. 1 is plain error feedback, with momentum factor masking.
        warmup_steps: steps of the rate warm-up.
        unit: elements that are selected together by their norm: 1, a number (a run of a row) or "kernel" (of a
            convolution); one index then pays for all of them. Weights that do not divide into units, and the pool,
            are selected by single elements.
        indices, values: how these become bytes; what a codec of values loses stays in the residual.
        small: role of the tensors with fewer than two dimensions.
        roles: role by parameter name; shell patterns, the last match counts.
    """

    rate: float = 1e-3
    pooled_rate: float | None = None
    momentum: float = 0.9
    second_moment: float = 0.0
    clip_norm: float | None = None
    low_pass: float = 0.1
    warmup_steps: int = 100
    unit: Unit = 1
    indices: IndexCoder = Rice()
    values: ValueCodec = Sign()
    small: Role = Role.OWN
    roles: Mapping[str, Role] = field(default_factory=dict)

    @classmethod
    def paper(cls, **arguments: Any) -> Self:
        """With raw codes and plain feedback, where not set otherwise: int32, float32, no filter of the residual."""
        return cls(**(cls._raw() | arguments))

    @classmethod
    def _raw(cls) -> dict[str, Any]:
        return {"indices": RawIndices(), "values": Float32(), "low_pass": 1.0}

    def __post_init__(self) -> None:
        _to_role(self, "small")
        if not isinstance(self.roles, Mapping):
            raise ValueError(f"{_class(self)}(roles=...) must map names to roles, got {self.roles!r}.")
        roles = {name: _role(self, f"roles[{name!r}]", role) for name, role in self.roles.items()}
        object.__setattr__(self, "roles", roles)
        _within(self, "rate", "in (0, 1]", 0 < _number(self, "rate") <= 1)
        if self.pooled_rate is not None:
            _within(self, "pooled_rate", "in (0, 1]", 0 < _number(self, "pooled_rate") <= 1)
        for name in ("momentum", "second_moment"):
            _within(self, name, "in [0, 1)", 0 <= _number(self, name) < 1)
        if self.clip_norm is not None:
            _within(self, "clip_norm", "positive", 0 < _number(self, "clip_norm") < float("inf"))
        _within(self, "low_pass", "in (0, 1]", 0 < _number(self, "low_pass") <= 1)
        _steps(self, "warmup_steps")
        unit = self.unit
        integral = isinstance(unit, int) and not isinstance(unit, bool)
        _within(
            self, "unit", 'an integer of at least 1, or "kernel"', unit == "kernel" or (integral and int(unit) >= 1)
        )
        _within(self, "indices", "an index coder, such as lgc.Rice()", isinstance(self.indices, IndexCoder))
        _within(self, "values", "a value codec, such as lgc.Sign()", isinstance(self.values, ValueCodec))

    @property
    def corrected_momentum(self) -> float:
        return 0.0 if self.makes_adams_step else self.momentum

    @property
    def makes_adams_step(self) -> bool:
        return self.second_moment > 0

    @abstractmethod
    def layout(self, parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        """Segments and roles for these parameters."""

    @abstractmethod
    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        """One rank's aggregator, with its state at the start."""

    def _layout(self, parameters: Iterable[tuple[str, Tensor]], *, first: Role, last: Role, other: Role) -> Layout:
        pooled_rate = min(1.0, 4 * self.rate) if self.pooled_rate is None else self.pooled_rate
        return plan_layout(
            parameters,
            rate=self.rate,
            pooled_rate=pooled_rate,
            unit=self.unit,
            first=first,
            last=last,
            small=self.small,
            other=other,
            overrides=self.roles,
        )

    def _codecs(self) -> Codecs:
        return Codecs(self.indices, self.values)

    def _feedback(
        self, layout: Layout, transport: Transport, device: torch.device, *, keep_loss: bool = True
    ) -> Feedback:
        return Feedback(
            layout.size,
            momentum=self.momentum,
            second_moment=self.second_moment,
            clip_norm=self.clip_norm,
            keep_loss=keep_loss,
            low_pass=self.low_pass,
            world_size=transport.world_size,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class TopK(SparseScheme):
    """Sparse gradient descent: each rank's own top-k with error feedback.

    Args:
        server: gather at rank 0, which selects again from the sum and keeps a residual of its own, so that
            traffic per rank does not grow with the number of ranks.
    """

    name: ClassVar[str] = "topk"
    momentum: float = 0.0
    warmup_steps: int = 0
    server: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _boolean(self, "server")
        used = {self.small, *self.roles.values()}
        if Role.SHARED in used:
            raise ValueError(f"{_class(self)} has no leader: roles must be dense or own, got shared.")

    def layout(self, parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._layout(parameters, first=Role.OWN, last=Role.OWN, other=Role.OWN)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        region, codecs = Region(layout.own), self._codecs()
        own = OwnTopK(transport, region, codecs)
        if self.server:
            own = ServerTopK(transport, region, codecs, layout.size, device)
        schedule = Schedule(self.rate, warmup_steps=self.warmup_steps)
        return OwnAggregator(layout, transport, schedule, self._feedback(layout, transport, device), own)


@dataclass(frozen=True, kw_only=True)
class DGC(TopK):
    """Deep Gradient Compression: own top-k with momentum correction, clipping and rate warm-up.

    With `low_pass=1` also momentum factor masking, as in its paper. Source: Lin et al., ICLR 2018, arXiv 1712.01887.
    """

    name: ClassVar[str] = "dgc"
    momentum: float = 0.9
    warmup_steps: int = 100


@dataclass(frozen=True, kw_only=True)
class ScaleCom(SparseScheme):
    """A rotating leader's indices for all ranks, values all-reduced.

    Source: Chen et al., NeurIPS 2020, arXiv 2104.11125, and with it the filter `low_pass`; here with momentum
    correction.
    """

    name: ClassVar[str] = "scalecom"
    small: Role = Role.SHARED

    def layout(self, parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._layout(parameters, first=Role.SHARED, last=Role.SHARED, other=Role.SHARED)

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> Aggregator:
        schedule = Schedule(self.rate, warmup_steps=self.warmup_steps)
        return SharedAggregator(layout, transport, schedule, self._feedback(layout, transport, device), self._codecs())


@dataclass(frozen=True, kw_only=True)
class LGCScheme(SparseScheme, ABC):
    """What both variants of Learned Gradient Compression take, in addition.

    Args:
        dense_steps, train_steps: lengths of these phases; the paper's are 200 and 300.
        feedback: "reconstruction" keeps what the autoencoder loses for later, "paper" drops it.
        first, last: roles of the first and the last weight.
        autoencoder_optimizer, autoencoder_lr: of the autoencoder's own training.
        autoencoder_updates: its optimizer's steps per step of phase train, at least 1, which is the paper's.
        refresh_every: train the autoencoder again after this many compressed steps; 0 is never.
        refresh_below: ... when the fraction of the values' energy that it explains falls below this fraction of
            what it was when frozen, or below zero; 0 is never, None is 0.5 with feedback="reconstruction", else 0.
        refresh_steps: length of such a repeated phase.
        seed: of the autoencoder's initial weights.
    """

    aggregator: ClassVar[type[LGCAggregator]]
    dense_steps: int = 200
    train_steps: int = 300
    feedback: FeedbackMode = "reconstruction"
    first: Role = Role.DENSE
    last: Role = Role.OWN
    autoencoder_optimizer: Optimizer = "adam"
    autoencoder_lr: float = 1e-3
    autoencoder_updates: int = 4
    refresh_every: int = 0
    refresh_below: float | None = None
    refresh_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _to_role(self, "first")
        _to_role(self, "last")
        for name in ("dense_steps", "train_steps", "refresh_every", "seed"):
            _steps(self, name)
        _one_of(self, "feedback", get_args(FeedbackMode))
        _one_of(self, "autoencoder_optimizer", get_args(Optimizer))
        _within(self, "autoencoder_lr", "positive", 0 < _number(self, "autoencoder_lr") < float("inf"))
        if self.refresh_below is not None:
            _within(self, "refresh_below", "in [0, 1)", 0 <= _number(self, "refresh_below") < 1)
        for name in ("autoencoder_updates", "refresh_steps"):
            _within(self, name, "at least 1", _integer(self, name) >= 1)

    def layout(self, parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        return self._layout(parameters, first=self.first, last=self.last, other=Role.SHARED)

    @classmethod
    def _raw(cls) -> dict[str, Any]:
        return super()._raw() | {"feedback": "paper", "autoencoder_updates": 1, "latent": Float32()}

    def build(self, layout: Layout, transport: Transport, *, device: torch.device) -> LGCAggregator:
        keeps_loss = self.feedback == "reconstruction"
        below = (0.5 if keeps_loss else 0.0) if self.refresh_below is None else self.refresh_below
        refresh = Refresh(self.refresh_every, below, self.refresh_steps)
        return self.aggregator(
            layout,
            transport,
            Schedule(
                self.rate,
                dense_steps=self.dense_steps,
                warmup_steps=self.warmup_steps,
                train_steps=self.train_steps,
            ),
            self._feedback(layout, transport, device, keep_loss=keeps_loss),
            self._autoencoder(transport.world_size, torch.Generator().manual_seed(self.seed)),
            self._codecs(),
            Training(self.autoencoder_optimizer, self.autoencoder_lr, self.autoencoder_updates, refresh),
        )

    @abstractmethod
    def _autoencoder(self, world_size: int, generator: torch.Generator) -> RingAutoencoder | ServerAutoencoder:
        """With its initial weights from the generator."""


@dataclass(frozen=True, kw_only=True)
class LGCRing(LGCScheme):
    """Learned Gradient Compression over ring all-reduce.

    Args:
        latent: `Uniform(bits=...)`, summed as integers, or `Float32()`.
    """

    name: ClassVar[str] = "lgc-ring"
    aggregator: ClassVar[type[LGCAggregator]] = RingAggregator
    latent: RingLatent = Uniform(bits=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        summable = isinstance(self.latent, Float32 | Uniform) and getattr(self.latent, "block", None) is None
        _within(self, "latent", "float32 or uniform without blocks, which can be summed", summable)

    def _autoencoder(self, world_size: int, generator: torch.Generator) -> RingAutoencoder:
        return RingAutoencoder(generator, self.latent)


@dataclass(frozen=True, kw_only=True)
class LGCServer(LGCScheme):
    """Learned Gradient Compression with a parameter server at rank 0.

    Args:
        innovation: fraction of the values at the leader's indices that every rank sends itself, in (0, 1].
        latent: how the leader's latent becomes bytes.
    """

    name: ClassVar[str] = "lgc-ps"
    aggregator: ClassVar[type[LGCAggregator]] = ServerAggregator
    innovation: float = 0.01
    latent: ValueCodec = Uniform(bits=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self, "latent", "a value codec", isinstance(self.latent, ValueCodec))
        _within(self, "innovation", "in (0, 1]", 0 < _number(self, "innovation") <= 1)

    def _autoencoder(self, world_size: int, generator: torch.Generator) -> ServerAutoencoder:
        return ServerAutoencoder(world_size, generator, self.latent, self.innovation)


@dataclass(frozen=True, kw_only=True)
class Auto(Scheme):
    """Dense at first, then what was fastest of dense and the candidates when they were tried on this model and link.

    The decision is for speed alone, and for the phase that a scheme stays in. No candidate has momentum of its own: the
    optimizer keeps it, whatever is chosen.

    Args:
        after: dense steps before the decision, at least 5.
        bandwidth, latency: of each rank's link, such as "100mbit" and "1ms", to decide as if it were no faster than
            that; None is as it is.
        candidates: to choose from, beside dense.
    """

    name: ClassVar[str] = "auto"
    after: int = 20
    bandwidth: str | None = None
    latency: str = "0ms"
    candidates: tuple[Scheme, ...] = field(
        default_factory=lambda: (
            BF16(),
            DGC(momentum=0.0),
            ScaleCom(momentum=0.0),
            LGCRing(momentum=0.0),
            LGCServer(momentum=0.0),
        )
    )

    def __post_init__(self) -> None:
        _within(self, "after", "at least 5", _integer(self, "after") >= 5)
        if self.bandwidth is None:
            _within(self, "latency", '"0ms" where there is no bandwidth', self.latency == "0ms")
        else:
            Link.parse(self.bandwidth, self.latency)
        if not isinstance(self.candidates, tuple | list):
            raise ValueError(f"Auto(candidates=...) must be a tuple of schemes, got {self.candidates!r}.")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            own = isinstance(candidate, Scheme) and (candidate.corrected_momentum or candidate.makes_adams_step)
            if not isinstance(candidate, Dense | SparseScheme) or own:
                raise ValueError(
                    "Auto(candidates=...) must be able to take over from dense: bf16, fp16, or a sparse scheme with "
                    f"momentum=0, since the optimizer keeps its own; got {candidate}."
                )

    @classmethod
    def _adopt(cls, defaults: Mapping[str, Any]) -> dict[str, Any]:
        return {"candidates": tuple(parse_scheme(str(candidate), defaults) for candidate in cls().candidates)}


SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme for scheme in (Dense, FP16, BF16, PowerSGD, TopK, DGC, ScaleCom, LGCRing, LGCServer, Auto)
}


def parse_scheme(text: str, defaults: Mapping[str, Any] | None = None) -> Scheme:
    """A scheme from `name[:paper][:argument=value]...`, for example `lgc-ring:rate=0.002:feedback=paper`.

    Args:
        text: the scheme's name, `paper` for the raw settings of its paper, and the arguments to set.
        defaults: values for arguments that the scheme takes and `text` does not set.

    Raises:
        ValueError: naming the unknown scheme or argument, or the bound and the value.
    """
    name, *settings = text.split(":")
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; there are {', '.join(SCHEMES)}.")
    scheme = SCHEMES[name]
    hints = get_type_hints(scheme)
    known = {item.name for item in fields(scheme)}
    arguments = scheme._adopt(defaults or {})
    if settings[:1] == ["paper"] and issubclass(scheme, SparseScheme):
        settings = settings[1:]
        arguments |= scheme._raw()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{name}: {setting!r} is not of the form argument=value.")
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(sorted(known)) or 'none'}.")
        arguments[key] = _parse(f"{name}:{key}", value, hints[key])
    return scheme(**arguments)


def require_different(texts: Sequence[str], schemes: Iterable[Scheme]) -> None:
    """Raise ValueError if two of these texts are the same scheme, once a recipe's defaults have completed them."""
    seen: dict[str, str] = {}
    for text, scheme in zip(texts, map(str, schemes), strict=True):
        if scheme in seen:
            raise ValueError(f"schemes must differ, and {seen[scheme]} and {text} are the same here.")
        seen[scheme] = text


def _parse(where: str, text: str, hint: Any) -> Any:
    origin = get_origin(hint)
    if hint in _PARSERS:
        return _PARSERS[hint](where, text)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if origin is Literal or hint is Role:
        return text  # the scheme checks it
    if hint is str:
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, got {text!r}.")
        return text.lower() == "true"
    if hint not in (int, float):
        raise ValueError(f"{where} cannot be set in text, only from Python.")
    try:
        return hint(text)
    except ValueError:
        kind = "an integer" if hint is int else "a number"
        raise ValueError(f"{where} must be {kind}, got {text!r}.") from None


def _parse_index_coder(where: str, text: str) -> IndexCoder:
    if text not in INDEX_CODERS:
        raise ValueError(f"{where} must be one of {', '.join(INDEX_CODERS)}, got {text!r}.")
    return INDEX_CODERS[text]()


def _parse_value_codec(where: str, text: str) -> ValueCodec:
    uniform = re.fullmatch(r"uniform(\d+)(?:x(\d+))?", text)
    if uniform:
        bits, block = uniform.groups()
        return Uniform(bits=int(bits), block=None if block is None else int(block))
    if text not in VALUE_CODECS:
        options = ", ".join(VALUE_CODECS)
        raise ValueError(f"{where} must be one of {options}, uniformBITS or uniformBITSxBLOCK, got {text!r}.")
    return VALUE_CODECS[text]()


def _parse_unit(where: str, text: str) -> Unit:
    if text != "kernel" and not text.isdecimal():
        raise ValueError(f'{where} must be a number of elements or "kernel", got {text!r}.')
    return int(text) if text.isdecimal() else "kernel"


_PARSERS: dict[Any, Callable[[str, str], Any]] = {
    IndexCoder: _parse_index_coder,
    ValueCodec: _parse_value_codec,
    RingLatent: _parse_value_codec,
    Unit: _parse_unit,
}


def _text(value: object) -> str:
    """As `parse_scheme` reads it."""
    if isinstance(value, Uniform):
        return f"uniform{value.bits}" + ("" if value.block is None else f"x{value.block}")
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    for name, codec in (INDEX_CODERS | VALUE_CODECS).items():
        if type(value) is codec:
            return name
    return str(value)


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _class(scheme: Scheme) -> str:
    return type(scheme).__name__


def _within(scheme: Scheme, name: str, bound: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{_class(scheme)}({name}=...) must be {bound}, got {getattr(scheme, name)!r}.")


def _number(scheme: Scheme, name: str) -> float:
    value = getattr(scheme, name)
    _within(scheme, name, "a number", isinstance(value, int | float) and not isinstance(value, bool))
    return float(value)


def _integer(scheme: Scheme, name: str) -> int:
    value = getattr(scheme, name)
    _within(scheme, name, "an integer", isinstance(value, int) and not isinstance(value, bool))
    return int(value)


def _boolean(scheme: Scheme, name: str) -> None:
    _within(scheme, name, "True or False", isinstance(getattr(scheme, name), bool))


def _steps(scheme: Scheme, name: str) -> None:
    _within(scheme, name, "at least 0", _integer(scheme, name) >= 0)


def _one_of(scheme: Scheme, name: str, options: tuple[str, ...]) -> None:
    _within(scheme, name, f"one of {', '.join(options)}", getattr(scheme, name) in options)


def _role(scheme: Scheme, name: str, value: object) -> Role:
    if value not in list(Role):
        options = ", ".join(Role)
        raise ValueError(f"{_class(scheme)}({name}=...) must be one of {options}, got {value!r}.")
    return Role(str(value))


def _to_role(scheme: Scheme, name: str) -> None:
    object.__setattr__(scheme, name, _role(scheme, name, getattr(scheme, name)))
