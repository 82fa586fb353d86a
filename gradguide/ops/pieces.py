"""Cuts a bucket's tensors into pieces of bounded size, and reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write, scopes_of

__all__ = ["LARGE", "Piece", "pieces", "row_tensors", "row_vector", "store", "tensors_of", "vector"]

LARGE = 1 << 17
"""Most elements of a piece on a CPU: 512 KiB in float32, so that a piece stays in cache while it is worked on."""

DEVICE_LARGE = 1 << 22
"""The same on other devices, where each call costs a launch."""


class Piece(NamedTuple):
    """Part of a scope: several whole tensors, or elements ``start:stop`` of one.

    ``stop`` is None for whole tensors.
    """

    scope: int
    tensors: range
    start: int = 0
    stop: int | None = None


def pieces(rows: Sequence[Row | None], writes: Sequence[Write] = ()) -> Iterator[Piece]:
    """Yield the pieces of all scopes, in order. A tensor that is not contiguous in some list stays whole."""
    lists = [part for row in rows if row is not None for part in row.parts]
    lists += [write.into for write in writes]
    if not lists[0]:
        return
    large = LARGE if lists[0][0].device.type == "cpu" else DEVICE_LARGE
    lengths = list(map(Tensor.numel, lists[0]))
    for scope, tensors in enumerate(scopes_of(rows)):
        first, filled = tensors.start, 0
        for index in tensors:
            length = lengths[index]
            if filled and filled + length > large:
                yield Piece(scope, range(first, index))
                first, filled = index, 0
            filled += length
            if filled > large and all(part[index].is_contiguous() for part in lists):
                for start in range(0, length, large):
                    yield Piece(scope, range(index, index + 1), start, min(start + large, length))
                first, filled = index + 1, 0
        if filled:
            yield Piece(scope, range(first, tensors.stop))


def tensors_of(part: Sequence[Tensor], piece: Piece) -> list[Tensor]:
    """Return the tensors of a piece, or a flat view of part of one."""
    first = piece.tensors.start
    if piece.stop is not None:
        return [part[first].view(-1)[piece.start : piece.stop]]
    return list(part[first : piece.tensors.stop])


def row_tensors(row: Row, piece: Piece, dtype: torch.dtype) -> list[Tensor]:
    """Return the row in a piece: tensors of ``dtype``, for reading. They may be those of the row."""

    def taken(part: Sequence[Tensor]) -> list[Tensor]:
        found = tensors_of(part, piece)
        return found if found[0].dtype == dtype else [tensor.to(dtype) for tensor in found]

    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return taken(row.offset)
    result = list(torch._foreach_sub(taken(row.at), taken(row.anchor)))
    if row.scale is not None:
        torch._foreach_mul_(result, taken(row.scale))
    if row.offset is not None:
        torch._foreach_add_(result, taken(row.offset))
    return result


def vector(part: Sequence[Tensor], piece: Piece, dtype: torch.dtype) -> Tensor:
    """Return the elements of a piece: Tensor [elements] of ``dtype``. It may be a view of the tensor's own memory."""
    if len(piece.tensors) > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors_of(part, piece)])
    else:
        flat = part[piece.tensors.start].reshape(-1)
        if piece.stop is not None:
            flat = flat[piece.start : piece.stop]
    return flat if flat.dtype == dtype else flat.to(dtype)


def row_vector(row: Row, piece: Piece, dtype: torch.dtype) -> Tensor:
    """Return the row's elements in a piece: Tensor [elements] of ``dtype``, for reading."""
    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return vector(row.offset, piece, dtype)
    result = vector(row.at, piece, dtype) - vector(row.anchor, piece, dtype)
    if row.scale is not None:
        result.mul_(vector(row.scale, piece, dtype))
    if row.offset is not None:
        result.add_(vector(row.offset, piece, dtype))
    return result


def store(into: Sequence[Tensor], piece: Piece, result: Tensor) -> None:
    """Write a vector [elements] into a piece."""
    targets = tensors_of(into, piece)
    parts = result.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view(target.shape) for part, target in zip(parts, targets, strict=True)])
