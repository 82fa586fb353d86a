"""Products of all pairs of rows: one read of every row, then a small sum over chunks. No atomics: same bits always."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.access import addresses_of, chunk_of, form_rows, load_column, uses, vector_end

__all__ = ["finish", "measure", "total"]


@triton.constexpr_function
def place(i, j, count, same):
    """Where the product of row ``i`` with row ``j`` of ``count`` is kept; of the SAME rows only pairs with j >= i."""
    return i * count - i * (i - 1) // 2 + j - i if same else i * count + j


@triton.jit
def load_rows(addresses, offsets, mask, DTYPES: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Rows as a tuple of blocks. A column that several of them share is read once."""
    columns = ()
    for column in tl.static_range(len(DTYPES)):
        if uses(ROWS, column):
            columns = columns + (load_column(addresses, column, offsets, mask, DTYPES, VECTOR),)
        else:
            columns = columns + (0.0,)
    return form_rows(columns, ROWS)


@triton.jit
def dot(a, b, THREADS: tl.constexpr):
    """Products summed within each thread, which holds neighbours: float32 [THREADS], with no exchange between them."""
    return tl.sum(tl.reshape(a * b, [THREADS, a.shape[0] // THREADS]), axis=1)


@triton.jit
def add_products(sums, a, b, SAME: tl.constexpr, THREADS: tl.constexpr):
    """The sums, grown by the products of all pairs of ``a`` and ``b``; of the SAME rows, of each pair once."""
    grown = ()
    for i in tl.static_range(len(a)):
        for j in tl.static_range(i if SAME else 0, len(b)):
            grown = grown + (sums[place(i, j, len(b), SAME)] + dot(a[i], b[j], THREADS),)
    return grown


@triton.jit(do_not_specialize=["tensors", "count", "first_a", "first_b", "rows"])
def measure(
    partials, table, lengths, chunks, tensors, count, first_a, first_b, rows, DTYPES: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """One chunk's products of rows A with rows B, into float32 partials [rows, rows, chunks].

    Args:
        table: int64 [columns, tensors], addresses; the columns have the precisions DTYPES.
        lengths: int64 [tensors].
        chunks: int64 [count, 3], tensor, number and scope of each chunk of CHUNK elements.
        tensors, count, rows: how many.
        first_a, first_b: which of all rows A and B begin with.
        A, B: for each row the numbers of its columns: offset, scale, at, anchor; -1 is absent.
        SAME: whether A and B are the same rows; then each pair is taken once.
        THREADS: of a program.
    """
    tensor, begin, end = chunk_of(chunks, lengths, CHUNK)
    addresses = addresses_of(table, tensor, tensors, len(DTYPES))
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    split = vector_end(addresses, begin, end, BLOCK)
    sums = ()
    for i in tl.static_range(len(A)):
        for _ in tl.static_range(i if SAME else 0, len(B)):
            sums = sums + (tl.zeros([THREADS], tl.float32),)
    for start in range(begin, split, BLOCK):
        offsets = start + lanes
        a = load_rows(addresses, offsets, None, DTYPES, A, True)
        b = a if SAME else load_rows(addresses, offsets, None, DTYPES, B, True)
        sums = add_products(sums, a, b, SAME, THREADS)
    for start in range(split, end, BLOCK):
        offsets = start + lanes
        a = load_rows(addresses, offsets, offsets < end, DTYPES, A, False)
        b = a if SAME else load_rows(addresses, offsets, offsets < end, DTYPES, B, False)
        sums = add_products(sums, a, b, SAME, THREADS)
    for i in tl.static_range(len(A)):
        for j in tl.static_range(i if SAME else 0, len(B)):
            entry = ((first_a + i) * rows + first_b + j) * count.to(tl.int64) + tl.program_id(0)
            tl.store(partials + entry, tl.sum(sums[place(i, j, len(B), SAME)]))


@triton.jit
def added_up(numbers, first, end, BLOCK: tl.constexpr):
    """Sum of float32 ``numbers`` from ``first`` to ``end``, in float64."""
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, end, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        sums += tl.load(numbers + index, mask=index < end, other=0.0).to(tl.float64)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["entries", "count"])
def total(sums, partials, bounds, entries, count, BLOCK: tl.constexpr):
    """One entry of float64 sums [scopes, entries], over the scope's part of float32 partials [entries, count].

    Args:
        bounds: int64 [scopes + 1], where each scope's part begins.
    """
    place = tl.program_id(0)
    scope, entry = place // entries, place % entries
    first, end = tl.load(bounds + scope), tl.load(bounds + scope + 1)
    tl.store(sums + place, added_up(partials + entry * count.to(tl.int64), first, end, BLOCK))


@triton.jit(do_not_specialize=["count"])
def finish(gram, partials, bounds, count, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Entry (r, s) of a scope's Gram matrix, float64 [scopes, len(SLOTS), len(SLOTS)], summed in float64 over chunks.

    Args:
        partials: float32 [ROWS, ROWS, count], upper half.
        bounds: int64 [scopes + 1], where each scope's chunks begin.
        SLOTS: for each row of the matrix its row among ROWS; -1 is a row of zeros.
    """
    place = tl.program_id(0)
    scope, entry = place // (len(SLOTS) * len(SLOTS)), place % (len(SLOTS) * len(SLOTS))
    r, s = entry // len(SLOTS), entry % len(SLOTS)
    a, b = -1, -1
    for row in tl.static_range(len(SLOTS)):
        a = tl.where(r == row, SLOTS[row], a)
        b = tl.where(s == row, SLOTS[row], b)
    # Both halves sum the same numbers in the same order, so the matrix is symmetric to the bit.
    first, second = tl.minimum(a, b), tl.maximum(a, b)
    begin = tl.load(bounds + scope)
    end = tl.where(first >= 0, tl.load(bounds + scope + 1), begin)
    start = partials + (first * ROWS + second).to(tl.int64) * count
    tl.store(gram + place, added_up(start, begin, end, BLOCK))
