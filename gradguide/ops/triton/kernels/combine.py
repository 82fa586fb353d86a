"""Write linear combinations of rows: all writes of a bucket in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.columns import (
    addresses_of,
    chunk_of,
    form_rows,
    item,
    load_column,
    scope_of,
    section,
    store_column,
    uses,
    vector_end,
)

__all__ = ["combine", "is_read", "load_coefficients", "weighted"]

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.constexpr_function
def grows(writes, column):
    """Return whether a write accumulates into this column."""
    return (column, True) in writes


@triton.constexpr_function
def own_row(rows, column):
    """Return the first row that consists of this column only; -1 if there is no such row."""
    return next((row for row, parts in enumerate(rows) if tuple(parts) == (column, -1, -1, -1)), -1)


@triton.jit
def load_coefficients(coefficients, SLOTS: tl.constexpr):
    """Load the coefficients at SLOTS as a tuple of float32 scalars, clamped to the range of float32."""
    found = ()
    for row in tl.static_range(len(SLOTS)):
        value = tl.load(coefficients + SLOTS[row])
        found = found + (tl.minimum(tl.maximum(value, -LARGEST), LARGEST).to(tl.float32),)
    return found


@triton.jit
def has_effect(coefficients, ROWS: tl.constexpr, COLUMN: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Return whether a write into this column with these coefficients changes anything: int32, 1 or 0.

    Adding zeros changes nothing, and neither does a combination that equals the column.
    """
    own: tl.constexpr = -1 if ACCUMULATE else own_row(ROWS, COLUMN)
    found = 0 if ACCUMULATE or own >= 0 else 1
    for row in tl.static_range(len(coefficients)):
        found = found | tl.where(coefficients[row] != (1.0 if row == own else 0.0), 1, 0)
    return found


@triton.jit
def is_read(coefficients, column, ROWS: tl.constexpr):
    """Return whether a combination reads this column, as int32: a row that uses it has a nonzero coefficient."""
    found = 0
    for row in tl.static_range(len(ROWS)):
        if uses(section(ROWS, row, 1), column):
            found = found | tl.where(coefficients[row] != 0.0, 1, 0)
    return found


@triton.jit
def weighted(coefficients, rows):
    """Return the weighted sum of the rows. A coefficient of 0 drops its row, even if that holds NaN."""
    total = tl.where(coefficients[0] == 0.0, 0.0, coefficients[0] * rows[0])
    for row in tl.static_range(1, len(rows)):
        total += tl.where(coefficients[row] == 0.0, 0.0, coefficients[row] * rows[row])
    return total


@triton.jit
def prepare(
    table, coefficients, tensor, tensors, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """Return the inputs of every block: column addresses, coefficients, which writes to make, which columns to read."""
    weights = ()
    changes = ()
    for write in tl.static_range(len(WRITES)):
        weights = weights + (load_coefficients(coefficients[write], SLOTS),)
        changes = changes + (has_effect(weights[write], ROWS, item(WRITES, write, 0), item(WRITES, write, 1)),)
    reads = ()
    for column in tl.static_range(COLUMNS):
        read = 0
        for write in tl.static_range(len(WRITES)):
            read = read | (is_read(weights[write], column, ROWS) & changes[write])
            if item(WRITES, write, 1) and item(WRITES, write, 0) == column:
                read = read | changes[write]
        reads = reads + (read,)
    return addresses_of(table, tensor, tensors, COLUMNS), weights, changes, reads


@triton.jit
def lanes_if(flag, inside, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return a mask of the lanes ``inside`` (of all lanes with VECTOR); it is empty if ``flag`` is 0."""
    mask = tl.zeros([BLOCK], tl.int32) + flag != 0
    if not VECTOR:
        mask = mask & inside
    return mask


@triton.jit
def block(
    prepared, offsets, inside, DTYPES: tl.constexpr, ROWS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Combine one block. All loads precede the stores, because the targets may be rows."""
    addresses, weights, changes, reads = prepared
    columns = ()
    for column in tl.static_range(len(DTYPES)):
        if uses(ROWS, column) or grows(WRITES, column):
            mask = lanes_if(reads[column], inside, BLOCK, VECTOR)
            columns = columns + (load_column(addresses, column, offsets, mask, DTYPES, VECTOR),)
        else:
            columns = columns + (0.0,)
    rows = form_rows(columns, ROWS)
    results = ()
    for write in tl.static_range(len(WRITES)):
        result = weighted(weights[write], rows)
        if item(WRITES, write, 1):
            result += columns[item(WRITES, write, 0)]
        results = results + (result,)
    for write in tl.static_range(len(WRITES)):
        mask = lanes_if(changes[write], inside, BLOCK, VECTOR)
        store_column(
            addresses[item(WRITES, write, 0)], offsets, results[write], mask, DTYPES[item(WRITES, write, 0)], VECTOR
        )


@triton.jit(do_not_specialize=["tensors", "slots"])
def combine(
    table, lengths, chunks, coefficients, tensors, slots, DTYPES: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, WRITES: tl.constexpr, RELOAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write combinations of rows over one chunk. Columns with only zero coefficients are not read.

    Args:
        table: int64 [columns, tensors], addresses; DTYPES are the precisions of the columns.
        lengths: int64 [tensors], number of elements.
        chunks: int64 [chunks, 3], tensor, index within it and scope of each chunk of CHUNK elements.
        coefficients: for each write a float tensor [scopes, slots]; the coefficient of ROWS[i] is at SLOTS[i].
        tensors, slots: number of tensors and of slots.
        ROWS: for each row the indices of its columns: offset, scale, at, anchor; -1 is absent.
        WRITES: for each write its column, and whether it accumulates. A write that would change nothing is skipped.
        RELOAD: whether to reload addresses and coefficients for each block, because they do not fit in registers.
    """
    tensor, begin, end = chunk_of(chunks, lengths, CHUNK)
    own = ()
    for write in tl.static_range(len(WRITES)):
        own = own + (coefficients[write] + scope_of(chunks) * slots,)
    prepared = prepare(table, own, tensor, tensors, len(DTYPES), ROWS, SLOTS, WRITES)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    split = vector_end(prepared[0], begin, end, BLOCK)
    for start in range(begin, split, BLOCK):
        if RELOAD:
            prepared = prepare(table, own, tensor, tensors, len(DTYPES), ROWS, SLOTS, WRITES)
        block(prepared, start + lanes, None, DTYPES, ROWS, WRITES, BLOCK, True)
    for start in range(split, end, BLOCK):
        if RELOAD:
            prepared = prepare(table, own, tensor, tensors, len(DTYPES), ROWS, SLOTS, WRITES)
        offsets = start + lanes
        block(prepared, offsets, offsets < end, DTYPES, ROWS, WRITES, BLOCK, False)
