"""A nested state as JSON text and named tensors, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Any]

ESCAPES = str.maketrans({"~": "~0", "/": "~1", "[": "~2"})
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64),
    )
}


def to_json(state: State) -> tuple[str, dict[str, Tensor]]:
    """A state's JSON text and its tensors by their path in it: contiguous, on the CPU, each with storage of its own.

    Lists are lists and dicts with string keys are objects; {"$tensor": name}, {"$float": "nan"}, {"$tuple": [...]} and
    {"$dict": [[key, value], ...]} are what JSON does not have.

    Raises:
        TypeError: naming the part that has no such form.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_encode(state, "", tensors), allow_nan=False), tensors


def from_json(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `to_json` was given.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: if there is none.
    """
    return _decode(json.loads(text, parse_constant=_refuse_constant), tensors)


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype, a key of `DTYPES` if it has a file format."""
    return str(tensor.dtype).removeprefix("torch.")


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if dtype_name(value) not in DTYPES or value.layout is not torch.strided:
            raise TypeError(f"state[{name!r}] is a {value.layout} tensor of {value.dtype}, which has no file format.")
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        tensors[name] = plain.clone(memory_format=torch.contiguous_format)
        return {"$tensor": name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{name}/[{index}]", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"state[{name!r}] has the key {key!r} ({type(key).__name__}); it must be str or int.")
        encoded = [(key, _encode(item, f"{name}/{_part(key)}", tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(encoded)
        return {"$dict": encoded}
    raise TypeError(f"state[{name!r}] is a {type(value).__name__}, which has no file format.")


def _part(key: str | int) -> str:
    """A key as in a JSON pointer (RFC 6901), integers in brackets."""
    return f"[{key}]" if isinstance(key, int) else key.translate(ESCAPES)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"{value!r:.100} has no meaning")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
