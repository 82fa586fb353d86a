"""What all kernels share: finding a chunk, reading columns, forming rows out of them."""

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
    """An entry of nested tuples, as a number that is known when compiling."""
    for index in indices:
        table = table[index]
    return table


@triton.constexpr_function
def uses(rows, column):
    """Whether any of ``rows``, each the numbers of its four columns, is formed from ``column``."""
    return any(column in row for row in rows)


@triton.constexpr_function
def section(rows, first, count):
    """``count`` rows from ``first`` on, or as many as there are."""
    return rows[first : first + count]


@triton.jit
def chunk_of(chunks, lengths, CHUNK: tl.constexpr):
    """The chunk of this program: its tensor, first element, and the element after its last.

    Args:
        chunks: int64 [chunks, 3], tensor, number of the chunk within it, and scope.
        lengths: int64 [tensors], elements of each tensor.
    """
    index = tl.program_id(0)
    tensor = tl.load(chunks + 3 * index)
    # int64 from here on, for tensors of more than 2^31 elements.
    begin = tl.load(chunks + 3 * index + 1) * CHUNK
    return tensor, begin, tl.minimum(begin + CHUNK, tl.load(lengths + tensor))


@triton.jit
def scope_of(chunks):
    """The scope that this program's chunk belongs to."""
    return tl.load(chunks + 3 * tl.program_id(0) + 2)


@triton.jit
def addresses_of(table, tensor, tensors, COLUMNS: tl.constexpr):
    """Where each column's tensor begins: a tuple of int64 scalars, from int64 [columns, tensors]."""
    addresses = ()
    for column in tl.static_range(COLUMNS):
        addresses = addresses + (tl.load(table + column * tensors + tensor),)
    return addresses


@triton.jit
def vector_end(addresses, begin, end, BLOCK: tl.constexpr):
    """The element up to which whole blocks can be read 128 bits at a time; ``begin`` where an address forbids it."""
    bits = addresses[0]
    for column in tl.static_range(1, len(addresses)):
        bits = bits | addresses[column]
    return tl.where(bits % 16 == 0, begin + (end - begin) // BLOCK * BLOCK, begin)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The address as a pointer; VECTOR tells the compiler that it is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_column(addresses, column: tl.constexpr, offsets, mask, DTYPES: tl.constexpr, VECTOR: tl.constexpr):
    """Elements of one column in float32, zeros where ``mask`` is false; a mask of one value keeps vectors whole."""
    pointers = pointer_to(addresses[column], DTYPES[column], VECTOR) + offsets
    if mask is None:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_column(address, offsets, value, mask, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Write float32 values into a column, rounded to its precision."""
    tl.store(pointer_to(address, DTYPE, VECTOR) + offsets, value.to(DTYPE), mask=mask)


@triton.jit
def form(columns, ROWS: tl.constexpr, row: tl.constexpr):
    """Row ``row``: ``offset + scale * (at - anchor)``, from the numbers of these four columns; -1 is an absent part."""
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
    """All rows, as a tuple of blocks."""
    rows = ()
    for row in tl.static_range(len(ROWS)):
        rows = rows + (form(columns, ROWS, row),)
    return rows
