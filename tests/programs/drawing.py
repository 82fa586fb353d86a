"""Choices from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["Draw"]

T = TypeVar("T")


class Draw:
    """Choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return bool(self.generator.random() < share)

    def one(self, values: Sequence[T]) -> T:
        """One of them."""
        return values[int(self.generator.integers(len(values)))]

    def number(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(self.generator.integers(low, high + 1))

    def seed(self) -> int:
        """A seed for tensors."""
        return self.number(0, 10**6)

    def scale(self, profile: str) -> float:
        """A scale: "ordinary" is near 1, "tame" what float16 holds, "wild" from 1e-20 to 1e20."""
        if profile == "ordinary" or (profile == "wild" and self.chance(0.3)):
            return 1.0
        span = 20.0 if profile == "wild" else 2.0
        return float(f"{10 ** self.generator.uniform(-span, span):.3g}")
