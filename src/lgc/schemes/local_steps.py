"""Local steps: an exchange of what the ranks have moved, every so many steps of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from lgc.coding import Float32, Largest, LloydMax, ValueCodec
from lgc.schemes.arguments import Default, Seconds, require, require_integer, require_number, require_one_of
from lgc.schemes.dense import Dense
from lgc.schemes.quantized import Quantized
from lgc.schemes.scalecom import ScaleCom
from lgc.schemes.scheme import RoundScheme, Scheme
from lgc.schemes.sparse import SparseScheme
from lgc.schemes.topk import TopK

EXCHANGES = (Dense, Quantized, TopK, ScaleCom)
USUAL = 20  # steps from round to round

Moments = Literal["own", "all"]


@dataclass(frozen=True, kw_only=True)
class LocalSteps(Scheme):
    """Every rank takes `every` steps of its own; then the ranks exchange what they have moved.

        d_k = origin_k - weights_k     what rank k has moved from where it began, the pseudo-gradient
        e_k = decay e_k + d_k          its residual; what is sent leaves it
        d   = mean of what was sent    by `exchange`
        m   = outer_momentum m + d;  anchor = anchor - outer_lr (d + outer_momentum m)
        weights_k = origin_k = anchor - ahead e_k

    Source: Douillard et al., DiLoCo, arXiv 2311.08105, there uncompressed; Streaming DiLoCo, arXiv 2501.18512, for
    `overlap` and `fragments`. In text the exchange follows a plus sign: `local:every=50+quantized:bits=2`.

    Args:
        every: steps from one round to the next, at least 1; or a time, `lgc.Seconds(30)`, in which each rank takes as
            many as it can, and counts for as many. See docs/elastic.md.
        exchange: of what was moved: Dense, Quantized, TopK or ScaleCom. Its schedule counts rounds.
        decay: of the residual from round to round, in (0, 1]; 1 keeps everything that is owed.
        outer_lr: learning rate of the outer optimizer, positive; None is 1. More makes up for slow training where an
            exchange leaves most out and `first_moments` is a number.
        outer_momentum: Nesterov's, in [0, 1); None is measured: 0.8 where an exchange sends every coordinate and
            `every` is at least 10 (0.7 from 100 on) or a time, 0 elsewhere, where it destroys.
        start_steps: at first, so many steps exchange their gradients; the first hundreds decide much.
        start: how their values become bytes; Float32 is uncompressed.
        first_moments: by which momentum a rank goes on after a round: its "own", or that of "all" ranks, as far as what
            they have moved tells; or a number between these, 0 and 1, which is better where most of that is left out.
            For SGD and Adam.
        second_moments: what Adam divides by: "own" is what a rank's own gradients vary by, "all" what their mean over
            all ranks does, estimated from the rank's own, so that the learning rate of dense training is right.
        ahead: how much of what a rank still owes it keeps in its own weights, 0 to 1: it begins a round ahead of the
            anchor, at 1 where in the mean the ranks would be if nothing were left to send.
        overlap: exchange while the next steps compute; what comes back is applied when the next exchange begins.
        fragments: the tensors in so many groups, one of them exchanged every `every / fragments` steps.
    """

    name: ClassVar[str] = "local"
    every: int | Seconds = USUAL
    exchange: RoundScheme = field(default_factory=Quantized)
    decay: float = 1.0
    outer_lr: float | None = None
    outer_momentum: float | None = None
    start_steps: int = 300
    start: ValueCodec = LloydMax(4)
    first_moments: Moments | float = "own"
    second_moments: Moments = "own"
    ahead: float = 0.0
    overlap: bool = False
    fragments: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, Seconds):
            require(self, "every", "an integer, or a time such as lgc.Seconds(30)", type(self.every) is int)
            require_integer(self, "every", 1)
        object.__setattr__(self, "exchange", _as_exchange(self))
        require(self, "decay", "in (0, 1]", 0 < require_number(self, "decay") <= 1)
        if self.outer_lr is not None:
            require(self, "outer_lr", "positive", 0 < require_number(self, "outer_lr") < float("inf"))
        if self.outer_momentum is not None:
            require(self, "outer_momentum", "in [0, 1)", 0 <= require_number(self, "outer_momentum") < 1)
        require_integer(self, "start_steps", 0)
        require(self, "start", "a value codec, such as lgc.LloydMax(4)", isinstance(self.start, ValueCodec))
        if isinstance(self.first_moments, str):
            require_one_of(self, "first_moments", get_args(Moments))
        else:
            share = require_number(self, "first_moments")
            require(self, "first_moments", "own, all, or in [0, 1]", 0 <= share <= 1)
            object.__setattr__(self, "first_moments", share)  # a float, as its text is read
        require_one_of(self, "second_moments", get_args(Moments))
        require(self, "ahead", "in [0, 1]", 0 <= require_number(self, "ahead") <= 1)
        require(self, "overlap", "True or False", isinstance(self.overlap, bool))
        require_integer(self, "fragments", 1)
        if self.overlap:
            require(self, "first_moments", "left at own with overlap=True", not self.common_momentum)
            require(self, "ahead", "left at 0 with overlap=True", self.ahead == 0)
        if isinstance(self.every, Seconds):
            require(self, "first_moments", f"left at own with every={self.every}", not self.common_momentum)
            require(self, "ahead", f"left at 0 with every={self.every}", self.ahead == 0)
            require(self, "overlap", f"left at False with every={self.every}", not self.overlap)
            require(self, "fragments", f"left at 1 with every={self.every}", self.fragments == 1)
        else:
            require(self, "fragments", f"a divisor of every={self.every}", self.every % self.fragments == 0)

    @property
    def steps_a_round(self) -> int:
        """Steps from one round to the next, of the same fragment.

        Raises:
            ValueError: if rounds are opened by time.
        """
        require_rounds_by_count(self, "what is asked for")
        assert not isinstance(self.every, Seconds)
        return self.every

    @property
    def period(self) -> int:
        """Steps from one exchange to the next one, of another fragment if there are several; raises likewise."""
        return self.steps_a_round // self.fragments

    @property
    def outer(self) -> tuple[float, float]:
        """Learning rate and momentum of the outer optimizer, with the measured defaults."""
        momentum, every = 0.0, USUAL if isinstance(self.every, Seconds) else self.every
        if isinstance(self.exchange, Dense | Quantized) and every >= 10:
            momentum = 0.8 if every < 100 else 0.7
        rate = 1.0 if self.outer_lr is None else self.outer_lr
        return rate, momentum if self.outer_momentum is None else self.outer_momentum

    @property
    def common_momentum(self) -> float:
        """How far a rank goes on by the momentum of all ranks, from 0, its own, to 1."""
        given = self.first_moments
        return float(given == "all") if isinstance(given, str) else given

    @property
    def rounds_of_waiting(self) -> float:
        """Roughly how many rounds what is moved is owed before it is sent, as measured; 1 if that is at once."""
        match self.exchange:
            case Dense():
                return 1.0
            case SparseScheme(rate=share) | Quantized(codec=Largest(share=share)):
                return 3 / math.sqrt(share)
            case _:
                return 4.0

    @property
    def start_exchange(self) -> RoundScheme:
        """The scheme of the first steps' gradients."""
        return Dense() if self.start == Float32() else Quantized(values=self.start)

    def arguments(self) -> dict[str, str]:
        exchange = {f"exchange.{name}": text for name, text in self.exchange.arguments().items()}
        return super().arguments() | {"exchange": self.exchange.name} | exchange

    def __str__(self) -> str:
        return f"{super(LocalSteps, replace(self, exchange=Quantized())).__str__()}+{self.exchange}"


def require_rounds_by_count(scheme: Scheme, what: str) -> None:
    """Raise ValueError for local steps whose rounds are opened by time, on behalf of what counts steps."""
    if isinstance(scheme, LocalSteps) and isinstance(scheme.every, Seconds):
        raise ValueError(
            f"{what} counts steps, the same number on every rank, and {scheme} opens rounds by time; give it a number "
            f"of steps, such as every={USUAL}."
        )


def _as_exchange(scheme: LocalSteps) -> RoundScheme:
    """Its exchange with error feedback alone, as the inner optimizer and the outer optimizer have the momenta."""
    exchange, kind = scheme.exchange, type(scheme).__name__
    if type(exchange) not in EXCHANGES:
        names = ", ".join(each.__name__ for each in EXCHANGES)
        raise ValueError(f"{kind}(exchange=...) must be one of {names}, got {type(exchange).__name__}.")
    if not isinstance(exchange, SparseScheme):
        return exchange
    for name, off in (("momentum", 0.0), ("second_moment", 0.0), ("low_pass", 1.0)):
        value = getattr(exchange, name)
        if value != off and not isinstance(value, Default):
            raise ValueError(
                f"{kind}(exchange={type(exchange).__name__}({name}={value})): an exchange of what was moved must have "
                f"{name}={off:g}, as the optimizer has acted before; leave {name} out, and set outer_momentum for one "
                "between rounds."
            )
    return replace(exchange, momentum=0.0, second_moment=0.0, low_pass=1.0)
