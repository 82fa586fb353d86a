"""Lists of tensors, and the metadata by which a kernel may read them by address."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["ListMetadata", "MetadataCache", "TensorList", "addresses_of", "common_value", "metadata_of", "same_objects"]

DTYPE, DEVICE = attrgetter("dtype"), attrgetter("device")
_LAYOUT = attrgetter("layout")
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter))


class ListMetadata(NamedTuple):
    """What holds for a list of tensors as long as their shapes, strides, dtypes, devices and types stay as they are.

    lengths: int64 [tensors], elements of each.
    dtype, device: of all tensors, None where they differ.
    plain (bool): whether all are exactly ``torch.Tensor`` or ``nn.Parameter``, contiguous, and hold their numbers as
        they are: no wrapper subclass, no fake, negated or conjugated tensor.
    """

    lengths: array[int]
    dtype: torch.dtype | None
    device: torch.device | None
    plain: bool


class TensorList(list[Tensor]):
    """A list of tensors whose metadata may be known.

    Args:
        tensors: the tensors.
        metadata: if it is known. Who gives it sees to it that it holds.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), metadata: ListMetadata | None = None) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def metadata_of(tensors: Sequence[Tensor]) -> ListMetadata:
    """Return the metadata of a list: that which is known, or read anew."""
    known = getattr(tensors, "metadata", None)
    if known is not None:
        return known  # type: ignore[no-any-return]
    plain = _PLAIN_TYPES.issuperset(map(type, tensors)) and common_value(map(_LAYOUT, tensors)) == torch.strided
    return ListMetadata(
        array("q", map(Tensor.numel, tensors)),
        common_value(map(DTYPE, tensors)),
        common_value(map(DEVICE, tensors)),
        plain
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor.is_conj, tensors)),
    )


def addresses_of(tensors: Sequence[Tensor], metadata: ListMetadata) -> array[int] | None:
    """Return the address of each tensor of a plain list, read anew; None where one has elements and no memory.

    Tensors on the meta device and efficient zero tensors have no memory.
    """
    addresses = array("q", map(Tensor.data_ptr, tensors))
    if 0 in addresses and any(length and not where for length, where in zip(metadata.lengths, addresses, strict=True)):
        return None
    return addresses


def common_value(values: Iterable[Any]) -> Any:
    """Return the one value that all of them are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def same_objects(left: Sequence[object], right: Sequence[object]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


class MetadataCache:
    """Metadata by key of lists that are built anew at every step and mostly hold the same tensors.

    It holds for tensors that only the library or the base optimizer writes: the same objects with the same numbers of
    elements. It keeps no tensor alive: the base's state may be freed, or moved to the host, between steps.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[ref[Tensor]], ListMetadata]] = {}

    def of(self, key: Hashable, tensors: Sequence[Tensor]) -> TensorList:
        """Return these tensors with their metadata, read anew if the list of ``key`` held other tensors before."""
        kept = self._kept.get(key)
        if kept is not None and same_objects(list(map(ref.__call__, kept[0])), tensors):
            lengths = array("q", map(Tensor.numel, tensors))
            if lengths == kept[1].lengths:
                return TensorList(tensors, kept[1])
        metadata = metadata_of(tensors)
        self._kept[key] = list(map(ref, tensors)), metadata
        return TensorList(tensors, metadata)
