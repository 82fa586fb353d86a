"""The CPU backend: blocks that stay in cache while all their products are taken; coefficients read by the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops.pack import pack, pack_list
from gradguide.ops.pieces import Piece, blocks, target
from gradguide.ops.row import Row, Write, compute_dtype

__all__ = ["combine_", "gram"]

BLOCK = 1 << 18
"""Elements per block: 1 MiB per row in float32. A sum of so many products in float32 is good to about 1e-6."""

# Between these a float32 sum of squares neither overflows nor loses small terms to underflow; outside, the block is
# done again in float64.
_SMALLEST, _LARGEST = 1e-24, 1e30

# Below this a row's own coefficient is too small to recover its old value from its new one.
_INVERTIBLE = 0.1


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrix of the rows: products in the rows' precision per block, float64 across blocks. Tensor [R, R]."""
    dtype = compute_dtype(rows)
    present = [(index, row) for index, row in enumerate(rows) if row is not None]
    pairs = list(combinations_with_replacement(range(len(present)), 2))
    totals = [0.0] * len(pairs)
    cut = list(blocks(rows, BLOCK))
    longest = max((sum(_lengths(present[0][1].tensors, block)) for block in cut), default=0)
    work = [torch.empty(longest, dtype=dtype) for _ in present]
    for block in cut:
        products = _products([pack(row, block, dtype, w) for (_, row), w in zip(present, work, strict=True)], pairs)
        squares = [product for product, (a, b) in zip(products, pairs, strict=True) if a == b]
        if dtype == torch.float32 and not all(_SMALLEST < square < _LARGEST for square in squares):
            products = _products([pack(row, block, torch.float64) for _, row in present], pairs)
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    result = [[0.0] * len(rows) for _ in rows]
    for (a, b), total in zip(pairs, totals, strict=True):
        first, second = present[a][0], present[b][0]
        result[first][second] = result[second][first] = total
    return torch.tensor(result, dtype=torch.float64)


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would change nothing is not made.
    """
    plan = [_Sum(write, _coefficients(write, rows), _row_of(write, rows)) for write in writes]
    plan = [each for each in plan if not each.trivial]
    if not plan:
        return
    dtype = compute_dtype(rows)
    if any(abs(c) > _LARGEST for each in plan for c in each.terms.values()):
        dtype = torch.float64
    chain = _chain(plan, dtype)
    for block in blocks(rows, BLOCK, [each.write for each in plan]):
        if chain is not None:
            _overwrite(plan, chain, rows, block, dtype)
        else:
            used = {index for each in plan for index in each.terms}
            values = {index: pack(row, block, dtype) for index in used if (row := rows[index]) is not None}
            results = [_sum(each, block, values, dtype) for each in plan]
            for each, result in zip(plan, results, strict=True):
                torch._foreach_copy_(_targets(each.write, block), _parts(each.write, block, result))


class _Sum(NamedTuple):
    """A write with the coefficients that are not 0, by row, and the row whose memory it overwrites, if any."""

    write: Write
    terms: dict[int, float]
    own: int | None

    @property
    def trivial(self) -> bool:
        return not self.terms if self.write.accumulate else self.terms == {self.own: 1.0}


def _chain(plan: list[_Sum], dtype: torch.dtype) -> list[tuple[float, dict[int, float]]] | None:
    """The writes as ``x <- factor * x + sum of others``, each of which sees what those before it have written.

    It needs no working memory for results. A write that wants the old value of a row already overwritten has it from
    the new one: ``old = (new - sum of others) / factor``. None where that would lose precision, or a write is over no
    row.
    """
    if any(tensor.dtype != dtype for each in plan for tensor in each.write.into):
        return None
    if len(plan) == 1 and plan[0].write.accumulate and plan[0].own not in plan[0].terms:
        return [(1.0, plan[0].terms)]
    wanted = [dict(each.terms) for each in plan]
    chain: list[tuple[float, dict[int, float]]] = []
    for number, each in enumerate(plan):
        if each.own is None or each.write.accumulate:
            return None
        others = wanted[number]
        factor = others.pop(each.own, 0.0)
        for later in wanted[number + 1 :]:
            if each.own in later:
                if abs(factor) < _INVERTIBLE:
                    return None
                share = later[each.own] / factor
                later[each.own] = share
                for index, coefficient in others.items():
                    later[index] = later.get(index, 0.0) - share * coefficient
        chain.append((factor, others))
    return chain


def _overwrite(
    plan: list[_Sum],
    chain: list[tuple[float, dict[int, float]]],
    rows: Sequence[Row | None],
    block: list[Piece],
    dtype: torch.dtype,
) -> None:
    def read(index: int) -> list[Tensor]:
        row = rows[index]
        assert row is not None
        if row.at is None and row.offset is not None:
            return [target(row.offset, piece) for piece in block]
        return _parts(plan[0].write, block, pack(row, block, dtype))

    # All that is formed on the fly is formed before anything is written.
    values = {index: read(index) for _, others in chain for index in others if not _grown(plan[0].write, rows[index])}
    for each, (factor, others) in zip(plan, chain, strict=True):
        targets = _targets(each.write, block)
        if factor != 1.0:
            torch._foreach_mul_(targets, factor)
        for index, coefficient in sorted(others.items(), key=lambda item: item[0] in values):
            if index in values:
                torch._foreach_add_(targets, values[index], alpha=coefficient)
            else:
                anchor = rows[index].anchor  # type: ignore[union-attr]
                assert anchor is not None
                # x + c (x - before), rounded once.
                torch._foreach_lerp_(targets, [target(anchor, piece) for piece in block], -coefficient)


def _grown(write: Write, row: Row | None) -> bool:
    """Whether the row is what the target has grown by: ``into - anchor``."""
    return write.accumulate and row is not None and row.at is write.into and row.scale is None and row.offset is None


def _sum(each: _Sum, block: list[Piece], values: dict[int, Tensor], dtype: torch.dtype) -> Tensor:
    """The write's result over the block, in new memory."""
    terms = list(each.terms.items())
    if each.write.accumulate:
        result = pack_list(each.write.into, block, dtype).clone()
    elif terms:
        index, coefficient = terms.pop(0)
        result = values[index] * coefficient
    else:
        return pack_list(each.write.into, block, dtype).new_zeros(()).expand(sum(_lengths(each.write.into, block)))
    for index, coefficient in terms:
        result.add_(values[index], alpha=coefficient)
    return result


def _targets(write: Write, block: list[Piece]) -> list[Tensor]:
    return [target(write.into, piece) for piece in block]


def _parts(write: Write, block: list[Piece], values: Tensor) -> list[Tensor]:
    """The values of a block, cut into the shapes of the write's targets."""
    parts = torch.split(values, _lengths(write.into, block))
    return [part.view(t.shape) for part, t in zip(parts, _targets(write, block), strict=True)]


def _lengths(tensors: Sequence[Tensor], block: list[Piece]) -> list[int]:
    return [tensors[p.tensor].numel() if p.stop is None else p.stop - p.start for p in block]


def _products(values: list[Tensor], pairs: list[tuple[int, int]]) -> list[float]:
    return [torch.dot(values[a], values[b]).item() for a, b in pairs]


def _coefficients(write: Write, rows: Sequence[Row | None]) -> dict[int, float]:
    pairs = zip(write.coefficients.tolist(), rows, strict=True)
    return {index: c for index, (c, row) in enumerate(pairs) if c != 0.0 and row is not None}


def _row_of(write: Write, rows: Sequence[Row | None]) -> int | None:
    """The plain row that lies in the memory that is written, if there is one."""
    for index, row in enumerate(rows):
        if row is not None and row.at is None and row.offset is write.into:
            return index
    return None
