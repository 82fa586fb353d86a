"""Per-element weights of an anchored source: see ``SourceGradient.anchored``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradguide.ops.tensors import to_float64
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["anchor_weights"]


def anchor_weights(fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``H = sqrt(F) / mean(sqrt(F)) / |theta0|``, with mean and norm over all parameters together.

    Args:
        fisher, anchor: F and theta0 by name, with equal shapes.

    Returns:
        H by name, in the dtype of F. If F is zero everywhere, H is uniform: ``1 / |theta0|``.
        Empty tables are unchanged.
    """
    roots = {name: to_float64(table).sqrt() for name, table in fisher.items()}
    numbers = sum(root.numel() for root in roots.values())
    if numbers == 0:
        return dict(fisher)
    total = sum(float(root.sum()) for root in roots.values())
    squared = sum(float(to_float64(table).square().sum()) for table in anchor.values())
    length = max(squared, LEAST_LENGTH**2 * numbers) ** 0.5
    if total == 0:
        return {name: torch.full_like(table, 1.0 / length) for name, table in fisher.items()}
    return {name: (root * (numbers / total / length)).to(fisher[name]) for name, root in roots.items()}
