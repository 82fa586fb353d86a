"""Compare the decision kernels with the same rules in torch operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide import Alignment, Direction, Magnitude, SourceGradient
from gradguide.rules import decide as decision
from gradguide.rules.decide import BEFORE, STATISTICS, UPDATE, Limit, Rules
from gradguide.rules.span import Span
from gradguide.rules.triton import decide as triton
from tests.ops.triton.problems import DEVICE
from tests.strategies import rows, span_of

# The interpreter uses numpy, which warns about values that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

DIRECTIONS = st.sampled_from([None, Direction(), Direction(damping=0.0), Direction(decay=0.5, damping=1.0)])
MAGNITUDES = st.sampled_from([
    None, Magnitude(), Magnitude(max_norm=0.1, max_update=None), Magnitude(max_norm=math.inf, max_update=1e-3),
])  # fmt: skip


# Without shrinking, which would take minutes in the interpreter.
SEARCH = settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
SHORT_SEARCH = settings(SEARCH, max_examples=15)


def source() -> SourceGradient:
    return SourceGradient({"p": torch.ones(1)})


def anchor() -> SourceGradient:
    return SourceGradient(None, fisher={"p": torch.ones(1)}, anchor={"p": torch.ones(1)})


def statistics(scopes: int, seed: int) -> Tensor:
    """Return statistics as after some steps, and for the first scope as before any step."""
    found = (
        torch.rand(scopes, len(STATISTICS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    )
    found[:, 1] *= found[:, 0].square()  # at most the value after a single gradient
    found[0] = 0.0
    return found


def close(found: Tensor, wanted: Tensor, scale: Tensor | float = 1.0, tolerance: float = 1e-6) -> None:
    difference = (found.cpu() - wanted).abs()
    assert bool((difference <= tolerance * (wanted.abs() + scale)).all()), f"{found=}, {wanted=}"


def vectors_of(coordinates: Tensor, vectors: Tensor) -> Tensor:
    """Return the vectors of coordinates [S, R]: with parallel sources, different coordinates give the same vector."""
    return (coordinates.cpu().unsqueeze(1) @ vectors).squeeze(1)


def on_device(span: Span) -> Span:
    return Span(span.gram.to(DEVICE))


@SEARCH
@given(st.data())
def test_a_step(data: st.DataObject) -> None:
    count, regularized = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    vectors = data.draw(rows(2 + count + regularized))
    direction = data.draw(DIRECTIONS)
    magnitude = data.draw(MAGNITUDES)
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
    options: dict[str, Any] = {"regularized": regularized}
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
        assert torch.equal(found.clipped.cpu(), wanted.clipped)
        assert torch.equal(found.direction.cpu(), wanted.direction)
        assert torch.equal(mine.cpu(), known)
        return
    # The projection may remove almost all of the gradient, and then only rounding errors remain.
    size = vectors.norm(dim=2).sum(dim=1, keepdim=True)
    close(vectors_of(found.guided, vectors), vectors_of(wanted.guided, vectors), scale=size)
    close(vectors_of(found.clipped, vectors), vectors_of(wanted.clipped, vectors), scale=size)
    close(vectors_of(found.direction, vectors), vectors_of(wanted.direction, vectors), scale=size)
    close(found.guided_norm, wanted.guided_norm, scale=size.squeeze(1))
    left = wanted.guided_norm > 1e-6 * size.squeeze(1)
    close(mine.cpu()[positions][left], known[positions][left], scale=1e-6)
    close(found.clip_factor.cpu()[left], wanted.clip_factor[left], scale=0.0)
    for name in ("coherence", "damping"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine.cpu()[left], theirs[left], scale=1e-6)


def assert_limits_agree(found: Limit, wanted: Limit, size: Tensor) -> None:
    assert torch.equal(found.factor.cpu() == 0.0, wanted.factor == 0.0)
    left = wanted.norm_after > 1e-2 * size  # larger than rounding errors
    close(found.factor.cpu()[left], wanted.factor[left], scale=0.0)
    close(found.norm_before.cpu(), wanted.norm_before, scale=size)
    close(found.norm_after.cpu(), wanted.norm_after, scale=size, tolerance=1e-5)


@SHORT_SEARCH
@given(st.data())
def test_an_update(data: st.DataObject) -> None:
    """Compare both forms: an update already made, and a preview from products with the step's rows."""
    count, bounded, extra = data.draw(st.integers(0, 3)), data.draw(st.booleans()), data.draw(st.integers(0, 1))
    vectors = data.draw(rows(2 + count))
    update, before, sources = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]
    alignment = Alignment([source()] * count) if count else None
    rules = Rules(None, alignment, Magnitude(max_update=0.05 if bounded else None))
    numbers = torch.tensor([12.0, 0.0], dtype=torch.float64)
    size = update.norm(dim=2)

    wanted = decision.constrain(span_of(vectors), rules, numbers)
    found = triton.constrain(on_device(span_of(vectors)), rules, numbers.to(DEVICE))
    assert_limits_agree(found, wanted, size.squeeze(1))
    moved = [change_of(limit.coefficients, vectors) for limit in (wanted, found)]
    close(moved[1], moved[0], scale=size)

    # The step's span starts with gradient and direction, and may end with the gradient of a regularizer.
    step = torch.cat([torch.ones_like(vectors[:, :2]), sources, torch.ones_like(vectors[:, :extra])], dim=1)
    alone = [(a * b).sum(dim=2) for a, b in ((update, update), (before, before), (update, sources))]
    products = torch.cat(alone, dim=1)
    for kind, where, known, rest in (
        (decision, span_of(step), products, numbers),
        (triton, on_device(span_of(step)), products.to(DEVICE), numbers.to(DEVICE)),
    ):
        limit = kind.constrain_preview(where, known, rules, rest)
        assert (limit.coefficients is None) == (count == 0)
        assert_limits_agree(limit, wanted, size.squeeze(1))
        change = limit.scale.cpu().unsqueeze(1) * update.squeeze(1)
        change = change if limit.coefficients is None else change + vectors_of(limit.coefficients, step)
        close(change, moved[0], scale=size)


def change_of(coefficients: Tensor | None, vectors: Tensor) -> Tensor:
    """Return the change of the parameters for coefficients of the parameters after, those before and the sources.

    The rows [S, 2 + K, n] are the update, the parameters before it and the sources.
    """
    assert coefficients is not None
    found = coefficients.cpu().clone()
    assert torch.equal(found[:, BEFORE], 1.0 - found[:, UPDATE])
    found[:, BEFORE] = 0.0
    return vectors_of(found, vectors)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_sixteen_sources(seed: int) -> None:
    """Test more sources than dimensions: many are active and some are linearly dependent."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, 18, 10, generator=generator, dtype=torch.float64)
    span, ones = span_of(vectors), torch.ones(1, dtype=torch.float64)
    for on in ("gradient", "update"):
        rules = Rules(None, Alignment([source()] * 16, on=on, weight=0.0), Magnitude(max_update=10.0))
        if on == "gradient":
            found, wanted = (
                kind.decide(
                    Span(span.gram.to(device)), rules,
                    torch.zeros(1, len(STATISTICS), dtype=torch.float64, device=device),
                    torch.arange(1, device=device), torch.zeros(2, dtype=torch.float64, device=device),
                ).guided
                for kind, device in ((triton, DEVICE), (decision, torch.device("cpu")))
            )  # fmt: skip
        else:
            found, wanted = (
                kind.constrain(where, rules, ones.to(where.gram.device)).coefficients
                for kind, where in ((triton, on_device(span)), (decision, span))
            )
            assert found is not None and wanted is not None
        close(vectors_of(found, vectors), vectors_of(wanted, vectors), scale=vectors[:, :1].norm(dim=2))


def test_what_is_not_finite_leaves_everything_as_it_was() -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = torch.nan
    rules = Rules(Direction(), Alignment(source()), Magnitude())
    known = statistics(2, 0)
    there, totals = known.to(DEVICE, copy=True), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    found = triton.decide(on_device(Span(gram)), rules, there, torch.arange(2, device=DEVICE), totals)
    assert torch.equal(there.cpu(), known)
    assert totals.tolist() == [0.0, 1.0]
    assert float(found.go) == 0.0
    assert found.clipped.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert found.direction.tolist() == [[0.0, 1.0, 0.0]] * 2
    assert bool(found.guided_norm[1].isnan()), "metrics say so"


@pytest.mark.parametrize("largest", [None, 0.05])
def test_a_scope_whose_update_is_not_finite_goes_back_if_it_is_bounded(largest: float | None) -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 2] = gram[1, 2, 0] = torch.inf
    gram[0] *= 1e-8
    rules, ones = Rules(None, Alignment(source()), Magnitude(max_update=largest)), torch.ones(2, dtype=torch.float64)
    products = torch.stack([gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 2]], dim=1)
    for kind, device in ((decision, torch.device("cpu")), (triton, DEVICE)):
        span, there = Span(gram.to(device)), ones.to(device)
        for limit in (
            kind.constrain(span, rules, there), kind.constrain_preview(span, products.to(device), rules, there)
        ):  # fmt: skip
            left = 1.0 if largest is None else 0.0
            assert limit.scale.tolist() == [1.0, left]
            assert limit.factor.tolist() == [1.0, left]
            assert limit.norm_after[0].item() == pytest.approx(1e-4)
            assert limit.norm_after[1].isnan() if largest is None else limit.norm_after[1] == 0.0
        made = kind.constrain(span, rules, there).coefficients
        assert made is not None
        assert made.tolist() == [[1.0, 0.0, 0.0], [left, 1.0 - left, 0.0]]
