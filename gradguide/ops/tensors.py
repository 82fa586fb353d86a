"""Lists of tensors that passes go over, and what a pass has to know of one before it goes by address.

Asking 300 tensors one question takes the host 20 to 30 microseconds, and a step on a GPU is to take less than a
millisecond. So what does not change from step to step is asked once, and kept with the list.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Facts", "Interned", "Tensors", "facts_of", "only", "same", "unchanged"]

DTYPE, DEVICE = attrgetter("dtype"), attrgetter("device")


class Facts(NamedTuple):
    """Of a list of tensors: numbers of elements, the dtype and the device that all have (None where they differ), and
    whether all are contiguous."""

    lengths: array[int]
    dtype: torch.dtype | None
    device: torch.device | None
    contiguous: bool


class Tensors(list[Tensor]):
    """A list whose facts are found out once.

    Who makes one vouches for its tensors: as long as the list is in use they are the same ones, and keep size,
    precision and layout. Their memory may move.
    """

    facts: Facts | None = None


def facts_of(tensors: Sequence[Tensor]) -> Facts:
    """The facts of a list, which a list of :class:`Tensors` keeps."""
    if isinstance(tensors, Tensors):
        if tensors.facts is None:
            tensors.facts = _found(tensors)
        return tensors.facts
    return _found(tensors)


def _found(tensors: Sequence[Tensor]) -> Facts:
    lengths = array("q", map(Tensor.numel, tensors))
    contiguous = all(map(Tensor.is_contiguous, tensors))
    return Facts(lengths, only(map(DTYPE, tensors)), only(map(DEVICE, tensors)), contiguous)


def only(values: Iterable[Any]) -> Any:
    """The one value that all of them are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


def unchanged(tensors: Tensors) -> bool:
    """Whether tensors that belong to others, whose data may be given another precision or layout, still have those of
    their facts."""
    facts = facts_of(tensors)
    return only(map(DTYPE, tensors)) == facts.dtype and all(map(Tensor.is_contiguous, tensors)) == facts.contiguous


class Interned:
    """Lists by key, each the same object for as long as it holds the same tensors: so its facts can be kept."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensors] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own.
        return {"_kept": {}}

    def of(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensors:
        """The list kept under ``key`` if it holds just these tensors, else a new one of them, which is kept."""
        kept = self._kept.get(key)
        if kept is None or not same(kept, tensors):
            kept = self._kept[key] = Tensors(tensors)
        return kept

    def get(self, key: Hashable) -> Tensors | None:
        """The list kept under ``key``."""
        return self._kept.get(key)

    def clear(self) -> None:
        """Keep nothing, and no memory alive."""
        self._kept.clear()
