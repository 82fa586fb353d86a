"""Lists of tensors that passes go over, and what a pass has to know of one before it goes by address.

Asking 300 tensors one question takes the host 15 to 30 microseconds, and a step on a GPU is to take less than a
millisecond. So of a list that a step has in common with the one before, only addresses and precision are asked: where
they are as they were, so is all else.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

__all__ = ["DTYPE", "Facts", "Interned", "Note", "Tensors", "facts_of", "located", "only", "same"]

DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


class Facts(NamedTuple):
    """Of a list of tensors: numbers of elements, the dtype and the device that all have (None where they differ), and
    whether all are contiguous."""

    lengths: array[int]
    dtype: torch.dtype | None
    device: torch.device | None
    contiguous: bool


class Note:
    """What was found out about a list: its facts, and the addresses at which they held; None for facts of this step."""

    __slots__ = ("addresses", "facts")

    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts
        self.addresses: array[int] | None = None


class Tensors(list[Tensor]):
    """A list with a note, which other lists of the same tensors may share."""

    def __init__(self, tensors: Iterable[Tensor] = (), note: Note | None = None) -> None:
        super().__init__(tensors)
        self.note = Note() if note is None else note

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's tensors lie elsewhere.
        return Tensors, (list(self),)


def located(tensors: Sequence[Tensor]) -> tuple[Facts, array[int]]:
    """The facts of a list, and the addresses of its tensors: all that a pass goes by."""
    addresses = array("q", map(Tensor.data_ptr, tensors))
    if not isinstance(tensors, Tensors):
        return facts_of(tensors), addresses
    note = tensors.note
    if note.facts is None or not _holds(note.facts, note.addresses, tensors, addresses):
        note.facts = facts_of(tensors)
    note.addresses = addresses
    return note.facts, addresses


def _holds(facts: Facts, before: array[int] | None, tensors: Sequence[Tensor], now: array[int]) -> bool:
    """Whether facts that held at the addresses ``before`` still do: between steps, tensors may be given other data.

    Data of another size or on another device lie elsewhere; memory that was freed and taken again may hold another
    precision.
    """
    return before is None or (before == now and only(map(DTYPE, tensors)) == facts.dtype)


def facts_of(tensors: Sequence[Tensor]) -> Facts:
    """The facts of a list, found out anew."""
    lengths = array("q", map(Tensor.numel, tensors))
    contiguous = all(map(Tensor.is_contiguous, tensors))
    return Facts(lengths, only(map(DTYPE, tensors)), only(map(_DEVICE, tensors)), contiguous)


def only(values: Iterable[Any]) -> Any:
    """The one value that all of them are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


class Interned:
    """Notes by key, for lists that are drawn up at every step and mostly hold the same tensors.

    It keeps no tensor alive: what is not ours may be freed, or moved to the host, between steps.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[ref[Tensor]], Note]] = {}

    def of(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensors:
        """These tensors, with the note that is kept under ``key`` if that is of them, else with a new one."""
        known = self.known(key, tensors)
        if known is not None:
            return known
        note = Note()
        self._kept[key] = list(map(ref, tensors)), note
        return Tensors(tensors, note)

    def known(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensors | None:
        """These tensors, with the note that is kept under ``key``; None if there is none, or of others."""
        kept = self._kept.get(key)
        if kept is None or not same(list(map(ref.__call__, kept[0])), tensors):
            return None
        return Tensors(tensors, kept[1])
