"""Shared by all kernels: locate a chunk, read columns, compute rows from them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "addresses_of",
    "chunk_of",
    "form_rows",
    "item",
    "load_column",
    "scope_of",
    "section",
    "store_column",
    "uses",
    "vector_end",
]


@triton.constexpr_function
def item(table, *indices):
    """Return an entry of nested tuples as a compile-time constant."""
    for index in indices:
        table = table[index]
    return table


@triton.constexpr_function
def uses(rows, column):
    """Return whether any of ``rows``, each a tuple of four column indices, reads ``column``."""
    return any(column in row for row in rows)


@triton.constexpr_function
def section(rows, first, count):
    """Return up to ``count`` rows from ``first`` on."""
    return rows[first : first + count]


@triton.jit
def chunk_of(chunks, lengths, CHUNK: tl.constexpr):
    """Return the chunk of this program: its tensor, first element, and end (exclusive).

    Args:
        chunks: int64 [chunks, 3], tensor, index of the chunk within it, and scope.
        lengths: int64 [tensors], number of elements of each tensor.
    """
    index = tl.program_id(0)
    tensor = tl.load(chunks + 3 * index)
    # Offsets are int64, for tensors of more than 2^31 elements.
    begin = tl.load(chunks + 3 * index + 1) * CHUNK
    return tensor, begin, tl.minimum(begin + CHUNK, tl.load(lengths + tensor))


@triton.jit
def scope_of(chunks):
    """Return the scope of this program's chunk."""
    return tl.load(chunks + 3 * tl.program_id(0) + 2)


@triton.jit
def addresses_of(table, tensor, tensors, COLUMNS: tl.constexpr):
    """Return the address of each column's tensor, from int64 [columns, tensors]: a tuple of int64 scalars."""
    addresses = ()
    for column in tl.static_range(COLUMNS):
        addresses = addresses + (tl.load(table + column * tensors + tensor),)
    return addresses


@triton.jit
def vector_end(addresses, begin, end, BLOCK: tl.constexpr):
    """Return the end of the full blocks that allow 128-bit access; ``begin`` if an address is not aligned."""
    bits = addresses[0]
    for column in tl.static_range(1, len(addresses)):
        bits = bits | addresses[column]
    return tl.where(bits % 16 == 0, begin + (end - begin) // BLOCK * BLOCK, begin)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return the address as a pointer. With VECTOR the compiler assumes a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_column(addresses, column: tl.constexpr, offsets, mask, DTYPES: tl.constexpr, VECTOR: tl.constexpr):
    """Load one column as float32, with zeros where ``mask`` is false. A uniform mask keeps vector loads."""
    pointers = pointer_to(addresses[column], DTYPES[column], VECTOR) + offsets
    if mask is None:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_column(address, offsets, value, mask, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Store float32 values in a column, rounded to its precision."""
    tl.store(pointer_to(address, DTYPE, VECTOR) + offsets, value.to(DTYPE), mask=mask)


@triton.jit
def form(columns, ROWS: tl.constexpr, row: tl.constexpr):
    """Compute ``offset + scale * (at - anchor)`` from the four column indices of a row; -1 is an absent part."""
    OFFSET: tl.constexpr = item(ROWS, row, 0)
    SCALE: tl.constexpr = item(ROWS, row, 1)
    AT: tl.constexpr = item(ROWS, row, 2)
    ANCHOR: tl.constexpr = item(ROWS, row, 3)
    if AT < 0:
        return columns[OFFSET]
    else:
        result = columns[AT] - columns[ANCHOR]
        if SCALE >= 0:
            result = columns[SCALE] * result
        if OFFSET >= 0:
            result = result + columns[OFFSET]
        return result


@triton.jit
def form_rows(columns, ROWS: tl.constexpr):
    """Compute all rows: a tuple of blocks."""
    rows = ()
    for row in tl.static_range(len(ROWS)):
        rows = rows + (form(columns, ROWS, row),)
    return rows
