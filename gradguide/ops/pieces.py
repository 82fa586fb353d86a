"""Cutting a bucket's tensors into blocks of bounded size, so that a pass over them needs bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from gradguide.ops.row import Row, Write

__all__ = ["Piece", "blocks", "flat", "target"]


class Piece(NamedTuple):
    """Elements ``start:stop`` of the bucket's tensor ``tensor``, in flat order; ``stop`` is None for all of it."""

    tensor: int
    start: int
    stop: int | None


def blocks(rows: Sequence[Row | None], scope: range, size: int, writes: Sequence[Write] = ()) -> Iterator[list[Piece]]:
    """Pieces of a scope's tensors, gathered into blocks of at most ``size`` elements, in order.

    Large tensors are cut; one with a part that is not contiguous stays whole, whatever its size. Empty tensors give
    no piece.
    """
    lists: list[Sequence[Tensor]] = [part for row in rows if row is not None for part in row.parts]
    lists.extend(write.into for write in writes)
    block: list[Piece] = []
    filled = 0
    for index in scope:
        length = lists[0][index].numel()
        if length == 0:
            continue
        if length <= size or not all(part[index].is_contiguous() for part in lists):
            found = [(Piece(index, 0, None), length)]
        else:
            cuts = [*range(0, length, size), length]
            found = [(Piece(index, a, b), b - a) for a, b in pairwise(cuts)]
        for piece, count in found:
            if block and filled + count > size:
                yield block
                block, filled = [], 0
            block.append(piece)
            filled += count
    if block:
        yield block


def flat(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
    """The elements of a piece, 1-D, for reading only: a view if the tensor is contiguous, else a copy."""
    tensor = tensors[piece.tensor].reshape(-1)
    return tensor if piece.stop is None else tensor[piece.start : piece.stop]


def target(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
    """The elements of a piece, for writing: 1-D, or the whole tensor in its own shape."""
    tensor = tensors[piece.tensor]
    return tensor if piece.stop is None else tensor.view(-1)[piece.start : piece.stop]
