"""Detect stale plans by identity and metadata of every parameter, and metadata of every gradient.

This is the first of four causes. ``StepPlanner.plan`` lists all of them. With DTensors no plan is reused.

A step on a GPU takes about a millisecond of host time. Reading one attribute of 300 tensors takes 5 to 45 microseconds.
So each attribute is read once per step, by one call of map.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import layout_of
from gradguide.ops.tensors import same_objects

__all__ = ["Signature"]

_READERS: tuple[Any, ...] = (
    type, attrgetter("shape"), attrgetter("dtype"), Tensor.get_device, Tensor.is_neg,
)  # fmt: skip
"""The layout needs no reader: ``data_ptr`` raises for sparse gradients, and a parameter cannot change its layout."""


class Signature:
    """The groups, parameters and gradients that a plan was made for.

    A plan is stale if any of these changes:

    - the parameters in the groups, whether a group maximizes, which gradients are None or shared;
    - shape, strides, dtype, device, exact type or negative bit of a parameter or a gradient.

    Addresses are read at each step, so memory may change. The signature does not reference gradients.

    Args:
        groups: param groups of the base optimizer.
        signs: the sign of each group.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], signs: Sequence[int]) -> None:
        self._parameters = [p for group in groups for p in group["params"]]
        self._form = _form(groups, signs, self._parameters, [p.grad for p in self._parameters])

    def gradients(self, groups: Sequence[dict[str, Any]], signs: Sequence[int]) -> list[Tensor | None] | None:
        """Return the present gradient of each parameter, or None if anything changed.

        Always None if a parameter is a DTensor: its local shard may change.
        """
        parameters = [p for group in groups for p in group["params"]]
        if self._form is None or not same_objects(parameters, self._parameters):
            return None
        gradients = [p.grad for p in parameters]
        return gradients if _form(groups, signs, parameters, gradients) == self._form else None


def _form(
    groups: Sequence[dict[str, Any]],
    signs: Sequence[int],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> Any:
    there = [g for g in gradients if g is not None]
    if not {Tensor, nn.Parameter}.issuperset(map(type, parameters)) and any(map(layout_of, parameters)):
        return None
    try:
        addresses = set(map(Tensor.data_ptr, there))
        return (
            [len(group["params"]) for group in groups],
            list(signs),
            [g is None for g in gradients],
            len(addresses),  # fewer where parameters share the memory of a gradient
            list(map(torch._is_zerotensor, there)) if 0 in addresses else [],
            _metadata(parameters),
            _metadata(there),
        )
    except RuntimeError:  # sparse tensors have no address, and some no strides
        return None


def _metadata(tensors: Sequence[Tensor]) -> list[list[Any]]:
    contiguous = list(map(Tensor.is_contiguous, tensors))
    # Reading strides takes as long as everything else, and shapes determine those of contiguous tensors.
    strides = [] if all(contiguous) else list(map(Tensor.stride, tensors))
    return [contiguous, strides, *(list(map(read, tensors)) for read in _READERS)]
