"""The portable backend: torch operations on one piece at a time, on any device and in any precision.

Working memory is that of one piece. On a CPU the host reads the coefficients. On other devices they stay there, and the
host never waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradguide.ops.pieces import Piece, pieces, row_tensors, row_vector, store, tensors_of, vector
from gradguide.ops.row import Row, Write, check_shapes, check_writes, compute_dtype, sizes_of

__all__ = ["combine_", "gram"]

SMALL = 1 << 11
"""On a CPU, tensors of at most so many elements are measured together, scope by scope, in float64."""

DOT = 1 << 15
"""Most elements of a float32 product on a CPU. Its error grows with their number, to 7.5e-6 of the product of the
lengths where all elements are alike and every addition rounds the same way. It is 3e-7 for random elements."""

SOUND = (1e-24, 1e30)
"""Squared lengths between which float32 products have neither overflowed nor lost digits to underflow."""

WIDEST = 1e30
"""Largest coefficient of a combination in float32. A larger one may overflow, so a CPU takes it in float64."""

Pairs = Sequence[tuple[int, int]]
Values = Mapping[int, list[Tensor]]


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Return the Gram matrices of the rows: Tensor [S, R, R], summed in float64 where the device has it.

    On a CPU, products of tensors of more than ``SMALL`` elements are float32 where they are in its range. All others
    are float64.

    Raises:
        ValueError: rows differ in the shapes of their tensors.
        OverflowError: squares of finite float64 rows overflow.
    """
    check_shapes(rows)
    device = _device(rows)
    on_cpu = device.type == "cpu"
    wide = torch.float32 if device.type == "mps" else torch.float64
    present = [row for row in rows if row is not None]
    pairs = list(combinations_with_replacement(range(len(present)), 2))
    dtype = compute_dtype(rows)
    small, large = _Products([], []), _Products([], [])
    for piece in pieces(rows):
        values = [row_tensors(row, piece, dtype) for row in present]
        lengths = list(map(Tensor.numel, values[0]))
        places = [place for place, length in enumerate(lengths) if length <= SMALL or not on_cpu]
        if places:
            small.parts.append(_Part(piece, places))
            small.found.extend(_wide_products(values, small.parts[-1], pairs, wide))
        for place, length in enumerate(lengths):
            if on_cpu and length > SMALL:
                vectors = [tensors[place].reshape(-1) for tensors in values]
                for start in range(0, length, DOT):
                    cut = vectors if length <= DOT else [vector[start : start + DOT] for vector in vectors]
                    large.parts.append(_Part(piece, [place], start, start + DOT))
                    large.found.extend([torch.dot(cut[a], cut[b]) for a, b in pairs])
    result = torch.zeros(len(sizes_of(rows)), len(rows), len(rows), dtype=wide, device=device)
    parts = small.parts + large.parts
    if not parts:
        return result
    # Stacked apart: tensors of two dtypes take ten times as long to stack.
    products = torch.cat([torch.stack(each.found).to(wide) for each in (small, large) if each.found])
    products = products.view(len(parts), len(pairs))
    if on_cpu:
        _mend(products, present, parts, pairs)
    sums = _summed(products, [part.piece.scope for part in parts], len(result))
    slots = [index for index, row in enumerate(rows) if row is not None]
    for number, (a, b) in enumerate(pairs):
        result[:, slots[a], slots[b]] = result[:, slots[b], slots[a]] = sums[:, number]
    return result


class _Part(NamedTuple):
    """Elements ``start:stop`` of those tensors of a piece that stand at ``places`` in it."""

    piece: Piece
    places: list[int]
    start: int = 0
    stop: int | None = None


class _Products(NamedTuple):
    """Parts, and for each of them the products of all pairs of rows, 0-d tensors."""

    parts: list[_Part]
    found: list[Tensor]


def _wide_products(values: Sequence[list[Tensor]], part: _Part, pairs: Pairs, wide: torch.dtype) -> list[Tensor]:
    """Return the product of each pair of rows over a part: 0-d tensors of dtype ``wide``."""
    vectors = []
    for tensors in values:
        flat = [tensors[place].reshape(-1) for place in part.places]
        vectors.append(torch.cat(flat)[part.start : part.stop].to(wide))
    return [torch.dot(vectors[a], vectors[b]) for a, b in pairs]


def _mend(products: Tensor, rows: Sequence[Row], parts: Sequence[_Part], pairs: Pairs) -> None:
    """Replace products [parts, pairs] that left the range of float32 by those in float64, in place.

    Raises:
        OverflowError: squares of finite float64 rows overflow.
    """
    squares = products[:, [number for number, (a, b) in enumerate(pairs) if a == b]]
    sound = ((squares > SOUND[0]) & (squares < SOUND[1])).all(dim=1)
    for number in (~sound).nonzero().flatten().tolist():
        part = parts[number]
        values = [row_tensors(row, part.piece, torch.float64) for row in rows]
        products[number] = torch.stack(_wide_products(values, part, pairs, torch.float64))
        if compute_dtype(rows) == torch.float64 and not products[number].isfinite().all():
            largest = torch.stack([tensors[place].abs().max() for tensors in values for place in part.places]).max()
            if largest.isfinite():
                raise OverflowError(
                    f"a float64 gradient, direction or source has elements of {float(largest):.1e}, whose squares "
                    "overflow; scale the loss down"
                )


def _summed(products: Tensor, scopes: list[int], count: int) -> Tensor:
    """Return the sum over each scope's pieces: Tensor [count, pairs], of ``products`` [pieces, pairs]."""
    if count == 1:
        return products.sum(dim=0, keepdim=True)
    index = torch.tensor(scopes)
    if products.device.type == "cuda":
        index = index.pin_memory()
    index = index.to(products.device, non_blocking=True)
    return products.new_zeros(count, products.shape[1]).index_add_(0, index, products)


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 drops its row whatever that holds, NaN included. On a CPU a write that changes nothing is not
    made.

    Raises:
        ValueError: rows or writes differ in the shapes of their tensors, or in the number of coefficients.
    """
    check_writes(rows, writes)
    check_shapes(rows, writes)
    if _device(rows).type == "cpu":
        _combine_on_cpu(rows, writes)
    else:
        _combine_on_device(rows, writes)


class _Planned(NamedTuple):
    """A write to be made in one scope.

    terms: coefficients that are not 0, by row.
    own: the rows that are the written tensors themselves.
    """

    write: Write
    terms: dict[int, float]
    own: set[int]


def _combine_on_cpu(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    plans = _plans(rows, writes)
    if not any(plans):
        return
    narrow = compute_dtype(rows)
    for piece in pieces(rows, writes):
        plan = plans[piece.scope]
        if not plan:
            continue
        largest = max((abs(c) for planned in plan for c in planned.terms.values()), default=0.0)
        dtype = torch.float64 if largest > WIDEST else narrow
        wanted = dict.fromkeys(index for planned in plan for index in planned.terms)
        values = {index: row_tensors(row, piece, dtype) for index in wanted if (row := rows[index]) is not None}
        results = [_combined(planned, values, piece, dtype) for planned in plan[:-1]]
        # Nothing reads the rows after the last write, so it may be made in their memory.
        if not _combined_in_place(plan[-1], values, piece, dtype):
            results.append(_combined(plan[-1], values, piece, dtype))
        for planned, result in zip(plan, results, strict=False):
            torch._foreach_copy_(tensors_of(planned.write.into, piece), result)


def _plans(rows: Sequence[Row | None], writes: Sequence[Write]) -> list[list[_Planned]]:
    """Return the writes of each scope, without those that leave everything as it is."""
    present = [index for index, row in enumerate(rows) if row is not None]
    own = [{index for index in present if _is_plainly(rows[index], write.into)} for write in writes]
    plans = []
    for each in zip(*(write.coefficients.tolist() for write in writes), strict=True):
        plan = []
        for write, numbers, theirs in zip(writes, each, own, strict=True):
            terms = {index: numbers[index] for index in present if numbers[index] != 0.0}
            unchanged = not terms if write.accumulate else len(terms) == 1 and any(terms.get(i) == 1.0 for i in theirs)
            if not unchanged:
                plan.append(_Planned(write, terms, theirs))
        plans.append(plan)
    return plans


def _is_plainly(row: Row | None, tensors: Sequence[Tensor]) -> bool:
    """Whether a row is these tensors themselves."""
    if row is None or row.at is not None or row.offset is None:
        return False
    return row.offset is tensors or all(map(is_, row.offset, tensors))


def _combined(planned: _Planned, values: Values, piece: Piece, dtype: torch.dtype) -> list[Tensor]:
    """Return what a write leaves in a piece: tensors of ``dtype``, new memory."""
    into = tensors_of(planned.write.into, piece)
    total = [tensor.to(dtype, copy=True) for tensor in into] if planned.write.accumulate else None
    for index, coefficient in planned.terms.items():
        if total is None:
            total = list(torch._foreach_mul(values[index], coefficient))
        else:
            torch._foreach_add_(total, values[index], alpha=coefficient)
    return [torch.zeros_like(tensor) for tensor in into] if total is None else total


def _combined_in_place(planned: _Planned, values: Values, piece: Piece, dtype: torch.dtype) -> bool:
    """Make a write in the memory of its target, where that is one of the rows or is added to, and has ``dtype``.

    Returns:
        Whether it was made.
    """
    accumulate, terms = planned.write.accumulate, planned.terms
    own = planned.own & terms.keys()
    into = tensors_of(planned.write.into, piece)
    if into[0].dtype != dtype or not (own or accumulate) or type(into[0]) not in (Tensor, nn.Parameter):
        return False  # also of subclasses, which may know fewer operations
    factor = float(accumulate) + sum(terms[index] for index in own)
    if factor != 1.0:
        torch._foreach_mul_(into, factor)
    for index, coefficient in terms.items():
        if index not in own:
            torch._foreach_add_(into, values[index], alpha=coefficient)
    return True


def _combine_on_device(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    dtype = compute_dtype(rows)
    bound = torch.finfo(dtype).max
    coefficients = [write.coefficients.clamp(-bound, bound).to(dtype) for write in writes]
    dropped = [each == 0 for each in coefficients]
    for piece in pieces(rows, writes):
        vectors = [None if row is None else row_vector(row, piece, dtype) for row in rows]
        results = []
        for write, each, zero in zip(writes, coefficients, dropped, strict=True):
            total = vector(write.into, piece, dtype) if write.accumulate else None
            for index, values in enumerate(vectors):
                if values is not None:
                    term = torch.where(zero[piece.scope, index], 0.0, values * each[piece.scope, index])
                    total = term if total is None else total + term
            results.append(total)
        for write, result in zip(writes, results, strict=True):
            if result is not None:
                store(write.into, piece, result)


def _device(rows: Sequence[Row | None]) -> torch.device:
    return next(row for row in rows if row is not None).tensors[0].device
