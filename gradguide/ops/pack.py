"""One block of a row as a single 1-D tensor: in place where its memory lies so, else gathered into working memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.ops.pieces import Piece, flat
from gradguide.ops.row import Row

__all__ = ["adjacent", "lay_out", "pack", "pack_list"]

ALIGNMENT = 64
"""Bytes; what torch's allocator gives, and the widest vector of a CPU."""


def pack(row: Row, block: list[Piece], dtype: torch.dtype) -> Tensor:
    """The row's elements in the block, 1-D and of ``dtype``; for reading only, since it may be the row's own memory."""
    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return pack_list(row.offset, block, dtype)
    result = pack_list(row.at, block, dtype) - pack_list(row.anchor, block, dtype)
    if row.scale is not None:
        result.mul_(pack_list(row.scale, block, dtype))
    if row.offset is not None:
        result.add_(pack_list(row.offset, block, dtype))
    return result


def pack_list(tensors: Sequence[Tensor], block: list[Piece], dtype: torch.dtype) -> Tensor:
    """A list's elements in the block, 1-D and of ``dtype``; for reading only."""
    whole = adjacent(tensors, block, dtype)
    # A sum of products is taken in another order, and rounds otherwise, where its memory begins elsewhere; so that a
    # resumed run repeats every bit, all of them begin on a boundary.
    if whole is not None and whole.data_ptr() % ALIGNMENT == 0:
        return whole
    return torch.cat([flat(tensors, piece) for piece in block]).to(dtype)


def lay_out(like: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Zeros in the shapes of ``like``, of their dtype or the one given, one after the other in one memory per device.

    A pass over them then needs no gathering.
    """
    totals: dict[tuple[torch.device, torch.dtype], int] = {}
    for tensor in like:
        key = (tensor.device, dtype or tensor.dtype)
        totals[key] = totals.get(key, 0) + tensor.numel()
    memory = {key: torch.zeros(total, device=key[0], dtype=key[1]) for key, total in totals.items()}
    used = dict.fromkeys(memory, 0)
    result = []
    for tensor in like:
        key = (tensor.device, dtype or tensor.dtype)
        start = used[key]
        used[key] += tensor.numel()
        result.append(memory[key][start : used[key]].view(tensor.shape))
    return result


def adjacent(tensors: Sequence[Tensor], block: list[Piece], dtype: torch.dtype) -> Tensor | None:
    """The block as one view of the tensors' memory, or None where they do not lie there one after the other."""
    first, last = block[0], block[-1]
    start, tail = tensors[first.tensor], tensors[last.tensor]
    if start.dtype != dtype or not start.is_contiguous():
        return None
    if first.tensor == last.tensor:
        return flat(tensors, Piece(first.tensor, first.start, last.stop))
    width = start.element_size()
    begin = end = start.data_ptr() + width * first.start
    for index, skipped, stop in block:
        tensor = tensors[index]
        if tensor.data_ptr() + width * skipped != end or tensor.dtype != dtype or not tensor.is_contiguous():
            return None
        end += width * ((tensor.numel() if stop is None else stop) - skipped)
    # Memory that touches may still be two allocations; then the last tensor does not lie in the first one's storage.
    storage = start.untyped_storage()
    if tail.device != start.device or end > storage.data_ptr() + storage.nbytes():
        return None
    return start.as_strided(((end - begin) // width,), (1,), start.storage_offset() + first.start)
