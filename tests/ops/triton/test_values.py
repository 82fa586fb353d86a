"""Compare every kernel with the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradguide.ops import Row, Stack, Write, foreach, reference
from gradguide.ops import triton as ops
from gradguide.ops.row import sizes_of
from tests.ops.triton.problems import CHUNK, DEVICE, MANY, ODD, some_rows, tensors, unaligned

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = [(), (0,), (600,)]

CASES = pytest.mark.parametrize(
    ("shapes", "sources", "dtypes"),
    [
        pytest.param(ODD, 0, (F32,), id="K=0"),
        pytest.param(ODD, 1, (F32,), id="K=1"),
        pytest.param(ODD, 1, (BF16, F32), id="K=1, bf16 gradients"),
        pytest.param(ODD, 1, (F32, BF16, F16), id="K=1, three precisions"),
        pytest.param(ODD, 4, (F32, F32, BF16), id="K=4"),
        pytest.param([(600,)], 16, (F32, BF16), id="K=16"),
        pytest.param(MANY, 1, (F32,), id="many small tensors"),
        pytest.param([(1, 2048)], 1, (F32,), id="one chunk"),
        pytest.param([(2 * CHUNK + 1,)], 1, (F32,), id="three chunks"),
        pytest.param([(0,), (4, 0)], 1, (F32,), id="empty"),
    ],
)


def check_gram(rows: list[Row | None]) -> None:
    found, expected = ops.gram(rows), reference.gram(rows)
    assert found.dtype == torch.float64
    assert found.device == expected.device
    assert torch.equal(found, found.mT)
    lengths = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - expected).abs() <= 1e-6 * lengths.unsqueeze(1) * lengths.unsqueeze(2)).all()
    assert torch.equal(found, ops.gram(rows)), "the same rows give the same bits"


def coefficients(scopes: int, count: int, seed: int) -> Tensor:
    """Return random coefficients, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(scopes, count, generator=generator, dtype=torch.float64)
    return (drawn * (torch.rand(scopes, count, generator=generator) > 0.3)).to(DEVICE)


def check_combine(rows: list[Row | None], accumulate: bool) -> None:
    """Compare writes of g and d in one pass, in place, with the reference."""
    results, sizes = [], sizes_of(rows)
    for backend in (reference, ops):
        g, d = rows[0], rows[1]
        assert g is not None and g.offset is not None and d is not None and d.offset is not None
        g, d = Row(offset=[t.clone() for t in g.offset]), Row(offset=[t.clone() for t in d.offset])
        assert g.offset is not None and d.offset is not None
        writes = [
            Write(into=d.offset, coefficients=coefficients(len(sizes), len(rows), 1)),
            Write(into=g.offset, coefficients=coefficients(len(sizes), len(rows), 2), accumulate=accumulate),
        ]
        backend.combine_(Stack([g, d, *rows[2:]], sizes), writes)
        results.append([*g.offset, *d.offset])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=1e-5)


@CASES
def test_gram(shapes: list[tuple[int, ...]], sources: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check_gram(some_rows(shapes, sources, dtypes))


@CASES
@pytest.mark.parametrize("accumulate", [False, True])
def test_combine(
    shapes: list[tuple[int, ...]], sources: int, dtypes: tuple[torch.dtype, ...], accumulate: bool
) -> None:
    check_combine(some_rows(shapes, sources, dtypes), accumulate)


@pytest.mark.parametrize(("sizes", "sources"), [([2, 0, 3, 1], 1), ([2, 0, 3, 1], 6), ([0, 6, 0], 1)])
def test_several_scopes_in_one_launch(sizes: list[int], sources: int) -> None:
    shapes: list[tuple[int, ...]] = [(CHUNK + 1,), (0,), (600,), (), (2, 129), (1024,)]
    rows = Stack(some_rows(shapes, sources, (F32, BF16)), sizes)
    check_gram(rows)
    for accumulate in (False, True):
        check_combine(rows, accumulate)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_views_that_are_not_aligned(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(2049,), (3,)]
    for rows in (
        [Row(offset=unaligned(0, shapes, dtype)), Row(offset=tensors(1, shapes))],
        [Row(offset=unaligned(0, shapes, dtype)), Row(offset=unaligned(1, shapes))],
    ):
        check_gram([*rows])
        check_combine([*rows], accumulate=False)


def test_absent_rows_are_rows_of_zeros() -> None:
    first, second = tensors(0, SMALL), tensors(1, SMALL)
    rows = [None, Row(offset=first), None, Row(offset=second)]
    check_gram(rows)
    assert not ops.gram(rows)[0, 0].any()
    wanted = [2.0 * a - b for a, b in zip(first, second, strict=True)]
    weights = torch.tensor([[7.0, 2.0, float("inf"), -1.0]], dtype=torch.float64, device=DEVICE)
    ops.combine_(rows, [Write(into=first, coefficients=weights)])
    torch.testing.assert_close(first, wanted)


def test_what_is_written_need_be_no_row() -> None:
    first, target = tensors(0, SMALL), tensors(5, SMALL)
    ops.combine_([Row(offset=first)], [Write(into=target, coefficients=torch.tensor([[3.0]], device=DEVICE))])
    torch.testing.assert_close(target, [3.0 * t for t in first])


def test_an_update_is_corrected_where_it_was_made() -> None:
    """Test a row that is computed from the parameters that are written."""
    before, now, source = tensors(0, SMALL), tensors(1, SMALL), tensors(2, SMALL)
    wanted = [n + 0.5 * (n - b) - 2.0 * s for n, b, s in zip(now, before, source, strict=True)]
    weights = torch.tensor([[0.5, -2.0]], dtype=torch.float64, device=DEVICE)
    ops.combine_(
        [Row(at=now, anchor=before), Row(offset=source)], [Write(into=now, coefficients=weights, accumulate=True)]
    )
    torch.testing.assert_close(now, wanted)


@pytest.mark.parametrize("shape", [(1024,), (5,)], ids=["whole block", "part of one"])
def test_a_zero_coefficient_drops_its_row_whatever_it_holds(shape: tuple[int, ...]) -> None:
    bad, good = torch.full(shape, float("nan"), device=DEVICE), torch.ones(shape, device=DEVICE)
    weights = torch.tensor([[0.0, 2.0]], device=DEVICE)
    ops.combine_([Row(offset=[bad]), Row(offset=[good])], [Write(into=[good], coefficients=weights)])
    assert torch.equal(good, torch.full(shape, 2.0, device=DEVICE))


def test_writing_a_row_back_changes_no_bit() -> None:
    g = [torch.tensor([1e-45, -0.5, 3e38, -0.0], device=DEVICE), torch.randn(1024).to(DEVICE, BF16).float()]
    before = [t.clone() for t in g]
    rows: list[Row | None] = [Row(offset=g), Row(offset=[torch.full_like(t, 7.0) for t in g])]
    ops.combine_(rows, [Write(into=g, coefficients=torch.tensor([[1.0, 0.0]], device=DEVICE))])
    ops.combine_(rows, [Write(into=g, coefficients=torch.zeros(1, 2, device=DEVICE), accumulate=True)])
    for found, wanted in zip(g, before, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())


def test_scopes_in_which_nothing_is_written_are_left_alone() -> None:
    g = [torch.tensor([-0.0, 2.0], device=DEVICE), torch.tensor([-0.0, 2.0], device=DEVICE)]
    rows = Stack([Row(offset=g), Row(offset=[torch.ones_like(t) for t in g])], [1, 1])
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64, device=DEVICE)
    ops.combine_(rows, [Write(into=g, coefficients=weights)])
    assert g[0].signbit().tolist() == [True, False]
    assert [t.tolist() for t in g] == [[0.0, 2.0], [0.5, 1.5]]


def test_zeros_are_written_where_no_row_has_a_coefficient() -> None:
    g = [torch.tensor([-3.0, float("nan")], device=DEVICE)]
    ops.combine_([Row(offset=g)], [Write(into=g, coefficients=torch.zeros(1, 1, device=DEVICE))])
    assert g[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1023, 1030], ids=["first", "last of a block", "in the rest"])
def test_nan_and_inf_show_in_the_gram_matrix(bad: float, place: int) -> None:
    row = torch.ones(1031, device=DEVICE)
    row[place] = bad
    found = ops.gram([Row(offset=[row]), Row(offset=[torch.ones(1031, device=DEVICE)])])[0]
    assert not found[0].isfinite().any()
    assert found[1, 1] == 1031.0


def test_a_coefficient_beyond_float32_counts_as_its_largest_number() -> None:
    g = [torch.tensor([1e-30, 0.0], device=DEVICE)]
    ops.combine_([Row(offset=g)], [Write(into=g, coefficients=torch.tensor([[1e300]]).double().to(DEVICE))])
    expected = torch.tensor([1e-30 * torch.finfo(F32).max, 0.0], device=DEVICE)
    torch.testing.assert_close(g[0], expected)


@pytest.mark.parametrize("kind", ["not contiguous", "float64"])
def test_tensors_without_a_kernel_take_the_portable_backend(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 7, 11, dtype=torch.float64).to(DEVICE)
    if kind == "not contiguous":
        a, b = a.float(), b.float().T.contiguous()
        a = a.T
    rows: list[Row | None] = [Row(offset=[a]), Row(offset=[b])]
    check_gram(rows)
    expected = 2.0 * a + 0.5 * b
    weights = torch.tensor([[2.0, 0.5]], device=DEVICE)
    ops.combine_(rows, [Write(into=[a], coefficients=weights)])
    torch.testing.assert_close(a, expected)
    monkeypatch.setattr(foreach, "gram", lambda rows: "portable")
    assert ops.gram(rows) == "portable"


def test_rows_of_other_sizes_are_refused_before_memory_is_read() -> None:
    g, short = [torch.ones(1000, device=DEVICE)], [torch.ones(4, device=DEVICE)]
    weights = torch.ones(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="differ in size"):
        ops.gram([Row(offset=g), Row(offset=short)])
    with pytest.raises(ValueError, match="differ in size"):
        ops.combine_([Row(offset=g)], [Write(into=short, coefficients=weights)])
    with pytest.raises(ValueError, match=r"one coefficient for each of 1 scopes and 2 rows, found shape \(1, 1\)"):
        ops.combine_([Row(offset=g), Row(offset=g)], [Write(into=g, coefficients=weights)])
    assert short[0].tolist() == [1.0] * 4
