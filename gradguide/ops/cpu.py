"""The CPU backend: pieces that stay in cache, read once for all their products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.ops.pieces import Piece, pieces
from gradguide.ops.row import Row, Write, compute_dtype

__all__ = ["combine_", "gram"]

PIECE = 1 << 16
"""Elements per piece: 256 KiB per row in float32, so that a few rows fit in a core's second-level cache."""

# Between these a float32 sum of squares neither overflows nor loses small terms to underflow; outside, the piece is
# done again in float64.
_SMALLEST, _LARGEST = 1e-24, 1e30


def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrix of the rows: products in the rows' precision per piece, float64 across pieces. Tensor [R, R]."""
    dtype = compute_dtype(rows)
    present = [(index, row) for index, row in enumerate(rows) if row is not None]
    total = [[0.0] * len(rows) for _ in rows]
    for piece in pieces(rows, PIECE):
        products = _products([row for _, row in present], piece, dtype)
        if dtype == torch.float32 and not all(_SMALLEST < products[k][k] < _LARGEST for k in range(len(present))):
            products = _products([row for _, row in present], piece, torch.float64)
        for j, (a, _) in enumerate(present):
            for k, (b, _) in enumerate(present[: j + 1]):
                total[a][b] += products[j][k]
    for a in range(len(rows)):
        for b in range(a):
            total[b][a] = total[a][b]
    return torch.tensor(total, dtype=torch.float64)


def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would change nothing is not made.
    """
    planned = [(write, write.coefficients.tolist()) for write in writes]
    planned = [(write, coefficients) for write, coefficients in planned if not _trivial(write, coefficients, rows)]
    if not planned:
        return
    dtype = compute_dtype(rows)
    largest = max(abs(c) for _, coefficients in planned for c in coefficients)
    if largest > _LARGEST:
        dtype = torch.float64
    for piece in pieces(rows, PIECE, [write for write, _ in planned]):
        values: dict[int, Tensor] = {}
        results = []
        for write, coefficients in planned:
            result: Tensor | None = None
            if write.accumulate:
                result = _slice(write.into, piece).to(dtype, copy=True)
            for index, (coefficient, row) in enumerate(zip(coefficients, rows, strict=True)):
                if row is None or coefficient == 0.0:
                    continue
                if index not in values:
                    values[index] = row.flat(piece.tensor, dtype, piece.start, piece.stop)
                if result is None:
                    result = values[index] * coefficient
                else:
                    result.add_(values[index], alpha=coefficient)
            results.append(result)
        for (write, _), result in zip(planned, results, strict=True):
            target = write.into[piece.tensor].detach()
            if piece.stop is not None:
                target = target.view(-1)[piece.start : piece.stop]
            if result is None:
                target.zero_()
            else:
                target.copy_(result.view(target.shape))


def _products(rows: Sequence[Row], piece: Piece, dtype: torch.dtype) -> list[list[float]]:
    flats = [row.flat(piece.tensor, dtype, piece.start, piece.stop) for row in rows]
    return [[float(torch.dot(a, b)) for b in flats[: j + 1]] for j, a in enumerate(flats)]


def _trivial(write: Write, coefficients: list[float], rows: Sequence[Row | None]) -> bool:
    if write.accumulate:
        return not any(coefficients)
    for index, row in enumerate(rows):
        if row is not None and row.at is None and row.offset is write.into:
            others = any(c != 0.0 for k, c in enumerate(coefficients) if k != index and rows[k] is not None)
            return coefficients[index] == 1.0 and not others
    return False


def _slice(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
    flat = tensors[piece.tensor].detach().reshape(-1)
    return flat if piece.stop is None else flat[piece.start : piece.stop]
