"""Every method trains, and parts of GradGuide agree with the rivals that they contain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.few_shot.data import Problem
from benchmarks.few_shot.digits import Digits
from benchmarks.few_shot.methods import BASE, HEAD_ONLY, METHODS, Learner, Variant, guide
from benchmarks.few_shot.rivals import EWC
from benchmarks.few_shot.train import Evaluation
from gradguide import Alignment, Magnitude, SourceGradient


def run(problem: Problem, learner: Learner, steps: int = 8) -> list[Tensor]:
    for step in range(steps):
        chosen = [i % problem.rows for i in range(step, step + 8)]
        evaluation = Evaluation(problem, learner.optimizer, chosen, 1.0)
        evaluation()
        learner.step(evaluation.closure)
    return [p.detach().clone() for p in problem.parameters]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_few_rows_at_a_fair_rate(digits: Digits, name: str) -> None:
    problem = digits.problem(2, 0)
    rows = range(problem.rows)
    before = float(problem.loss(rows).detach())
    run(problem, METHODS[name](problem, 3e-3), steps=30)
    assert float(problem.loss(rows).detach()) < 0.7 * before


def test_ewc_is_the_alignment_without_projection(digits: Digits) -> None:
    variant = Variant(
        direction=None,
        alignment=lambda sources: Alignment(
            [SourceGradient(None, fisher=s.fisher, anchor=s.anchor) for s in sources], weight=EWC, project=False
        ),
        magnitude=Magnitude(max_update=None),
    )
    problem = digits.problem(2, 0)
    rival = run(problem, METHODS["EWC"](problem, 3e-3))
    problem = digits.problem(2, 0)
    ours = run(problem, Learner(optimizer=guide(AdamW(problem.groups(3e-3)), problem, variant)))
    for a, b in zip(rival, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_baseline_is_the_magnitude_alone(digits: Digits) -> None:
    problem = digits.problem(2, 0)
    rival = run(problem, METHODS[BASE](problem, 3e-3))
    problem = digits.problem(2, 0)
    variant = Variant(direction=None, magnitude=Magnitude(max_update=None))
    ours = run(problem, Learner(optimizer=guide(AdamW(problem.groups(3e-3)), problem, variant)))
    for a, b in zip(rival, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_head_alone_leaves_the_adapter_as_it_was_at_any_rate(digits: Digits, lr: float) -> None:
    problem = digits.problem(2, 0)
    before = [p.detach().clone() for _, p in problem.adapter]
    after = run(problem, METHODS[HEAD_ONLY](problem, lr))
    assert all(torch.equal(a, b) for a, b in zip(before, after[: len(before)], strict=True))
    problem = digits.problem(2, 0)
    other = run(problem, METHODS[HEAD_ONLY](problem, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(after, other, strict=True))


def test_a_quarter_of_the_rate_is_the_baseline_at_that_rate(digits: Digits) -> None:
    problem = digits.problem(2, 0)
    lower = run(problem, METHODS[f"{BASE}, rate / 4"](problem, 4e-3))
    problem = digits.problem(2, 0)
    base = run(problem, METHODS[BASE](problem, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(lower, base, strict=True))
