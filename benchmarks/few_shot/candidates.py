"""Candidates for the rules and their defaults; NOTES.md says what each gave. ``--candidates`` runs them.

What the library cannot do is written out here in full, on a step of the base that the library has guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.few_shot import guided
from benchmarks.few_shot.guided import Variant
from benchmarks.few_shot.methods import Learner, Method
from benchmarks.few_shot.problem import Problem
from gradguide import Alignment, Direction, Magnitude, SourceGradient

__all__ = ["CANDIDATES"]


def _weight(weight: float, *, project: bool = True) -> Any:
    def make(sources: Sequence[SourceGradient]) -> Alignment:
        return Alignment([s.anchored() for s in sources], weight=weight, project=project)

    return make


class Budget:
    """After each step, brings the parameters back to where the source's drift is at most ``nats``.

    The drift is ``1/2 D' F D`` with D = theta - theta0: with the true Fisher information, the Kullback-Leibler
    divergence of the source's predictions, to second order.

    Args:
        how: "radial" scales D; "prox" divides each element by 1 + mu F, with the smallest mu that keeps the budget.
    """

    def __init__(self, base: Optimizer, problem: Problem, nats: float, how: str) -> None:
        self.base = base
        self._parameters = [p for _, p in problem.adapter]
        self._nats, self._how = nats, how
        names = [name for name, _ in problem.adapter]
        rows = [source.row(names, self._parameters) for source in problem.sources]
        self._sources = [(list(row.scale or ()), list(row.anchor or ())) for row in rows]

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.base.step()
        for fisher, anchor in self._sources:
            drift = [p - a for p, a in zip(self._parameters, anchor, strict=True)]
            found = self._drift(fisher, drift, 0.0)
            if found <= self._nats:
                continue
            if self._how == "radial":
                kept = [d * (self._nats / found) ** 0.5 for d in drift]
            else:
                kept = self._proximal(fisher, drift)
            for p, a, d in zip(self._parameters, anchor, kept, strict=True):
                p.copy_(a + d)

    def _proximal(self, fisher: list[Tensor], drift: list[Tensor]) -> list[Tensor]:
        low, high = 0.0, 1.0
        while self._drift(fisher, drift, high) > self._nats:
            high *= 4
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self._drift(fisher, drift, middle) > self._nats else (low, middle)
        return [d / (1 + high * f) for d, f in zip(drift, fisher, strict=True)]

    @staticmethod
    def _drift(fisher: list[Tensor], drift: list[Tensor], mu: float) -> float:
        return 0.5 * sum(float((f * (d / (1 + mu * f)).square()).sum()) for f, d in zip(fisher, drift, strict=True))


def _budget(nats: float, how: str, variant: Variant) -> Method:
    def method(problem: Problem, lr: float) -> Learner:
        base = guided.wrap(AdamW(problem.groups(lr)), problem, variant)
        return Learner(optimizer=Budget(base, problem, nats, how))  # type: ignore[arg-type]

    return method


def _plain(variant: Variant) -> Method:
    return lambda problem, lr: Learner(optimizer=guided.wrap(AdamW(problem.groups(lr)), problem, variant))


CANDIDATES: dict[str, Method] = {
    "weight 10": _plain(Variant(alignment=_weight(10.0))),
    "weight 100": _plain(Variant(alignment=_weight(100.0))),
    "weight 1000, no projection": _plain(Variant(alignment=_weight(1000.0, project=False))),
    "coherence 2": _plain(Variant(magnitude=Magnitude(coherence=2.0))),
    "coherence 0.5": _plain(Variant(magnitude=Magnitude(coherence=0.5))),
    "radial 0.02": _budget(0.02, "radial", Variant()),
    "radial 0.1": _budget(0.1, "radial", Variant()),
    "prox 0.02": _budget(0.02, "prox", Variant()),
    "prox 0.1": _budget(0.1, "prox", Variant()),
    "prox 0.1, damping 0": _budget(0.1, "prox", Variant(direction=Direction(damping=0.0))),
}
