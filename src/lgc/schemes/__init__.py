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
from lgc.schemes.local_steps import LocalSteps, require_rounds_by_count
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

    Local steps have the scheme of their exchange after a plus sign: `local:every=50+quantized:bits=2`.

    Args:
        text: the scheme's name, `paper` for the raw settings of its paper, and the arguments to set.
        defaults: values for arguments that the scheme takes and `text` does not set.

    Raises:
        ValueError: naming the unknown scheme or argument, or the bound and the value.
    """
    own, plus, exchange = text.partition("+")
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
    if plus and scheme is not LocalSteps:
        raise ValueError(f"{name} has no exchange, which only local has after a plus sign, got {text!r}.")
    if plus:
        arguments["exchange"] = parse_scheme(exchange)
    return scheme(**arguments | _parse_settings(scheme, settings, text))


def _parse_settings(kind: type[Scheme], settings: Iterable[str], text: str) -> dict[str, Any]:
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
