"""Kernel operands: distinct lists of tensors (columns), and for each row the columns that it is computed from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradguide.ops.row import Row, Stack, Write, sizes_of
from gradguide.ops.tensors import ListMetadata, addresses_of, metadata_of

__all__ = ["KernelOperands", "operands_of"]

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True, slots=True)
class KernelOperands:
    """Layout of a kernel's operands, on which it is specialised, and the addresses of their data.

    device: common to all tensors.
    dtypes: Triton type of each column.
    rows: for each row its columns: offset, scale, at, anchor; -1 is absent.
    writes: for each write its column, and whether it accumulates.
    others: columns of the other lists.
    addresses: [columns, tensors].
    lengths: [tensors], number of elements.
    sizes: [scopes], number of tensors of each scope.
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


def operands_of(
    rows: Sequence[Row | None], writes: Sequence[Write] = (), others: Sequence[Sequence[Tensor]] = ()
) -> KernelOperands | None:
    """Return the operands for the present rows, the writes and other lists.

    Lists of the same tensors share one column, which is read once. The addresses of a stack's lists are read once per
    step.

    Returns:
        None if a kernel cannot read a list by address: the list is not plain (see ``ListMetadata.plain``), has no
        memory, mixes devices or precisions, or has a precision without a kernel.

    Raises:
        ValueError: lists differ in number or size of their tensors.
    """
    kept: dict[int, tuple[ListMetadata, array[int] | None]] = rows.kept if isinstance(rows, Stack) else {}

    def locate(part: Sequence[Tensor]) -> tuple[ListMetadata, array[int] | None]:
        found = kept.get(id(part)) if id(part) in stacked else None
        if found is None:
            metadata = metadata_of(part)
            found = metadata, addresses_of(part, metadata) if metadata.plain else None
            if id(part) in stacked:
                kept[id(part)] = found
        return found

    present = [row for row in rows if row is not None]
    fields = [part for row in present for part in row.fields]
    stacked = {id(part) for part in fields if part is not None}
    (lengths, _, device, _), _ = locate(present[0].tensors)
    numbers: dict[int, int] = {}  # column of each list, by identity
    places: dict[bytes, int] = {}  # column of each set of addresses: lists may share tensors
    addresses: array[int] = array("q")
    dtypes: list[Any] = []
    for part in [*fields, *(write.into for write in writes), *others]:
        if part is None or id(part) in numbers:
            continue
        metadata, where = locate(part)
        # Kernels do not check bounds of a shorter tensor: they would access memory of other tensors.
        if metadata.lengths != lengths:
            raise ValueError("the tensors of a row, or of what is written, differ in size from those of the first row")
        if device is None or where is None or metadata.device != device or metadata.dtype not in DTYPES:
            return None
        place = places.setdefault(where.tobytes(), len(places))
        numbers[id(part)] = place
        if place == len(dtypes):
            dtypes.append(DTYPES[metadata.dtype])
            addresses.extend(where)

    def number(part: Sequence[Tensor] | None) -> int:
        return -1 if part is None else numbers[id(part)]

    def four(row: Row) -> tuple[int, int, int, int]:
        offset, scale, at, anchor = map(number, row.fields)
        return offset, scale, at, anchor

    assert device is not None
    return KernelOperands(
        device=device,
        dtypes=tuple(dtypes),
        rows=tuple(map(four, present)),
        writes=tuple((number(write.into), write.accumulate) for write in writes),
        others=tuple(map(number, others)),
        addresses=addresses,
        lengths=lengths,
        sizes=array("q", sizes_of(rows)),
    )
