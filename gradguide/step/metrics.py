"""Metrics of a step, transferred to the host only when they are read."""

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

_KEYS = (
    "grad_norm", "guided_norm", "clip_factor", "direction_cosine", "coherence", "damping", "update_norm",
    "update_factor",
)  # fmt: skip


@dataclass(slots=True)
class Record:
    """Measurements of the last step on the device, over S scopes.

    span: rows of gradient, direction and sources, [S, R, R].
    guided_norm (Tensor): shape [S], norm of the guided gradient before clipping.
    clip_factor (Tensor): shape [S].
    coherence, damping (Tensor | None): shape [S], None without a direction.
    limit: the constrained update, None if it was not measured: then no bound was set, or it was within its bound.
    bounded (bool): whether the update is bounded.
    drifts: per source the modelled KL in nats per token, Tensor []; None if the source has no such model.
    """

    span: Span
    guided_norm: Tensor
    clip_factor: Tensor
    coherence: Tensor | None
    damping: Tensor | None
    limit: Limit | None
    bounded: bool
    drifts: Sequence[Tensor | None]


@torch.no_grad()
def read(record: Record | None, update_norm: Tensor, totals: Tensor, sources: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a step over all scopes together, with one transfer to the host.

    Args:
        record: the last step that was not skipped; None before the first.
        update_norm (Tensor): 0-d, length of the update of that step.
        totals (Tensor): shape [2], steps and skipped steps.
        sources: names of the sources.

    Returns:
        Floats by name; NaN for unmeasured metrics.

            - Norms and cosines are computed over all scopes together.
            - Factors are the norm over all scopes after clipping (or bounding), divided by the norm before.
            - Coherence and damping are means over scopes.
            - ``conflict`` is 1 if any scope has a conflict.
            - With several sources, ``source_cosine`` is the lowest, ``source_drift`` the highest, and ``conflict`` 1 if
              any source conflicts. Metrics of each source are under ``source_cosine/NAME`` and so on.
    """
    per_source = [f"{key}/{k}" for key in ("source_cosine", "conflict", "source_drift") for k in sources]
    if record is None:
        values = [float("nan")] * (len(_KEYS) + len(per_source)) + totals.tolist()
    else:
        values = torch.cat([_measures(record, update_norm, len(sources)), totals.to(record.span.gram)]).tolist()
    found = dict(zip([*_KEYS, *per_source, "steps", "skipped"], values, strict=True))
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
    # A scope without a gradient adds zeros. A gradient that is not finite makes the sums NaN.
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
        # Coherence is 0 for a scope that never had a gradient: leave it out of the mean.
        nan if record.coherence is None else divide(record.coherence.sum(), (record.coherence > 0).sum().to(gram)),
        nan if record.damping is None else _mean(record.damping, gram[:, GRADIENT, GRADIENT] > 0),
        nan,
        _update_factor(record.limit, nan) if record.bounded else nan,
    ]
    own = slice(SOURCES, SOURCES + sources)
    conflicting = conflicts(per_scope[:, own]).any(dim=0).to(gram.dtype)
    drifts = torch.stack([nan, *(nan if drift is None else drift.to(gram) for drift in record.drifts)])[1:]
    found = torch.cat([torch.stack(measured), cosines[own], conflicting, drifts]).where(gram.isfinite().all(), nan)
    # A step skipped on the device has a record too, in which only the update is known: it is 0.
    found[_KEYS.index("update_norm")] = update_norm.to(gram)
    return found


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of ``values`` [S] over the ``counted`` scopes, or 0 if the count is 0: Tensor []."""
    return divide(torch.where(counted, values, 0.0).sum(), counted.sum().to(values))


def _update_factor(limit: Limit | None, like: Tensor) -> Tensor:
    """Return the norm of the whole update after the bound over the norm before it: Tensor []; 0 if not finite."""
    if limit is None:
        return torch.ones_like(like)
    made = limit.norm_before.square().sum().sqrt()
    left = torch.where(limit.factor > 0, limit.factor * limit.norm_before, 0.0).square().sum().sqrt()
    return torch.where(made.isfinite(), torch.where(made > 0, divide(left, made), 1.0), 0.0)
