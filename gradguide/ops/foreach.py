"""The portable backend: a bounded block of all rows at a time, coefficients on the device, no read by the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.ops.pack import pack, pack_list
from gradguide.ops.pieces import Piece, blocks, target
from gradguide.ops.row import Row, Write, check_writes, compute_dtype, scopes_of

__all__ = ["combine_", "gram"]

BLOCK = 1 << 22
"""Elements per block and row: 16 MiB in float32, which bounds the working memory whatever the model's size."""

CPU_BLOCK = 1 << 17
"""The same on a CPU, where a block should stay in cache."""


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrices of the rows [S, R, R]: products of rows scaled to at most 1, sums in float64 where the device has
    it."""
    grams = [_gram(rows, scope) for scope in scopes_of(rows)]
    return grams[0].unsqueeze(0) if len(grams) == 1 else torch.stack(grams)


def _gram(rows: Sequence[Row | None], scope: range) -> Tensor:
    device = _device(rows)
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(len(rows), len(rows), dtype=wide, device=device)
    for block in blocks(rows, scope, _block(device)):
        values = _pack(rows, block)
        largest = values.abs().amax(dim=1).to(wide)
        # Scaled by its own largest element, no row's products overflow or vanish. A row of zeros stays one; one that
        # holds Inf or NaN gives NaN.
        scale = torch.where(largest > 0, largest, 1.0)
        # In two factors, because the inverse of a denormal number overflows.
        root = scale.sqrt().to(values.dtype).unsqueeze(1)
        unit = values / root / root
        products = torch.stack([(unit * row).sum(dim=1, dtype=wide) for row in unit])
        total += products * scale.outer(scale)
    return total


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 drops its row whatever that holds, NaN included.
    """
    check_writes(rows, writes)
    wide = torch.float64 if _device(rows).type != "mps" else torch.float32
    coefficients = [write.coefficients.to(wide) for write in writes]
    for number, scope in enumerate(scopes_of(rows)):
        _combine_(rows, scope, writes, [each[number] for each in coefficients])


def _combine_(
    rows: Sequence[Row | None], scope: range, writes: Sequence[Write], coefficients: Sequence[Tensor]
) -> None:
    for block in blocks(rows, scope, _block(_device(rows)), writes):
        values = _pack(rows, block)
        results = []
        for write, c in zip(writes, coefficients, strict=True):
            bound = torch.finfo(values.dtype).max
            column = c.clamp(-bound, bound).to(values.dtype).unsqueeze(1)
            result = torch.where(column == 0, 0.0, values * column).sum(dim=0)
            if write.accumulate:
                result += pack_list(write.into, block, values.dtype)
            results.append(result)
        for write, result in zip(writes, results, strict=True):
            targets = [target(write.into, piece) for piece in block]
            parts = torch.split(result, [target.numel() for target in targets])
            torch._foreach_copy_(
                targets, [part.view(target.shape) for part, target in zip(parts, targets, strict=True)]
            )


def _pack(rows: Sequence[Row | None], block: list[Piece]) -> Tensor:
    """The rows' elements in the block, as one tensor [R, elements]."""
    dtype = compute_dtype(rows)
    packed = [None if row is None else pack(row, block, dtype) for row in rows]
    example = next(row for row in packed if row is not None)
    return torch.stack([torch.zeros_like(example) if row is None else row for row in packed])


def _device(rows: Sequence[Row | None]) -> torch.device:
    return next(row for row in rows if row is not None).tensors[0].device


def _block(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else BLOCK
