"""The CPU backend: compiled passes over float32 rows in torch's threads; the portable backend takes the rest."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops import foreach, reference
from gradguide.ops.codes import GROUP
from gradguide.ops.row import Row, Stack, Write

try:
    from gradguide.ops import _cpu
except ImportError:  # installed where there was no C compiler
    _cpu = None  # type: ignore[assignment]

__all__ = ["_cpu", "combine_", "gram"]

THREADED = 1 << 16
"""Elements from which on a pass is worth a thread more."""

_DTYPE = attrgetter("dtype")

_LARGEST = 1e30
"""Beyond this a coefficient may leave the range of float32: rows of such sizes are rare, and taken in float64."""


@torch.no_grad()
def gram(rows: Sequence[Row | None], known: Container[int] = ()) -> Tensor:
    """Gram matrix of the rows: products in float32 per block of 512 elements, float64 across blocks. [R, R].

    Args:
        known: numbers of rows whose products with each other are not wanted, and are 0.
    """
    table = _table_of(rows)
    if _cpu is None or table is None:
        return foreach.gram(rows, known)
    left_out = bytes(index in known for index in range(len(rows)))
    products = _cpu.gram(table.addresses, table.lengths, len(rows), _threads(table), left_out)
    return torch.tensor(products, dtype=torch.float64).view(len(rows), len(rows))


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would change nothing is not made.
    """
    plan = [(write, write.coefficients.tolist()) for write in writes]
    plan = [(write, numbers) for write, numbers in plan if not _trivial(write, numbers, rows)]
    if not plan:
        return
    if any(abs(number) > _LARGEST for _, numbers in plan for number in numbers):
        reference.combine_(rows, [write for write, _ in plan])
        return
    table = _table_of(rows)
    if _cpu is None or table is None or not all(_plain(write.into) for write, _ in plan):
        foreach.combine_(rows, [write for write, _ in plan])
        return
    for write, _ in plan:
        _check_lengths(write.into, table.lengths)
    into = array("q", [address for write, _ in plan for address in map(Tensor.data_ptr, write.into)])
    coefficients = array("d", [number for _, numbers in plan for number in numbers])
    accumulate = bytes(write.accumulate for write, _ in plan)
    _cpu.combine(table.addresses, table.lengths, len(rows), _threads(table), into, coefficients, accumulate)


class _Table(NamedTuple):
    """Where the rows lie: addresses [rows, 4, tensors] (0 for a part that is absent) and lengths [tensors]."""

    addresses: array[int]
    lengths: array[int]
    elements: int


def _table_of(rows: Sequence[Row | None]) -> _Table | None:
    """The table, drawn up once for all passes over a stack."""
    if isinstance(rows, Stack) and isinstance(rows.kept, _Table):
        return rows.kept
    table = _table(rows)
    if isinstance(rows, Stack):
        rows.kept = table
    return table


def _table(rows: Sequence[Row | None]) -> _Table | None:
    """None where a row has a part that is not plain float32 memory."""
    example = next(row for row in rows if row is not None).tensors
    lengths = array("q", map(Tensor.numel, example))
    absent = [0] * len(example)
    addresses = array("q")
    for row in rows:
        if row is not None and row.steps is not None:
            assert row.offset is not None
            if not _whole(row.offset) or not _plain(row.steps):
                return None
            _check_lengths(row.offset, lengths)
            if any(steps.numel() * GROUP < length for steps, length in zip(row.steps, lengths, strict=True)):
                raise ValueError("the steps of a row of 8-bit codes are too few for its codes")
            addresses.extend(map(Tensor.data_ptr, row.offset))
            addresses.extend(map(Tensor.data_ptr, row.steps))
            addresses.extend(absent + absent)
            continue
        parts = (None,) * 4 if row is None else (row.offset, row.scale, row.at, row.anchor)
        for part in parts:
            if part is None:
                addresses.extend(absent)
            elif _plain(part):
                _check_lengths(part, lengths)
                addresses.extend(map(Tensor.data_ptr, part))
            else:
                return None
    return _Table(addresses, lengths, sum(lengths))


def _plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(_DTYPE, tensors)) <= {torch.float32} and _whole(tensors)


def _whole(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _check_lengths(part: Sequence[Tensor], lengths: array[int]) -> None:
    # The compiled passes go by address: a shorter tensor would have them read or write memory of others.
    if array("q", map(Tensor.numel, part)) != lengths:
        raise ValueError("the tensors of a row, or of what is written, differ in size from those of the first row")


def _trivial(write: Write, numbers: list[float], rows: Sequence[Row | None]) -> bool:
    """Whether the write leaves everything as it is."""
    terms = {index: c for index, (c, row) in enumerate(zip(numbers, rows, strict=True)) if c != 0.0 and row is not None}
    if write.accumulate or not terms:
        return write.accumulate and not terms
    (index, coefficient), *others = terms.items()
    row = rows[index]
    return not others and coefficient == 1.0 and row is not None and row.at is None and row.offset is write.into


def _threads(table: _Table) -> int:
    return max(1, min(torch.get_num_threads(), table.elements // THREADED))
