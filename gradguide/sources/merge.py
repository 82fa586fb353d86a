"""One source for several: see ``SourceGradient.merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradguide.utils.checks import check_range

__all__ = ["merged_tables"]

Tables = Mapping[str, Mapping[str, Tensor]]


def merged_tables(sources: Sequence[Tables], weights: Sequence[float] | None) -> dict[str, dict[str, Tensor]]:
    """Tables of the weighted sum, in float32 at least.

    Args:
        sources: tables of each.
        weights: one each; None is the mean.

    Raises:
        ValueError: there is none, or weights, names, shapes or kinds do not fit together.
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
            raise ValueError(f"source {index} holds {sorted(tables)}, source 0 {sorted(first)}; merge like with like")
        for label, table in tables.items():
            if {name: t.shape for name, t in table.items()} != {name: t.shape for name, t in first[label].items()}:
                raise ValueError(f"source {index} has not the names and shapes of source 0")
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
    total = sum((weight * t.double() for weight, t in zip(weights, tensors, strict=True)), torch.zeros(()))
    return total.to(torch.promote_types(tensors[0].dtype, torch.float32))


def _mean(anchors: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of the anchors by weight times curvature; where there is none, by weight, since it does not matter."""
    total = sum(weights)
    plain = sum((w / total * a.double() for w, a in zip(weights, anchors, strict=True)), torch.zeros(()))
    curved = sum((w * f.double() for w, f in zip(weights, fishers, strict=True)), torch.zeros(()))
    # As a change from the plain mean, which keeps the digits that anchors have in common.
    shift = sum(
        (w * f.double() * (a.double() - plain) for w, f, a in zip(weights, fishers, anchors, strict=True)),
        torch.zeros(()),
    )
    mean = plain + torch.where(curved > 0, shift / torch.where(curved > 0, curved, 1.0), 0.0)
    return mean.to(anchors[0].dtype)
