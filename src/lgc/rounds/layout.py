"""Which slice of the flat gradient a parameter has, and how that slice is exchanged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, Self

from torch import Tensor

POOL = "<small tensors>"
INDEX_LIMIT = 2**31  # raw indices travel as int32

Unit = int | Literal["kernel"]


class Role(StrEnum):
    """How a parameter's gradient is exchanged."""

    DENSE = "dense"  # uncompressed
    OWN = "own"  # every rank sends its own largest values with their indices
    SHARED = "shared"  # all ranks send their values at one leader's indices


class Segment(NamedTuple):
    """The range that one top-k selects from: a weight, or the pool of all small tensors.

    `slice` is its place in the flat vector, `rate` the fraction of it that is sent after the warm-up, `unit` the number
    of consecutive elements that are sent together.
    """

    name: str
    role: Role
    slice: slice
    rate: float
    unit: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.slice.stop - self.slice.start)


def entries(size: int, rate: float) -> int:
    """Number of units that a segment of `size` units sends at `rate`: at least one, none if it is empty."""
    return min(size, max(1, round(rate * size)))


def unit_size(shape: tuple[int, ...], unit: Unit) -> int:
    """Elements that are selected together in a weight of this shape; 1 where it does not divide into such units."""
    size = math.prod(shape[2:]) if unit == "kernel" else unit
    return size if size and math.prod(shape) % size == 0 else 1


class Layout:
    """The flat vector: dense parameters, then own segments, then shared segments.

    Built from names, shapes and roles alone, so every rank builds the same one and state can be keyed by
    parameter name.

    Attributes:
        size: number of elements N.
        slices: parameter name to its slice.
        shapes: parameter name to its shape.
        dense: the slice of all dense parameters.
        own, shared: the segments of these roles, in order.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        roles: Mapping[str, Role],
        pooled: frozenset[str],
        *,
        rate: float,
        pooled_rate: float,
        unit: Unit = 1,
    ) -> None:
        self.shapes = dict(shapes)
        self.slices: dict[str, slice] = {}
        segments: list[Segment] = []
        position = 0
        for role in Role:
            members = [name for name in shapes if roles[name] is role]
            start = position
            for name in sorted(members, key=lambda name: name not in pooled):  # stable: the pool, then the rest
                size = math.prod(shapes[name])
                self.slices[name] = slice(position, position + size)
                if name not in pooled:
                    segments.append(Segment(name, role, self.slices[name], rate, unit_size(shapes[name], unit)))
                position += size
                if name in pooled and segments and segments[-1].name == POOL:
                    segments[-1] = segments[-1]._replace(slice=slice(start, position))
                elif name in pooled:
                    segments.append(Segment(POOL, role, slice(start, position), pooled_rate))
        self.size = position
        if self.size >= INDEX_LIMIT:
            raise ValueError(
                f"positions must fit into int32: at most {INDEX_LIMIT - 1} parameters, got {self.size}; train fewer, "
                "or use LocalSteps(fragments=..., start_steps=0), or dense, bf16, fp16 or powersgd."
            )
        self.dense = slice(0, sum(math.prod(shape) for name, shape in shapes.items() if roles[name] is Role.DENSE))
        self.own = [segment for segment in segments if segment.role is Role.OWN]
        self.shared = [segment for segment in segments if segment.role is Role.SHARED]

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        rate: float,
        pooled_rate: float,
        unit: Unit = 1,
        first: Role,
        last: Role,
        small: Role,
        other: Role,
        overrides: Mapping[str, Role],
    ) -> Self:
        """The layout that gives every parameter a role by its kind and its place in the model.

        Weights have two dimensions or more, everything else is small. The first weight is dense only where that costs
        at most a quarter of what the other weights send.

        Raises:
            ValueError: if a pattern of `overrides` matches no parameter.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in tensors}
        weights = [name for name, shape in shapes.items() if len(shape) >= 2]
        roles = {name: other if name in weights else small for name in shapes}
        if weights:
            rest = sum(math.prod(shapes[name]) for name in weights[1:])
            if first is not Role.DENSE or math.prod(shapes[weights[0]]) <= rate * rest / 4:
                roles[weights[0]] = first
            roles[weights[-1]] = last
        for pattern, role in overrides.items():
            matches = [name for name in shapes if fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(f"roles={{{pattern!r}: ...}} matches no parameter; there are {', '.join(shapes)}.")
            roles |= dict.fromkeys(matches, role)
        pooled = {name for name in shapes if name not in weights and roles[name] is small and small is not Role.DENSE}
        return cls(shapes, roles, frozenset(pooled), rate=rate, pooled_rate=pooled_rate, unit=unit)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of the flat vector by parameter name, in the parameters' shapes."""
        return {name: flat[place].view(self.shapes[name]) for name, place in self.slices.items()}
