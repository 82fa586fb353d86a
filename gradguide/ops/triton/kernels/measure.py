"""Measure products of all pairs of rows: read every row once, then sum over chunks. Deterministic, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.columns import addresses_of, chunk_of, form_rows, load_column, uses, vector_end

__all__ = ["finish", "measure", "total"]


@triton.constexpr_function
def place(i, j, count, same):
    """Return the index of the product of rows ``i`` and ``j`` of ``count``; with SAME only pairs j >= i are kept."""
    return i * count - i * (i - 1) // 2 + j - i if same else i * count + j


@triton.jit
def load_rows(addresses, offsets, mask, DTYPES: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Load rows as a tuple of blocks. A column that several rows share is read once."""
    columns = ()
    for column in tl.static_range(len(DTYPES)):
        if uses(ROWS, column):
            columns = columns + (load_column(addresses, column, offsets, mask, DTYPES, VECTOR),)
        else:
            columns = columns + (0.0,)
    return form_rows(columns, ROWS)


@triton.jit
def dot(a, b, THREADS: tl.constexpr):
    """Sum products within each thread: float32 [THREADS]. A thread holds adjacent elements, so nothing is exchanged."""
    return tl.sum(tl.reshape(a * b, [THREADS, a.shape[0] // THREADS]), axis=1)


@triton.jit
def add_products(sums, a, b, SAME: tl.constexpr, THREADS: tl.constexpr):
    """Add the products of all pairs of ``a`` and ``b`` to the sums; with SAME, of each pair once."""
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
    """Store the products of rows A with rows B over one chunk in float32 partials [rows, rows, chunks].

    Args:
        table: int64 [columns, tensors], addresses; DTYPES are the precisions of the columns.
        lengths: int64 [tensors], number of elements.
        chunks: int64 [count, 3], tensor, index within it and scope of each chunk of CHUNK elements.
        tensors, count, rows: number of tensors, of chunks and of all rows.
        first_a, first_b: index of the first row of A and of B among all rows.
        A, B: for each row the indices of its columns: offset, scale, at, anchor; -1 is absent.
        SAME: whether A and B are the same rows; then each pair is computed once.
        THREADS: number of threads of a program.
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
    """Return the sum of float32 ``numbers[first:end]`` in float64."""
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, end, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        sums += tl.load(numbers + index, mask=index < end, other=0.0).to(tl.float64)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["entries", "count"])
def total(sums, partials, bounds, entries, count, BLOCK: tl.constexpr):
    """Compute one entry of float64 sums [scopes, entries], over the scope's part of float32 partials [entries, count].

    Args:
        bounds: int64 [scopes + 1], start of each scope's part.
    """
    place = tl.program_id(0)
    scope, entry = place // entries, place % entries
    first, end = tl.load(bounds + scope), tl.load(bounds + scope + 1)
    tl.store(sums + place, added_up(partials + entry * count.to(tl.int64), first, end, BLOCK))


@triton.jit(do_not_specialize=["count"])
def finish(gram, partials, bounds, count, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one entry of the Gram matrices, float64 [scopes, len(SLOTS), len(SLOTS)], summed in float64 over chunks.

    Args:
        partials: float32 [ROWS, ROWS, count], upper triangle.
        bounds: int64 [scopes + 1], first chunk of each scope.
        SLOTS: for each row of the matrix its index among ROWS; -1 is a row of zeros.
    """
    place = tl.program_id(0)
    scope, entry = place // (len(SLOTS) * len(SLOTS)), place % (len(SLOTS) * len(SLOTS))
    r, s = entry // len(SLOTS), entry % len(SLOTS)
    a, b = -1, -1
    for row in tl.static_range(len(SLOTS)):
        a = tl.where(r == row, SLOTS[row], a)
        b = tl.where(s == row, SLOTS[row], b)
    # Both triangles sum the same numbers in the same order, so the matrix is exactly symmetric.
    first, second = tl.minimum(a, b), tl.maximum(a, b)
    begin = tl.load(bounds + scope)
    end = tl.where(first >= 0, tl.load(bounds + scope + 1), begin)
    start = partials + (first * ROWS + second).to(tl.int64) * count
    tl.store(gram + place, added_up(start, begin, end, BLOCK))
