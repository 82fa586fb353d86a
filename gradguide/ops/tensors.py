"""Lists of tensors, with the metadata that kernels need to read them by address."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = [
    "ListMetadata",
    "MetadataCache",
    "TensorList",
    "addresses_of",
    "all_finite",
    "common_value",
    "metadata_of",
    "same_objects",
    "to_float64",
    "wide_dtype",
]

DTYPE, DEVICE = attrgetter("dtype"), attrgetter("device")
_LAYOUT = attrgetter("layout")
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter))


class ListMetadata(NamedTuple):
    """Metadata of a list of tensors, valid while their shapes, strides, dtypes, devices and types stay the same.

    lengths: int64 [tensors], number of elements of each tensor.
    dtype, device: common to all tensors, None if they differ.
    plain (bool): whether all are exactly ``torch.Tensor`` or ``nn.Parameter``, contiguous, and store their values
        directly: no wrapper subclass, no fake, negated or conjugated tensor.
    """

    lengths: array[int]
    dtype: torch.dtype | None
    device: torch.device | None
    plain: bool


class TensorList(list[Tensor]):
    """A list of tensors with optional metadata.

    Args:
        tensors: the tensors.
        metadata: None if it is unknown. The caller guarantees that it is valid.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), metadata: ListMetadata | None = None) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def metadata_of(tensors: Sequence[Tensor]) -> ListMetadata:
    """Return the metadata of a list: the stored one if present, else computed from the tensors."""
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
    """Return the current address of each tensor of a plain list; None if a tensor has elements but no memory.

    Tensors on the meta device and efficient zero tensors have no memory.
    """
    addresses = array("q", map(Tensor.data_ptr, tensors))
    if 0 in addresses and any(length and not where for length, where in zip(metadata.lengths, addresses, strict=True)):
        return None
    return addresses


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all elements are finite: Tensor [], bool, on the device of the first of at least one tensor."""
    return torch.stack([tensor.isfinite().all().to(tensors[0].device) for tensor in tensors]).all()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float32 on mps and on some xpu devices, else float64."""
    return torch.float64 if _has_float64(device) else torch.float32


def to_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the host if its device has no float64."""
    return tensor.double() if _has_float64(tensor.device) else tensor.cpu().double()


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def common_value(values: Iterable[Any]) -> Any:
    """Return the common value; None if the values differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def same_objects(left: Sequence[object], right: Sequence[object]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


class MetadataCache:
    """Metadata by key, for lists that are rebuilt at every step and usually hold the same tensors.

    A cached entry is valid for the same objects with the same numbers of elements. This suffices for tensors that only
    the library or the base optimizer writes. The cache keeps weak references: the base's state may be freed, or moved
    to the host, between steps.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[ref[Tensor]], ListMetadata]] = {}

    def of(self, key: Hashable, tensors: Sequence[Tensor]) -> TensorList:
        """Return these tensors with their metadata, recomputed if the list of ``key`` held other tensors before."""
        kept = self._kept.get(key)
        if kept is not None and same_objects(list(map(ref.__call__, kept[0])), tensors):
            lengths = array("q", map(Tensor.numel, tensors))
            if lengths == kept[1].lengths and common_value(map(DTYPE, tensors)) == kept[1].dtype:
                return TensorList(tensors, kept[1])
        metadata = metadata_of(tensors)
        self._kept[key] = list(map(ref, tensors)), metadata
        return TensorList(tensors, metadata)
