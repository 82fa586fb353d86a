"""Training counts gradients fairly, and measures what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.few_shot.digits import Digits
from benchmarks.few_shot.methods import BASE, METHODS
from benchmarks.few_shot.train import Stability, Update, pool_gradient, train


def test_the_exact_objective_uses_as_many_gradients_as_the_others(digits: Digits) -> None:
    """Two per step, in half the steps; what was computed before the step is not computed again."""
    counts = {}
    for name in (BASE, "exact objective"):
        problem = digits.problem(2, 0)
        calls: list[int] = []
        loss = problem.loss

        def counted(chosen: Sequence[int], loss: Any = loss, calls: list[int] = calls) -> Tensor:
            calls.append(len(chosen))
            found: Tensor = loss(chosen)
            return found

        object.__setattr__(problem, "loss", counted)
        stream = (range(8) for _ in range(100))
        train(problem, METHODS[name], 3e-3, stream, 20, seed=0)
        counts[name] = len(calls)
    assert counts == {BASE: 20, "exact objective": 20}


def test_a_run_at_rate_zero_diverges_by_definition_and_moves_nothing(digits: Digits) -> None:
    problem = digits.problem(2, 0)
    object.__setattr__(problem, "head_lr", None)
    before = [p.detach().clone() for p in problem.parameters]
    trained = train(problem, METHODS[BASE], 0.0, (range(8) for _ in range(10)), 10, seed=0, detailed=True)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))
    assert trained.diverged == (trained.loss >= 0.95 * math.log(5))
    assert trained.alignment == 0.0
    assert trained.coherence == pytest.approx(1.0, abs=1e-4)  # the same gradient at every step
    assert trained.successive_cosine == pytest.approx(1.0, abs=1e-4)
    assert trained.steps_to_final == 5  # the first probe is as good as the last


def test_stability_of_opposite_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    stability = Stability([parameter])
    for sign in (1.0, -1.0):
        parameter.grad = sign * torch.tensor([3.0, 4.0])
        stability.observe()
    assert stability.cosines == [pytest.approx(-1.0)]
    # Weights 0.95 * 0.05 and 0.05 of unit vectors that point apart.
    assert stability.coherences == [pytest.approx(1.0), pytest.approx(0.05 / 1.95, abs=1e-6)]


def test_an_update_along_the_negative_pool_gradient_has_cosine_one(digits: Digits) -> None:
    problem = digits.problem(2, 0)
    gradient, update = pool_gradient(problem), Update(problem)
    with torch.no_grad():
        parts = gradient.split([p.numel() for _, p in problem.adapter])
        for (_, parameter), part in zip(problem.adapter, parts, strict=True):
            parameter.sub_(part.view_as(parameter))
    assert update.cosine(gradient) == pytest.approx(1.0, abs=1e-4)
