from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradguide import Direction
from gradguide.rules.direction import Average, accumulate, coherence, damp, evidence
from tests.strategies import EXTREMES, rows, span_of

STRENGTH = st.floats(0, 1)


def combine(coordinates: Tensor, vectors: Tensor) -> Tensor:
    """Return the vectors [S, n] with coordinates [S, R] in rows [S, R, n]."""
    return (coordinates.unsqueeze(1) @ vectors).squeeze(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return cosines of [S, n] and [S, n], from unit vectors so that no square overflows; NaN for zero vectors."""
    return (torch.nn.functional.normalize(a, eps=0.0) * torch.nn.functional.normalize(b, eps=0.0)).sum(dim=1)


@given(rows(2), STRENGTH)
def test_damping_is_the_soft_projection_onto_the_ray(vectors: Tensor, strength: float) -> None:
    span = span_of(vectors)
    damped = combine(damp(span, span.row(0), span.row(1), torch.full((2,), strength, dtype=torch.float64)), vectors)
    g, d = vectors[:, 0], vectors[:, 1]
    for s in range(2):
        if not d[s].any():
            assert torch.equal(damped[s], g[s])
            continue
        unit = d[s] / d[s].norm()
        expected = (1 - strength) * g[s] + strength * max(0.0, float(g[s] @ unit)) * unit
        assert torch.allclose(damped[s], expected, rtol=1e-9, atol=1e-9 * float(g[s].norm()))


@given(rows(2), STRENGTH)
def test_damping_never_turns_away_from_the_direction_nor_lengthens(vectors: Tensor, strength: float) -> None:
    span = span_of(vectors)
    damped = combine(damp(span, span.row(0), span.row(1), torch.full((2,), strength, dtype=torch.float64)), vectors)
    assert damped.isfinite().all()
    before, after = cosine(vectors[:, 0], vectors[:, 1]), cosine(damped, vectors[:, 1])
    clear = before.isfinite() & (damped.norm(dim=1) > 1e-9 * vectors[:, 0].norm(dim=1))
    assert (after[clear] >= before[clear] - 1e-9).all()
    assert (damped.norm(dim=1) <= vectors[:, 0].norm(dim=1) * (1 + 1e-9)).all()


@given(rows(2))
def test_full_damping_is_idempotent(vectors: Tensor) -> None:
    span = span_of(vectors)
    full = torch.ones(2, dtype=torch.float64)
    once = damp(span, span.row(0), span.row(1), full)
    twice = damp(span, once, span.row(1), full)
    a, b = combine(once, vectors), combine(twice, vectors)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(a.norm()))


@given(rows(2), STRENGTH, st.sampled_from(EXTREMES))
def test_damping_scales_with_the_gradient(vectors: Tensor, strength: float, scale: float) -> None:
    scaled = vectors.clone()
    scaled[:, 0] *= scale
    k = torch.full((2,), strength, dtype=torch.float64)
    results = []
    for these in (vectors, scaled):
        span = span_of(these)
        results.append(combine(damp(span, span.row(0), span.row(1), k), these))
    assert torch.allclose(results[0] * scale, results[1], rtol=1e-9, atol=1e-9 * float(results[1].norm()))


@given(st.integers(0, 2**31 - 1), st.floats(0, 0.99), st.integers(1, 30))
def test_statistics_follow_the_sum_itself(seed: int, decay: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.zeros(1, 5, dtype=torch.float64)
    average = Average(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    beta = torch.tensor([decay], dtype=torch.float64)
    for _ in range(steps):
        unit = torch.nn.functional.normalize(torch.randn(1, 5, generator=generator, dtype=torch.float64))
        coordinates, average = accumulate(
            torch.tensor([[0.0, 1.0]], dtype=torch.float64),
            torch.tensor([[1.0, 0.0]], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            average, beta, 1 - beta,
        )  # fmt: skip
        direction = combine(coordinates, torch.stack([unit, direction], dim=1))
    weights = [(1 - decay) * decay ** (steps - 1 - i) for i in range(steps)]
    assert math.isclose(float(average.mass), 1 - decay**steps, rel_tol=1e-9)
    assert math.isclose(float(average.square), sum(w * w for w in weights), rel_tol=1e-9)
    assert 0 <= float(coherence(direction.norm(dim=1), average)) <= 1


def test_coherence_is_one_for_agreement_and_evidence_is_none_at_the_first_step() -> None:
    first = Average(torch.tensor([0.05]), torch.tensor([0.0025]))
    assert coherence(torch.tensor([0.05]), first).item() == pytest.approx(1.0)
    assert evidence(torch.tensor([0.05]), first).item() == 0.0
    later = Average(torch.tensor([1.0]), torch.tensor([0.04]))
    assert evidence(torch.tensor([1.0]), later).item() == pytest.approx(1.0)
    assert evidence(torch.tensor([0.2]), later).item() == pytest.approx(0.0, abs=1e-3)
    unseen = Average(torch.zeros(1), torch.zeros(1))
    assert coherence(torch.zeros(1), unseen).item() == 0.0
    assert evidence(torch.zeros(1), unseen).item() == 0.0


def test_noise_shows_no_evidence_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    decay, found = 0.9, []
    for _ in range(20):
        d = torch.zeros(2000, dtype=torch.float64)
        mass = square = 0.0
        for _ in range(60):
            g = torch.randn(2000, generator=generator, dtype=torch.float64)
            d = decay * d + (1 - decay) * g / g.norm()
            mass, square = decay * mass + 1 - decay, decay**2 * square + (1 - decay) ** 2
        average = Average(torch.tensor([mass]), torch.tensor([square]))
        found.append(float(evidence(d.norm().reshape(1), average)))
    assert sum(found) / len(found) < 0.1


def test_a_term_of_no_length_changes_nothing() -> None:
    average = Average(torch.tensor([0.3]), torch.tensor([0.2]))
    direction = torch.tensor([[0.0, 1.0]])
    term = torch.tensor([[7.0, 0.0]])
    half = torch.tensor([0.5])
    moved, new = accumulate(direction, term, torch.zeros(1), average, half, half)
    assert torch.equal(moved, direction)
    assert new == average


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), found 1.0"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\), found -0.1"),
        ({"damping": 1.5}, r"damping must be in \[0, 1\], found 1.5"),
        ({"damping": float("nan")}, r"damping must be in \[0, 1\], found nan"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Direction(**options)  # type: ignore[arg-type]


def test_options_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"decay must be a number, found '0\.9'"):
        Direction(decay="0.9")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="share_momentum must be True or False, found 1"):
        Direction(share_momentum=1)  # type: ignore[arg-type]
