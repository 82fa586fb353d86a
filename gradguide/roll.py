"""The buckets of the last step, called again: most steps differ from the one before in their gradients alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradguide.buckets import Bucket
from gradguide.ops.tensors import DTYPE, Facts, Tensors, facts_of, only, same, unchanged

__all__ = ["Roll"]


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
            found = Tensors(map(gradients.__getitem__, bucket.places))  # type: ignore[arg-type]  # none is missing
            if not (_alike(found, facts) and unchanged(bucket.values)):
                return None
            found.facts = facts
            called.append(replace(bucket, gradients=found))
        return called


def _listed(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _alike(gradients: Sequence[Tensor], facts: Facts) -> bool:
    """Whether the facts of other gradients are those of these: asked with less ado than ``facts_of``."""
    assert facts.device is not None  # that of the bucket
    try:
        return (
            facts.lengths == array("q", map(Tensor.numel, gradients))
            and only(map(DTYPE, gradients)) == facts.dtype
            and all(map(Tensor.is_contiguous, gradients)) == facts.contiguous
            and only(map(Tensor.get_device, gradients)) == _index(facts.device)  # indices are cheaper than devices
        )
    except RuntimeError:  # sparse gradients have no such facts
        return False


def _index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index or 0
