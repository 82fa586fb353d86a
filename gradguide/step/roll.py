"""The buckets of the last step, called again: most steps differ from the one before in their gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradguide.distributed.layouts import layout_of
from gradguide.ops.tensors import DTYPE, Facts, Note, Tensors, facts_of, only, same
from gradguide.step.buckets import Bucket

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

    def __init__(self, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
        """The buckets of ``groups``; it calls none where one of their parameters is a DTensor, frozen or not."""
        self._parameters = _listed(groups)
        self._sizes = [len(group["params"]) for group in groups]
        self._missing = [p.grad is None for p in self._parameters]
        whole = all(layout_of(parameter) is None for parameter in self._parameters)
        self._entries = list(map(_entry, buckets)) if whole else []

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
    gradients = bucket.gradients
    return _Entry(
        bucket=replace(bucket, gradients=Tensors()),
        shapes=list(map(_SHAPE, gradients)),
        facts=facts_of(gradients),
        index=gradients[0].get_device(),
        stored=bucket.parameters[0].dtype,
    )


def _alike(gradients: Sequence[Tensor], entry: _Entry) -> bool:
    """Whether shapes and facts are those of these gradients too, and none has become sparse."""
    return (
        only(map(_LAYOUT, gradients)) == torch.strided
        and list(map(_SHAPE, gradients)) == entry.shapes
        and only(map(DTYPE, gradients)) == entry.facts.dtype
        and all(map(Tensor.is_contiguous, gradients)) == entry.facts.contiguous
        and only(map(Tensor.get_device, gradients)) == entry.index
    )
