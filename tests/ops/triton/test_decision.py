"""Decisions of the kernels against the same rules in torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide import Alignment, Direction, Magnitude, SourceGradient
from gradguide.rules import decision, triton
from gradguide.rules.decision import Rules
from gradguide.rules.span import Span
from tests.ops.triton.problems import DEVICE
from tests.strategies import rows, span_of

# The interpreter computes with numpy, which says so where a number is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

DIRECTIONS = st.sampled_from([None, Direction(), Direction(damping=0.0), Direction(decay=0.5, damping=1.0)])
MAGNITUDES = st.sampled_from([
    None, Magnitude(), Magnitude(max_norm=0.1, max_update=None), Magnitude(adaptive=True, max_update=1e-3),
    Magnitude(coherence=0.5),
])  # fmt: skip


# Without shrinking: in the interpreter a failing case would be made smaller for minutes.
SEARCH = settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def source() -> SourceGradient:
    return SourceGradient({"p": torch.ones(1)})


def anchor() -> SourceGradient:
    return SourceGradient(None, fisher={"p": torch.ones(1)}, anchor={"p": torch.ones(1)})


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


@SEARCH
@given(st.data())
def test_a_step(data: st.DataObject) -> None:
    count, regularized = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    vectors = data.draw(rows(2 + count + regularized))
    direction = data.draw(DIRECTIONS)
    magnitude = data.draw(MAGNITUDES.filter(lambda m: direction is not None or m is None or m.coherence == 0))
    on, weight = data.draw(st.sampled_from(["gradient", "update"])), data.draw(st.sampled_from([0.0, 0.3]))
    anchored = data.draw(st.integers(0, count))
    given = [source()] * (count - anchored) + [anchor()] * anchored
    alignment = Alignment(given, on=on, weight=weight) if count else None
    rules, known = Rules(direction, alignment, magnitude), statistics(3, data.draw(st.integers(0, 9)))
    mine = known.to(DEVICE, copy=True)
    wanted_counts = torch.tensor([4.0, 2.0], dtype=torch.float64)
    counts = wanted_counts.to(DEVICE, copy=True)
    rates = None
    if direction is not None and data.draw(st.booleans()):
        rates = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {"regularized": regularized, "propagate": data.draw(st.booleans())}
    span = span_of(vectors)
    if not data.draw(st.sampled_from([True, True, False])):
        span.gram[0, 0, 0] = data.draw(st.sampled_from([torch.nan, torch.inf]))
    positions = data.draw(st.sampled_from([torch.tensor([0, 1]), torch.tensor([2, 0])]))
    there = None if rates is None else (rates[0].to(DEVICE), rates[1].to(DEVICE))
    found, wanted = (
        kind.decide(where, rules, kept, place, totals, rates=momentum, **options)
        for kind, where, kept, place, totals, momentum in (
            (triton, on_device(span), mine, positions.to(DEVICE), counts, there),
            (decision, span, known, positions, wanted_counts, rates),
        )
    )
    assert torch.equal(counts.cpu(), wanted_counts)
    assert torch.equal(found.go.cpu(), wanted.go)
    if not bool(span.gram.isfinite().all()):
        assert torch.equal(found.gradient.cpu(), wanted.gradient)
        assert torch.equal(found.direction.cpu(), wanted.direction)
        assert torch.equal(mine.cpu(), known)
        return
    # What is taken from the gradient may leave next to nothing of it, and of that only rounding.
    size = vectors.norm(dim=2).sum(dim=1, keepdim=True)
    close(vectors_of(found.guided, vectors), vectors_of(wanted.guided, vectors), scale=size)
    close(vectors_of(found.gradient, vectors), vectors_of(wanted.gradient, vectors), scale=size)
    close(vectors_of(found.direction, vectors), vectors_of(wanted.direction, vectors), scale=size)
    close(found.norm, wanted.norm, scale=size.squeeze(1))
    assert (found.coherence is None) == (wanted.coherence is None)
    left = wanted.norm > 1e-6 * size.squeeze(1)
    close(mine.cpu()[positions][left], known[positions][left], scale=1e-6)
    close(found.factor.cpu()[left], wanted.factor[left], scale=0.0)
    close(found.scale.cpu()[left], wanted.scale[left], scale=1e-6)
    if found.coherence is not None and wanted.coherence is not None:
        close(found.coherence.cpu()[left], wanted.coherence[left], scale=1e-6)


@SEARCH
@given(st.data())
def test_an_update(data: st.DataObject) -> None:
    """That was made, and that was not made yet, of which only products with the step's rows are known."""
    count, bounded, extra = data.draw(st.integers(0, 3)), data.draw(st.booleans()), data.draw(st.integers(0, 1))
    vectors = data.draw(rows(2 + count))
    update, before, sources = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]
    alignment = Alignment([source()] * count) if count else None
    rules = Rules(None, alignment, Magnitude(max_update=0.05 if bounded else None))
    scale = data.draw(st.sampled_from([torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 0.25]).double()]))
    numbers = torch.tensor([12.0, 0.0], dtype=torch.float64)
    there = scale.to(DEVICE), numbers.to(DEVICE)

    made = torch.cat([update, *([before] if bounded else []), sources], dim=1)
    wanted = vectors_of(decision.limit(span_of(made), rules, scale, numbers), made)
    found = vectors_of(triton.limit(on_device(span_of(made)), rules, *there), made)
    close(found, wanted, scale=update.norm(dim=2))

    # Gradient and direction come first in the step's span, and perhaps what a regularizer adds comes last.
    step = torch.cat([torch.ones_like(vectors[:, :2]), sources, torch.ones_like(vectors[:, :extra])], dim=1)
    alone = [(a * b).sum(dim=2) for a, b in ((update, update), (before, before), (update, sources))]
    products = torch.cat(alone, dim=1)
    for kind, where, known, rest in (
        (decision, span_of(step), products, (scale, numbers)),
        (triton, on_device(span_of(step)), products.to(DEVICE), there),
    ):
        factor, pulls = kind.limit_unmade(where, known, rules, *rest)
        assert (pulls is None) == (count == 0)
        found = factor.cpu().unsqueeze(1) * update.squeeze(1)
        found = found if pulls is None else found + vectors_of(pulls, step)
        close(found, wanted, scale=update.norm(dim=2))


@pytest.mark.parametrize("seed", range(4))
def test_sixteen_sources(seed: int) -> None:
    """More sources than dimensions, so that many are active and some depend on others."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, 18, 10, generator=generator, dtype=torch.float64)
    span, ones = span_of(vectors), torch.ones(3, dtype=torch.float64)
    for on in ("gradient", "update"):
        rules = Rules(None, Alignment([source()] * 16, on=on, weight=0.0), Magnitude(max_update=10.0))
        if on == "gradient":
            found, wanted = (
                kind.decide(
                    Span(span.gram.to(device)), rules, torch.zeros(3, 5, dtype=torch.float64, device=device),
                    torch.arange(3, device=device), torch.zeros(2, dtype=torch.float64, device=device),
                ).guided
                for kind, device in ((triton, DEVICE), (decision, torch.device("cpu")))
            )  # fmt: skip
        else:
            wanted = decision.limit(span, rules, ones, ones)
            found = triton.limit(on_device(span), rules, ones.to(DEVICE), ones.to(DEVICE))
        close(vectors_of(found, vectors), vectors_of(wanted, vectors), scale=vectors[:, :1].norm(dim=2))


def test_what_is_not_finite_leaves_everything_as_it_was() -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = torch.nan
    rules = Rules(Direction(), Alignment(source()), Magnitude(adaptive=True, coherence=1.0))
    known = statistics(2, 0)
    there, totals = known.to(DEVICE, copy=True), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    found = triton.decide(on_device(Span(gram)), rules, there, torch.arange(2, device=DEVICE), totals)
    assert torch.equal(there.cpu(), known)
    assert totals.tolist() == [0.0, 1.0]
    assert float(found.go) == 0.0
    assert found.gradient.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert found.direction.tolist() == [[0.0, 1.0, 0.0]] * 2
    assert found.scale.tolist() == [1.0, 1.0]
    assert bool(found.norm[1].isnan()), "metrics say so"
    ones = torch.ones(2, dtype=torch.float64, device=DEVICE)
    assert triton.limit(on_device(Span(gram)), rules, ones, ones).tolist() == [[1.0, 0.0, 0.0]] * 2
    factor, pulls = triton.limit_unmade(on_device(Span(gram)), ones.new_ones(2, 3), rules, ones, ones)
    assert factor.tolist() == [1.0, 1.0]
    assert pulls is not None and not pulls.any()
