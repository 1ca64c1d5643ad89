"""Which values are exactly zero, in few bytes where they are rare or fill whole blocks. See docs/wire.md."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgc.coding.bits import Integers, check_bits, octet_count, pack_fixed, unpack_fixed
from lgc.coding.payload import Octets, PayloadError, octets, tensor

BLOCK = 256
_SOME_VALUES, _NO_VALUE, _MIXED = 0, 1, 2  # a block's flag: no zero, only zeros, both


def encode_zeros(values: Tensor) -> Tensor:
    """The places of the zeros, also negative ones, of `values`: uint8 on the CPU, empty if there is no zero.

    Args:
        values: float32 values of shape (N,), on any device.

    Raises:
        TypeError: if the values are not float32 of one dimension.
    """
    if values.dtype != torch.float32 or values.dim() != 1:
        form = f"{values.dtype} {tuple(values.shape)}"
        raise TypeError(f"encode_zeros(values=...) must be float32 of one dimension, got {form}.")
    zero = values.detach().cpu().numpy() == 0
    if not zero.any():
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    sizes = _sizes(zero.size)
    blocks = np.zeros((sizes.size, BLOCK), np.bool_)
    blocks.reshape(-1)[: zero.size] = zero
    zeros = np.count_nonzero(blocks, axis=1)
    flags = np.where(zeros == 0, _SOME_VALUES, np.where(zeros == sizes, _NO_VALUE, _MIXED))
    mixed = flags == _MIXED
    masks = np.packbits(blocks[mixed], bitorder="little")[: octet_count(int(sizes[mixed].sum()))]
    return tensor(np.concatenate([pack_fixed(flags, 2), masks]))


def decode_zeros(data: Tensor | bytes, count: int) -> Tensor:
    """Where the `count` values are zero, bool of shape (count,) on the CPU; parsed as hostile.

    Raises:
        PayloadError: if no values have this code.
    """
    array = octets(data)
    if not array.size:
        return torch.zeros(count, dtype=torch.bool, device="cpu")
    sizes = _sizes(count)
    length = octet_count(2 * sizes.size)
    flags = unpack_fixed(array[:length], sizes.size, 2, "zeros.flags")
    if flags.max(initial=0) > _MIXED:
        raise PayloadError("zeros.flags", f"at most {_MIXED}", flags.max())
    if not flags.any():
        raise PayloadError("zeros", "empty if there is no zero", f"{array.size} bytes")
    mixed = flags == _MIXED
    bits = int(sizes[mixed].sum())
    check_bits(array[length:], bits, "zeros.masks")
    blocks = np.zeros((sizes.size, BLOCK), np.bool_)
    blocks[flags == _NO_VALUE] = True
    masks = np.zeros((int(mixed.sum()), BLOCK), np.bool_)
    masks.reshape(-1)[:bits] = np.unpackbits(array[length:], count=bits, bitorder="little")
    zeros = np.count_nonzero(masks, axis=1)
    wrong = (zeros == 0) | (zeros == sizes[mixed])
    if wrong.any():
        raise PayloadError("zeros.masks", "of zeros and other values", f"{zeros[wrong][0]} zeros in a block")
    blocks[mixed] = masks
    return torch.from_numpy(blocks.reshape(-1)[:count])


def split_zeros(data: Octets, count: int) -> tuple[npt.NDArray[np.bool_], Octets]:
    """Where the `count` values are zero, and what follows: of a byte, 1 if any is, their code, and other bytes.

    Raises:
        PayloadError: if it does not begin so.
    """
    if data[:1].tobytes() == b"\x00":
        return np.zeros(count, np.bool_), data[1:]
    if data[:1].tobytes() != b"\x01":
        raise PayloadError("values.zeros", "0 or 1", data[:1].tolist())
    sizes = _sizes(count)
    flags = unpack_fixed(data[1 : 1 + octet_count(2 * sizes.size)], sizes.size, 2, "zeros.flags")
    end = 1 + octet_count(2 * sizes.size) + octet_count(int(sizes[flags == _MIXED].sum()))
    return decode_zeros(data[1:end].tobytes(), count).numpy(), data[end:]


def zeros_bound(count: int) -> int:
    """Largest possible number of bytes of the code of so many values."""
    alone = int(count % BLOCK == 1)  # a block of one value is never mixed
    return octet_count(2 * _sizes(count).size) + octet_count(count - alone)


def _sizes(count: int) -> Integers:
    """Number of values of every block."""
    if count < 0:
        raise ValueError(f"a code of zeros must be of at least 0 values, got {count}.")
    starts: npt.NDArray[np.int64] = np.arange(0, count, BLOCK)
    return np.minimum(BLOCK, count - starts)
