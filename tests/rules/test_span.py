"""Values below the rounding of the rows are zero, and bounds hold for the written values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.ops.rounding import KERNELS
from gradguide.rules.alignment import project
from gradguide.rules.projection import TOLERANCE
from gradguide.rules.span import Span
from tests.strategies import span_of

KINDS = ("random", "opposite", "duplicate", "near", "opposite and near", "zero")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Draw a short gradient, and sources that oppose, repeat or nearly repeat each other and the gradient."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    n, count = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    rows = [torch.randn(n, generator=generator)]
    for _ in range(count):
        kind = draw(st.sampled_from(KINDS))
        other = rows[draw(st.integers(0, len(rows) - 1))]
        row = torch.randn(n, generator=generator)
        if kind == "zero":
            row = torch.zeros(n)
        elif kind != "random":
            small = row * 10.0 ** draw(st.integers(-7, -2)) if "near" in kind else 0.0
            row = (-1.0 if "opposite" in kind else 1.0) * other + small
        rows.append(row * 10.0 ** draw(st.integers(-3, 3)))
    return rows[0] * 10.0 ** draw(st.integers(-3, 3)), rows[1:]


def written(gradient: Tensor, sources: list[Tensor], weight: float, max_norm: float) -> Tensor:
    """Return the guided gradient."""
    parameter = nn.Parameter(torch.zeros_like(gradient))
    alignment = Alignment([SourceGradient({"p": s}) for s in sources], on="gradient", weight=weight)
    optimizer = GradGuide(
        SGD([parameter], lr=1.0), alignment=alignment, direction=None, names={"p": parameter},
        magnitude=Magnitude(max_norm=max_norm, max_update=None),
    )  # fmt: skip
    parameter.grad = gradient.clone()
    optimizer.step()
    assert parameter.grad is not None
    return parameter.grad


@settings(max_examples=150)
@given(problems(), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_written_gradient_is_at_most_max_norm_long(
    problem: tuple[Tensor, list[Tensor]], weight: float, max_norm: float
) -> None:
    left = written(*problem, weight, max_norm).double()
    assert left.isfinite().all()
    assert float(left.norm()) <= max_norm * (1 + 1e-6)


@settings(max_examples=100)
@given(problems())
def test_a_projected_gradient_is_no_longer_than_it_was(problem: tuple[Tensor, list[Tensor]]) -> None:
    left = written(*problem, 0.0, math.inf).double()
    assert float(left.norm()) <= float(problem[0].double().norm()) * (1 + 1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 4096, 10**6])
@pytest.mark.parametrize("kind", ["normal", "uniform", "constant"])
def test_a_gradient_exactly_against_its_source_leaves_exactly_nothing(n: int, kind: str) -> None:
    for seed in range(10 if n < 1000 else 2):
        torch.manual_seed(seed)
        source = {"normal": torch.randn, "uniform": torch.rand, "constant": torch.ones}[kind](n)
        source = source * torch.rand(())
        gradient = -source * torch.rand(()) * 1e4
        assert not written(gradient, [source], 0.0, 1.0).any()


def test_a_pull_that_balances_the_gradient_leaves_exactly_nothing() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        source = torch.randn(3)
        assert not written(-0.7 * source, [source], 0.7, 1.0).any()


@pytest.mark.parametrize("on", ["gradient", "update"])
@pytest.mark.parametrize("n", [1, 1000])
def test_where_nothing_is_left_adam_does_not_move(n: int, on: str) -> None:
    """Adam's step does not depend on the gradient's length, so rounding errors alone would give a full step."""
    for seed in range(20):
        torch.manual_seed(seed)
        parameter, source = nn.Parameter(torch.rand(n)), torch.randn(n)
        if on == "update":
            source = source.sign()  # the direction of the first update of Adam
        before = parameter.detach().clone()
        optimizer = GradGuide(
            AdamW([parameter], lr=1e-3, weight_decay=0.0), alignment=Alignment(SourceGradient({"p": source}), on=on),
            names={"p": parameter}, direction=Direction()
        )  # fmt: skip
        for _ in range(2):
            parameter.grad = -source * torch.rand(()) * 1e4
            optimizer.step()
            torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=2e-7 if on == "update" else 0)
            if on == "gradient":
                assert optimizer.metrics()["guided_norm"] == 0.0
        assert optimizer.metrics()["coherence"] == pytest.approx(1.0)


def test_sources_that_leave_no_way_leave_nothing() -> None:
    """Sixteen sources of both signs over one number."""
    for seed in range(30):
        torch.manual_seed(seed)
        signs = [torch.randn(1) for _ in range(16)]
        if len({bool(s > 0) for s in signs}) == 2:
            assert not written(torch.randn(1) * 1000, signs, 0.0, 1.0).any()


@given(st.integers(0, 2**31 - 1), st.floats(-8, 0).map(lambda power: 10.0**power), st.sampled_from([1e-15, 1.0, 1e15]))
def test_the_ceiling_is_above_the_true_length_whatever_the_error_of_the_products(
    seed: int, left: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, other = torch.randn(2, 6, generator=generator, dtype=torch.float64) * scale
    vectors = torch.stack([s + left * other, s]).unsqueeze(0)
    exact = span_of(vectors)
    noise = torch.rand(1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    lengths = exact.lengths
    gram = exact.gram + (noise + noise.transpose(1, 2)) / 2 * KERNELS * 0.9 * lengths.unsqueeze(1) * lengths.unsqueeze(
        2
    )
    difference = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    found, true = Span(gram).extent(difference), float((vectors[0, 0] - vectors[0, 1]).norm())
    if not found.vector.any():
        assert float(found.norm) == float(found.ceiling) == 0.0
        assert true <= 2 * math.sqrt(KERNELS) * float(exact.reach(difference))
    else:
        assert true <= float(found.ceiling) * (1 + KERNELS)  # the error of the length itself
        assert float(found.norm) <= float(found.ceiling) * (1 + 1e-9)


def test_of_one_row_norm_and_ceiling_are_its_length() -> None:
    span = span_of(torch.tensor([[[3.0, 4.0], [1e-30, 0.0]]], dtype=torch.float64))
    for index, length in ((0, 5.0), (1, 1e-30)):
        vector, norm, ceiling = span.extent(span.row(index))
        assert torch.equal(vector, span.row(index))
        assert float(norm) == pytest.approx(length, rel=1e-14)
        assert float(ceiling) == pytest.approx(length, rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_taken_for_rounding(value: float) -> None:
    span = Span(torch.tensor([[[value, 1.0], [1.0, 1.0]]], dtype=torch.float64))
    assert not span.norm(span.row(0)).isfinite().any()


def test_rows_too_short_to_measure_are_not_taken_for_rounding() -> None:
    span = Span(torch.zeros(1, 2, 2, dtype=torch.float64))
    assert torch.equal(span.extent(span.row(0)).vector, span.row(0))


@pytest.mark.parametrize("angle", [1e-9, 1e-7, 1e-5, 1e-3])
def test_multipliers_of_nearly_opposite_sources_are_bounded(angle: float) -> None:
    vectors = torch.tensor(
        [[[0.3, -1.0, 0.0], [1.0, 0.0, 0.0], [-1.0, angle, 0.0], [-1.0, -angle, angle]]], dtype=torch.float64
    )
    span = span_of(vectors)
    found = project(span, span.row(0), 1)
    assert float(found[:, 1:].max()) <= TOLERANCE**-0.5 * float(span.lengths[0, 0])
    assert float(span.norm(found)) <= float(span.lengths[0, 0])
