"""The portable backend: torch operations on one block at a time, on any device and in any precision.

Working memory is that of one block. On a CPU the host reads the coefficients. On other devices they stay on the device,
so the host does not synchronize.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradguide.ops.blocks import Block, blocks, row_tensors, row_vector, store, tensors_of, vector
from gradguide.ops.row import Row, Write, check_shapes, check_writes, compute_dtype, sizes_of
from gradguide.ops.tensors import wide_dtype

__all__ = ["combine_", "gram"]

SMALL = 1 << 11
"""On a CPU, tensors of at most this many elements are measured together, scope by scope, in float64."""

DOT = 1 << 15
"""Maximum number of elements of a float32 product on a CPU. The error grows with their number. Relative to the product
of the lengths it reaches 7.5e-6 if all elements are equal and every addition rounds the same way, and 3e-7 for random
elements."""

SOUND = (1e-24, 1e30)
"""Range of squared lengths in which float32 products neither overflow nor lose digits to underflow."""

WIDEST = 1e30
"""Largest coefficient of a combination in float32. Larger ones may overflow, so on a CPU they use float64."""

Pairs = Sequence[tuple[int, int]]
Values = Mapping[int, list[Tensor]]


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Return the Gram matrices of the rows: Tensor [S, R, R], summed in float64 if the device supports it.

    On a CPU, products of tensors of more than ``SMALL`` elements are float32 if they are in its range. All other
    products are float64.

    Raises:
        ValueError: rows differ in the shapes of their tensors.
        OverflowError: squares of finite float64 rows overflow.
    """
    check_shapes(rows)
    device = _device(rows)
    on_cpu = _on_cpu(device)
    wide = wide_dtype(device)
    present = [row for row in rows if row is not None]
    pairs = list(combinations_with_replacement(range(len(present)), 2))
    dtype = compute_dtype(rows)
    small, large = _Products([], []), _Products([], [])
    for block in blocks(rows):
        values = [row_tensors(row, block, dtype) for row in present]
        lengths = list(map(Tensor.numel, values[0]))
        places = [place for place, length in enumerate(lengths) if length <= SMALL or not on_cpu]
        if places:
            small.parts.append(_Part(block, places))
            small.found.extend(_wide_products(values, small.parts[-1], pairs, wide))
        for place, length in enumerate(lengths):
            if on_cpu and length > SMALL:
                vectors = [tensors[place].reshape(-1) for tensors in values]
                for start in range(0, length, DOT):
                    cut = vectors if length <= DOT else [vector[start : start + DOT] for vector in vectors]
                    large.parts.append(_Part(block, [place], start, start + DOT))
                    large.found.extend([torch.dot(cut[a], cut[b]) for a, b in pairs])
    result = torch.zeros(len(sizes_of(rows)), len(rows), len(rows), dtype=wide, device=device)
    parts = small.parts + large.parts
    if not parts:
        return result
    # Stack each dtype separately: stacking tensors of mixed dtypes takes ten times as long.
    products = torch.cat([torch.stack(each.found).to(wide) for each in (small, large) if each.found])
    products = products.view(len(parts), len(pairs))
    if on_cpu:
        _mend(products, present, parts, pairs)
    sums = _summed(products, [part.block.scope for part in parts], len(result))
    slots = [index for index, row in enumerate(rows) if row is not None]
    for number, (a, b) in enumerate(pairs):
        result[:, slots[a], slots[b]] = result[:, slots[b], slots[a]] = sums[:, number]
    return result


class _Part(NamedTuple):
    """Elements ``start:stop`` of the tensors at ``places`` of a block."""

    block: Block
    places: list[int]
    start: int = 0
    stop: int | None = None


class _Products(NamedTuple):
    """Parts, and the products of all pairs of rows for each part, as 0-d tensors."""

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
    """Recompute products [parts, pairs] outside the range of float32 in float64, in place.

    Raises:
        OverflowError: squares of finite float64 rows overflow.
    """
    squares = products[:, [number for number, (a, b) in enumerate(pairs) if a == b]]
    sound = ((squares > SOUND[0]) & (squares < SOUND[1])).all(dim=1)
    for number in (~sound).nonzero().flatten().tolist():
        part = parts[number]
        # Rows as a combination forms them: what overflows float32 there must not look finite here.
        values = [row_tensors(row, part.block, compute_dtype(rows)) for row in rows]
        products[number] = torch.stack(_wide_products(values, part, pairs, torch.float64))
        if compute_dtype(rows) == torch.float64 and not products[number].isfinite().all():
            largest = torch.cat([tensors[place].reshape(-1) for tensors in values for place in part.places]).abs().max()
            if largest.isfinite():
                raise OverflowError(
                    f"a float64 gradient, direction or source has elements of {float(largest):.1e}, whose squares "
                    "overflow; scale the loss down"
                )


def _summed(products: Tensor, scopes: list[int], count: int) -> Tensor:
    """Sum ``products`` [parts, pairs] over the parts of each scope: Tensor [count, pairs]."""
    if count == 1:
        return products.sum(dim=0, keepdim=True)
    index = torch.tensor(scopes)
    if products.device.type == "cuda":
        index = index.pin_memory()
    index = index.to(products.device, non_blocking=True)
    return products.new_zeros(count, products.shape[1]).index_add_(0, index, products)


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all computed from the values before any write.

    A coefficient of 0 drops its row, even if the row holds NaN. On a CPU, a write that changes nothing is skipped.

    Raises:
        ValueError: rows or writes differ in the shapes of their tensors, or in the number of coefficients.
    """
    check_writes(rows, writes)
    check_shapes(rows, writes)
    if _on_cpu(_device(rows)):
        _combine_on_cpu(rows, writes)
    else:
        _combine_on_device(rows, writes)


class _Planned(NamedTuple):
    """A write in one scope.

    terms: nonzero coefficients by row.
    own: the rows that consist of the written tensors.
    """

    write: Write
    terms: dict[int, float]
    own: set[int]


def _combine_on_cpu(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    plans = _plans(rows, writes)
    if not any(plans):
        return
    narrow = compute_dtype(rows)
    for block in blocks(rows, writes):
        plan = plans[block.scope]
        if not plan:
            continue
        largest = max((abs(c) for planned in plan for c in planned.terms.values()), default=0.0)
        dtype = torch.float64 if largest > WIDEST else narrow
        wanted = dict.fromkeys(index for planned in plan for index in planned.terms)
        values = {index: row_tensors(row, block, dtype) for index in wanted if (row := rows[index]) is not None}
        results = [_combined(planned, values, block, dtype) for planned in plan[:-1]]
        # The rows are not read after the last write, so it may overwrite them.
        if not _combined_in_place(plan[-1], values, block, dtype):
            results.append(_combined(plan[-1], values, block, dtype))
        for planned, result in zip(plan, results, strict=False):
            torch._foreach_copy_(tensors_of(planned.write.into, block), result)


def _plans(rows: Sequence[Row | None], writes: Sequence[Write]) -> list[list[_Planned]]:
    """Return the writes of each scope, without those that change nothing."""
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
    """Return whether a row consists of exactly these tensors."""
    if row is None or row.at is not None or row.offset is None:
        return False
    return row.offset is tensors or all(map(is_, row.offset, tensors))


def _combined(planned: _Planned, values: Values, block: Block, dtype: torch.dtype) -> list[Tensor]:
    """Return the result of a write in a block, in new tensors of ``dtype``."""
    into = tensors_of(planned.write.into, block)
    total = [tensor.to(dtype, copy=True) for tensor in into] if planned.write.accumulate else None
    for index, coefficient in planned.terms.items():
        if total is None:
            total = list(torch._foreach_mul(values[index], coefficient))
        else:
            torch._foreach_add_(total, values[index], alpha=coefficient)
    return [torch.zeros_like(tensor) for tensor in into] if total is None else total


def _combined_in_place(planned: _Planned, values: Values, block: Block, dtype: torch.dtype) -> bool:
    """Write in place if the target has ``dtype`` and is one of the rows or accumulates.

    Returns:
        Whether the write was made.
    """
    accumulate, terms = planned.write.accumulate, planned.terms
    own = planned.own & terms.keys()
    into = tensors_of(planned.write.into, block)
    if into[0].dtype != dtype or not (own or accumulate) or type(into[0]) not in (Tensor, nn.Parameter):
        return False  # also of subclasses, which may have fewer operations
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
    coefficients = [write.coefficients.to(dtype).clamp(-bound, bound) for write in writes]
    dropped = [each == 0 for each in coefficients]
    for block in blocks(rows, writes):
        vectors = [None if row is None else row_vector(row, block, dtype) for row in rows]
        results = []
        for write, each, zero in zip(writes, coefficients, dropped, strict=True):
            total = vector(write.into, block, dtype) if write.accumulate else None
            for index, values in enumerate(vectors):
                if values is not None:
                    term = torch.where(zero[block.scope, index], 0.0, values * each[block.scope, index])
                    total = term if total is None else total + term
            results.append(total)
        for write, result in zip(writes, results, strict=True):
            if result is not None:
                store(write.into, block, result)


def _device(rows: Sequence[Row | None]) -> torch.device:
    return next(row for row in rows if row is not None).tensors[0].device


def _on_cpu(device: torch.device) -> bool:
    """Return whether the host can read values without synchronizing. Tests patch it to run the other path on a CPU."""
    return device.type == "cpu"
