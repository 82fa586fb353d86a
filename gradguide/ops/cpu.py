"""The CPU backend: compiled passes over float32, bfloat16 and 8-bit rows in torch's threads; the portable backend takes
the rest."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops import foreach, reference
from gradguide.ops.codes import GROUP
from gradguide.ops.row import Row, Stack, Write
from gradguide.ops.tensors import Facts, located

try:
    from gradguide.ops import _cpu
except ImportError:  # installed where there was no C compiler
    _cpu = None  # type: ignore[assignment]

__all__ = ["_cpu", "combine_", "gram"]

THREADED = 1 << 16
"""Elements from which on a pass is worth a thread more."""

_FLOAT32, _BFLOAT16, _CODES = range(3)
_KINDS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16}
"""How the compiled passes name what a part is stored as."""

_LARGEST = 1e30
"""Beyond this a coefficient may leave the range of float32: rows of such sizes are rare, and taken in float64."""


@torch.no_grad()
def gram(rows: Sequence[Row | None], known: Container[int] = ()) -> Tensor:
    """Gram matrix of the rows: products in float32 per block, of 512 or 4,096 elements, float64 across. [R, R].

    Args:
        known: numbers of rows whose products with each other are not wanted, and are 0.
    """
    table = _table_of(rows)
    if _cpu is None or table is None:
        return foreach.gram(rows, known)
    left_out = bytes(index in known for index in range(len(rows)))
    products = _cpu.gram(table.addresses, table.kinds, table.lengths, len(rows), _threads(table), left_out)
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
    written = [located(write.into) for write, _ in plan]
    stored = [_kind(facts) for facts, _ in written]
    if _cpu is None or table is None or None in stored:
        foreach.combine_(rows, [write for write, _ in plan])
        return
    into = array("q")
    for facts, addresses in written:
        _check_lengths(facts, table.lengths)
        into.extend(addresses)
    coefficients = array("d", [number for _, numbers in plan for number in numbers])
    accumulate = bytes(write.accumulate for write, _ in plan)
    kinds = bytes(kind for kind in stored if kind is not None)
    _cpu.combine(
        table.addresses, table.kinds, table.lengths, len(rows), _threads(table), into, coefficients, accumulate, kinds
    )


class _Table(NamedTuple):
    """Where the rows lie: addresses [rows, 4, tensors] (0 for a part that is absent), kinds [rows, 4] and lengths
    [tensors]."""

    addresses: array[int]
    kinds: bytes
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
    """None where a row has a part that the compiled passes cannot read."""
    known = {id(part): located(part) for row in rows if row is not None for part in row.fields if part is not None}
    example = next(row for row in rows if row is not None).tensors
    lengths = known[id(example)][0].lengths
    absent = array("q", [0] * len(example))
    addresses, kinds = array("q"), bytearray()
    for row in rows:
        for part in (None,) * 4 if row is None else row.fields:
            if row is None or part is None:
                addresses.extend(absent)
                kinds.append(_FLOAT32)
                continue
            facts, where = known[id(part)]
            kind = _kind_in(row, part, facts, lengths)
            if kind is None:
                return None
            addresses.extend(where)
            kinds.append(kind)
    return _Table(addresses, bytes(kinds), lengths, sum(lengths))


def _kind_in(row: Row, part: Sequence[Tensor], facts: Facts, lengths: array[int]) -> int | None:
    """How a part of the row is stored; None where the compiled passes cannot read it."""
    if part is row.steps:
        if any(steps * GROUP < length for steps, length in zip(facts.lengths, lengths, strict=True)):
            raise ValueError("the steps of a row of 8-bit codes are too few for its codes")
        return _FLOAT32 if _kind(facts) == _FLOAT32 else None
    kind = _CODES if row.steps is not None and facts.contiguous else _kind(facts)
    if kind is not None:
        _check_lengths(facts, lengths)
    return kind


def _kind(facts: Facts) -> int | None:
    return _KINDS.get(facts.dtype) if facts.dtype is not None and facts.contiguous else None


def _check_lengths(facts: Facts, lengths: array[int]) -> None:
    # The compiled passes go by address: a shorter tensor would have them read or write memory of others.
    if facts.lengths != lengths:
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
