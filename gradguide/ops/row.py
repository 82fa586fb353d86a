"""A row: one vector over the tensors of a bucket, stored or computed on the fly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Row",
    "Stack",
    "Write",
    "check_shapes",
    "check_writes",
    "compute_dtype",
    "lists_of",
    "scopes_of",
    "sizes_of",
]

_SHAPE = attrgetter("shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One vector over a bucket's tensors: ``offset + scale * (at - anchor)``, element by element.

    Absent parts have their neutral value (offset 0, scale 1). All vectors of a step have this form:

    - a gradient, a running direction or a stored source gradient: only ``offset``;
    - a source gradient that moves with the parameters, ``s0 + F * (theta - theta0)``: all four parts;
    - the update of the base optimizer: ``at - anchor``, the parameters after and before it.

    Lists are aligned: entry i of each belongs to tensor i of the bucket, with the same shape.
    """

    offset: Sequence[Tensor] | None = None
    scale: Sequence[Tensor] | None = None
    at: Sequence[Tensor] | None = None
    anchor: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.at is None) != (self.anchor is None):
            raise ValueError("a row has both `at` and `anchor`, or neither")
        if self.at is None and (self.offset is None or self.scale is not None):
            raise ValueError("a row without `at` and `anchor` is its `offset` alone")

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Return the list that defines the number of tensors, their shapes and their device."""
        parts = self.at if self.offset is None else self.offset
        assert parts is not None
        return parts

    @property
    def fields(self) -> tuple[Sequence[Tensor] | None, ...]:
        """Return offset, scale, at and anchor; None is an absent part."""
        return self.offset, self.scale, self.at, self.anchor

    @property
    def parts(self) -> list[Sequence[Tensor]]:
        """Return the parts that are present."""
        return [part for part in self.fields if part is not None]

    def value(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return the vector's entries for tensor ``index``, as a new 1-D tensor of ``dtype``."""

        def flat(part: Sequence[Tensor]) -> Tensor:
            return part[index].detach().reshape(-1).to(dtype)

        if self.at is None or self.anchor is None:
            assert self.offset is not None
            return flat(self.offset).clone()
        result = flat(self.at) - flat(self.anchor)
        if self.scale is not None:
            result *= flat(self.scale)
        return result if self.offset is None else result + flat(self.offset)


class Stack(list["Row | None"]):
    """The rows of a bucket, with the data that a backend caches between its passes over them.

    A stack is valid for one step, because the memory of tensors may change between steps.

    Args:
        sizes: number of tensors of each of S consecutive scopes; by default all tensors are one scope.
        kept: cache of a stack of the same step that has some of these lists, and outlives this one.
    """

    def __init__(
        self, rows: Iterable[Row | None], sizes: Sequence[int] | None = None, kept: dict[int, Any] | None = None
    ) -> None:
        super().__init__(rows)
        self.sizes = sizes
        self.kept = {} if kept is None else kept


def sizes_of(rows: Sequence[Row | None]) -> Sequence[int]:
    """Return the number of tensors of each of S scopes."""
    if isinstance(rows, Stack) and rows.sizes is not None:
        return rows.sizes
    return [len(next(row for row in rows if row is not None).tensors)]


def scopes_of(rows: Sequence[Row | None]) -> list[range]:
    """Return the indices of each scope's tensors."""
    sizes = sizes_of(rows)
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One result of ``combine_``: it sets ``into`` to a combination of the rows, or adds that to ``into``.

    Args:
        into: the bucket's tensors that are written in place.
        coefficients (Tensor): shape [S, rows], one coefficient per scope and row.
        accumulate (bool): add to ``into`` instead of overwriting it.
    """

    into: Sequence[Tensor]
    coefficients: Tensor
    accumulate: bool = False


def check_writes(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Raise ValueError unless each write has a coefficient for every scope and row.

    A smaller tensor would broadcast, or a kernel would read beyond its end.
    """
    wanted = len(sizes_of(rows)), len(rows)
    for write in writes:
        if write.coefficients.shape != wanted:
            raise ValueError(
                f"a write has one coefficient for each of {wanted[0]} scopes and {wanted[1]} rows, found shape "
                f"{tuple(write.coefficients.shape)}"
            )


def lists_of(rows: Sequence[Row | None], writes: Sequence[Write] = ()) -> list[Sequence[Tensor]]:
    """Return all lists of tensors that are read or written."""
    return [part for row in rows if row is not None for part in row.parts] + [write.into for write in writes]


def check_shapes(rows: Sequence[Row | None], writes: Sequence[Write] = ()) -> None:
    """Raise ValueError unless all lists have tensors of the same shapes: other shapes might broadcast."""
    lists = lists_of(rows, writes)
    wanted = list(map(_SHAPE, lists[0]))
    for part in {id(part): part for part in lists[1:]}.values():
        if len(part) != len(wanted):
            raise ValueError(f"a row, or what is written, has {len(part)} tensors, expected {len(wanted)}")
        found = list(map(_SHAPE, part))
        if found != wanted:
            index = next(i for i, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
            raise ValueError(
                "the tensors of a row, or of what is written, differ in size from those of the first row: tensor "
                f"{index} has shape {tuple(found[index])}, expected {tuple(wanted[index])}"
            )


def compute_dtype(rows: Sequence[Row | None]) -> torch.dtype:
    """Return float64 if the first row is float64 (float64 models, tests), else float32."""
    first = next(row for row in rows if row is not None)
    return torch.float64 if first.tensors[0].dtype == torch.float64 else torch.float32
