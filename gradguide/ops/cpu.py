"""The CPU backend: a tensor's rows are read once and stay in cache while all their products are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from gradguide.ops.pieces import Piece, pieces
from gradguide.ops.row import Row, Write, compute_dtype

__all__ = ["combine_", "gram"]

PIECE = 1 << 17
"""Elements per piece: 512 KiB per row in float32. A sum of so many products in float32 is good to about 1e-6."""

# Between these a float32 sum of squares neither overflows nor loses small terms to underflow; outside, the piece is
# done again in float64.
_SMALLEST, _LARGEST = 1e-24, 1e30

# Below this a row's own coefficient is too small to recover its old value from its new one.
_INVERTIBLE = 0.1


def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrix of the rows: products in the rows' precision per piece, float64 across pieces. Tensor [R, R]."""
    dtype = compute_dtype(rows)
    present = [(index, row) for index, row in enumerate(rows) if row is not None]
    count = len(present)
    pairs = list(combinations_with_replacement(range(count), 2))
    squares = [k for k, (a, b) in enumerate(pairs) if a == b]
    totals = [0.0] * len(pairs)
    dot = torch.dot
    for piece, values in _walk([row for _, row in present], dtype):
        products = [dot(values[a], values[b]).item() for a, b in pairs]
        if dtype == torch.float32 and not all(_SMALLEST < products[k] < _LARGEST for k in squares):
            wide = [row.flat(piece.tensor, torch.float64, piece.start, piece.stop) for _, row in present]
            products = [dot(wide[a], wide[b]).item() for a, b in pairs]
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    result = [[0.0] * len(rows) for _ in rows]
    for (a, b), total in zip(pairs, totals, strict=True):
        first, second = present[a][0], present[b][0]
        result[first][second] = result[second][first] = total
    return torch.tensor(result, dtype=torch.float64)


def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would change nothing is not made.
    """
    plan = [(write, _coefficients(write, rows)) for write in writes]
    plan = [(write, coefficients) for write, coefficients in plan if not _trivial(write, coefficients, rows)]
    if plan and not _in_place(rows, plan):
        _by_copy(rows, plan)


def _in_place(rows: Sequence[Row | None], plan: list[tuple[Write, dict[int, float]]]) -> bool:
    """Write each row over itself, without working memory: ``x <- c x + sum of others``.

    A later write that wants the old value of a row already written has it from the new one. Returns False, with nothing
    done, where that cannot be had: a write that is into no row, a precision that would round on the way, a coefficient
    out of range.
    """
    dtype = compute_dtype(rows)
    steps: list[tuple[int, float, dict[int, float]]] = []
    wanted = [dict(coefficients) for _, coefficients in plan]
    for number, (write, _) in enumerate(plan):
        own = _row_of(write, rows)
        if own is None or write.accumulate or any(tensor.dtype != dtype for tensor in write.into):
            return False
        others = wanted[number]
        factor = others.pop(own, 0.0)
        for later in wanted[number + 1 :]:
            if own in later:
                if abs(factor) < _INVERTIBLE:
                    return False
                share = later[own] / factor
                later[own] = share
                for index, coefficient in others.items():
                    later[index] = later.get(index, 0.0) - share * coefficient
        steps.append((own, factor, others))
    if any(abs(c) > _LARGEST for _, factor, others in steps for c in (factor, *others.values())):
        return False
    used = sorted({index for own, _, others in steps for index in (own, *others)})
    position = {index: k for k, index in enumerate(used)}
    chosen = [row for index in used if (row := rows[index]) is not None]
    if any(not t.is_contiguous() for row in chosen if row.at is None for t in row.offset or ()):
        return False
    for _, values in _walk(chosen, dtype):
        for own, factor, others in steps:
            target = values[position[own]]
            if factor != 1.0:
                target.mul_(factor)
            for index, coefficient in others.items():
                target.add_(values[position[index]], alpha=coefficient)
    return True


def _by_copy(rows: Sequence[Row | None], plan: list[tuple[Write, dict[int, float]]]) -> None:
    """Compute every result of a piece in working memory, then copy all of them over."""
    dtype = compute_dtype(rows)
    if any(abs(c) > _LARGEST for _, coefficients in plan for c in coefficients.values()):
        dtype = torch.float64
    for piece in pieces(rows, PIECE, [write for write, _ in plan]):
        values: dict[int, Tensor] = {}
        results = []
        for write, coefficients in plan:
            target = _slice(write.into, piece)
            result = target.to(dtype, copy=True) if write.accumulate else torch.zeros_like(target, dtype=dtype)
            for index, coefficient in coefficients.items():
                row = rows[index]
                assert row is not None
                if index not in values:
                    values[index] = row.flat(piece.tensor, dtype, piece.start, piece.stop).view_as(target)
                result.add_(values[index], alpha=coefficient)
            results.append((target, result))
        for target, result in results:
            target.copy_(result)


def _walk(rows: Sequence[Row], dtype: torch.dtype) -> Iterator[tuple[Piece, list[Tensor]]]:
    """Each piece with the rows' values there, 1-D and of ``dtype``; views of the rows' own memory where that is so."""
    views = [_views(row, dtype) for row in rows]
    for piece in pieces(rows, PIECE):
        index, start, stop = piece
        if stop is None:
            yield (
                piece,
                [
                    row.flat(index, dtype) if view is None else view[index]
                    for row, view in zip(rows, views, strict=True)
                ],
            )
        else:
            yield (
                piece,
                [
                    row.flat(index, dtype, start, stop) if view is None else view[index][start:stop]
                    for row, view in zip(rows, views, strict=True)
                ],
            )


def _views(row: Row, dtype: torch.dtype) -> list[Tensor] | None:
    """The tensors of a plain row as 1-D views, or None where there are no such views."""
    if row.at is not None or row.offset is None:
        return None
    if not all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in row.offset):
        return None
    return [tensor.view(-1) for tensor in row.offset]


def _coefficients(write: Write, rows: Sequence[Row | None]) -> dict[int, float]:
    """The coefficients that are not 0, of rows that are there."""
    found = enumerate(write.coefficients.tolist())
    return {index: c for index, c in found if c != 0.0 and rows[index] is not None}


def _row_of(write: Write, rows: Sequence[Row | None]) -> int | None:
    """The plain row that lies in the memory that is written, if there is one."""
    for index, row in enumerate(rows):
        if row is not None and row.at is None and row.offset is write.into:
            return index
    return None


def _trivial(write: Write, coefficients: dict[int, float], rows: Sequence[Row | None]) -> bool:
    return not coefficients if write.accumulate else coefficients == {_row_of(write, rows): 1.0}


def _slice(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
    tensor = tensors[piece.tensor].detach()
    return tensor if piece.stop is None else tensor.view(-1)[piece.start : piece.stop]
