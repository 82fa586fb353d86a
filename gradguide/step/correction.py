"""Write the corrected update of the base: to the parameters, and to the second sequence of a schedule-free base.

Groups with a rate of 0 keep their parameters: a projection adds source gradients to the others only.

A schedule-free optimizer trains at ``y = beta * x + (1 - beta) * z``. It stores y, the parameter, and z, in its state.
The average x, which is evaluated, is computed from both. A rule that shortens the update of y alone moves x away from
z, up the loss. So z gets the same combination as y, and then x has it too. The reference implementations also store x
and y, which get it as well.
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
    sequences: those of a schedule-free base by name, None before the first step of a parameter.
    """

    values: list[TensorList]
    sequences: list[dict[str, list[Tensor | None]]]


_SEQUENCES = ("z", "x", "y")


@torch.no_grad()
def copy_before(base: Optimizer, plan: StepPlan) -> Before:
    """Copy the parameters, and the sequences of a schedule-free base."""
    copies = [
        {name: [None if part is None else part.clone() for part in parts] for name, parts in each.items()}
        for each in (_sequences(base, bucket) for bucket in plan.buckets)
    ]
    return Before(plan.snapshot(), copies)


def update_source_rows(
    base: Optimizer, plan: StepPlan, sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor]
) -> list[Row | None]:
    """Return the rows of the source gradients that an update is projected on: zero in groups with a rate of 0.

    Args:
        at: the parameters before the step.
    """
    rows = plan.source_rows(sources, bucket, at, "update")
    resting = resting_groups(base) if rows else None
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
    made = [_sequences(base, bucket) for bucket in plan.buckets]
    for name in made[0] if made else ():
        found = [[part for part in each[name] if part is not None] for each in made]
        if any(len(each) < len(bucket.values) for each, bucket in zip(found, plan.buckets, strict=True)):
            continue
        after = []
        for bucket, each, these, values, copies in zip(plan.buckets, found, rows, *before, strict=True):
            # Each starts at the parameter.
            start = [value if copy is None else copy for value, copy in zip(values, copies[name], strict=True)]
            after.append(Stack([Row(offset=each), Row(offset=start), *these[2:]], bucket.sizes))
        plan.combine_(after, [[Write(into=each, coefficients=coefficients)] for each in found])


def _sequences(base: Optimizer, bucket: Bucket) -> dict[str, list[Tensor | None]]:
    """Return this rank's sequences of the parameters; empty if the base has no modes, as schedule-free ones have."""
    if not (hasattr(base, "train") and hasattr(base, "eval")):
        return {}
    states = [(p, base.state.get(p, {})) for p in bucket.parameters]
    found = {name: [(p, state.get(name)) for p, state in states] for name in _SEQUENCES}
    return {
        name: [local(part) if isinstance(part, Tensor) and part.shape == p.shape else None for p, part in parts]
        for name, parts in found.items()
    }
