"""Launch the kernels: block and chunk sizes, device arrays, the current device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gradguide.ops.row import Row, Stack, Write, check_writes, sizes_of
from gradguide.ops.triton.device_arrays import DeviceArrayCache, bounds_of, chunk_numbers
from gradguide.ops.triton.kernels.combine import combine
from gradguide.ops.triton.kernels.measure import finish, measure, total
from gradguide.ops.triton.operands import KernelOperands, operands_of

__all__ = [
    "BLOCK",
    "CHUNK",
    "FINISH",
    "FUSION",
    "REGISTERS",
    "TILE",
    "WARPS",
    "WIDE",
    "WIDEST_BLOCK",
    "WIDE_BLOCK",
    "launch_combine",
    "launch_measure",
    "mark_written",
    "numbers_of",
    "on",
    "sums_of",
    "table_of",
    "tables_of",
]

WARPS = 4

BLOCK = 1024
"""Elements of a block, which a program processes at a time: 8 per thread, 128 bits in 16-bit precision."""

WIDE_BLOCK = 512
"""Block size with more than TILE rows in registers, or with moments: it halves the registers per row."""

WIDEST_BLOCK = 128
"""Block size with more than WIDE columns, for instance those of sixteen moving sources."""

WIDE = 24

TILE = 6
"""Rows that fit in registers together with their mutual products, 21 sums per thread."""

CHUNK = 1 << 14
"""Elements per program."""

REGISTERS = 232
"""Maximum registers per thread of a program that combines. By default the compiler aims at a higher occupancy than a
memory-bound pass needs, and spills registers for it."""

FUSION = {"enable_fp_fusion": True}
"""Fuse multiply and add, with one rounding. The option is explicit because Triton 3.10 changes its default, which would
change the last bits of a step."""

FINISH = 2048
"""Partial sums that a program adds in one iteration."""

_arrays = DeviceArrayCache()


def launch_measure(rows: Sequence[Row | None]) -> Tensor | None:
    """Return the Gram matrices of the rows: Tensor [S, R, R], float64; None if a row has no kernel.

    Up to TILE rows are read once. With more rows, each is read once per TILE rows.
    """
    present, sizes = [row for row in rows if row is not None], sizes_of(rows)
    tiles = [(first, present[first : first + TILE]) for first in range(0, len(present), TILE)]
    launches = []
    for (first, a), (second, b) in combinations_with_replacement(tiles, 2):
        # A single tile passes the stack itself, which caches its operands.
        operands = operands_of(rows if len(tiles) == 1 else Stack(a if first == second else [*a, *b], sizes))
        if operands is None:
            return None
        launches.append((first, second, operands, operands.rows[: len(a)], operands.rows[len(a) :]))
    device, count = launches[0][2].device, 0
    partials: Tensor | None = None
    with on(device):
        for first, second, operands, a_rows, b_rows in launches:
            table, lengths, chunks = tables_of(operands)
            if partials is None:
                count = len(chunks)
                partials = torch.empty(len(present), len(present), count, dtype=torch.float32, device=device)
            if count:
                measure[(count,)](
                    partials, table, lengths, chunks, operands.tensors, count, first, second, len(present),
                    DTYPES=operands.dtypes, A=a_rows, B=b_rows or a_rows, SAME=first == second,
                    BLOCK=block_for(operands), CHUNK=CHUNK, THREADS=32 * WARPS, num_warps=WARPS, **FUSION,
                )  # fmt: skip
        gram = torch.empty(len(sizes), len(rows), len(rows), dtype=torch.float64, device=device)
        finish[(gram.numel(),)](
            gram, partials, _bounds(launches[0][2]), count, SLOTS=_slots(rows), ROWS=len(present), BLOCK=FINISH,
            num_warps=WARPS, **FUSION,
        )  # fmt: skip
    return gram


def sums_of(partials: Tensor, operands: KernelOperands) -> Tensor:
    """Sum float32 ``partials`` [N, chunks] over the chunks of each scope: Tensor [S, N], float64."""
    sums = torch.empty(len(operands.sizes), len(partials), dtype=torch.float64, device=partials.device)
    with on(partials.device):
        total[(sums.numel(),)](
            sums, partials, _bounds(operands), len(partials), partials.shape[1], BLOCK=FINISH, num_warps=WARPS, **FUSION
        )
    return sums


def launch_combine(rows: Sequence[Row | None], writes: Sequence[Write]) -> bool:
    """Make the writes and return True; return False and write nothing if a row or a write has no kernel."""
    check_writes(rows, writes)
    operands = operands_of(rows, writes)
    if operands is None:
        return False
    table, lengths, chunks = tables_of(operands)
    if len(chunks):
        with on(operands.device):
            combine[(len(chunks),)](
                table, lengths, chunks, tuple(write.coefficients.contiguous() for write in writes), operands.tensors,
                len(rows),
                DTYPES=operands.dtypes, ROWS=operands.rows, SLOTS=tuple(i for i, row in enumerate(rows) if row),
                WRITES=operands.writes, RELOAD=len(operands.rows) > TILE,
                BLOCK=WIDEST_BLOCK if len(operands.dtypes) > WIDE else block_for(operands), CHUNK=CHUNK,
                num_warps=WARPS, maxnreg=REGISTERS, **FUSION,
            )  # fmt: skip
    for write in writes:
        mark_written(write.into)
    return True


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Raise the version of tensors that a kernel wrote: autograd then refuses a graph that needs their old values."""
    try:
        increment_version(tensors)
    except RuntimeError:  # of inference tensors, which have no version
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def tables_of(operands: KernelOperands) -> tuple[Tensor, Tensor, Tensor]:
    """Return addresses [columns, tensors], lengths [tensors] and chunks [chunks, 3] on the device."""
    device, lengths = operands.device, operands.lengths
    return table_of(device, operands.addresses), table_of(device, lengths), _cut(operands, "chunks", chunk_numbers)


def _bounds(operands: KernelOperands) -> Tensor:
    """Return the first chunk of each scope, on the device: Tensor [scopes + 1]."""
    return _cut(operands, "bounds", bounds_of)


def _cut(operands: KernelOperands, kind: str, make: Callable[[array[int], array[int], int], Tensor]) -> Tensor:
    """Return a device array that depends only on the split into chunks."""
    lengths, sizes = operands.lengths, operands.sizes
    key = lengths.tobytes() + b"/" + sizes.tobytes()
    return _arrays.get(operands.device, kind, key, lambda: make(lengths, sizes, CHUNK))


def table_of(device: torch.device, numbers: array[int]) -> Tensor:
    """Return the numbers on the device: Tensor [len(numbers)], int64."""
    return _arrays.get(device, "numbers", numbers.tobytes(), lambda: torch.frombuffer(numbers, dtype=torch.int64))


def numbers_of(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """Return the numbers on the device: Tensor [len(numbers)], float64, without host synchronization."""
    return table_of(device, array("q", array("d", numbers).tobytes())).view(torch.float64)


def block_for(operands: KernelOperands) -> int:
    """Return the block size for these operands."""
    return BLOCK if len(operands.rows) <= TILE else WIDE_BLOCK


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current, because Triton launches kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _slots(rows: Sequence[Row | None]) -> tuple[int, ...]:
    """Return the index of each row among the present rows; -1 for an absent one."""
    slots, filled = [], 0
    for row in rows:
        slots.append(-1 if row is None else filled)
        filled += row is not None
    return tuple(slots)
