"""The passes of the portable backend on a CPU, where the host reads products and coefficients.

Memory traffic is the cost: blocks stay in cache, and a combination is written in place, without temporaries, if it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradguide.ops.blocks import blocks, row_tensors, tensors_of
from gradguide.ops.row import Row, Write, compute_dtype, scopes_of

__all__ = ["SMALL", "combine_on_cpu", "gram_on_cpu"]

SMALL = 1 << 11
"""Tensors of at most this many elements are measured together, scope by scope, in float64."""

TOGETHER = 64
"""Maximum number of small tensors that are measured together."""

DOT = 1 << 15
"""Maximum number of elements of a float32 product. The error grows with their number. Relative to the product of the
lengths it reaches 7.5e-6 if all elements are equal and every addition rounds the same way, and 3e-7 for random
elements."""

SOUND = (1e-24, 1e30)
"""Range of squared lengths in which float32 products neither overflow nor lose digits to underflow."""

WIDEST = 1e30
"""Largest coefficient of a combination in float32. Larger ones may overflow, so they use float64."""

CANCELLED = 0.25
"""Largest change of a coefficient when writes are made one after the other, relative to it. See ``_one_by_one``."""

PIECE = 4 * DOT
"""Maximum number of elements of a row that is computed at once."""

Pairs = Sequence[tuple[int, int]]
Values = Mapping[int, list[Tensor]]


def gram_on_cpu(rows: Sequence[Row | None]) -> Tensor:
    """Return the Gram matrices of the rows: Tensor [S, R, R], float64.

    Raises:
        OverflowError: squares of finite float64 rows overflow.
    """
    slots = [index for index, row in enumerate(rows) if row is not None]
    present = [row for row in rows if row is not None]
    pairs = list(combinations_with_replacement(range(len(present)), 2))
    dtype = compute_dtype(rows)
    lengths = list(map(Tensor.numel, present[0].tensors))
    sums = []
    for tensors in scopes_of(rows):
        found = [[0.0] * len(pairs)]
        small = [index for index in tensors if lengths[index] <= SMALL]
        for start in range(0, len(small), TOGETHER):
            taken = small[start : start + TOGETHER]
            vectors = [torch.cat([_value(row, index, dtype) for index in taken]) for row in present]
            found.append(_wide_products(vectors, pairs))
        for index in tensors:
            if SMALL < lengths[index] <= PIECE:
                found += _products([_value(row, index, dtype) for row in present], pairs)
            elif lengths[index] > PIECE:
                for piece in _pieces(present, index):
                    found += _products([_value(row, 0, dtype) for row in piece], pairs)
        sums.append([sum(column) for column in zip(*found, strict=True)])
    result = torch.zeros(len(sums), len(rows), len(rows), dtype=torch.float64)
    for number, (a, b) in enumerate(pairs):
        column = torch.tensor([each[number] for each in sums], dtype=torch.float64)
        result[:, slots[a], slots[b]] = result[:, slots[b], slots[a]] = column
    return result


def _pieces(rows: Sequence[Row], index: int) -> Iterator[list[Row]]:
    """Yield the rows over parts of tensor ``index``, as rows over one vector of at most ``PIECE`` elements."""
    flat = [[None if part is None else part[index].reshape(-1) for part in row.fields] for row in rows]
    for start in range(0, rows[0].tensors[index].numel(), PIECE):
        cut = [[None if part is None else [part[start : start + PIECE]] for part in parts] for parts in flat]
        yield [Row(offset=offset, scale=scale, at=at, anchor=anchor) for offset, scale, at, anchor in cut]


def _value(row: Row, index: int, dtype: torch.dtype) -> Tensor:
    """Return the row over tensor ``index``: Tensor [elements] of ``dtype``, read-only."""
    if row.at is None or row.anchor is None:
        assert row.offset is not None
        return _as(row.offset[index], dtype).reshape(-1)
    value = _as(row.at[index], dtype) - _as(row.anchor[index], dtype)
    if row.scale is not None:
        value *= _as(row.scale[index], dtype)
    if row.offset is not None:
        value += _as(row.offset[index], dtype)
    return value.reshape(-1)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _products(vectors: Sequence[Tensor], pairs: Pairs) -> list[list[float]]:
    """Return the products of all pairs of vectors [elements], part by part: in float32 if they are in its range."""
    if vectors[0].numel() > DOT:
        parts = zip(*(vector.split(DOT) for vector in vectors), strict=True)
        return [found for part in parts for found in _products(part, pairs)]
    products = [torch.dot(vectors[a], vectors[b]).item() for a, b in pairs]
    for (a, b), product in zip(pairs, products, strict=True):
        if a == b and not SOUND[0] < product < SOUND[1]:  # also where it is NaN
            return [_wide_products(vectors, pairs)]
    return [products]


def _wide_products(vectors: Sequence[Tensor], pairs: Pairs) -> list[float]:
    """Return the products of all pairs of vectors [elements], in float64.

    Raises:
        OverflowError: squares of finite float64 values overflow.
    """
    wide = [vector.to(torch.float64) for vector in vectors]
    products = [torch.dot(wide[a], wide[b]).item() for a, b in pairs]
    if vectors[0].dtype == torch.float64 and not all(map(math.isfinite, products)):
        largest = torch.stack(wide).abs().max()
        if largest.isfinite():
            raise OverflowError(
                f"a float64 gradient, direction or source has elements of {float(largest):.1e}, whose squares "
                "overflow; scale the loss down"
            )
    return products


class _Planned(NamedTuple):
    """A write in one scope.

    terms: nonzero coefficients by row.
    own: the rows that consist of the written tensors.
    factor: the factor of the written tensors in the result.
    """

    write: Write
    terms: dict[int, float]
    own: set[int]
    factor: float


class _Plan(NamedTuple):
    """The writes of a scope.

    together: the writes, each in terms of the rows before any write.
    one_by_one: the same in terms of the rows after the writes before it; None if that would lose digits.
    read: the rows with a coefficient.
    dtype: dtype of the combination.
    """

    together: list[_Planned]
    one_by_one: list[_Planned] | None
    read: dict[int, Row]
    dtype: torch.dtype


def combine_on_cpu(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows. Rows with coefficient 0 are not read."""
    plans = _plans(rows, writes)
    if not any(plan.together for plan in plans):
        return
    for block in blocks(rows, writes):
        plan = plans[block.scope]
        if not plan.together:
            continue
        values = {index: row_tensors(row, block, plan.dtype) for index, row in plan.read.items()}
        into = [tensors_of(planned.write.into, block) for planned in plan.together]
        in_place = [_takes_in_place(*each, plan.dtype) for each in zip(plan.together, into, strict=True)]
        if plan.one_by_one is not None and all(in_place):
            for planned, targets in zip(plan.one_by_one, into, strict=True):
                _combine_in_place(planned, values, targets)
            continue
        # The rows are not read after the last write, so it may overwrite them.
        copied = list(zip(plan.together, into, strict=True))[: -1 if in_place[-1] else None]
        results = [_combined(planned, values, targets, plan.dtype) for planned, targets in copied]
        if in_place[-1]:
            _combine_in_place(plan.together[-1], values, into[-1])
        for (_, targets), result in zip(copied, results, strict=True):
            torch._foreach_copy_(targets, result)


def _plans(rows: Sequence[Row | None], writes: Sequence[Write]) -> list[_Plan]:
    """Return the writes of each scope, without those that change nothing."""
    present = {index: row for index, row in enumerate(rows) if row is not None}
    own = [{index for index, row in present.items() if _is_plainly(row, write.into)} for write in writes]
    narrow = compute_dtype(rows)
    plans = []
    for each in zip(*(write.coefficients.tolist() for write in writes), strict=True):
        plan = []
        for write, numbers, theirs in zip(writes, each, own, strict=True):
            terms = {index: numbers[index] for index in present if numbers[index] != 0.0}
            unchanged = not terms if write.accumulate else len(terms) == 1 and any(terms.get(i) == 1.0 for i in theirs)
            if not unchanged:
                factor = float(write.accumulate) + sum(terms[index] for index in theirs & terms.keys())
                plan.append(_Planned(write, terms, theirs, factor))
        read = {index: row for index, row in present.items() if any(index in planned.terms for planned in plan)}
        largest = max((abs(c) for planned in plan for c in planned.terms.values()), default=0.0)
        plans.append(_Plan(plan, _one_by_one(plan), read, torch.float64 if largest > WIDEST else narrow))
    return plans


def _is_plainly(row: Row, tensors: Sequence[Tensor]) -> bool:
    """Return whether a row consists of exactly these tensors."""
    if row.at is not None or row.offset is None:
        return False
    return row.offset is tensors or all(map(is_, row.offset, tensors))


def _one_by_one(plan: list[_Planned]) -> list[_Planned] | None:
    """Return two writes so that the second reads what the first wrote, and none needs a temporary.

    With the first write ``a' = x a + y b``, the second, ``u a + v b``, is ``(u / x) a' + (v - u y / x) b``. Its error
    is that of a plain combination as long as ``u y / x`` is small beside v: the terms do not cancel. If it is not, or
    if the first write does not keep a share of its own row, return None.
    """
    if len(plan) != 2 or plan[0].write.accumulate or plan[1].write.accumulate:
        return None
    first, last = plan
    row, *others = first.own or [None]
    if row not in first.terms or others or row in last.own:
        return None
    share = last.terms.get(row, 0.0) / first.terms[row]
    moved = {index: share * value for index, value in first.terms.items() if index != row}
    if abs(share) > WIDEST or any(abs(part) > CANCELLED * abs(last.terms.get(i, 0.0)) for i, part in moved.items()):
        return None
    terms = {index: value - moved.get(index, 0.0) for index, value in last.terms.items()}
    factor = sum(terms[index] for index in last.own & terms.keys())
    return [first, last._replace(terms={**terms, row: share} if row in terms else terms, factor=factor)]


def _combined(planned: _Planned, values: Values, into: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the result of a write in a block, in new tensors of ``dtype``."""
    total = [tensor.to(dtype, copy=True) for tensor in into] if planned.write.accumulate else None
    for index, coefficient in planned.terms.items():
        if total is None:
            total = list(torch._foreach_mul(values[index], coefficient))
        else:
            torch._foreach_add_(total, values[index], alpha=coefficient)
    return [torch.zeros_like(tensor) for tensor in into] if total is None else total


def _takes_in_place(planned: _Planned, into: list[Tensor], dtype: torch.dtype) -> bool:
    """Return whether the target has ``dtype``, and is one of the rows or accumulates."""
    reads_itself = planned.write.accumulate or not planned.own.isdisjoint(planned.terms)
    # A subclass may have fewer operations.
    return reads_itself and into[0].dtype == dtype and type(into[0]) in (Tensor, nn.Parameter)


def _combine_in_place(planned: _Planned, values: Values, into: list[Tensor]) -> None:
    """Make a write in a block, in the written tensors."""
    factor = planned.factor
    for index, coefficient in planned.terms.items():
        if index not in planned.own:
            _scale_and_add_(into, factor, values[index], coefficient)
            factor = 1.0
    if factor != 1.0:
        torch._foreach_mul_(into, factor)


def _scale_and_add_(into: list[Tensor], factor: float, values: list[Tensor], coefficient: float) -> None:
    """Set ``into`` to ``factor * into + coefficient * values``: one pass for one tensor, else one operation each."""
    if factor == 1.0:
        torch._foreach_add_(into, values, alpha=coefficient)
    elif len(into) == 1 and into[0].is_contiguous() and values[0].is_contiguous():
        # The outer product with a one, the only operation that scales both: half the traffic of two.
        into[0].view(-1, 1).addr_(values[0].view(-1), into[0].new_ones(1), beta=factor, alpha=coefficient)
    else:
        torch._foreach_mul_(into, factor)
        torch._foreach_add_(into, values, alpha=coefficient)
