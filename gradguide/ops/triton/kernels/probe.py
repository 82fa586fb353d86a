"""Products of Adam's update before it is made, for the rules that act on it: everything is read, nothing written."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.access import addresses_of, chunk_of, form_rows, item, scope_of, uses, vector_end
from gradguide.ops.triton.kernels.adam import correction, load_columns, settings_of, stepped
from gradguide.ops.triton.kernels.combine import is_read, load_coefficients, weighted
from gradguide.ops.triton.kernels.measure import dot

__all__ = ["probe"]


@triton.constexpr_function
def chosen(rows, slots, first, count):
    """The rows at ``count`` slots from ``first`` on; of those that are not there, none."""
    return tuple(row for row, slot in zip(rows, slots) if first <= slot < first + count)  # noqa: B905 (Triton's own zip)


@triton.jit
def prepare(
    table, gradient, tensor, tensors, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    FIRST: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """What every block needs: addresses of the columns, coefficients of the gradient, and which columns count."""
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
    """The sums, and the products of one block."""
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
    """One chunk's products of the update u that ``adam`` would make with ``g = gradient . rows``: of u and of the
    parameters with itself, then of u with each source; float32 partials [2 + SOURCES, count].

    Args:
        count: of the chunks.
        FIRST, SOURCES: the slot of the first source, and how many slots are theirs; one that is not among SLOTS
            counts as zeros.

    The others are those of ``adam``.
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
