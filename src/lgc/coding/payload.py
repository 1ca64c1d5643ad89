"""The layout of everything of variable length that crosses the network. See docs/wire.md."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Octets = npt.NDArray[np.uint8]

MAGIC = b"LGCP"
VERSION = 1
PARTS_LIMIT = 255
_FIELDS = ("magic", "version", "kind", "parts", "reserved", "step")
_FIXED = struct.Struct("<4sBBBBQ")
_CHECKSUM = struct.Struct("<I")
_START = _FIXED.size + _CHECKSUM.size  # of the parts' lengths


class Kind(IntEnum):
    """What a payload's parts are."""

    INDICES = 1
    VALUES = 2
    ENTRIES = 3  # indices, then their values
    LATENT = 4
    INNOVATION = 5  # indices into the selected entries, then their values
    QUANTIZED = 6  # which values are zero, then the code of all others
    SHARE = 7  # numbers of entries, indices, values


class PayloadError(ValueError):
    """Received bytes that are not what the receiver expects.

    Attributes:
        field: the field of the layout that is wrong.
    """

    def __init__(self, field: str, bound: str, value: object) -> None:
        super().__init__(f"payload field {field} must be {bound}, got {value}.")
        self.field = field


def octets(data: Tensor | bytes) -> Octets:
    """The bytes as a numpy array on the CPU, copied only from another device or a strided tensor.

    Raises:
        TypeError: if a tensor is not of dtype uint8 with one dimension.
    """
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise TypeError(f"data must be bytes or a uint8 tensor of one dimension, got {data.dtype} {data.shape}.")
        array: Octets = data.detach().cpu().contiguous().numpy()
        return array
    return np.frombuffer(data, dtype=np.uint8)


def tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """The array's memory as a uint8 tensor on the CPU; the array must be writable and little-endian."""
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))


def header_size(parts: int) -> int:
    """Bytes before the first part, 20 + 4 parts."""
    return _START + 4 * parts


def size_limit(bounds: Sequence[int]) -> int:
    """The largest possible payload of parts with these largest possible lengths, in bytes."""
    return header_size(len(bounds)) + sum(bounds)


def pack(parts: Sequence[Tensor | bytes], *, kind: int, step: int) -> Tensor:
    """One payload of these parts, a uint8 tensor on the CPU.

    Args:
        parts: byte strings, at most 255, each shorter than 2^32 bytes.
        kind: what the parts are, 0 to 255; see `Kind`.
        step: the round that it belongs to, 0 to 2^64 - 1.

    Raises:
        ValueError: if an argument is out of its range.
    """
    contents = [octets(part) for part in parts]
    if len(contents) > PARTS_LIMIT:
        raise ValueError(f"pack(parts=...) must be at most {PARTS_LIMIT}, got {len(contents)}.")
    if not 0 <= kind < 2**8:
        raise ValueError(f"pack(kind=...) must be in [0, 255], got {kind}.")
    if not 0 <= step < 2**64:
        raise ValueError(f"pack(step=...) must be in [0, 2^64), got {step}.")
    for content in contents:
        if content.size >= 2**32:
            raise ValueError(f"pack(parts=...) must each be shorter than 2^32 bytes, got {content.size}.")
    fixed = np.frombuffer(_FIXED.pack(MAGIC, VERSION, kind, len(contents), 0, step), dtype=np.uint8)
    lengths = np.array([content.size for content in contents], dtype="<u4").view(np.uint8)
    payload = np.concatenate([fixed, np.zeros(_CHECKSUM.size, np.uint8), lengths, *contents])
    payload[_FIXED.size : _START] = np.frombuffer(_CHECKSUM.pack(_checksum(payload)), dtype=np.uint8)
    return torch.from_numpy(payload)


def unpack(data: Tensor | bytes, *, kind: int, step: int, bounds: Sequence[int]) -> list[Tensor]:
    """The parts of a payload, as uint8 tensors on the CPU; parsed as hostile, and copied once.

    Args:
        data: what was received.
        kind: what it has to be.
        step: the round that it has to belong to.
        bounds: the largest possible length of each part in bytes; their number is the number of parts.

    Raises:
        PayloadError: if it is anything else.
    """
    payload = octets(data)
    if payload.size < header_size(len(bounds)):
        raise PayloadError("length", f"at least {header_size(len(bounds))} bytes", payload.size)
    if payload.size > size_limit(bounds):
        raise PayloadError("length", f"at most {size_limit(bounds)} bytes", payload.size)
    received = _FIXED.unpack(payload[: _FIXED.size].tobytes())
    expected = (MAGIC, VERSION, int(kind), len(bounds), 0, step)
    for field, right, value in zip(_FIELDS, expected, received, strict=True):
        if value != right:
            raise PayloadError(field, str(right), value)
    start = header_size(len(bounds))
    lengths = np.frombuffer(payload[_START:start].tobytes(), dtype="<u4").tolist()
    for place, (length, bound) in enumerate(zip(lengths, bounds, strict=True)):
        if length > bound:
            raise PayloadError(f"lengths[{place}]", f"at most {bound} bytes", length)
    if start + sum(lengths) != payload.size:
        raise PayloadError("length", f"{start + sum(lengths)} bytes, as its parts declare", payload.size)
    (checksum,) = _CHECKSUM.unpack(payload[_FIXED.size : _START].tobytes())
    if checksum != _checksum(payload):
        raise PayloadError("checksum", f"{_checksum(payload):#010x}", f"{checksum:#010x}")
    ends = np.cumsum(lengths, dtype=np.int64) + start
    return [tensor(payload[end - length : end].copy()) for end, length in zip(ends, lengths, strict=True)]


def _checksum(payload: Octets) -> int:
    """CRC-32 of everything but the checksum itself."""
    return zlib.crc32(payload[_START:].data, zlib.crc32(payload[: _FIXED.size].data))
