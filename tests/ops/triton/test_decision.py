"""Decisions of the kernels against the same rules in torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide import Alignment, Direction, Magnitude, SourceGradient
from gradguide.rules import decision, triton
from gradguide.rules.decision import Rules
from gradguide.rules.span import Span
from tests.ops.triton.problems import DEVICE
from tests.strategies import rows, span_of

DIRECTIONS = st.sampled_from([None, Direction(), Direction(damping=0.0), Direction(decay=0.5, damping=1.0)])
MAGNITUDES = st.sampled_from([
    None, Magnitude(), Magnitude(max_norm=0.1, max_update=None), Magnitude(adaptive=True, max_update=1e-3),
    Magnitude(coherence=0.5),
])  # fmt: skip


def source() -> SourceGradient:
    return SourceGradient({"p": torch.ones(1)})


def statistics(scopes: int, seed: int) -> Tensor:
    """As after some steps; of the first scope as before any."""
    found = torch.rand(scopes, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    found[:, 1] *= found[:, 0].square()  # no more than had one gradient alone been seen
    found[0] = 0.0
    return found


def close(found: Tensor, wanted: Tensor, scale: Tensor | float = 1.0, tolerance: float = 1e-6) -> None:
    difference = (found.cpu() - wanted).abs()
    assert bool((difference <= tolerance * (wanted.abs() + scale)).all()), f"{found=}, {wanted=}"


def vectors_of(coordinates: Tensor, vectors: Tensor) -> Tensor:
    """What coordinates [S, R] mean: with sources that are parallel, several mean the same."""
    return (coordinates.cpu().unsqueeze(1) @ vectors).squeeze(1)


def on_device(span: Span) -> Span:
    return Span(span.gram.to(DEVICE))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_step(data: st.DataObject) -> None:
    count, regularized = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    vectors = data.draw(rows(2 + count + regularized))
    direction = data.draw(DIRECTIONS)
    magnitude = data.draw(MAGNITUDES.filter(lambda m: direction is not None or m is None or m.coherence == 0))
    on, weight = data.draw(st.sampled_from(["gradient", "update"])), data.draw(st.sampled_from([0.0, 0.3]))
    alignment = Alignment([source()] * count, on=on, weight=weight) if count else None
    rules, known = Rules(direction, alignment, magnitude), statistics(2, data.draw(st.integers(0, 9)))
    rates = None
    if direction is not None and data.draw(st.booleans()):
        rates = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {"regularized": regularized}
    finite = torch.tensor(data.draw(st.sampled_from([True, True, False])))
    wanted = decision.decide(span_of(vectors), finite, rules, known, rates=rates, **options)
    there = None if rates is None else (rates[0].to(DEVICE), rates[1].to(DEVICE))
    found = triton.decide(
        on_device(span_of(vectors)), finite.to(DEVICE), rules, known.to(DEVICE), rates=there, **options
    )
    for name in ("gradient", "guided"):
        mine, theirs = (vectors_of(getattr(d, name), vectors) for d in (found, wanted))
        close(mine, theirs, scale=theirs.norm(dim=1, keepdim=True))
    close(vectors_of(found.direction, vectors), vectors_of(wanted.direction, vectors), scale=1.0)
    for name in ("norm", "factor", "coherence", "scale", "statistics"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            close(mine, theirs, scale=0.0 if name == "norm" else 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_update(data: st.DataObject) -> None:
    count, bounded = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    vectors = data.draw(rows(1 + bounded + count))
    alignment = Alignment([source()] * count) if count else None
    rules = Rules(None, alignment, Magnitude(max_update=0.05 if bounded else None))
    scale = data.draw(st.sampled_from([None, torch.tensor([1.0, 0.25], dtype=torch.float64)]))
    numbers = torch.tensor([12.0, 0.0], dtype=torch.float64)
    wanted = decision.limit(span_of(vectors), rules, scale, numbers)
    there = None if scale is None else scale.to(DEVICE)
    found = triton.limit(on_device(span_of(vectors)), rules, there, numbers.to(DEVICE))
    mine, theirs = vectors_of(found, vectors), vectors_of(wanted, vectors)
    close(mine, theirs, scale=theirs.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("seed", range(4))
def test_sixteen_sources(seed: int) -> None:
    """More sources than dimensions, so that many are active and some depend on others."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, 18, 10, generator=generator, dtype=torch.float64)
    for on, span in (("gradient", span_of(vectors)), ("update", span_of(vectors))):
        rules = Rules(None, Alignment([source()] * 16, on=on, weight=0.0), Magnitude(max_update=10.0))
        known, numbers = torch.zeros(3, 5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        if on == "gradient":
            yes = torch.tensor(True)
            wanted = decision.decide(span, yes, rules, known).guided
            found = triton.decide(on_device(span), yes.to(DEVICE), rules, known.to(DEVICE)).guided
        else:
            wanted = decision.limit(span, rules, None, numbers)
            found = triton.limit(on_device(span), rules, None, numbers.to(DEVICE))
        close(vectors_of(found, vectors), vectors_of(wanted, vectors), scale=vectors[:, :1].norm(dim=2))


def test_what_is_not_finite_leaves_everything_as_it_was() -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = torch.nan
    rules = Rules(Direction(), Alignment(source()), Magnitude(adaptive=True, coherence=1.0))
    known = statistics(2, 0)
    found = triton.decide(on_device(Span(gram)), torch.tensor(False, device=DEVICE), rules, known.to(DEVICE))
    assert torch.equal(found.statistics.cpu(), known)
    assert found.gradient.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert found.direction.tolist() == [[0.0, 1.0, 0.0]] * 2
    assert found.scale is not None and found.scale.tolist() == [1.0, 1.0]
    assert bool(found.norm[1].isnan()), "metrics say so"
    wanted = triton.limit(on_device(Span(gram)), rules, None, torch.ones(2, dtype=torch.float64, device=DEVICE))
    assert wanted.tolist() == [[1.0, 0.0, 0.0]] * 2
