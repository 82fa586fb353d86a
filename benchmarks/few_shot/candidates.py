"""Candidates for the rules and their defaults; NOTES.md says what each gave. ``--candidates`` runs them.

What the library cannot do is written out here in full, on a step of the base that the library has guided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.few_shot import guided, penalties
from benchmarks.few_shot.guided import Variant
from benchmarks.few_shot.methods import Learner, Method
from benchmarks.few_shot.problem import Problem
from gradguide import Alignment, Direction, Magnitude, SourceGradient

__all__ = ["CANDIDATES"]


def _weight(weight: float) -> Any:
    """F as it is: what the default was before it was brought to scale."""

    def make(sources: Sequence[SourceGradient]) -> Alignment:
        return Alignment([penalties.elastic(s) for s in sources], weight=weight, project=True)

    return make


def _scaled(alpha: float, power: float, floor: float = 0.0) -> Any:
    """F to a power, brought to a mean of ``alpha``; of that, ``floor`` is the same for every element."""

    def make(sources: Sequence[SourceGradient]) -> Alignment:
        return Alignment([_at_scale(s, alpha, power, floor) for s in sources], weight=1.0, project=True)

    return make


def _at_scale(source: SourceGradient, alpha: float, power: float, floor: float) -> SourceGradient:
    shaped = {name: f.double() ** power for name, f in source.fisher.items()}
    numbers = sum(f.numel() for f in shaped.values())
    mean = sum(float(f.sum()) for f in shaped.values()) / numbers
    held = {name: (alpha * ((1 - floor) * f / mean + floor)).float() for name, f in shaped.items()}
    return SourceGradient(None, fisher=held, anchor=source.anchor)


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
        self._sources = _anchors(problem, problem.sources)

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


class Decoupled:
    """After each step, pulls the parameters towards each anchor apart from the gradient, as AdamW decays weights.

    ``theta <- theta - min(rate * strength * sqrt(F) / mean(sqrt(F)), 1) (theta - theta0)``: in proportion to the rate,
    where a pull that Adam divides by its second moments is not.
    """

    def __init__(self, base: Optimizer, problem: Problem, strength: float) -> None:
        self.base = base
        self._parameters = [p for _, p in problem.adapter]
        self._strength = strength
        self._sources = _anchors(problem, [_at_scale(source, 1.0, 0.5, 0.0) for source in problem.sources])

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.base.step()
        pull = self.base.param_groups[0]["lr"] * self._strength  # the first group has the adapter
        for shapes, anchor in self._sources:
            for p, shape, a in zip(self._parameters, shapes, anchor, strict=True):
                p.sub_((shape * pull).clamp_max(1.0) * (p - a))


def _anchors(problem: Problem, sources: Sequence[SourceGradient]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each source, its curvature and its anchor at the adapter's parameters."""
    names, parameters = [name for name, _ in problem.adapter], [p for _, p in problem.adapter]
    rows = [source.row(names, parameters) for source in sources]
    return [(list(row.scale or ()), list(row.anchor or ())) for row in rows]


def _around(make: Callable[[Optimizer, Problem], Any], variant: Variant) -> Method:
    """What ``make`` puts around a step that the library has guided."""

    def method(problem: Problem, lr: float) -> Learner:
        return Learner(optimizer=make(guided.wrap(AdamW(problem.groups(lr)), problem, variant), problem))

    return method


def _plain(variant: Variant) -> Method:
    return _around(lambda guide, problem: guide, variant)


class Agreement:
    """Scales each update by ``c^power``, c the estimated cosine between two independent gradients of the run.

    With R the length of the running mean of unit gradients and R0 what as many unrelated ones would show, R^2 is in the
    mean ``R0^2 + (1 - R0^2) c``; with a prior of ``prior``, worth one gradient, ``c = R^2 - (1 - prior) R0^2``.
    """

    def __init__(self, base: Optimizer, problem: Problem, power: float, prior: float) -> None:
        self.base = base
        self._parameters = problem.parameters
        self._power, self._prior = power, prior
        self._mean: Tensor | None = None
        self._mass = self._square = 0.0

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        g = torch.cat([p.grad.reshape(-1) for p in self._parameters if p.grad is not None])
        unit = g / g.norm().clamp_min(1e-30)
        self._mean = 0.05 * unit if self._mean is None else self._mean.lerp(unit, 0.05)
        self._mass = 0.95 * self._mass + 0.05
        self._square = 0.95**2 * self._square + 0.05**2
        r2, chance = (float(self._mean.norm()) / self._mass) ** 2, self._square / self._mass**2
        scale = max(r2 - (1 - self._prior) * chance, 0.0) ** self._power
        before = [p.clone() for p in self._parameters]
        self.base.step()
        for p, old in zip(self._parameters, before, strict=True):
            p.copy_(old + scale * (p - old))


_ALIGNED = _weight(penalties.EWC)
_SEEDING = 8  # rows at a time


def _seeded(problem: Problem, lr: float) -> Learner:
    """The direction is that of all rows before the first step is made: a pass of steps at rate 0, then forgotten."""
    optimizer = guided.wrap(AdamW(problem.groups(lr)), problem, guided.VARIANTS["GradGuide"])
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for first in range(0, problem.rows, _SEEDING):
        optimizer.zero_grad()
        problem.loss(range(first, min(first + _SEEDING, problem.rows))).backward()
        optimizer.step()
    optimizer.base.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return Learner(optimizer=optimizer)


def _in_weight_space(alpha: float) -> Method:
    """Pulled back not A and B but their product: ``alpha r / (|A0| |B0|) / 2 |BA - B0 A0|^2`` of each pair."""

    def method(problem: Problem, lr: float) -> Learner:
        by_name = dict(problem.adapter)
        pairs = [(a, by_name[name.replace("lora_A", "lora_B")]) for name, a in by_name.items() if "lora_A" in name]
        start = [(a.detach().clone(), b.detach().clone()) for a, b in pairs]

        @torch.no_grad()
        def change() -> None:
            for (a, b), (a0, b0) in zip(pairs, start, strict=True):
                assert a.grad is not None and b.grad is not None
                moved = b @ a - b0 @ a0
                strength = alpha * len(a) / max(float(a0.norm() * b0.norm()), 1e-6)
                a.grad.add_(b.T @ moved, alpha=strength)
                b.grad.add_(moved @ a.T, alpha=strength)

        optimizer = guided.wrap(AdamW(problem.groups(lr)), problem, Variant())
        return Learner(optimizer=optimizer, changes=(change,))

    return method


def _magnitude(max_update: float | None) -> Magnitude:
    return Magnitude(max_update=max_update)


CANDIDATES: dict[str, Method] = {
    "F as it is": _plain(Variant(alignment=_ALIGNED)),
    "F 0.1": _plain(Variant(alignment=_scaled(0.1, 1.0))),
    "F 0.3, half floor": _plain(Variant(alignment=_scaled(0.3, 1.0, 0.5))),
    "F 1, half floor": _plain(Variant(alignment=_scaled(1.0, 1.0, 0.5))),
    "root F 0.1": _plain(Variant(alignment=_scaled(0.1, 0.5))),
    "root F 0.3": _plain(Variant(alignment=_scaled(0.3, 0.5))),
    "root F 1": _plain(Variant(alignment=_scaled(1.0, 0.5))),
    "all alike 0.1": _plain(Variant(alignment=_scaled(0.1, 1.0, 1.0))),
    "agreement 0.5": _around(
        partial(Agreement, power=0.5, prior=0.1), Variant(alignment=_ALIGNED, magnitude=_magnitude(None))
    ),
    "weight 100": _plain(Variant(alignment=_weight(100.0))),
    "bound 0.02": _plain(Variant(alignment=_ALIGNED, magnitude=_magnitude(0.02))),
    "bound 0.1": _plain(Variant(alignment=_ALIGNED, magnitude=_magnitude(0.1))),
    "tighter bound": _plain(Variant(alignment=guided.anchored, magnitude=_magnitude(0.02))),
    "by module": _plain(Variant(alignment=guided.anchored, scope="module")),
    "seeded direction": _seeded,
    "weight space": _in_weight_space(0.1),
    "decoupled 10": _around(partial(Decoupled, strength=10.0), Variant()),
    "decoupled 30": _around(partial(Decoupled, strength=30.0), Variant()),
    "damping 0": _plain(Variant(direction=Direction(damping=0.0), alignment=_ALIGNED)),
    "damping 0.8": _plain(Variant(direction=Direction(damping=0.8), alignment=_ALIGNED)),
}
