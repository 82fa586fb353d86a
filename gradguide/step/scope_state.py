"""What is remembered per scope: a handful of float64 numbers on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguide.rules.decide import STATISTICS
from gradguide.step.buckets import Label

__all__ = ["Scopes"]


class Scopes:
    """Statistics by scope label; a label that is new starts from zeros."""

    def __init__(self) -> None:
        self._index: dict[Label, int] = {}
        self._values = torch.zeros(0, len(STATISTICS), dtype=torch.float64)
        self._located: tuple[list[Label], Tensor] | None = None

    def locate(self, labels: list[Label], device: torch.device) -> Tensor:
        """Positions of the labels: Tensor [len(labels)], int64 on ``device``, where the statistics move too."""
        # The labels seldom change, and copying positions to an accelerator anew would make the host wait.
        if self._located is not None and self._located[0] == labels and self._values.device == device:
            return self._located[1]
        for label in labels:
            self._index.setdefault(label, len(self._index))
        missing = len(self._index) - self._values.shape[0]
        if missing or self._values.device != device:
            wide = torch.float32 if device.type == "mps" else torch.float64
            new = torch.zeros(missing, len(STATISTICS), dtype=wide, device=device)
            self._values = torch.cat([self._values.to(device, wide), new])
        positions = torch.tensor([self._index[label] for label in labels], device=device)
        self._located = labels, positions
        return positions

    @property
    def statistics(self) -> Tensor:
        """What is remembered of all scopes: Tensor [T, len(STATISTICS)], to be changed in place at their positions."""
        return self._values

    def export(self, label: Label) -> Tensor:
        """Statistics of one scope: Tensor [len(STATISTICS)]; zeros for a label not seen yet."""
        if label not in self._index:
            return torch.zeros(len(STATISTICS), dtype=torch.float64)
        return self._values[self._index[label]].clone()

    def restore(self, statistics: dict[Label, Tensor]) -> None:
        """Forget everything, then take over the numbers of each label [len(STATISTICS)]."""
        self._located = None
        self._index = {label: position for position, label in enumerate(statistics)}
        empty = torch.zeros(0, len(STATISTICS), dtype=torch.float64)
        self._values = torch.stack([values.double() for values in statistics.values()]) if statistics else empty
