"""Small integers side by side in int32 words, so that an all-reduce of words sums them all. See docs/wire.md."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 31  # of an int32 that lanes use: the sign bit stays clear, so no sum overflows


def lane_width(largest: int, terms: int) -> int:
    """Bits of a lane that holds the sum of `terms` integers in [0, largest]."""
    return max(1, (largest * terms).bit_length())


def lane_words(count: int, width: int) -> int:
    """Number of int32 words that hold `count` lanes."""
    return -(-count // _lanes(width))


def pack_lanes(values: Tensor, width: int) -> Tensor:
    """Integers as lanes of int32 words, floor(31 / width) in each, so that a sum of words is the sum of the lanes.

    No lane carries into the next as long as no sum exceeds 2^width - 1: see `lane_width`. Lane j of a word holds
    value j * words + word, so that packing and unpacking are sums of contiguous slices.

    Args:
        values: integers in [0, 2^width), one dimension, on any device.
        width: bits of a lane, 1 to 31.

    Returns:
        int32 of shape (lane_words(count, width),) on the same device.

    Raises:
        ValueError: if a value or the width is out of range.
    """
    lanes = _lanes(width)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >> width):
        raise ValueError(
            f"pack_lanes(values=...) must be in [0, {2**width - 1}], got {int(values.min())} to {int(values.max())}."
        )
    words = lane_words(values.numel(), width)
    packed = torch.zeros(words, dtype=torch.int32, device=values.device)
    for lane in range(lanes):
        part = values[lane * words : (lane + 1) * words].to(torch.int32)
        packed[: part.numel()] |= part << (lane * width)
    return packed


def unpack_lanes(words: Tensor, width: int, count: int) -> Tensor:
    """The `count` integers, int32, that lie in the lanes of int32 words.

    Raises:
        ValueError: if the words are not those of `count` lanes.
    """
    lanes = _lanes(width)
    if words.dtype != torch.int32 or words.numel() != lane_words(count, width):
        raise ValueError(
            f"unpack_lanes(words=...) must be {lane_words(count, width)} int32, got {words.numel()} {words.dtype}."
        )
    parts = [(words >> (lane * width)) & (2**width - 1) for lane in range(lanes)]
    return torch.cat(parts)[:count]


def _lanes(width: int) -> int:
    if not 1 <= width <= WORD_BITS:
        raise ValueError(f"lanes must be 1 to {WORD_BITS} bits wide, got {width}.")
    return WORD_BITS // width
