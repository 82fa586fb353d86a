"""The buckets of the last step, called again: most steps differ from the one before in their gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradguide.buckets import Bucket
from gradguide.ops.tensors import DTYPE, Facts, Tensors, facts_of, only, same

__all__ = ["Roll"]

_LAYOUT = attrgetter("layout")


class Roll:
    """What the buckets of a step were made of, so that the next ones need be made anew only if something changed.

    No gradient is kept: between steps its memory belongs to others.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._sizes: list[int] = []
        self._missing: list[bool] = []
        self._kept: list[tuple[Bucket, Facts]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own.
        return vars(Roll())

    def keep(self, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
        """Remember buckets of whole parameters, all that have gradients in ``groups``."""
        self._parameters = _listed(groups)
        self._sizes = [len(group["params"]) for group in groups]
        self._missing = [p.grad is None for p in self._parameters]
        self._kept = [(replace(bucket, gradients=Tensors()), facts_of(bucket.gradients)) for bucket in buckets]
        for bucket in buckets:
            facts_of(bucket.values)  # as they are now, to be compared with

    def call(self, groups: Sequence[dict[str, Any]]) -> list[Bucket] | None:
        """The buckets with the gradients that there are now; None where anything else is not as it was."""
        parameters = _listed(groups)
        if not self._kept or not same(parameters, self._parameters):
            return None
        if [len(group["params"]) for group in groups] != self._sizes:
            return None
        gradients = [p.grad for p in parameters]
        if [gradient is None for gradient in gradients] != self._missing:
            return None
        called = []
        for bucket, facts in self._kept:
            found = Tensors(gradient for place in bucket.places if (gradient := gradients[place]) is not None)
            if only(map(_LAYOUT, found)) != torch.strided or facts_of(found) != facts or not _as_before(bucket.values):
                return None
            called.append(replace(bucket, gradients=found))
        return called


def _listed(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _as_before(values: Tensors) -> bool:
    """Whether parameters, whose data may be given another precision or layout, still have those of their facts."""
    facts = facts_of(values)
    return only(map(DTYPE, values)) == facts.dtype and all(map(Tensor.is_contiguous, values)) == facts.contiguous
