"""The CPU backend: compiled passes over float32 and bfloat16 rows in torch's threads; the rest is portable."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.ops import foreach, reference
from gradguide.ops.row import Row, Stack, Write, check_writes, scopes_of
from gradguide.ops.tensors import Facts, located

try:
    from gradguide.ops import _cpu
except ImportError:  # installed where there was no C compiler
    _cpu = None  # type: ignore[assignment]

__all__ = ["_cpu", "combine_", "gram"]

THREADED = 1 << 16
"""Elements from which on a pass is worth a thread more."""

_FLOAT32, _BFLOAT16 = range(2)
_KINDS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16}
"""How the compiled passes name what a part is stored as."""

_LARGEST = 1e30
"""Beyond this a coefficient may leave the range of float32: rows of such sizes are rare, and taken in float64."""


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrices of the rows: products in float32 per block, of 512 or 4,096 elements, float64 across. [S, R, R]."""
    table = _table_of(rows)
    if _cpu is None or table is None:
        return foreach.gram(rows)
    products: list[float] = []
    for scope in table.scopes:
        products += _cpu.gram(scope.addresses, table.kinds, scope.lengths, len(rows), scope.threads, bytes(len(rows)))
    return torch.tensor(products, dtype=torch.float64).view(len(table.scopes), len(rows), len(rows))


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would change nothing is not made.
    """
    check_writes(rows, writes)
    plan = []  # of each write its coefficients, and in which scopes it is made
    for write in writes:
        each = write.coefficients.tolist()
        made = [not _trivial(write, numbers, rows) for numbers in each]
        if any(made):
            plan.append((write, each, made))
    if not plan:
        return
    wanted = [write for write, _, _ in plan]
    if any(abs(number) > _LARGEST for _, each, _ in plan for numbers in each for number in numbers):
        reference.combine_(rows, wanted)
        return
    table = _table_of(rows)
    written = [located(write.into) for write in wanted]
    kinds = [_kind(facts) for facts, _ in written]
    if _cpu is None or table is None or None in kinds:
        foreach.combine_(rows, wanted)
        return
    for facts, _ in written:
        _check_lengths(facts, table.lengths)
    for number, scope in enumerate(table.scopes):
        into, coefficients, accumulate, stored = array("q"), array("d"), bytearray(), bytearray()
        for (write, each, made), (_, addresses), kind in zip(plan, written, kinds, strict=True):
            if kind is not None and made[number]:
                into += addresses[scope.tensors.start : scope.tensors.stop]
                coefficients.extend(each[number])
                accumulate.append(write.accumulate)
                stored.append(kind)
        if stored:
            _cpu.combine(
                scope.addresses, table.kinds, scope.lengths, len(rows), scope.threads, into, coefficients,
                bytes(accumulate), bytes(stored),
            )  # fmt: skip


class _Scope(NamedTuple):
    """Where a scope's part of the rows lies: numbers of its tensors, addresses [rows, 4, tensors] (0 for a part that is
    absent), lengths [tensors], and how many threads that is worth."""

    tensors: range
    addresses: array[int]
    lengths: array[int]
    threads: int


class _Table(NamedTuple):
    """Where the rows lie: kinds [rows, 4], lengths of all tensors, and the scopes."""

    kinds: bytes
    lengths: array[int]
    scopes: list[_Scope]


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
    columns, kinds = [], bytearray()
    for row in rows:
        for part in (None,) * 4 if row is None else row.fields:
            if row is None or part is None:
                columns.append(absent)
                kinds.append(_FLOAT32)
                continue
            facts, where = known[id(part)]
            kind = _kind(facts)
            if kind is None:
                return None
            _check_lengths(facts, lengths)
            columns.append(where)
            kinds.append(kind)
    return _Table(bytes(kinds), lengths, [_scope(tensors, columns, lengths) for tensors in scopes_of(rows)])


def _scope(tensors: range, columns: Sequence[array[int]], lengths: array[int]) -> _Scope:
    addresses = array("q")
    for column in columns:
        addresses += column[tensors.start : tensors.stop]
    own = lengths[tensors.start : tensors.stop]
    return _Scope(tensors, addresses, own, _threads(own))


def _threads(lengths: array[int]) -> int:
    return max(1, min(torch.get_num_threads(), sum(lengths) // THREADED))


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
