"""How firmly an anchored source holds each number: see ``SourceGradient.anchored``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["anchor_weights"]


def anchor_weights(fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``H = sqrt(F) / mean(sqrt(F)) / |theta0|``, mean and length over all parameters together.

    Args:
        fisher, anchor: F and theta0 by name, of the same shapes.

    Returns:
        H by name, as precise as F. Where F is zero throughout, nothing tells the numbers apart: all are held alike.
        Tables without numbers stay as they are.
    """
    roots = {name: table.double().sqrt() for name, table in fisher.items()}
    numbers = sum(root.numel() for root in roots.values())
    if numbers == 0:
        return dict(fisher)
    total = sum(float(root.sum()) for root in roots.values())
    squared = sum(float(table.double().square().sum()) for table in anchor.values())
    length = max(squared, LEAST_LENGTH**2 * numbers) ** 0.5
    if total == 0:
        return {name: torch.full_like(table, 1.0 / length) for name, table in fisher.items()}
    return {name: (root * (numbers / total / length)).to(fisher[name].dtype) for name, root in roots.items()}
