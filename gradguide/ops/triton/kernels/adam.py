"""Combine rows and step Adam or AdamW in one pass over parameters, rows and moments."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.triton.kernels.columns import (
    addresses_of,
    chunk_of,
    form_rows,
    load_column,
    scope_of,
    store_column,
    uses,
    vector_end,
)
from gradguide.ops.triton.kernels.combine import is_read, lanes_if, load_coefficients, weighted
from gradguide.ops.triton.kernels.measure import dot

__all__ = ["adam", "correction", "count", "load_columns", "settings_of", "stepped"]


@triton.constexpr_function
def among(column, columns):
    """Return whether a column is one of ``columns``."""
    return column in columns


@triton.jit
def settings_of(settings, which, tensor, RATE_ON_DEVICE: tl.constexpr):
    """Return the settings of a tensor's param group: learning rate, ``beta, 1 - beta, log2(beta)`` for both betas, eps
    and weight decay.

    Args:
        settings: these numbers for each group; with RATE_ON_DEVICE the learning rate is a pointer.
        which: int64 [tensors], index of each tensor's group.
    """
    group = tl.load(which + tensor)
    chosen = settings[0]
    rate = tl.load(chosen[0]).to(tl.float32) if RATE_ON_DEVICE else chosen[0]
    rest = chosen[1:]
    for other in tl.static_range(1, len(settings)):
        mine = group == other
        lr = tl.load(settings[other][0]).to(tl.float32) if RATE_ON_DEVICE else settings[other][0]
        rate = tl.where(mine, lr, rate)
        picked = ()
        for number in tl.static_range(len(rest)):
            picked = picked + (tl.where(mine, settings[other][1 + number], rest[number]),)
        rest = picked
    return (rate,) + rest


@triton.jit
def correction(step, log_beta):
    """Return ``1 - beta^step`` as float32, from ``log2(beta)``. It uses float64 since beta^step may be near 1."""
    return (1.0 - tl.exp2(step.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def load_columns(
    addresses, reads, offsets, inside, DTYPES: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Load parameters, moments and the required columns of the rows: a tuple of blocks, by column."""
    columns = ()
    for column in tl.static_range(len(DTYPES)):
        if among(column, (P, M, V)):
            columns = columns + (load_column(addresses, column, offsets, inside, DTYPES, VECTOR),)
        elif uses(ROWS, column):
            mask = lanes_if(reads[column], inside, BLOCK, VECTOR)
            columns = columns + (load_column(addresses, column, offsets, mask, DTYPES, VECTOR),)
        else:
            columns = columns + (0.0,)
    return columns


@triton.jit
def stepped(
    columns, g, settings, corrections, P: tl.constexpr, M: tl.constexpr, V: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Return the new moments of Adam's step with the gradient ``g``, and its update of the parameters."""
    lr, beta1, rest1, _, beta2, rest2, _, eps, decay = settings
    before = columns[P]
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        p = before * (1.0 - lr * decay)
    else:
        g = tl.where(decay != 0.0, g + decay * before, g)
        p = before
    m = beta1 * columns[M] + rest1 * g
    v = beta2 * columns[V] + rest2 * g * g
    p -= lr / corrections[0] * m / (tl.sqrt_rn(v) / tl.sqrt_rn(corrections[1]) + eps)
    return m, v, p - before


@triton.jit(do_not_specialize=["tensors"])
def count(steps, go, tensors, BLOCK: tl.constexpr):
    """Add float32 ``go`` to the float32 step counts at the addresses ``steps``, int64 [tensors]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tensors
    pointers = tl.load(steps + index, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + tl.load(go), mask=mask)


@triton.jit
def prepare(
    table, gradient, direction, pulls, tensor, tensors, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, PULLED: tl.constexpr,
):  # fmt: skip
    """Return the inputs of every block: column addresses, the coefficients, and which columns to read."""
    weights = load_coefficients(gradient, SLOTS)
    turned = load_coefficients(direction, SLOTS)
    pulling = load_coefficients(pulls, SLOTS) if PULLED else turned
    reads = ()
    for column in tl.static_range(COLUMNS):
        read = is_read(weights, column, ROWS)
        if D >= 0:
            read = read | is_read(turned, column, ROWS)
        if PULLED:
            read = read | is_read(pulling, column, ROWS)
        reads = reads + (read,)
    return addresses_of(table, tensor, tensors, COLUMNS), weights, turned, pulling, reads


@triton.jit
def block(
    prepared, offsets, inside, settings, corrections, scale,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    PULLED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Step one block, and return the change of the parameters after rounding."""
    addresses, gradient, direction, pulling, reads = prepared
    columns = load_columns(addresses, reads, offsets, inside, DTYPES, ROWS, P, M, V, BLOCK, VECTOR)
    rows = form_rows(columns, ROWS)
    before = columns[P]
    m, v, update = stepped(columns, weighted(gradient, rows), settings, corrections, P, M, V, DECOUPLED, MAXIMIZE)
    # A scale of 0 must drop an update that holds Inf or NaN.
    p = before + tl.where(scale == 0.0, 0.0, scale * update)
    if PULLED:
        p += weighted(pulling, rows)
    p = p.to(DTYPES[P]).to(tl.float32)
    # All loads precede the stores, because the targets may be rows.
    if D >= 0:
        store_column(addresses[D], offsets, weighted(direction, rows), inside, DTYPES[D], VECTOR)
    store_column(addresses[M], offsets, m, inside, DTYPES[M], VECTOR)
    store_column(addresses[V], offsets, v, inside, DTYPES[V], VECTOR)
    store_column(addresses[P], offsets, p, inside, DTYPES[P], VECTOR)
    change = p - before
    return change if VECTOR else tl.where(inside, change, 0.0)


# The scales are a slice of a tensor, so their alignment varies; it must not trigger a recompilation.
@triton.jit(do_not_specialize=["tensors", "slots"], do_not_specialize_on_alignment=["scale"])
def adam(
    table, lengths, chunks, steps, which, settings, gradient, direction, pulls, scale, go, squares, tensors, slots,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, PULLED: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, RELOAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Step one chunk: ``g = gradient . rows; d = direction . rows; p, m, v = Adam(p, g, m, v)``. g is not stored.

    The update of the parameters is ``scale`` times that of Adam. With PULLED, ``pulls . rows`` is added to it.

    Args:
        table: int64 [columns, tensors], addresses; DTYPES are the precisions of the columns.
        lengths: int64 [tensors], number of elements.
        chunks: int64 [chunks, 3], tensor, index within it and scope of each chunk of CHUNK elements.
        steps: int64 [tensors], addresses of float32 counts of the steps before this one.
        gradient, direction, pulls: float64 coefficients [scopes, slots] of the guided gradient, the new direction and
            the addition to the update; the coefficient of ROWS[i] is at SLOTS[i].
        scale: float64 [scopes], factor of the update.
        go: float32; 0 changes nothing.
        squares: output, float32 [chunks], squared length of each chunk's update.
        which, settings: see ``settings_of``; DECOUPLED selects decoupled weight decay.
        tensors, slots: number of tensors and of slots.
        ROWS: for each row the indices of its columns: offset, scale, at, anchor; -1 is absent.
        D, P, M, V: columns of direction (-1 is absent), parameters, first and second moments.
        RELOAD: whether to reload addresses and coefficients for each block, because they do not fit in registers.
        THREADS: number of threads of a program.
    """
    index = tl.program_id(0)
    tl.store(squares + index, 0.0)
    if tl.load(go) == 0.0:
        return
    tensor, begin, end = chunk_of(chunks, lengths, CHUNK)
    scope = scope_of(chunks)
    gradient, direction, pulls = gradient + scope * slots, direction + scope * slots, pulls + scope * slots
    prepared = prepare(table, gradient, direction, pulls, tensor, tensors, len(DTYPES), ROWS, SLOTS, D, PULLED)
    step = tl.load(tl.load(steps + tensor).to(tl.pointer_type(tl.float32))) + 1.0
    own = settings_of(settings, which, tensor, RATE_ON_DEVICE)
    factor = tl.load(scale + scope).to(tl.float32)
    corrections = (correction(step, own[3]), correction(step, own[6]))
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    split = vector_end(prepared[0], begin, end, BLOCK)
    total = tl.zeros([THREADS], tl.float32)
    for start in range(begin, split, BLOCK):
        if RELOAD:
            prepared = prepare(table, gradient, direction, pulls, tensor, tensors, len(DTYPES), ROWS, SLOTS, D, PULLED)
        change = block(
            prepared, start + lanes, None, own, corrections, factor,
            DTYPES, ROWS, D, P, M, V, PULLED, DECOUPLED, MAXIMIZE, BLOCK, True,
        )  # fmt: skip
        total += dot(change, change, THREADS)
    for start in range(split, end, BLOCK):
        if RELOAD:
            prepared = prepare(table, gradient, direction, pulls, tensor, tensors, len(DTYPES), ROWS, SLOTS, D, PULLED)
        offsets = start + lanes
        change = block(
            prepared, offsets, offsets < end, own, corrections, factor,
            DTYPES, ROWS, D, P, M, V, PULLED, DECOUPLED, MAXIMIZE, BLOCK, False,
        )  # fmt: skip
        total += dot(change, change, THREADS)
    tl.store(squares + index, tl.sum(total))
