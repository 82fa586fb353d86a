"""Write the corrected update of the base: to the parameters, and to the second sequence of a schedule-free base.

Groups with a rate of 0 keep their parameters: a projection adds source gradients to the others only.

A schedule-free optimizer trains at ``y = beta * x + (1 - beta) * z``. It stores y, the parameter, and z, in its state.
The average x, which is evaluated, is computed from both. A rule that shortens the update of y alone moves x away from
z, up the loss. So z gets the same combination as y, and then x has it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import resting_groups
from gradguide.distributed.layouts import local
from gradguide.ops import Row, Stack, Write
from gradguide.ops.tensors import TensorList
from gradguide.sources.protocol import Source
from gradguide.step.buckets import Bucket
from gradguide.step.plan import Rows, StepPlan

__all__ = ["Before", "copy_before", "update_source_rows", "write_corrected"]


class Before(NamedTuple):
    """Copies of each bucket's tensors before the base's step.

    values: the parameters.
    sequences: z of each parameter, None before its first step; empty if the base is not schedule-free.
    """

    values: list[TensorList]
    sequences: list[list[Tensor | None]]


@torch.no_grad()
def copy_before(base: Optimizer, plan: StepPlan) -> Before:
    """Copy the parameters, and z of a schedule-free base."""
    found = [_sequences(base, bucket) for bucket in plan.buckets]
    return Before(plan.snapshot(), [[None if z is None else z.clone() for z in each] for each in found])


def update_source_rows(
    base: Optimizer, plan: StepPlan, sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor]
) -> list[Row | None]:
    """Return the rows of the source gradients that an update is projected on: zero in groups with a rate of 0.

    Args:
        at: the parameters before the step.
    """
    rows, resting = plan.source_rows(sources, bucket, at, "update"), resting_groups(base)
    if not resting:
        return rows
    still = [group in resting for group in bucket.groups]
    return [None if row is None else _zeroed(row, still) for row in rows]


def _zeroed(row: Row, zero: Sequence[bool]) -> Row:
    offset, at = row.offset, row.at
    if offset is not None:
        offset = [torch.zeros_like(part) if none else part for part, none in zip(offset, zero, strict=True)]
    if at is not None and row.anchor is not None:
        at = [anchor if none else part for part, anchor, none in zip(at, row.anchor, zero, strict=True)]
    return replace(row, offset=offset, at=at)


def write_corrected(
    base: Optimizer, plan: StepPlan, rows: Rows, now: Sequence[TensorList], before: Before, coefficients: Tensor
) -> None:
    """Write the combination of the parameters after the step, those before it, and the sources.

    Args:
        rows: of the update's span, for each bucket.
        now: the parameters after the step, for each bucket.
        coefficients: see ``Limit.coefficients``.
    """
    after = [
        Stack([Row(offset=values), *these[1:]], bucket.sizes, these.kept)
        for bucket, values, these in zip(plan.buckets, now, rows, strict=True)
    ]
    plan.combine_(after, [[Write(into=values, coefficients=coefficients)] for values in now])
    found = [[z for z in _sequences(base, bucket) if z is not None] for bucket in plan.buckets]
    if not found or any(len(each) < len(bucket.values) for each, bucket in zip(found, plan.buckets, strict=True)):
        return
    after = []
    for bucket, each, these, values, copies in zip(plan.buckets, found, rows, *before, strict=True):
        # z starts at the parameter.
        start = [value if copy is None else copy for value, copy in zip(values, copies, strict=True)]
        after.append(Stack([Row(offset=each), Row(offset=start), *these[2:]], bucket.sizes))
    plan.combine_(after, [[Write(into=each, coefficients=coefficients)] for each in found])


def _sequences(base: Optimizer, bucket: Bucket) -> list[Tensor | None]:
    """Return this rank's part of z of each parameter; empty if the base has no modes, as schedule-free ones have."""
    if not (hasattr(base, "train") and hasattr(base, "eval")):
        return []
    found = [(p, base.state.get(p, {}).get("z")) for p in bucket.parameters]
    return [local(z) if isinstance(z, Tensor) and z.shape == p.shape else None for p, z in found]
