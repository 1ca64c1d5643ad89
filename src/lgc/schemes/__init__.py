"""The schemes. Each file has a method whole: its arguments, and the round that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from lgc.schemes.arguments import Seconds, from_text
from lgc.schemes.dense import Dense, DenseBF16, DenseFP16
from lgc.schemes.learned import LGCScheme
from lgc.schemes.lgc_ring import LGCRing
from lgc.schemes.lgc_server import LGCServer
from lgc.schemes.local_steps import Later, LocalSteps, require_rounds_by_count
from lgc.schemes.powersgd import PowerSGD
from lgc.schemes.quantized import Quantized
from lgc.schemes.scalecom import ScaleCom
from lgc.schemes.scheme import RoundScheme, Scheme
from lgc.schemes.sparse import SparseScheme
from lgc.schemes.topk import DGC, TopK

__all__ = [
    "DGC",
    "SCHEMES",
    "Dense",
    "DenseBF16",
    "DenseFP16",
    "LGCRing",
    "LGCScheme",
    "LGCServer",
    "Later",
    "LocalSteps",
    "PowerSGD",
    "Quantized",
    "RoundScheme",
    "ScaleCom",
    "Scheme",
    "Seconds",
    "SparseScheme",
    "TopK",
    "parse_scheme",
    "require_different",
    "require_rounds_by_count",
]

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (
        Dense,
        DenseFP16,
        DenseBF16,
        PowerSGD,
        Quantized,
        TopK,
        DGC,
        ScaleCom,
        LGCRing,
        LGCServer,
        LocalSteps,
    )
}


def parse_scheme(text: str, defaults: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme that `name[:paper][:argument=value]...` describes, such as `lgc-ring:rate=0.002:feedback=paper`.

    Local steps have the scheme of their exchange after a plus sign, and then what changes later, likewise:
    `local:every=2+quantized:bits=1+later:step=900:every=6+quantized`.

    Args:
        text: the scheme's name, `paper` for the raw settings of its paper, and the arguments to set.
        defaults: values for arguments that the scheme takes and `text` does not set.

    Raises:
        ValueError: naming the unknown scheme or argument, or the bound and the value.
    """
    own, *others = text.split("+")
    name, *settings = own.split(":")
    if name == "auto":
        raise ValueError(
            "there is no scheme 'auto': measure before attaching, by lgc.choose(...) in a script or by `lgc plan`, and "
            "attach what that finds."
        )
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; there are {', '.join(SCHEMES)}.")
    scheme = SCHEMES[name]
    known = {item.name for item in fields(scheme)}
    arguments = {argument: value for argument, value in (defaults or {}).items() if argument in known}
    if settings[:1] == ["paper"] and issubclass(scheme, SparseScheme):
        settings = settings[1:]
        arguments |= scheme.paper_arguments()
    if others and scheme is not LocalSteps:
        raise ValueError(f"{name} has no exchange, which only local has after a plus sign, got {text!r}.")
    if others and others[0].partition(":")[0] != Later.name:
        arguments["exchange"] = parse_scheme(others.pop(0))
    if others:
        arguments["later"] = _parse_later(others, text)
    return scheme(**arguments | _parse_settings(scheme, settings, text))


def _parse_later(parts: Sequence[str], text: str) -> Later:
    """What `later:argument=value...` and the scheme of its exchange describe, of the local steps of a text."""
    own, *exchange = parts
    name, *settings = own.split(":")
    if name != Later.name or len(exchange) > 1 or (exchange[:1] and exchange[0].partition(":")[0] == Later.name):
        raise ValueError(
            f"local: its exchange may be followed, once, by {Later.name}:step=...:every=..., and the exchange of that, "
            f"got {text!r}."
        )
    arguments = _parse_settings(Later, settings, text)
    if missing := {"step", "every"} - arguments.keys():
        raise ValueError(f"{Later.name}: {' and '.join(sorted(missing))} must be set in {text!r}.")
    if exchange:
        arguments["exchange"] = parse_scheme(exchange[0])
    return Later(**arguments)


def _parse_settings(kind: type[Scheme] | type[Later], settings: Iterable[str], text: str) -> dict[str, Any]:
    """The values of `argument=value`, by argument."""
    name, hints, known = kind.name, get_type_hints(kind), {item.name for item in fields(kind)}
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{name}: {setting!r} is not of the form argument=value.")
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(sorted(known)) or 'none'}.")
        if key in arguments:
            raise ValueError(f"{name}: {key} is set twice in {text!r}.")
        arguments[key] = from_text(f"{name}:{key}", value, hints[key])
    return arguments


def as_scheme(scheme: Scheme | str) -> Scheme:
    """The scheme itself, or the one that its text form describes; raises ValueError as `parse_scheme`."""
    return parse_scheme(scheme) if isinstance(scheme, str) else scheme


def require_different(texts: Sequence[str], schemes: Iterable[Scheme]) -> None:
    """Raise ValueError if two of these texts are the same scheme, once a recipe's defaults have completed them."""
    seen: dict[str, str] = {}
    for text, scheme in zip(texts, map(str, schemes), strict=True):
        if scheme in seen:
            raise ValueError(f"schemes must differ, and {seen[scheme]} and {text} are the same here.")
        seen[scheme] = text
