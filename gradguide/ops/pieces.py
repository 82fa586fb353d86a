"""Cutting a bucket's tensors into pieces of bounded size, so that a pass over them needs bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gradguide.ops.row import Row, Write

__all__ = ["Piece", "pieces"]


class Piece(NamedTuple):
    """Elements ``start:stop`` of the bucket's tensor ``tensor``, in flat order; ``stop`` is None for a whole tensor."""

    tensor: int
    start: int
    stop: int | None


def pieces(rows: Sequence[Row | None], size: int, writes: Sequence[Write] = ()) -> Iterator[Piece]:
    """The pieces of at most ``size`` elements, in order; a tensor with a part that is not contiguous stays whole.

    Empty tensors give none.
    """
    lists: list[Sequence[Tensor]] = [
        part
        for row in rows
        if row is not None
        for part in (row.offset, row.scale, row.at, row.anchor)
        if part is not None
    ]
    lists.extend(write.into for write in writes)
    for index, tensor in enumerate(lists[0]):
        length = tensor.numel()
        if length == 0:
            continue
        if length <= size or not all(part[index].is_contiguous() for part in lists):
            yield Piece(index, 0, None)
        else:
            for start in range(0, length, size):
                yield Piece(index, start, min(start + size, length))
