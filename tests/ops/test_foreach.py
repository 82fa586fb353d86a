"""Compare the portable backend with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide import Direction, GradGuide
from gradguide.ops import Row, Stack, Write, blocks, cpu, foreach, reference
from gradguide.ops.rounding import DOTS, EXACT, WRITTEN

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((), (0,), (1,), (3, 5), (7, 0, 2), (64, 33), (300, 301))
SCOPES = st.lists(st.lists(st.sampled_from(SHAPES), max_size=3), min_size=1, max_size=3).filter(any)
"""Shapes of the tensors of up to three scopes; all but one may be empty."""


def tensors(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]


def some_rows(
    seed: int, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], sizes: list[int] | None = None
) -> Stack:
    """Return a plain row, an absent row, a moving source and an update."""
    g, d, s0, fisher = (tensors(seed + k, shapes, dtypes[k % len(dtypes)]) for k in range(4))
    now, before = (tensors(seed + k, shapes, dtypes[0]) for k in (4, 5))
    moving = Row(offset=s0, scale=fisher, at=now, anchor=before)
    return Stack([Row(offset=g), Row(offset=d), None, moving, Row(at=now, anchor=before)], sizes)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    scopes=SCOPES,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
)
def test_gram_is_the_oracles(seed: int, scopes: list[list[tuple[int, ...]]], dtypes: list[torch.dtype]) -> None:
    rows = some_rows(seed, [*chain(*scopes)], dtypes, [*map(len, scopes)])
    expected = reference.gram(rows)
    found = foreach.gram(rows)
    assert found.dtype == torch.float64
    assert found.shape == (len(scopes), 5, 5)
    assert torch.equal(found, found.mT)
    lengths = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - expected).abs() <= 1e-5 * lengths.unsqueeze(1) * lengths.unsqueeze(2) + 1e-12).all()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    scopes=SCOPES,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    accumulate=st.booleans(),
    coefficients=st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=30, max_size=30),
)
def test_combine_is_the_oracles(
    seed: int,
    scopes: list[list[tuple[int, ...]]],
    dtypes: list[torch.dtype],
    accumulate: bool,
    coefficients: list[float],
) -> None:
    results = []
    own, other = torch.tensor(coefficients, dtype=torch.float64).view(2, 3, 5)[:, : len(scopes)]
    for ops in (reference, foreach):
        rows = some_rows(seed, [*chain(*scopes)], dtypes, [*map(len, scopes)])
        first, second = rows[0], rows[1]
        assert first is not None and first.offset is not None and second is not None and second.offset is not None
        writes = [
            Write(into=first.offset, coefficients=own),
            Write(into=second.offset, coefficients=other, accumulate=accumulate),
        ]
        ops.combine_(rows, writes)
        results.append([*first.offset, *second.offset])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        tolerance = 4 * torch.finfo(found.dtype).eps
        assert torch.allclose(found.double(), expected.double(), rtol=max(tolerance, 1e-5), atol=max(tolerance, 2e-5))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1.0, 1e18, 1e30, 1e38])
def test_gram_of_tiny_and_huge_rows(scale: float) -> None:
    rows: list[Row | None] = [Row(offset=[torch.tensor([scale, 0.0, -scale])]), Row(offset=[torch.ones(3)])]
    found, expected = foreach.gram(rows), reference.gram(rows)
    assert torch.allclose(found, expected, rtol=1e-5, atol=0.0)


def test_long_rows_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 10)
    monkeypatch.setattr(blocks, "LARGE", 1000)
    shapes = [(1999,), (37, 100), (5,), (1000,), (0,)]
    rows = some_rows(0, shapes, [torch.float32])
    assert torch.allclose(foreach.gram(rows), reference.gram(rows), rtol=1e-5, atol=1e-2)
    target, expected = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
    coefficients = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    foreach.combine_(rows, [Write(into=target, coefficients=coefficients)])
    reference.combine_(rows, [Write(into=expected, coefficients=coefficients)])
    for found, wanted in zip(target, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


def test_tensors_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 10)
    monkeypatch.setattr(blocks, "LARGE", 20)
    a, b = torch.randn(2, 7, 11)
    rows: list[Row | None] = [Row(offset=[a.T]), Row(offset=[b.T.contiguous()])]
    assert torch.allclose(foreach.gram(rows), reference.gram(rows), rtol=1e-5, atol=1e-5)
    expected = 2.0 * a + 0.5 * b
    foreach.combine_(rows, [Write(into=[a.T], coefficients=torch.tensor([[2.0, 0.5]]))])
    assert torch.allclose(a, expected, atol=1e-6)


def test_a_zero_coefficient_drops_its_row_whatever_it_holds() -> None:
    bad, good = torch.full((4,), float("nan")), torch.arange(4.0)
    rows: list[Row | None] = [Row(offset=[bad]), Row(offset=[good])]
    foreach.combine_(rows, [Write(into=[good], coefficients=torch.tensor([[0.0, 2.0]]))])
    assert torch.equal(good, 2 * torch.arange(4.0))


def test_writing_a_row_back_changes_no_bit() -> None:
    g = [torch.tensor([1e-45, -0.5, 3e38, 0.1])]
    before = [t.clone() for t in g]
    rows: list[Row | None] = [Row(offset=g), Row(offset=[torch.full((4,), 7.0)])]
    foreach.combine_(rows, [Write(into=g, coefficients=torch.tensor([[1.0, 0.0]]))])
    foreach.combine_(rows, [Write(into=g, coefficients=torch.tensor([[0.0, 0.0]]), accumulate=True)])
    assert torch.equal(g[0], before[0])


def test_nan_and_inf_show_in_the_gram_matrix() -> None:
    for bad in (float("nan"), float("inf")):
        rows: list[Row | None] = [Row(offset=[torch.tensor([1.0, bad])]), Row(offset=[torch.ones(2)])]
        found = foreach.gram(rows)[0]
        assert not found[0].isfinite().any()
        assert found[1, 1] == 2.0


def test_a_coefficient_beyond_float32_still_gives_the_right_result_on_cpu() -> None:
    g, s = [torch.tensor([1.0, 2.0])], [torch.tensor([1e-40, 0.0])]
    foreach.combine_(
        [Row(offset=g), Row(offset=s)], [Write(into=g, coefficients=torch.tensor([[1.0, 1e40]], dtype=torch.float64))]
    )
    assert torch.allclose(g[0], torch.tensor([2.0, 2.0]), rtol=1e-4)


def test_float64_rows_take_float32_coefficients_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "_on_cpu", lambda device: False)
    g, s = [torch.tensor([1.0, 2.0]).double()], [torch.tensor([3.0, 4.0]).double()]
    foreach.combine_([Row(offset=g), Row(offset=s)], [Write(into=g, coefficients=torch.tensor([[2.0, 0.5]]))])
    assert g[0].tolist() == [3.5, 6.0]


@pytest.mark.parametrize("shape", [(2,), (1, 3), (2, 2)])
def test_a_write_has_a_coefficient_for_every_scope_and_row(shape: tuple[int, ...]) -> None:
    g = [torch.ones(2), torch.ones(3)]
    rows = Stack([Row(offset=g), Row(offset=g)], [2])
    with pytest.raises(ValueError, match=r"each of 1 scopes and 2 rows, found shape \(" + str(shape[0])):
        foreach.combine_(rows, [Write(into=g, coefficients=torch.full(shape, 2.0))])
    assert [t.tolist() for t in g] == [[1.0] * 2, [1.0] * 3]


def test_rows_check_their_parts() -> None:
    one = [torch.ones(1)]
    with pytest.raises(ValueError, match="both `at` and `anchor`"):
        Row(offset=one, at=one)
    with pytest.raises(ValueError, match="its `offset` alone"):
        Row(offset=one, scale=one)
    with pytest.raises(ValueError, match="its `offset` alone"):
        Row()


def test_rows_of_other_shapes_are_refused_before_anything_is_written() -> None:
    g, short = [torch.ones(4, 3)], [torch.ones(3, 4)]
    with pytest.raises(ValueError, match=r"tensor 0 has shape \(3, 4\), expected \(4, 3\)"):
        foreach.gram([Row(offset=g), Row(offset=short)])
    with pytest.raises(ValueError, match="differ in size"):
        foreach.combine_([Row(offset=g)], [Write(into=short, coefficients=torch.ones(1, 1))])
    with pytest.raises(ValueError, match="has 2 tensors, expected 1"):
        foreach.gram([Row(offset=g), Row(offset=[*g, *g])])
    assert short[0].eq(1).all()


@pytest.mark.parametrize("size", [100, cpu.SMALL, cpu.SMALL + 1, cpu.DOT, 5 * cpu.DOT + 7, 300_000])
@pytest.mark.parametrize("kind", [torch.randn, torch.rand, torch.ones])
def test_the_error_of_products_is_below_what_the_rules_take_for_rounding(
    kind: Callable[..., Tensor], size: int
) -> None:
    a, b = [kind(size) * 0.3], [kind(size) * 0.7]
    rows: list[Row | None] = [Row(offset=a), Row(offset=b)]
    found, exact = foreach.gram(rows)[0], reference.gram(rows)[0]
    error = (found - exact).abs() / exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    assert float(error.max()) <= DOTS
    if size <= cpu.SMALL:
        assert float(error.max()) <= EXACT


def test_a_row_in_another_list_than_what_is_written_is_read_before() -> None:
    g, d = [torch.arange(5.0)], [torch.ones(5)]
    rows: list[Row | None] = [Row(offset=list(g)), Row(offset=d), Row(offset=[g[0]])]
    foreach.combine_(rows, [Write(into=g, coefficients=torch.tensor([[2.0, 1.0, 3.0]]))])
    assert g[0].tolist() == [5.0 * x + 1.0 for x in range(5)]


def test_many_scopes_at_once_are_each_scope_by_itself() -> None:
    shapes = [(3, 5), (0,), (50, 60), (), (7,), (100, 101)]
    rows = some_rows(0, shapes, [torch.float32], [1, 2, 0, 3])
    found = foreach.gram(rows)
    ends = [0, 1, 3, 3, 6]
    for scope, (start, end) in enumerate(pairwise(ends)):
        alone = [cut(row, start, end) for row in rows]
        wanted = foreach.gram(alone)[0] if end > start else torch.zeros(5, 5, dtype=torch.float64)
        torch.testing.assert_close(found[scope], wanted, rtol=1e-12, atol=0)


def cut(row: Row | None, start: int, end: int) -> Row | None:
    if row is None:
        return None
    offset, scale, at, anchor = (None if part is None else part[start:end] for part in row.fields)
    return Row(offset=offset, scale=scale, at=at, anchor=anchor)


def test_on_another_device_nothing_is_read_and_nothing_fails() -> None:
    """The meta device holds no numbers, so a read by the host would be an error."""
    shapes = [(3, 5), (0,), (50, 60)]
    rows = Stack([moved(row) for row in some_rows(0, shapes, [torch.float32])], [1, 2])
    found = foreach.gram(rows)
    assert (found.shape, found.device.type) == ((2, 5, 5), "meta")
    first = rows[0]
    assert first is not None and first.offset is not None
    foreach.combine_(rows, [Write(into=first.offset, coefficients=found[:, 0])])


def moved(row: Row | None) -> Row | None:
    if row is None:
        return None
    offset, scale, at, anchor = (None if part is None else [t.to("meta") for t in part] for part in row.fields)
    return Row(offset=offset, scale=scale, at=at, anchor=anchor)


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_finite_float64_rows_whose_squares_overflow_are_an_error_with_the_way_out(size: float) -> None:
    """They are finite, so the step is not skipped as if they were not."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GradGuide(torch.optim.SGD([parameter], lr=0.1), direction=Direction())
    parameter.grad = torch.full((3,), size, dtype=torch.float64)
    with pytest.raises(OverflowError, match="whose squares overflow; scale the loss down"):
        optimizer.step()
    assert parameter.tolist() == [1.0] * 3
    parameter.grad = torch.full((3,), float("inf"), dtype=torch.float64)
    optimizer.step()
    assert optimizer.metrics()["skipped"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_beside_a_parameter_without_numbers(bad: float) -> None:
    full, empty = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 0))
    optimizer = GradGuide(torch.optim.SGD([full, empty], lr=0.1), direction=Direction())
    full.grad, empty.grad = torch.full_like(full, bad), torch.zeros_like(empty)
    optimizer.step()
    assert torch.equal(full.detach(), torch.ones(2, dtype=torch.float64))
    assert optimizer.metrics()["skipped"] == 1


SHARES = st.sampled_from([0.0, 1.0, -1.0, 0.95, 0.05, 0.5, 1e-6, 1e-12, 1e6, 1e20])


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    first=st.tuples(SHARES, SHARES, SHARES),
    second=st.tuples(SHARES, SHARES, SHARES),
    length=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    size=st.sampled_from([5, 9000, 200_000]),
)
def test_two_writes_have_the_error_of_a_plain_combination(
    seed: int, first: tuple[float, ...], second: tuple[float, ...], length: float, size: int
) -> None:
    d, g, s = (tensors(seed + k, [(size,)], torch.float32, scale) for k, scale in enumerate((length, 1.0, 1.0)))
    rows: list[Row | None] = [Row(offset=g), Row(offset=d), Row(offset=s)]
    before = [[t.double() for t in row] for row in (g, d, s)]
    coefficients = [torch.tensor([each], dtype=torch.float64) for each in (first, second)]
    foreach.combine_(rows, [Write(into=d, coefficients=coefficients[0]), Write(into=g, coefficients=coefficients[1])])
    for found, each in ((d, first), (g, second)):
        exact = sum(c * row[0] for c, row in zip(each, before, strict=True))
        reach = sum(abs(c) * float(row[0].norm()) for c, row in zip(each, before, strict=True))
        assert float((found[0].double() - exact).norm()) <= WRITTEN * reach + 1e-40


def test_two_writes_take_no_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    g, d = tensors(0, [(300, 301)], torch.float32), tensors(1, [(300, 301)], torch.float32)
    monkeypatch.setattr(cpu, "_combined", None)
    writes = [
        Write(into=part, coefficients=torch.tensor([pair])) for part, pair in ((d, [0.05, 0.95]), (g, [0.5, 0.3]))
    ]
    foreach.combine_([Row(offset=g), Row(offset=d)], writes)
    expected = 0.5 * tensors(0, [(300, 301)], torch.float64)[0] + 0.3 * tensors(1, [(300, 301)], torch.float64)[0]
    assert torch.allclose(g[0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_of_a_row_that_is_not_finite_only_the_writes_that_read_it_are_not(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "_on_cpu", lambda device: on_cpu)
    g, d, s = [torch.full((20_000,), torch.nan)], [torch.ones(20_000)], [torch.full((20_000,), torch.inf)]
    writes = [
        Write(into=d, coefficients=torch.tensor([[0.0, 0.5, 0.0]])),
        Write(into=g, coefficients=torch.tensor([[2.0, 3.0, 0.0]])),
    ]
    foreach.combine_([Row(offset=g), Row(offset=d), Row(offset=s)], writes)
    assert d[0].eq(0.5).all()
    assert g[0].isnan().all()
