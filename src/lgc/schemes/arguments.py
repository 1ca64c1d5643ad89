"""The arguments of schemes: their bounds, and their text form, as on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

from lgc.coding import (
    BFloat16,
    DeadZone,
    Float16,
    Float32,
    IndexCoder,
    Largest,
    LloydMax,
    RangeCoder,
    RawIndices,
    Recent,
    RecentSign,
    Rice,
    Sign,
    Uniform,
    ValueCodec,
)
from lgc.rounds.layout import Role, Unit

INDEX_CODERS: dict[str, type[IndexCoder]] = {"raw": RawIndices, "rice": Rice, "range": RangeCoder, "recent": Recent}
VALUE_CODECS: dict[str, type[ValueCodec]] = {
    "float32": Float32,
    "float16": Float16,
    "bfloat16": BFloat16,
    "sign": Sign,
    "recentsign": RecentSign,
}
QUANTISERS: dict[str, type[Uniform] | type[LloydMax]] = {"uniform": Uniform, "lloyd": LloydMax}
ZONED: dict[str, type[DeadZone] | type[Largest]] = {"deadzone": DeadZone, "largest": Largest}


@dataclass(frozen=True)
class Seconds:
    """A time, as in `LocalSteps(every=Seconds(30))`; in text a number and an s, such as 30s.

    Args:
        number: of seconds, positive.
    """

    number: float

    def __post_init__(self) -> None:
        require(self, "number", "positive and finite", 0 < require_number(self, "number") < math.inf)

    def __str__(self) -> str:
        return f"{int(self.number) if self.number == int(self.number) else self.number}s"


class Default(float):
    """A number that nobody has set, and that another method may therefore set otherwise."""


def to_text(value: object) -> str:
    """An argument's value as `from_text` reads it."""
    if isinstance(value, Uniform | LloydMax):
        (name,) = [name for name, codec in QUANTISERS.items() if type(value) is codec]
        return f"{name}{value.bits}" + ("" if value.block == type(value).block else f"x{value.block}")
    if isinstance(value, DeadZone | Largest):
        number = value.step if isinstance(value, DeadZone) else value.share
        (name,) = [name for name, codec in ZONED.items() if type(value) is codec]
        return f"{name}{Decimal(str(number)):f}"
    for name, codec in (INDEX_CODERS | VALUE_CODECS).items():
        if type(value) is codec:
            return name
    return str(value)


def from_text(where: str, text: str, hint: Any) -> Any:
    """The value of an argument of type `hint`.

    Raises:
        ValueError: naming the argument, `where`, what it may be, and the text.
    """
    if hint == Unit:
        if text != "kernel" and not text.isdecimal():
            raise ValueError(f'{where} must be a number of elements or "kernel", got {text!r}.')
        return int(text) if text.isdecimal() else "kernel"
    optional = type(None) in get_args(hint)
    if optional and text.lower() == "none":
        return None
    options = [option for option in get_args(hint) or (hint,) if option is not type(None)]
    if all(isinstance(option, type) and issubclass(option, IndexCoder | ValueCodec) for option in options):
        return _codec(where, text, INDEX_CODERS if hint is IndexCoder else VALUE_CODECS)
    if optional:
        (hint,) = options
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    if words and float in options:
        return text if text in words else _number(f"{where}, if not {' or '.join(words)},", text, float)
    if get_origin(hint) is Literal or hint is Role:
        return text  # the scheme checks it
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, got {text!r}.")
        return text.lower() == "true"
    return _number(where, text, hint)


def require(scheme: object, name: str, bound: str, holds: bool) -> None:
    """Raise ValueError naming class, argument, bound and value, unless it holds."""
    if not holds:
        raise ValueError(f"{type(scheme).__name__}({name}=...) must be {bound}, got {getattr(scheme, name)!r}.")


def require_number(scheme: object, name: str) -> float:
    """The value of an argument that must be a number."""
    value = getattr(scheme, name)
    require(scheme, name, "a number", isinstance(value, int | float) and not isinstance(value, bool))
    return float(value)


def require_integer(scheme: object, name: str, least: int) -> None:
    """Raise ValueError unless an argument is an integer of at least `least`."""
    value = getattr(scheme, name)
    require(scheme, name, "an integer", isinstance(value, int) and not isinstance(value, bool))
    require(scheme, name, f"at least {least}", value >= least)


def require_one_of(scheme: object, name: str, options: tuple[str, ...]) -> None:
    """Raise ValueError unless an argument is one of these."""
    require(scheme, name, f"one of {', '.join(options)}", getattr(scheme, name) in options)


def require_role(scheme: object, name: str, value: object) -> Role:
    """The role that an argument, or a part of one, names."""
    if value not in list(Role):
        options = ", ".join(Role)
        raise ValueError(f"{type(scheme).__name__}({name}=...) must be one of {options}, got {value!r}.")
    return Role(str(value))


def _codec(where: str, text: str, codecs: Mapping[str, type[IndexCoder] | type[ValueCodec]]) -> IndexCoder | ValueCodec:
    of_values = codecs is VALUE_CODECS
    quantiser = re.fullmatch(rf"({'|'.join(QUANTISERS)})(\d+)(?:x(\d+))?", text) if of_values else None
    if quantiser:
        name, *numbers = quantiser.groups()
        return QUANTISERS[name](*(int(number) for number in numbers if number is not None))
    zoned = re.fullmatch(rf"({'|'.join(ZONED)})(\d+(?:\.\d+)?)", text) if of_values else None
    if zoned:
        return ZONED[zoned[1]](float(zoned[2]))
    if text not in codecs:
        quantisers = [f"{name}BITS, {name}BITSxBLOCK" for name in QUANTISERS] + ["deadzoneSTEP", "largestSHARE"]
        options = ", ".join([*codecs, *(quantisers if of_values else [])])
        raise ValueError(f"{where} must be one of {options}, got {text!r}.")
    return codecs[text]()


def _number(where: str, text: str, hint: Any) -> int | float | Seconds:
    kinds = {int: "an integer", float: "a number", int | Seconds: "an integer, or a time such as 30s"}
    if hint not in kinds:
        raise ValueError(f"{where} cannot be set in text, only from Python.")
    of_time = hint == int | Seconds and text.endswith("s")
    try:
        number = float(text[:-1]) if of_time else float(text) if hint is float else int(text)
    except ValueError:
        raise ValueError(f"{where} must be {kinds[hint]}, got {text!r}.") from None
    return Seconds(number) if of_time else number
