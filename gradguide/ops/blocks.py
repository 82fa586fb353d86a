"""Split a bucket's tensors into blocks of bounded size, and read and write the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write, lists_of, scopes_of

__all__ = ["LARGE", "Block", "blocks", "row_tensors", "row_vector", "store", "tensors_of", "vector"]

LARGE = 3 << 15
"""Maximum number of elements of a block on a CPU: 384 KiB in float32, so that the rows of a block stay in cache."""

DEVICE_LARGE = 1 << 22
"""Maximum number of elements of a block on other devices. It is larger because each call costs a launch."""


class Block(NamedTuple):
    """Part of a scope: several whole tensors, or elements ``start:stop`` of one.

    ``stop`` is None for whole tensors.
    """

    scope: int
    tensors: range
    start: int = 0
    stop: int | None = None


def blocks(rows: Sequence[Row | None], writes: Sequence[Write] = ()) -> Iterator[Block]:
    """Yield the blocks of all scopes, in order. A tensor that is not contiguous in every list is not split.

    On a CPU, a tensor of at least an eighth of the largest block is one block: one tensor takes fewer operations. On
    other devices fewer blocks take fewer launches.
    """
    lists = lists_of(rows, writes)
    if not lists[0]:
        return
    on_cpu = lists[0][0].device.type == "cpu"
    large = LARGE if on_cpu else DEVICE_LARGE
    least = large // 8 if on_cpu else large + 1
    lengths = list(map(Tensor.numel, lists[0]))
    for scope, tensors in enumerate(scopes_of(rows)):
        first, filled = tensors.start, 0
        for index in tensors:
            length = lengths[index]
            alone = length >= least
            if filled and (alone or filled + length > large):
                yield Block(scope, range(first, index))
                first, filled = index, 0
            filled += length
            if alone and (length <= large or not all(part[index].is_contiguous() for part in lists)):
                yield Block(scope, range(index, index + 1))
            elif alone:
                for start in range(0, length, large):
                    yield Block(scope, range(index, index + 1), start, min(start + large, length))
            if alone:
                first, filled = index + 1, 0
        if filled:
            yield Block(scope, range(first, tensors.stop))


def tensors_of(part: Sequence[Tensor], block: Block) -> list[Tensor]:
    """Return the tensors of a block, or a flat view of part of one."""
    first = block.tensors.start
    if block.stop is not None:
        return [part[first].view(-1)[block.start : block.stop]]
    return list(part[first : block.tensors.stop])


def row_tensors(row: Row, block: Block, dtype: torch.dtype) -> list[Tensor]:
    """Return the row in a block: tensors of ``dtype``, read-only. They may alias the tensors of the row."""

    def taken(part: Sequence[Tensor]) -> list[Tensor]:
        found = tensors_of(part, block)
        return found if found[0].dtype == dtype else [tensor.to(dtype) for tensor in found]

    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return taken(row.offset)
    result = list(torch._foreach_sub(taken(row.at), taken(row.anchor)))
    if row.scale is not None and row.offset is not None:
        return list(torch._foreach_addcmul(taken(row.offset), taken(row.scale), result))
    if row.scale is not None:
        torch._foreach_mul_(result, taken(row.scale))
    if row.offset is not None:
        torch._foreach_add_(result, taken(row.offset))
    return result


def vector(part: Sequence[Tensor], block: Block, dtype: torch.dtype) -> Tensor:
    """Return the elements of a block: Tensor [elements] of ``dtype``. It may be a view of the tensor."""
    if len(block.tensors) > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors_of(part, block)])
    else:
        flat = part[block.tensors.start].reshape(-1)
        if block.stop is not None:
            flat = flat[block.start : block.stop]
    return flat if flat.dtype == dtype else flat.to(dtype)


def row_vector(row: Row, block: Block, dtype: torch.dtype) -> Tensor:
    """Return the row's elements in a block: Tensor [elements] of ``dtype``, read-only."""
    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return vector(row.offset, block, dtype)
    result = vector(row.at, block, dtype) - vector(row.anchor, block, dtype)
    if row.scale is not None:
        result.mul_(vector(row.scale, block, dtype))
    if row.offset is not None:
        result.add_(vector(row.offset, block, dtype))
    return result


def store(into: Sequence[Tensor], block: Block, result: Tensor) -> None:
    """Write a vector [elements] into a block."""
    targets = tensors_of(into, block)
    parts = result.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view(target.shape) for part, target in zip(parts, targets, strict=True)])
