"""A small model guided by live batches of another task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradguide import Alignment, GradGuide, ReplaySource
from tests.contract import kit


def old(step: int) -> tuple[Tensor, Tensor]:
    """Return a batch of the source task, distinct from those of the target."""
    return kit.batch(500 + step)


def guide(model: nn.Module, source: Any, **options: Any) -> GradGuide:
    options = {"direction": None, "magnitude": None} | options
    alignment = Alignment(source, on="gradient", **options.pop("alignment", {}))
    return GradGuide(kit.sgd(model.parameters()), alignment=alignment, names=model.named_parameters(), **options)


class LossOf:
    """The loss of a batch, times the next of ``factors``; it counts its calls. A deep copy evaluates a copied model."""

    def __init__(self, model: nn.Module, factors: Sequence[float] = ()) -> None:
        self.model, self.factors = model, list(factors)
        self.calls = 0

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return kit.loss_of(self.model, batch) * (self.factors.pop(0) if self.factors else 1.0)


def replay_of(model: nn.Module, every: int = 1, count: int = 3) -> ReplaySource:
    return ReplaySource([old(i) for i in range(count)], LossOf(model), every)
