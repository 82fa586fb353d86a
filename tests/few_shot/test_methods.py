"""The rivals do what their papers say, and GradGuide's parts agree with the rivals that they contain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.few_shot import guided, live
from benchmarks.few_shot.cautious import CautiousAdamW
from benchmarks.few_shot.digits import Digits
from benchmarks.few_shot.guided import Variant
from benchmarks.few_shot.methods import BASE, HEAD_ONLY, METHODS, Learner
from benchmarks.few_shot.penalties import EWC, elastic
from benchmarks.few_shot.problem import Problem
from benchmarks.few_shot.train import Evaluation, train
from benchmarks.zclip import ZClip
from gradguide import Alignment, Magnitude


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def run(problem: Problem, learner: Learner, steps: int = 8) -> list[Tensor]:
    for step in range(steps):
        chosen = [i % problem.rows for i in range(step, step + 8)]
        evaluation = Evaluation(problem, learner.optimizer, chosen, 1.0)
        evaluation()
        learner.step(evaluation.again)
    return [p.detach().clone() for p in problem.parameters]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_few_rows_at_a_fair_rate(digits: Digits, name: str) -> None:
    problem = digits.problem(2, 0)
    rows = range(problem.rows)
    before = float(problem.loss(rows).detach())
    run(problem, METHODS[name](problem, 3e-3), steps=30)
    assert float(problem.loss(rows).detach()) < 0.7 * before


def test_the_exact_objective_takes_as_many_gradients_as_the_others(digits: Digits) -> None:
    """Two a step, in half the steps; what was computed before the step is not computed again."""
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


def test_ewc_is_the_alignment_without_projection(digits: Digits) -> None:
    variant = Variant(
        direction=None,
        alignment=lambda sources: Alignment([elastic(s) for s in sources], weight=EWC, project=False),
        magnitude=Magnitude(max_update=None),
    )
    problem = digits.problem(2, 0)
    rival = run(problem, METHODS["EWC"](problem, 3e-3))
    problem = digits.problem(2, 0)
    ours = run(problem, Learner(optimizer=guided.wrap(AdamW(problem.groups(3e-3)), problem, variant)))
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


def test_the_base_is_the_magnitude_alone(digits: Digits) -> None:
    problem = digits.problem(2, 0)
    rival = run(problem, METHODS[BASE](problem, 3e-3))
    problem = digits.problem(2, 0)
    variant = Variant(direction=None, magnitude=Magnitude(max_update=None))
    ours = run(problem, Learner(optimizer=guided.wrap(AdamW(problem.groups(3e-3)), problem, variant)))
    for a, b in zip(rival, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def small(gradient: list[float], *sources: list[float]) -> Problem:
    """A parameter whose gradient is as given, and earlier tasks whose gradients are as given."""
    parameter = nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)

    def linear(row: list[float]) -> Tensor:
        return torch.dot(torch.tensor(row), parameter)

    return Problem(
        adapter=[("p", parameter)],
        head=[],
        rows=1,
        classes=2,
        loss=lambda _: linear(gradient),
        source_loss=[lambda row=row: linear(row) for row in sources],  # type: ignore[misc]
        sources=(),
        pool_loss=list,
        accuracy=dict,
        probe=lambda: 0.0,
    )


def changed(method: str, gradient: list[float], *sources: list[float]) -> Tensor:
    problem = small(gradient, *sources)
    getattr(live, method)(problem)()
    found = problem.parameters[0].grad
    assert found is not None
    return found


def test_a_gem_removes_the_conflict_with_the_mean_of_the_earlier_tasks_and_nothing_else() -> None:
    assert changed("a_gem", [1.0, -1.0], [0.0, 2.0], [0.0, 4.0]).tolist() == [1.0, 0.0]
    assert changed("a_gem", [1.0, 1.0], [0.0, 2.0]).tolist() == [1.0, 1.0]


def test_replay_adds_up() -> None:
    assert changed("replay", [1.0, -1.0], [0.0, 2.0], [3.0, 0.0]).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("method", ["pcgrad", "upgrad"])
def test_gradient_surgery_conflicts_with_neither_task(method: str) -> None:
    g, s = [1.0, -1.0], [0.0, 2.0]
    found = changed(method, g, s)
    assert float(found @ torch.tensor(g)) >= -1e-5
    assert float(found @ torch.tensor(s)) >= -1e-5


@pytest.mark.parametrize("method", ["a_gem", "replay", "pcgrad", "upgrad"])
def test_without_earlier_tasks_the_gradient_stays(method: str) -> None:
    assert changed(method, [1.0, -1.0]).tolist() == [1.0, -1.0]


def test_zclip_clips_what_stands_out_after_its_warm_up_and_nothing_before() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    clip = ZClip([parameter])
    norms = []
    for step in range(40):
        parameter.grad = torch.tensor([1.0 + 0.1 * math.sin(step) if step not in (10, 35) else 100.0])
        clip()
        norms.append(float(parameter.grad))
    assert norms[10] == 100.0
    assert norms[35] < 100.0
    assert all(n == pytest.approx(1.0 + 0.1 * math.sin(i), abs=1e-6) for i, n in enumerate(norms) if i not in (10, 35))


def test_cautious_adamw_against_its_definition() -> None:
    torch.manual_seed(0)
    start = torch.randn(50)
    cautious, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [CautiousAdamW([cautious], lr=0.1, weight_decay=0.0), AdamW([plain], lr=0.1, weight_decay=0.0)]
    for _ in range(5):
        with torch.no_grad():
            plain.copy_(cautious)  # the moments are those of the gradients alone, which both receive
        gradient = torch.randn(50)
        before = plain.detach().clone()
        for parameter, optimizer in zip((cautious, plain), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        update = before - plain.detach()
        mask = (update * gradient > 0).float()
        torch.testing.assert_close(cautious.detach(), before - update * mask / mask.mean())
