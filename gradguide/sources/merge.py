"""Merge several stored sources into one: see ``SourceGradient.merge``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    numbers = _checked_weights(weights, len(sources))
    _check_equal(sources)

    def merged(label: str, name: str) -> Tensor:
        tensors = [tables[label][name] for tables in sources]
        if label == "anchor":
            found = _mean(tensors, [tables["fisher"][name] for tables in sources], numbers)
        else:
            found = _total(weight * to_float64(t) for weight, t in zip(numbers, tensors, strict=True))
        # Rounded to bfloat16, the mean of anchors would move by more than training moves parameters.
        wide = any(t.dtype == torch.float64 for t in tensors)
        return found.to(tensors[0].device, torch.float64 if wide else torch.float32)

    return {label: {name: merged(label, name) for name in table} for label, table in sources[0].items()}


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one weight for each of ``count`` sources."""
    if count == 0:
        raise ValueError("merge needs at least one source, found none")
    numbers = [1.0 / count] * count if weights is None else list(weights)
    if len(numbers) != count:
        raise ValueError(f"weights must be one for each of {count} sources, found {len(numbers)}")
    for weight in numbers:
        check_range("weight", weight, 0, float("inf"), open_high=True)
    if not any(numbers):
        raise ValueError("weights must not all be 0")
    return numbers


def _check_equal(sources: Sequence[Tables]) -> None:
    """Raise ValueError unless all sources have tables of the same labels, names and shapes."""
    first = sources[0]
    for index, tables in enumerate(sources[1:], 1):
        if tables.keys() != first.keys():
            raise ValueError(f"source {index} holds {sorted(tables)}, source 0 {sorted(first)}; they must be equal")
        for label, table in tables.items():
            if {name: t.shape for name, t in table.items()} != {name: t.shape for name, t in first[label].items()}:
                raise ValueError(f"source {index} differs from source 0 in names or shapes")


def _mean(anchors: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean of the anchors, weighted by weight times curvature; where curvature is zero, by weight alone."""
    total = sum(weights)
    plain = _total(weight / total * to_float64(a) for weight, a in zip(weights, anchors, strict=True))
    masses = [weight * to_float64(f) for weight, f in zip(weights, fishers, strict=True)]
    curved = _total(masses)
    # Relative to the plain mean, to avoid cancellation: anchors differ little.
    shift = _total(mass * (to_float64(a) - plain) for mass, a in zip(masses, anchors, strict=True))
    return plain + torch.where(curved > 0, shift / torch.where(curved > 0, curved, 1.0), 0.0)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, torch.zeros(()))
