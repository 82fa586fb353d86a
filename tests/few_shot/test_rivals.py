"""Each rival's change of the gradient is that of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.few_shot import rivals
from benchmarks.few_shot.data import Problem
from benchmarks.zclip import ZClip
from gradguide import SourceGradient


def small(gradient: list[float], *live: list[float], sources: tuple[SourceGradient, ...] = ()) -> Problem:
    """A parameter "p" of zeros with this gradient, and earlier tasks whose batches have the gradients ``live``."""
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
        source_loss=[lambda row=row: linear(row) for row in live],  # type: ignore[misc]
        sources=sources,
        pool_loss=list,
        accuracy=dict,
        probe=lambda: 0.0,
    )


def gradient_of(problem: Problem) -> Tensor:
    found = problem.parameters[0].grad
    assert found is not None
    return found


def changed(method: str, gradient: list[float], *live: list[float]) -> Tensor:
    problem = small(gradient, *live)
    getattr(rivals, method)(problem)()
    return gradient_of(problem)


def test_l2_sp_pulls_to_where_training_began() -> None:
    problem = small([1.0, -1.0])
    change = rivals.l2_sp(problem)
    with torch.no_grad():
        problem.parameters[0].add_(torch.tensor([2.0, -3.0]))
    change()
    torch.testing.assert_close(gradient_of(problem), torch.tensor([1.0 + 0.1 * 2.0, -1.0 - 0.1 * 3.0]))


def test_ewc_pulls_to_every_anchor_by_its_fisher_information() -> None:
    sources = tuple(
        SourceGradient(None, fisher={"p": torch.tensor(fisher)}, anchor={"p": torch.tensor(anchor)})
        for fisher, anchor in (([1e-3, 0.0], [1.0, 1.0]), ([2e-3, 4e-3], [0.0, -2.0]))
    )
    problem = small([1.0, -1.0], sources=sources)
    rivals.ewc(problem)()
    # theta is 0, so the pull is -1000 sum_k F_k theta_k.
    torch.testing.assert_close(gradient_of(problem), torch.tensor([1.0 - 1.0, -1.0 + 8.0]))


def test_a_gem_removes_the_conflict_with_the_mean_of_the_earlier_tasks_and_nothing_else() -> None:
    assert changed("a_gem", [1.0, -1.0], [0.0, 2.0], [0.0, 4.0]).tolist() == [1.0, 0.0]
    assert changed("a_gem", [1.0, 1.0], [0.0, 2.0]).tolist() == [1.0, 1.0]


def test_replay_adds_up() -> None:
    assert changed("replay", [1.0, -1.0], [0.0, 2.0], [3.0, 0.0]).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("method", ["pcgrad", "upgrad"])
def test_two_conflicting_gradients_are_each_projected_and_added(method: str) -> None:
    # g = (1, -1) and s = (0, 2): g without its part along s is (1, 0); s without its part along g is (1, 1).
    torch.testing.assert_close(changed(method, [1.0, -1.0], [0.0, 2.0]), torch.tensor([2.0, 1.0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["replay", "pcgrad", "upgrad"])
def test_gradients_without_conflict_are_added(method: str) -> None:
    torch.testing.assert_close(changed(method, [1.0, 1.0], [0.0, 2.0]), torch.tensor([1.0, 3.0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["a_gem", "replay", "pcgrad", "upgrad"])
def test_without_earlier_tasks_the_gradient_stays(method: str) -> None:
    assert changed(method, [1.0, -1.0]).tolist() == [1.0, -1.0]


def test_zclip_clips_only_norms_that_stand_out_after_its_warm_up() -> None:
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
    optimizers = [rivals.CautiousAdamW([cautious], lr=0.1, weight_decay=0.0), AdamW([plain], lr=0.1, weight_decay=0.0)]
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
