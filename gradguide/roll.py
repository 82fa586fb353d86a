"""The buckets of the last step, called again: most steps differ from the one before in their gradients alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradguide.buckets import Bucket
from gradguide.ops.tensors import DTYPE, Facts, Note, Tensors, only, same
from gradguide.sharding import layout_of

__all__ = ["Roll"]

_SHAPE, _LAYOUT = attrgetter("shape"), attrgetter("layout")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A bucket without its gradients, and what these were like."""

    bucket: Bucket
    shapes: list[torch.Size]
    facts: Facts
    index: int  # of the device, -1 for the CPU: cheaper to ask for than the device
    stored: torch.dtype  # of the parameters


class Roll:
    """What the buckets of a step were made of, so that the next ones need be made anew only if something changed.

    No gradient is kept: between steps its memory belongs to others.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._sizes: list[int] = []
        self._missing: list[bool] = []
        self._entries: list[_Entry] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own, and begins with an empty roll.
        return vars(Roll())

    def keep(self, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
        """Remember the buckets of ``groups``; nothing where one of their parameters is a DTensor, frozen or not."""
        parameters = _listed(groups)
        if any(layout_of(parameter) is not None for parameter in parameters):
            return
        self._parameters = parameters
        self._sizes = [len(group["params"]) for group in groups]
        self._missing = [p.grad is None for p in parameters]
        self._entries = list(map(_entry, buckets))

    def call(self, groups: Sequence[dict[str, Any]]) -> list[Bucket] | None:
        """The buckets with the gradients that there are now; None where anything else is not as it was."""
        parameters = _listed(groups)
        if not self._entries or not same(parameters, self._parameters):
            return None
        if [len(group["params"]) for group in groups] != self._sizes:
            return None
        gradients = [p.grad for p in parameters]
        if [gradient is None for gradient in gradients] != self._missing:
            return None
        called = []
        for entry in self._entries:
            # None of these is missing.
            found: list[Any] = list(map(gradients.__getitem__, entry.bucket.places))
            if not _alike(found, entry) or only(map(DTYPE, entry.bucket.parameters)) != entry.stored:
                return None
            called.append(replace(entry.bucket, gradients=Tensors(found, Note(entry.facts))))
        return called


def _listed(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _entry(bucket: Bucket) -> _Entry:
    first = bucket.gradients[0]
    contiguous = all(map(Tensor.is_contiguous, bucket.gradients))
    facts = Facts(array("q", map(Tensor.numel, bucket.gradients)), first.dtype, first.device, contiguous)
    shapes = list(map(_SHAPE, bucket.gradients))
    bare = replace(bucket, gradients=Tensors())
    return _Entry(bare, shapes, facts, first.get_device(), bucket.parameters[0].dtype)


def _alike(gradients: Sequence[Tensor], entry: _Entry) -> bool:
    """Whether shapes and facts are those of these gradients too, and none has become sparse."""
    return (
        only(map(_LAYOUT, gradients)) == torch.strided
        and list(map(_SHAPE, gradients)) == entry.shapes
        and only(map(DTYPE, gradients)) == entry.facts.dtype
        and all(map(Tensor.is_contiguous, gradients)) == entry.facts.contiguous
        and only(map(Tensor.get_device, gradients)) == entry.index
    )
