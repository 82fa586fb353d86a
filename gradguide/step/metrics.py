"""What a step measured, turned into numbers only when somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguide.rules.alignment import conflicts
from gradguide.rules.decide import DIRECTION, GRADIENT, SOURCES, Limit
from gradguide.rules.span import Span, divide

__all__ = ["Record", "read"]


@dataclass(slots=True)
class Record:
    """The last step on the device, over S scopes.

    span: rows of gradient, direction and sources, [S, R, R].
    guided (Tensor): coordinates [S, R] of the guided gradient before clipping.
    guided_norm, clip_factor (Tensor): shape [S].
    coherence, damping (Tensor | None): shape [S], None without a direction.
    limit: what the rules left of the update, None where it was not measured.
    bounded (bool): whether the update is bounded.
    drifts: for each source its modelled KL in nats per token, Tensor []; None for one that models none.
    """

    span: Span
    guided: Tensor
    guided_norm: Tensor
    clip_factor: Tensor
    coherence: Tensor | None
    damping: Tensor | None
    limit: Limit | None
    bounded: bool
    drifts: Sequence[Tensor | None]


@torch.no_grad()
def read(record: Record | None, update_norm: Tensor, totals: Tensor, sources: Sequence[str]) -> dict[str, float]:
    """The metrics of a step, over all scopes together, with one transfer to the host.

    Args:
        record: the last step that was not skipped; None before the first.
        update_norm (Tensor): 0-d, length of the update of that step.
        totals (Tensor): shape [2], steps and skipped steps.
        sources: their names.

    Returns:
        Floats by name; NaN for what was not measured. Norms and cosines are those of all scopes together. Factors are
        the length of all scopes together after clipping, or bounding, over that before. Coherence and damping are means
        over scopes. There is a conflict where any scope has one. With several sources, ``source_cosine`` is the
        lowest, ``source_drift`` the highest and ``conflict`` any, and each has its own, ``source_cosine/NAME``.
    """
    keys = [
        "grad_norm", "guided_norm", "clip_factor", "direction_cosine", "coherence", "damping", "update_norm",
        "update_factor",
    ]  # fmt: skip
    per_source = [f"{key}/{k}" for key in ("source_cosine", "conflict", "source_drift") for k in sources]
    if record is None:
        values = [float("nan")] * (len(keys) + len(per_source)) + totals.tolist()
    else:
        values = torch.cat([_measures(record, update_norm, len(sources)), totals.to(record.span.gram)]).tolist()
    found = dict(zip([*keys, *per_source, "steps", "skipped"], values, strict=True))
    each = {key: [found[f"{key}/{k}"] for k in sources] for key in ("source_cosine", "conflict", "source_drift")}
    found["source_cosine"] = min(each["source_cosine"], default=float("nan"))
    found["conflict"] = max(each["conflict"], default=float("nan"))
    drifts = [drift for drift in each["source_drift"] if not math.isnan(drift)]
    found["source_drift"] = max(drifts, default=float("nan"))
    if len(sources) < 2:
        for key in per_source:
            del found[key]
    return found


def _measures(record: Record, update_norm: Tensor, sources: int) -> Tensor:
    gram = record.span.gram
    # A scope without a gradient has no say; one whose gradient is not finite makes the sums NaN, as it should.
    squares = gram.diagonal(dim1=1, dim2=2).clamp(min=0.0)
    lengths = squares.sum(dim=0).sqrt()
    cosines = divide(gram[:, GRADIENT, :].sum(dim=0), lengths[GRADIENT] * lengths).clamp(-1.0, 1.0)
    per_scope = divide(gram[:, GRADIENT, :], (squares[:, GRADIENT, None] * squares).sqrt())
    guided = record.guided_norm.square().sum().sqrt()
    clipped = (record.guided_norm * record.clip_factor).square().sum().sqrt()
    nan = gram.new_tensor(float("nan"))
    measured = [
        lengths[GRADIENT],
        guided,
        torch.where(guided > 0, divide(clipped, guided), 1.0),
        nan if record.coherence is None else cosines[DIRECTION],
        # A scope that never had a gradient has no coherence.
        nan if record.coherence is None else divide(record.coherence.sum(), (record.coherence > 0).sum().to(gram)),
        nan if record.damping is None else _mean(record.damping, gram[:, GRADIENT, GRADIENT] > 0),
        update_norm.to(gram),
        nan if record.limit is None or not record.bounded else _update_factor(record.limit),
    ]
    own = slice(SOURCES, SOURCES + sources)
    conflicting = conflicts(per_scope[:, own]).any(dim=0).to(gram.dtype)
    drifts = torch.stack([nan, *(nan if drift is None else drift.to(gram) for drift in record.drifts)])[1:]
    return torch.cat([torch.stack(measured), cosines[own], conflicting, drifts])


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` [S] over the scopes that are ``counted``, 0 where none is: Tensor []."""
    return divide(torch.where(counted, values, 0.0).sum(), counted.sum().to(values))


def _update_factor(limit: Limit) -> Tensor:
    """Length of all scopes' updates after the bound over that before it, 0 if that is not finite: Tensor []."""
    made = limit.length.square().sum().sqrt()
    left = torch.where(limit.factor > 0, limit.factor * limit.length, 0.0).square().sum().sqrt()
    return torch.where(made.isfinite(), torch.where(made > 0, divide(left, made), 1.0), 0.0)
