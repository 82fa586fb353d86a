"""Preview Adam's update for the rules that act on it: compute its products without writing it."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.adam import correction, load_columns, settings_of, stepped
from gradguide.ops.triton.kernels.columns import addresses_of, chunk_of, form_rows, item, scope_of, uses, vector_end
from gradguide.ops.triton.kernels.combine import is_read, load_coefficients, weighted
from gradguide.ops.triton.kernels.measure import dot

__all__ = ["probe"]


@triton.constexpr_function
def chosen(rows, slots, first, count):
    """Return the present rows at ``count`` slots from ``first`` on."""
    return tuple(row for row, slot in zip(rows, slots) if first <= slot < first + count)  # noqa: B905 (Triton's own zip)


@triton.jit
def prepare(
    table, gradient, tensor, tensors, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    FIRST: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Return the inputs of every block: column addresses, gradient coefficients, and which columns to read."""
    weights = load_coefficients(gradient, SLOTS)
    reads = ()
    for column in tl.static_range(COLUMNS):
        if uses(chosen(ROWS, SLOTS, FIRST, SOURCES), column):
            reads = reads + (1,)
        else:
            reads = reads + (is_read(weights, column, ROWS),)
    return addresses_of(table, tensor, tensors, COLUMNS), weights, reads


@triton.jit
def grown(
    sums, prepared, offsets, inside, settings, corrections,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    FIRST: tl.constexpr, SOURCES: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the products of one block to the sums."""
    addresses, weights, reads = prepared
    columns = load_columns(addresses, reads, offsets, inside, DTYPES, ROWS, P, M, V, BLOCK, VECTOR)
    rows = form_rows(columns, ROWS)
    _, _, update = stepped(columns, weighted(weights, rows), settings, corrections, P, M, V, DECOUPLED, MAXIMIZE)
    if not VECTOR:
        update = tl.where(inside, update, 0.0)
    found = (sums[0] + dot(update, update, THREADS), sums[1] + dot(columns[P], columns[P], THREADS))
    for source in tl.static_range(SOURCES):
        total = sums[2 + source]
        for row in tl.static_range(len(ROWS)):
            if item(SLOTS, row) == FIRST + source:
                total += dot(update, rows[row], THREADS)
        found = found + (total,)
    return found


@triton.jit(do_not_specialize=["tensors", "slots", "count"])
def probe(
    partials, table, lengths, chunks, steps, which, settings, gradient, tensors, slots, count,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    FIRST: tl.constexpr, SOURCES: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, RELOAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Store one chunk's products of the update u that ``adam`` makes with ``g = gradient . rows``.

    The float32 partials [2 + SOURCES, count] are the squared norms of u and of the parameters, then the product of u
    with each source.

    Args:
        count: number of chunks.
        FIRST, SOURCES: slot of the first source, and number of source slots. A slot that is not among SLOTS is a row
            of zeros.

    The other arguments are those of ``adam``.
    """
    tensor, begin, end = chunk_of(chunks, lengths, CHUNK)
    gradient += scope_of(chunks) * slots
    prepared = prepare(table, gradient, tensor, tensors, len(DTYPES), ROWS, SLOTS, FIRST, SOURCES)
    step = tl.load(tl.load(steps + tensor).to(tl.pointer_type(tl.float32))) + 1.0
    own = settings_of(settings, which, tensor, RATE_ON_DEVICE)
    corrections = (correction(step, own[3]), correction(step, own[6]))
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    split = vector_end(prepared[0], begin, end, BLOCK)
    sums = ()
    for _ in tl.static_range(2 + SOURCES):
        sums = sums + (tl.zeros([THREADS], tl.float32),)
    for start in range(begin, split, BLOCK):
        if RELOAD:
            prepared = prepare(table, gradient, tensor, tensors, len(DTYPES), ROWS, SLOTS, FIRST, SOURCES)
        sums = grown(
            sums, prepared, start + lanes, None, own, corrections,
            DTYPES, ROWS, SLOTS, P, M, V, FIRST, SOURCES, DECOUPLED, MAXIMIZE, BLOCK, THREADS, True,
        )  # fmt: skip
    for start in range(split, end, BLOCK):
        if RELOAD:
            prepared = prepare(table, gradient, tensor, tensors, len(DTYPES), ROWS, SLOTS, FIRST, SOURCES)
        offsets = start + lanes
        sums = grown(
            sums, prepared, offsets, offsets < end, own, corrections,
            DTYPES, ROWS, SLOTS, P, M, V, FIRST, SOURCES, DECOUPLED, MAXIMIZE, BLOCK, THREADS, False,
        )  # fmt: skip
    for entry in tl.static_range(2 + SOURCES):
        tl.store(partials + entry * count.to(tl.int64) + tl.program_id(0), tl.sum(sums[entry]))
