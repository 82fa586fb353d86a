"""Keep the buckets of a step for the next one: most steps differ from the one before in their gradients alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from gradguide.buckets import Bucket
from gradguide.ops.tensors import DTYPE, Note, Tensors, located, only, same
from gradguide.sharding import layout_of

__all__ = ["Roll"]

_SHAPE = attrgetter("shape")
_TYPES = ({Tensor}, {nn.Parameter}, {Tensor, nn.Parameter})


class _Signature:
    """All that a pass goes by, of a list of plain tensors: exact types, shapes, dtype, device, addresses, bits.

    Strides are those of contiguous tensors, and bits are those of numbers that are not lazily negated.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.facts, self.addresses = located(tensors)
        self._shapes = list(map(_SHAPE, tensors))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these tensors have the signature, but perhaps other devices and addresses.

        Raises:
            RuntimeError: a tensor is sparse, and has no contiguity.
        """
        return (
            set(map(type, tensors)) in _TYPES
            and list(map(_SHAPE, tensors)) == self._shapes
            and only(map(DTYPE, tensors)) == self.facts.dtype
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A bucket without its gradients, and what parameters and gradients were like."""

    bucket: Bucket
    values: _Signature
    gradients: _Signature
    index: int  # of the gradients' device, -1 for the CPU: cheaper to ask for than the device


class Roll:
    """The buckets of a step, which serve the next one unless parameters, groups or gradients changed.

    They are stale as soon as any parameter is another object, or any address, shape, stride, dtype, device or exact
    type of a parameter differs, or any of these of a gradient but its address. Buckets that are not plain are never
    kept. No gradient is kept alive: between steps its memory belongs to others.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
        self._parameters = _listed(groups)
        self._sizes = [len(group["params"]) for group in groups]
        self._missing = [p.grad is None for p in self._parameters]
        keep = all(layout_of(p) is None for p in self._parameters) and all(bucket.plain for bucket in buckets)
        self._entries = list(map(_entry, buckets)) if keep else []

    def call(self, groups: Sequence[dict[str, Any]]) -> list[Bucket] | None:
        """Return the buckets with the present gradients; None where anything else is not as it was."""
        parameters = _listed(groups)
        if not self._entries or not same(parameters, self._parameters):
            return None
        if [len(group["params"]) for group in groups] != self._sizes:
            return None
        gradients = [p.grad for p in parameters]
        if [gradient is None for gradient in gradients] != self._missing:
            return None
        try:
            return self._called(gradients)
        except RuntimeError:  # of a sparse tensor that is asked for contiguity or address
            return None

    def _called(self, gradients: Sequence[Tensor | None]) -> list[Bucket] | None:
        called = []
        seen: set[int] = set()
        for entry in self._entries:
            values, signature = entry.bucket.parameters, entry.values
            # None of these is missing.
            found: list[Any] = list(map(gradients.__getitem__, entry.bucket.places))
            if not signature.fits(values) or not entry.gradients.fits(found):
                return None
            # The same addresses are those of the same device.
            if array("q", map(Tensor.data_ptr, values)) != signature.addresses:
                return None
            if only(map(Tensor.get_device, found)) != entry.index:
                return None
            # Two gradients at one address are one, and one at address 0 has no memory or no elements.
            addresses = array("q", map(Tensor.data_ptr, found))
            before = len(seen)
            seen.update(addresses)
            if len(seen) != before + len(found) or 0 in seen:
                return None
            called.append(
                replace(
                    entry.bucket,
                    values=Tensors(values, Note(signature.facts, signature.addresses, trusted=True)),
                    gradients=Tensors(found, Note(entry.gradients.facts, addresses, trusted=True)),
                )
            )
        return called


def _listed(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _entry(bucket: Bucket) -> _Entry:
    return _Entry(
        bucket=replace(bucket, gradients=Tensors()),
        values=_Signature(bucket.parameters),
        gradients=_Signature(bucket.gradients),
        index=bucket.gradients[0].get_device(),
    )
