"""Rows as kernels see them: distinct lists of tensors (columns), and for each row the columns that it is formed of."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradguide.ops.row import Row, Write

__all__ = ["Columns", "columns_of"]

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


@dataclass(frozen=True, slots=True)
class Columns:
    """What a kernel is specialised on, and where it finds its data.

    device: of all tensors.
    dtypes: Triton's type of each column.
    rows: for each row its columns: offset, scale, at, anchor; -1 is absent.
    writes: for each write its column, and whether it accumulates.
    addresses: [columns, tensors].
    lengths: [tensors], elements.
    """

    device: torch.device
    dtypes: tuple[Any, ...]
    rows: tuple[tuple[int, int, int, int], ...]
    writes: tuple[tuple[int, bool], ...]
    addresses: array[int]
    lengths: array[int]

    @property
    def tensors(self) -> int:
        return len(self.lengths)


def columns_of(rows: Sequence[Row], writes: Sequence[Write] = ()) -> Columns | None:
    """The columns of rows and writes, or None where a tensor is not contiguous or of a precision without a kernel.

    A list that stands in several places is one column, read once.

    Raises:
        ValueError: lists differ in number or size of their tensors.
    """
    lists: dict[int, Sequence[Tensor]] = {}

    def number(part: Sequence[Tensor] | None) -> int:
        if part is None:
            return -1
        lists.setdefault(id(part), part)
        return list(lists).index(id(part))

    formed = tuple((number(row.offset), number(row.scale), number(row.at), number(row.anchor)) for row in rows)
    written = tuple((number(write.into), write.accumulate) for write in writes)
    found = list(lists.values())
    lengths = array("q", map(Tensor.numel, found[0]))
    addresses, dtypes = array("q"), []
    for part in found:
        # Kernels go by address: a shorter tensor would have them read or write memory of others.
        if array("q", map(Tensor.numel, part)) != lengths:
            raise ValueError("the tensors of a row, or of what is written, differ in size from those of the first row")
        kinds = set(map(_DTYPE, part))
        if len(kinds) > 1 or not kinds <= DTYPES.keys() or not all(map(Tensor.is_contiguous, part)):
            return None
        if len(set(map(_DEVICE, part)) | {found[0][0].device}) > 1:
            return None
        dtypes.append(DTYPES[kinds.pop()])
        addresses.extend(map(Tensor.data_ptr, part))
    return Columns(found[0][0].device, tuple(dtypes), formed, written, addresses, lengths)
