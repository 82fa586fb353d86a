"""Merge several stored sources into one: see ``SourceGradient.merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradguide.ops.tensors import to_float64
from gradguide.utils.checks import check_range

__all__ = ["merged_tables"]

Tables = Mapping[str, Mapping[str, Tensor]]


def merged_tables(sources: Sequence[Tables], weights: Sequence[float] | None) -> dict[str, dict[str, Tensor]]:
    """Return the tables of the weighted sum, in float32 or float64.

    Args:
        sources: the tables of each source.
        weights: one per source; None gives the mean.

    Raises:
        ValueError: there is no source, or weights, names, shapes or table kinds do not match.
    """
    if not sources:
        raise ValueError("merge needs at least one source, found none")
    weights = [1.0 / len(sources)] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ValueError(f"weights must be one for each of {len(sources)} sources, found {len(weights)}")
    for weight in weights:
        check_range("weight", weight, 0, float("inf"), open_high=True)
    if not any(weights):
        raise ValueError("weights must not all be 0")
    first = sources[0]
    for index, tables in enumerate(sources[1:], 1):
        if tables.keys() != first.keys():
            raise ValueError(f"source {index} holds {sorted(tables)}, source 0 {sorted(first)}; they must be equal")
        for label, table in tables.items():
            if {name: t.shape for name, t in table.items()} != {name: t.shape for name, t in first[label].items()}:
                raise ValueError(f"source {index} differs from source 0 in names or shapes")
    found: dict[str, dict[str, Tensor]] = {
        label: {name: _sum([tables[label][name] for tables in sources], weights) for name in first[label]}
        for label in first
        if label != "anchor"
    }
    if "anchor" in first:
        found["anchor"] = {
            name: _mean(
                [tables["anchor"][name] for tables in sources], [tables["fisher"][name] for tables in sources], weights
            )
            for name in first["anchor"]
        }
    return found


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum((weight * to_float64(t) for weight, t in zip(weights, tensors, strict=True)), torch.zeros(()))
    return total.to(tensors[0].device, _stored_dtype(tensors))


def _stored_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 if a tensor has it, else float32.

    Rounded to bfloat16, the mean of anchors would move by more than training moves parameters.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _mean(anchors: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean of the anchors, weighted by weight times curvature; where curvature is zero, by weight alone."""
    total = sum(weights)
    plain = sum((w / total * to_float64(a) for w, a in zip(weights, anchors, strict=True)), torch.zeros(()))
    curved = sum((w * to_float64(f) for w, f in zip(weights, fishers, strict=True)), torch.zeros(()))
    # Relative to the plain mean, to avoid cancellation: anchors differ little.
    shift = sum(
        (w * to_float64(f) * (to_float64(a) - plain) for w, f, a in zip(weights, fishers, anchors, strict=True)),
        torch.zeros(()),
    )
    mean = plain + torch.where(curved > 0, shift / torch.where(curved > 0, curved, 1.0), 0.0)
    return mean.to(anchors[0].device, _stored_dtype(anchors))
