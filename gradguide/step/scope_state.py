"""Statistics of each scope between steps: a few float64 values on the device.

The running direction itself is not here: ``Engine.directions`` has it, per parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradguide.ops.tensors import wide_dtype
from gradguide.rules.decide import STATISTICS
from gradguide.step.buckets import Label

__all__ = ["ScopeState"]


class ScopeState:
    """Statistics by scope label. A new label starts from zeros."""

    def __init__(self) -> None:
        self._index: dict[Label, int] = {}
        self._values = torch.zeros(0, len(STATISTICS), dtype=torch.float64)

    def __setstate__(self, state: dict[str, Any]) -> None:
        columns = state["_values"].shape[1]
        if columns != len(STATISTICS):  # options pickled by that version could be misread too
            raise ValueError(
                f"the optimizer was pickled by another version of gradguide, with {columns} statistics per scope, this "
                f"one has {len(STATISTICS)}: pass its state_dict() on instead"
            )
        vars(self).update(state)

    def locate(self, labels: list[Label], device: torch.device) -> Tensor:
        """Move the statistics to ``device`` and return the indices of the labels there: Tensor [len(labels)], int64."""
        for label in labels:
            self._index.setdefault(label, len(self._index))
        missing = len(self._index) - self._values.shape[0]
        if missing or self._values.device != device:
            wide = wide_dtype(device)
            new = torch.zeros(missing, len(STATISTICS), dtype=wide, device=device)
            self._values = torch.cat([self._values.to(device, wide), new])
        return torch.tensor([self._index[label] for label in labels], device=device)

    @property
    def statistics(self) -> Tensor:
        """Statistics of all T scopes: Tensor [T, len(STATISTICS)]. Rules update rows in place."""
        return self._values

    def export(self, label: Label) -> Tensor:
        """Return the statistics of one scope: Tensor [len(STATISTICS)]; zeros for a new label."""
        if label not in self._index:
            return torch.zeros(len(STATISTICS), dtype=torch.float64)
        return self._values[self._index[label]].clone()

    def reset(self, labels: list[Label]) -> None:
        """Set the statistics of these labels to zero."""
        rows = [self._index[label] for label in labels if label in self._index]
        if rows:
            self._values[rows] = 0.0

    def restore(self, statistics: dict[Label, Tensor]) -> None:
        """Replace all statistics by those given, one Tensor [len(STATISTICS)] per label."""
        self._index = {label: position for position, label in enumerate(statistics)}
        empty = torch.zeros(0, len(STATISTICS), dtype=torch.float64)
        self._values = torch.stack([values.double() for values in statistics.values()]) if statistics else empty
