"""Rows as kernels see them: distinct lists of tensors (columns), and for each row the columns that it is formed of."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradguide.ops.row import Row, Stack, Write, sizes_of
from gradguide.ops.tensors import Facts, located

__all__ = ["Columns", "columns_of"]

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True, slots=True)
class Columns:
    """What a kernel is specialised on, and where it finds its data.

    device: of all tensors.
    dtypes: Triton's type of each column.
    rows: for each row its columns: offset, scale, at, anchor; -1 is absent.
    writes: for each write its column, and whether it accumulates.
    others: columns of the lists that are neither.
    addresses: [columns, tensors].
    lengths: [tensors], elements.
    sizes: [scopes], how many of the tensors belong to each.
    """

    device: torch.device
    dtypes: tuple[Any, ...]
    rows: tuple[tuple[int, int, int, int], ...]
    writes: tuple[tuple[int, bool], ...]
    others: tuple[int, ...]
    addresses: array[int]
    lengths: array[int]
    sizes: array[int]

    @property
    def tensors(self) -> int:
        return len(self.lengths)


def columns_of(
    rows: Sequence[Row | None], writes: Sequence[Write] = (), others: Sequence[Sequence[Tensor]] = ()
) -> Columns | None:
    """The columns of the rows that are there, of writes and other lists; None where a tensor is not plain or of a
    precision without a kernel.

    Tensors that stand in several lists are one column, read once. Of a Stack's lists addresses are asked for once.

    Raises:
        ValueError: lists differ in number or size of their tensors.
    """
    kept = _kept(rows)

    def ask(part: Sequence[Tensor]) -> tuple[Facts, array[int]]:
        if id(part) not in stacked:
            return located(part)
        if id(part) not in kept:
            kept[id(part)] = located(part)
        return kept[id(part)]

    present = [row for row in rows if row is not None]
    fields = [part for row in present for part in row.fields]
    stacked = set(map(id, fields))
    (lengths, _, device, _), _ = ask(present[0].tensors)
    numbers: dict[int, int] = {}  # of lists seen before
    places: dict[bytes, int] = {}  # of lists with other lists' tensors
    addresses: array[int] = array("q")
    dtypes: list[Any] = []
    for part in [*fields, *(write.into for write in writes), *others]:
        if part is None or id(part) in numbers:
            continue
        facts, where = ask(part)
        # Kernels go by address: a shorter tensor would have them read or write memory of others.
        if facts.lengths != lengths:
            raise ValueError("the tensors of a row, or of what is written, differ in size from those of the first row")
        if device is None or facts.device != device or facts.dtype not in DTYPES or not facts.plain:
            return None
        place = places.setdefault(where.tobytes(), len(places))
        numbers[id(part)] = place
        if place == len(dtypes):
            dtypes.append(DTYPES[facts.dtype])
            addresses.extend(where)

    def number(part: Sequence[Tensor] | None) -> int:
        return -1 if part is None else numbers[id(part)]

    def four(row: Row) -> tuple[int, int, int, int]:
        offset, scale, at, anchor = map(number, row.fields)
        return offset, scale, at, anchor

    assert device is not None
    return Columns(
        device=device,
        dtypes=tuple(dtypes),
        rows=tuple(map(four, present)),
        writes=tuple((number(write.into), write.accumulate) for write in writes),
        others=tuple(map(number, others)),
        addresses=addresses,
        lengths=lengths,
        sizes=array("q", sizes_of(rows)),
    )


def _kept(rows: Sequence[Row | None]) -> dict[int, tuple[Facts, array[int]]]:
    """What is known of a stack's lists, by identity; they live as long as it. Of other rows nothing is kept."""
    if not isinstance(rows, Stack):
        return {}
    if not isinstance(rows.kept, dict):
        rows.kept = {}
    return rows.kept
