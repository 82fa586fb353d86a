"""The parameters as they were before the base's step, and the update since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradguide.ops.pack import lay_out
from gradguide.step.buckets import Bucket

__all__ = ["Before"]


class Before:
    """Copies of the parameters, made anew by each step, and the length of the update that followed."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._stepped: list[Tensor] = []
        self._squares: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies that the next step makes anew have no place in a copy or a file.
        return {"_copies": {}, "_stepped": [], "_squares": []}

    @torch.no_grad()
    def keep(self, buckets: Sequence[Bucket]) -> None:
        """Copy the parameters of the buckets."""
        self._stepped = [p for bucket in buckets for p in bucket.parameters]
        self._squares = []
        for bucket in buckets:
            pairs = zip(bucket.parameters, bucket.values, strict=True)
            new = {p: value for p, value in pairs if not _alike(self._copies.get(p), value)}
            self._copies.update(zip(new, lay_out(list(new.values())), strict=True))
            torch._foreach_copy_(self.of(bucket), bucket.values)

    def of(self, bucket: Bucket) -> list[Tensor]:
        """The copies of a bucket's parameters, in their order."""
        return [self._copies[p] for p in bucket.parameters]

    def know(self, squares: list[Tensor]) -> None:
        """Take note of squared lengths whose sum is that of the update; with none, nothing is known of it."""
        self._stepped, self._squares = [], squares

    @torch.no_grad()
    def update_norm(self, device: torch.device) -> Tensor:
        """Length of the last update, Tensor [], measured on request; NaN if there is nothing to measure it by."""
        squares = self._squares or [(p.double() - self._copies[p].double()).square() for p in self._stepped]
        if not squares:
            return torch.tensor(float("nan"), device=device)
        return torch.stack([s.sum(dtype=torch.float64).to(device) for s in squares]).sum().sqrt()


def _alike(kept: Tensor | None, value: Tensor) -> bool:
    """Whether a copy made earlier still has the parameter's shape, dtype and device: models get moved and cast."""
    return kept is not None and kept.shape == value.shape and kept.dtype == value.dtype and kept.device == value.device
