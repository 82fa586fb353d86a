"""Lists of tensors that passes go over, and what a pass by address has to know of one.

Asking 300 tensors one question takes the host 25 to 60 microseconds, and a step on a GPU is to take less than a
millisecond. So what was found out about a list is kept in a note, for as long as the note's owner can promise.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = [
    "DTYPE",
    "LAYOUT",
    "Facts",
    "Interned",
    "Note",
    "Tensors",
    "are_plain",
    "facts_of",
    "located",
    "only",
    "same",
]

DTYPE, LAYOUT, _DEVICE = attrgetter("dtype"), attrgetter("layout"), attrgetter("device")

_TYPES = {Tensor, nn.Parameter}
"""Exactly these: a subclass may keep its numbers elsewhere, or have none."""


class Facts(NamedTuple):
    """Of a list of tensors: numbers of elements, the dtype and the device that all have (None where they differ), and
    whether all are plain, see :func:`are_plain`."""

    lengths: array[int]
    dtype: torch.dtype | None
    device: torch.device | None
    plain: bool


class Note:
    """What was found out about a list.

    facts, addresses: what was found; None if nothing was.
    trusted (bool): they hold without a further look. Who sets it promises that nobody else changes the tensors: of
        memory of our own for ever, of parameters and gradients from ``gradguide.roll`` until the base's step.
    """

    __slots__ = ("addresses", "facts", "trusted")

    def __init__(
        self, facts: Facts | None = None, addresses: array[int] | None = None, *, trusted: bool = False
    ) -> None:
        self.facts = facts
        self.addresses = addresses
        self.trusted = trusted


class Tensors(list[Tensor]):
    """A list with a note, which other lists of the same tensors may share."""

    def __init__(self, tensors: Iterable[Tensor] = (), note: Note | None = None) -> None:
        super().__init__(tensors)
        self.note = Note() if note is None else note

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's tensors lie elsewhere.
        return Tensors, (list(self),)


def located(tensors: Sequence[Tensor]) -> tuple[Facts, array[int]]:
    """Return the facts of a list, and the addresses of its tensors, which are meaningless unless all are plain."""
    note = tensors.note if isinstance(tensors, Tensors) else Note()
    if note.facts is not None and note.addresses is not None and note.facts.plain:
        if note.trusted:
            return note.facts, note.addresses
        addresses = array("q", map(Tensor.data_ptr, tensors))
        # Other data lie elsewhere; memory that was freed and taken again may hold another dtype.
        if note.addresses == addresses and only(map(DTYPE, tensors)) == note.facts.dtype:
            return note.facts, addresses
    note.facts = facts_of(tensors)
    note.addresses = array("q", map(Tensor.data_ptr, tensors) if note.facts.plain else [0] * len(tensors))
    return note.facts, note.addresses


def facts_of(tensors: Sequence[Tensor]) -> Facts:
    """Return the facts of a list, found out anew."""
    lengths = array("q", map(Tensor.numel, tensors))
    return Facts(lengths, only(map(DTYPE, tensors)), only(map(_DEVICE, tensors)), are_plain(tensors))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether the numbers of all tensors lie contiguously at their addresses, as they are.

    A subclass may keep them elsewhere, a fake or meta tensor has none, a zero tensor has no memory, and a lazily
    negated or conjugated one holds other numbers than it stands for.
    """
    return (
        set(map(type, tensors)) <= _TYPES
        and set(map(LAYOUT, tensors)) <= {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor.is_conj, tensors))
        and all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)
    )


def only(values: Iterable[Any]) -> Any:
    """Return the one value that all of them are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


class Interned:
    """Notes by key, for lists that are drawn up at every step and mostly hold the same tensors.

    It keeps no tensor of others alive: what is not ours may be freed, or moved to the host, between steps.

    own: whole lists of our own memory, each with the dict that it was drawn up from.
    """

    def __init__(self) -> None:
        self.own: dict[Hashable, tuple[object, Tensors]] = {}
        self._kept: dict[Hashable, tuple[list[ref[Tensor]], Note]] = {}

    def of(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensors:
        """Return these tensors, with the note kept under ``key`` if that is of them, else with a new one."""
        known = self.known(key, tensors)
        if known is not None:
            return known
        note = Note()
        self._kept[key] = list(map(ref, tensors)), note
        return Tensors(tensors, note)

    def known(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensors | None:
        """Return these tensors, with the note kept under ``key``; None if there is none, or of others."""
        kept = self._kept.get(key)
        if kept is None or not same(list(map(ref.__call__, kept[0])), tensors):
            return None
        return Tensors(tensors, kept[1])
