"""The portable backend: torch operations on one block at a time, on any device and in any precision.

Working memory is that of one block. On a CPU the host reads the coefficients. On other devices they stay on the device,
so the host does not synchronize.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from gradguide.ops.blocks import blocks, row_vector, store, vector
from gradguide.ops.cpu import combine_on_cpu, gram_on_cpu
from gradguide.ops.row import Row, Write, check_shapes, check_writes, compute_dtype, sizes_of
from gradguide.ops.tensors import wide_dtype

__all__ = ["combine_", "gram"]


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Return the Gram matrices of the rows: Tensor [S, R, R], summed in float64 if the device supports it.

    On a CPU, products of tensors of more than ``gradguide.ops.cpu.SMALL`` elements are float32 if they are in its
    range. All other products are float64.

    Raises:
        ValueError: rows differ in the shapes of their tensors.
        OverflowError: squares of finite float64 rows overflow.
    """
    check_shapes(rows)
    return gram_on_cpu(rows) if _on_cpu(_device(rows)) else _gram_on_device(rows)


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
        combine_on_cpu(rows, writes)
    else:
        _combine_on_device(rows, writes)


def _gram_on_device(rows: Sequence[Row | None]) -> Tensor:
    slots = [index for index, row in enumerate(rows) if row is not None]
    pairs = list(combinations_with_replacement(range(len(slots)), 2))
    dtype, wide = compute_dtype(rows), wide_dtype(_device(rows))
    result = torch.zeros(len(sizes_of(rows)), len(rows), len(rows), dtype=wide, device=_device(rows))
    scopes, products = [], []
    for block in blocks(rows):
        vectors = [row_vector(row, block, dtype).to(wide) for row in rows if row is not None]
        products += [torch.dot(vectors[a], vectors[b]) for a, b in pairs]
        scopes.append(block.scope)
    if not products:
        return result
    sums = _summed(torch.stack(products).view(len(scopes), len(pairs)), scopes, len(result))
    for number, (a, b) in enumerate(pairs):
        result[:, slots[a], slots[b]] = result[:, slots[b], slots[a]] = sums[:, number]
    return result


def _summed(products: Tensor, scopes: list[int], count: int) -> Tensor:
    """Sum ``products`` [parts, pairs] over the parts of each scope: Tensor [count, pairs]."""
    if count == 1:
        return products.sum(dim=0, keepdim=True)
    index = torch.tensor(scopes)
    if products.device.type == "cuda":
        index = index.pin_memory()
    index = index.to(products.device, non_blocking=True)
    return products.new_zeros(count, products.shape[1]).index_add_(0, index, products)


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
                    # Selected, not multiplied: 0 times NaN is NaN.
                    kept = torch.where(zero[block.scope, index], 0.0, values)
                    factor = each[block.scope, index]
                    total = kept.mul_(factor) if total is None else torch.addcmul(total, kept, factor)
            results.append(total)
        for write, result in zip(writes, results, strict=True):
            if result is not None:
                store(write.into, block, result)


def _device(rows: Sequence[Row | None]) -> torch.device:
    return next(row for row in rows if row is not None).tensors[0].device


def _on_cpu(device: torch.device) -> bool:
    """Return whether the host can read values without synchronizing. Tests patch it to run the other path on a CPU."""
    return device.type == "cpu"
