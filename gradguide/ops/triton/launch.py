"""Launching the kernels: sizes of blocks and chunks, tables, the device that is current."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gradguide.ops.row import Row, Stack, Write, check_writes, sizes_of
from gradguide.ops.triton.columns import Columns, columns_of
from gradguide.ops.triton.kernels.combine import combine
from gradguide.ops.triton.kernels.measure import finish, measure, total
from gradguide.ops.triton.tables import Tables, bounds_of, chunk_numbers

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
"""Elements that a program takes at a time: 8 per thread, one vector of 128 bits in 16-bit precision."""

WIDE_BLOCK = 512
"""The same where more than TILE rows are held at once, or moments beside them: half the registers per row."""

WIDEST_BLOCK = 128
"""The same where more than WIDE columns are combined, as sixteen moving sources have."""

WIDE = 24

TILE = 6
"""Rows whose products with each other, 21 sums per thread, stay in registers beside the rows themselves."""

CHUNK = 1 << 14
"""Elements per program."""

REGISTERS = 232
"""Most per thread of a program that combines. Left to itself the compiler aims at more threads than a pass that waits
for memory needs, and spills for it."""

FUSION = {"enable_fp_fusion": True}
"""Multiplying and adding round once. Said by name, since Triton's own default changes with its version 3.10, and with
it would the last bits of a step."""

FINISH = 2048
"""Partial sums that a program adds at a time."""

_tables = Tables()


def launch_measure(rows: Sequence[Row | None]) -> Tensor | None:
    """Gram matrices of the rows: Tensor [S, R, R], float64; None where there is no kernel for one of them.

    Up to TILE rows are read once; of more, each once for every TILE rows.
    """
    present, sizes = [row for row in rows if row is not None], sizes_of(rows)
    tiles = [(first, present[first : first + TILE]) for first in range(0, len(present), TILE)]
    launches = []
    for (first, a), (second, b) in combinations_with_replacement(tiles, 2):
        # Of one tile the stack itself, which keeps what is found out about it.
        columns = columns_of(rows if len(tiles) == 1 else Stack(a if first == second else [*a, *b], sizes))
        if columns is None:
            return None
        launches.append((first, second, columns, columns.rows[: len(a)], columns.rows[len(a) :]))
    device, count = launches[0][2].device, 0
    partials: Tensor | None = None
    with on(device):
        for first, second, columns, a_rows, b_rows in launches:
            table, lengths, chunks = tables_of(columns)
            if partials is None:
                count = len(chunks)
                partials = torch.empty(len(present), len(present), count, dtype=torch.float32, device=device)
            if count:
                measure[(count,)](
                    partials, table, lengths, chunks, columns.tensors, count, first, second, len(present),
                    DTYPES=columns.dtypes, A=a_rows, B=b_rows or a_rows, SAME=first == second,
                    BLOCK=block_for(columns), CHUNK=CHUNK, THREADS=32 * WARPS, num_warps=WARPS, **FUSION,
                )  # fmt: skip
        gram = torch.empty(len(sizes), len(rows), len(rows), dtype=torch.float64, device=device)
        finish[(gram.numel(),)](
            gram, partials, _bounds(launches[0][2]), count, SLOTS=_slots(rows), ROWS=len(present), BLOCK=FINISH,
            num_warps=WARPS, **FUSION,
        )  # fmt: skip
    return gram


def sums_of(partials: Tensor, columns: Columns) -> Tensor:
    """Sums over each scope's chunks: Tensor [S, N], float64, of float32 ``partials`` [N, chunks]."""
    sums = torch.empty(len(columns.sizes), len(partials), dtype=torch.float64, device=partials.device)
    with on(partials.device):
        total[(sums.numel(),)](
            sums, partials, _bounds(columns), len(partials), partials.shape[1], BLOCK=FINISH, num_warps=WARPS, **FUSION
        )
    return sums


def launch_combine(rows: Sequence[Row | None], writes: Sequence[Write]) -> bool:
    """Make the writes; False, and nothing done, where there is no kernel for a row or a write."""
    check_writes(rows, writes)
    columns = columns_of(rows, writes)
    if columns is None:
        return False
    table, lengths, chunks = tables_of(columns)
    if len(chunks):
        with on(columns.device):
            combine[(len(chunks),)](
                table, lengths, chunks, tuple(write.coefficients.contiguous() for write in writes), columns.tensors,
                len(rows),
                DTYPES=columns.dtypes, ROWS=columns.rows, SLOTS=tuple(i for i, row in enumerate(rows) if row),
                WRITES=columns.writes, RELOAD=len(columns.rows) > TILE,
                BLOCK=WIDEST_BLOCK if len(columns.dtypes) > WIDE else block_for(columns), CHUNK=CHUNK,
                num_warps=WARPS, maxnreg=REGISTERS, **FUSION,
            )  # fmt: skip
    for write in writes:
        mark_written(write.into)
    return True


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Raise the version of tensors that a kernel wrote, so that autograd refuses a graph that needs what they held."""
    try:
        increment_version(tensors)
    except RuntimeError:  # of inference tensors, which have no version
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def tables_of(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses [columns, tensors], lengths [tensors] and chunks [chunks, 3] on the device."""
    device, lengths = columns.device, columns.lengths
    return table_of(device, columns.addresses), table_of(device, lengths), _cut(columns, "chunks", chunk_numbers)


def _bounds(columns: Columns) -> Tensor:
    """Where each scope's chunks begin, on the device: Tensor [scopes + 1]."""
    return _cut(columns, "bounds", bounds_of)


def _cut(columns: Columns, kind: str, make: Callable[[array[int], array[int], int], Tensor]) -> Tensor:
    """What is known of the columns by how they are cut into chunks."""
    lengths, sizes = columns.lengths, columns.sizes
    key = lengths.tobytes() + b"/" + sizes.tobytes()
    return _tables.get(columns.device, kind, key, lambda: make(lengths, sizes, CHUNK))


def table_of(device: torch.device, numbers: array[int]) -> Tensor:
    """The numbers on the device: Tensor [len(numbers)], int64."""
    return _tables.get(device, "numbers", numbers.tobytes(), lambda: torch.frombuffer(numbers, dtype=torch.int64))


def numbers_of(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """The numbers on the device: Tensor [len(numbers)], float64, with no wait by the host."""
    return table_of(device, array("q", array("d", numbers).tobytes())).view(torch.float64)


def block_for(columns: Columns) -> int:
    """Elements that a program takes at a time."""
    return BLOCK if len(columns.rows) <= TILE else WIDE_BLOCK


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _slots(rows: Sequence[Row | None]) -> tuple[int, ...]:
    """For each row its place among those that are there; -1 for one that is not."""
    slots, filled = [], 0
    for row in rows:
        slots.append(-1 if row is None else filled)
        filled += row is not None
    return tuple(slots)
