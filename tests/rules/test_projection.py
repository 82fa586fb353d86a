from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide.rules.alignment import project
from gradguide.rules.projection import multipliers
from tests.strategies import EXTREMES, rows, span_of


def oracle(x: Tensor, sources: Tensor) -> Tensor:
    """Project x [n] onto {y : sources y >= 0}: the nearest feasible point over all active sets."""
    live = [s / s.norm() for s in sources if s.any()]
    best, best_distance = None, float("inf")
    for size in range(len(live) + 1):
        for chosen in itertools.combinations(live, size):
            y = x
            if chosen:
                active = torch.stack(chosen)
                y = x - torch.linalg.pinv(active, rtol=1e-10) @ (active @ x)
            feasible = all(float(s @ y) >= -1e-9 * float(x.norm()) for s in live)
            if feasible and float((y - x).norm()) < best_distance:
                best, best_distance = y, float((y - x).norm())
    assert best is not None
    return best


def projected(vectors: Tensor) -> Tensor:
    """Project the first of rows [S, R, n] on the cone of the others: [S, n]."""
    span = span_of(vectors)
    return (project(span, span.row(0), 1).unsqueeze(1) @ vectors).squeeze(1)


def conflict(x: Tensor, sources: Tensor) -> float:
    """Return the lowest cosine of x with any nonzero source; 0 if all are zero."""
    cosines = [float((x / x.norm()) @ (s / s.norm())) for s in sources if s.any() and x.any()]
    return min([0.0, *cosines])


@given(rows(2))
def test_one_source_is_the_closed_form(vectors: Tensor) -> None:
    results = projected(vectors)
    for result, (x, s) in zip(results, vectors, strict=True):
        expected = x
        if s.any():
            unit = s / s.norm()
            expected = x - min(0.0, float(x @ unit)) * unit
        assert torch.allclose(result, expected, rtol=1e-9, atol=2e-6 * float(x.norm()))


@settings(max_examples=60)
@given(st.integers(2, 5).flatmap(lambda k: rows(k + 1, length=8)))
def test_several_sources_are_the_nearest_point_of_the_cone(vectors: Tensor) -> None:
    for result, these in zip(projected(vectors), vectors, strict=True):
        x, sources = these[0], these[1:]
        scale = float(x.norm())
        assert result.isfinite().all()
        assert float((result - oracle(x, sources)).norm()) <= 1e-5 * scale
        for s in sources:
            assert float(result @ s) >= -2e-6 * scale * float(s.norm())


@settings(max_examples=30)
@given(st.integers(1, 16).flatmap(lambda k: rows(k + 1, length=10)))
def test_sixteen_sources_leave_no_conflict_and_do_not_lengthen(vectors: Tensor) -> None:
    # With more sources than dimensions the Gram matrix is rank-deficient.
    for result, these in zip(projected(vectors), vectors, strict=True):
        x = these[0]
        assert result.isfinite().all()
        assert float(result.norm()) <= float(x.norm()) * (1 + 1e-6)
        for s in these[1:]:
            assert float(result @ s) >= -2e-6 * float(x.norm()) * float(s.norm())
        # Moreau decomposition: the removed part is orthogonal to the projection.
        assert abs(float((x - result) @ result)) <= 1e-5 * float(x @ x)


@settings(max_examples=50)
@given(st.integers(1, 4).flatmap(lambda k: rows(k + 1)), st.sampled_from(EXTREMES), st.sampled_from(EXTREMES))
def test_the_decision_does_not_depend_on_scale(vectors: Tensor, gradient_scale: float, source_scale: float) -> None:
    scaled = vectors.clone()
    scaled[:, 0] *= gradient_scale
    scaled[:, 1:] *= source_scale
    a, b = projected(vectors) * gradient_scale, projected(scaled)
    assert (a - b).norm() <= 1e-5 * b.norm() + 1e-5 * scaled[:, 0].norm()


@given(st.integers(1, 4).flatmap(lambda k: rows(k + 1)))
def test_projection_is_idempotent(vectors: Tensor) -> None:
    once = projected(vectors)
    again = vectors.clone()
    again[:, 0] = once
    assert (projected(again) - once).norm() <= 1e-5 * vectors[:, 0].norm()


@given(rows(3))
def test_without_conflict_nothing_changes_bitwise(vectors: Tensor) -> None:
    span = span_of(vectors)
    before = span.row(0)
    after = project(span, before, 1)
    for s in range(len(vectors)):
        if conflict(vectors[s, 0], vectors[s, 1:]) > -1e-7:
            assert torch.equal(before[s], after[s])


@pytest.mark.parametrize("name", ["duplicate", "opposite", "zero", "nearly parallel"])
def test_degenerate_sources(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, s = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    x = x if float(x @ s) < 0 else -x
    second = {"duplicate": s, "opposite": -s, "zero": 0 * s, "nearly parallel": s + 1e-9 * x}[name]
    vectors = torch.stack([x, s, second]).unsqueeze(0)
    result = projected(vectors)[0]
    unit = s / s.norm()
    assert torch.allclose(result, x - float(x @ unit) * unit, atol=1e-6)


def test_multipliers_are_never_negative_and_zero_without_conflict() -> None:
    sources = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    found = multipliers(sources, torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64), torch.tensor([3.0]).double())
    assert torch.allclose(found, torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64), atol=1e-9)
    free = multipliers(sources, torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64), torch.tensor([3.0]).double())
    assert torch.equal(free, torch.zeros(1, 3, dtype=torch.float64))
