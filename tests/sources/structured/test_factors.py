"""Compare factors (low rank plus diagonal) with dense matrices."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.factors import Covariance, Factor, LayerFactors, merged, stacked

sizes = st.integers(2, 40)
seeds = st.integers(0, 2**31 - 1)


def vectors(rows: int, size: int, seed: int, decay: float = 1.0) -> Tensor:
    """Return random vectors whose covariance spectrum decays by the factor ``decay``."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    scales = torch.logspace(0, size - 1, size, base=decay)
    drawn: Tensor = torch.randn(rows, size, generator=generator) * scales @ basis.T
    return drawn


def add(sums: Covariance, rows: Tensor) -> None:
    sums.add(rows, rows.square(), torch.ones(len(rows)))


@given(sizes, seeds)
@settings(max_examples=40)
def test_a_whole_covariance_is_exact(size: int, seed: int) -> None:
    rows = vectors(64, size, seed)
    sums = Covariance(size, None, rows.device)
    add(sums, rows[:20])
    add(sums, rows[20:])
    torch.testing.assert_close(sums.factor(1 / 64).dense(), rows.T @ rows / 64, rtol=1e-4, atol=1e-4)


@given(st.integers(60, 120), seeds, st.sampled_from([2, 8, 16]))
@settings(max_examples=25)
def test_a_sketch_is_near_the_best_approximation_and_keeps_the_diagonal(size: int, seed: int, rank: int) -> None:
    rows = vectors(300, size, seed, decay=0.9)
    exact = rows.T @ rows / len(rows)
    sums = Covariance(size, rank, rows.device)
    for part in rows.split(70):
        add(sums, part)
    found = sums.factor(1 / len(rows))
    assert found.rank == rank
    best = float(torch.linalg.eigvalsh(exact)[:-rank].square().sum().sqrt())
    low = found.basis @ found.basis.T
    assert float((exact - low).norm()) <= 2.0 * best + 1e-4
    torch.testing.assert_close(found.dense().diagonal(), exact.diagonal(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("power", "most"), [(1.0, 1.55), (0.5, 1.22)])
def test_the_error_of_a_sketch_with_slowly_falling_eigenvalues(power: float, most: float) -> None:
    """A test matrix has no preferred direction, so that eigenvectors may be unit vectors."""
    values = torch.arange(1.0, 1025.0) ** -power
    sums = Covariance(1024, 32, values.device)
    add(sums, values.sqrt().diag())
    basis = sums.factor(1.0).basis
    error = (values.diag() - basis @ basis.T).norm()
    assert basis.shape == (1024, 32)
    assert float(error) <= most * float(values[32:].norm())


@given(sizes, seeds)
@settings(max_examples=40)
def test_apply_is_the_product_with_the_dense_matrix(size: int, seed: int) -> None:
    rows = vectors(30, size, seed)
    factor = stacked([Factor.of_matrix(rows.T @ rows, max(1, size // 3))])
    other = vectors(5, size, seed + 1)[None]
    torch.testing.assert_close(factor.apply(other), other @ factor.dense(), rtol=1e-4, atol=1e-3)


def test_fewer_vectors_than_the_rank_are_kept_whole() -> None:
    rows = vectors(3, 100, 0)
    sums = Covariance(100, 16, rows.device)
    add(sums, rows)
    torch.testing.assert_close(sums.factor(1.0).dense(), rows.T @ rows, rtol=1e-3, atol=1e-3)


def test_sketches_of_one_size_share_a_test_matrix_while_they_live() -> None:
    one, other, wider = (Covariance(100, rank, torch.device("cpu")) for rank in (16, 16, 17))
    assert one._test is not None
    assert one._test is other._test
    assert one._test is not wider._test
    kept = weakref.ref(one._test)
    del one, other
    assert kept() is None


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_scale_of_a_factor_may_be_extreme(scale: float) -> None:
    rows = vectors(60, 90, 3, decay=0.8)
    sums = Covariance(90, 8, rows.device)
    add(sums, rows)
    torch.testing.assert_close(sums.factor(scale).dense() / scale, sums.factor(1.0).dense(), rtol=1e-4, atol=1e-5)


def test_no_vector_gives_zero() -> None:
    found = Covariance(100, 16, torch.device("cpu")).factor(1.0)
    assert not found.dense().any()


def test_sketches_add_up_over_ranks() -> None:
    rows = vectors(40, 90, 5)
    whole, parts = Covariance(90, 8, rows.device), [Covariance(90, 8, rows.device) for _ in range(2)]
    add(whole, rows)
    for part, own in zip(parts, rows.split(20), strict=True):
        add(part, own)
    parts[0].sums += parts[1].sums
    parts[0].diagonal += parts[1].diagonal
    torch.testing.assert_close(parts[0].factor(1.0).dense(), whole.factor(1.0).dense(), rtol=1e-3, atol=1e-3)


def test_stacked_factors_of_several_ranks_apply_alike() -> None:
    factors = [Factor.of_matrix(torch.diag(torch.arange(1.0, 7.0)), rank) for rank in (1, 3)]
    rows = torch.randn(2, 4, 6)
    found = stacked(factors).apply(rows)
    for one, factor, own in zip(found, factors, rows, strict=True):
        torch.testing.assert_close(one, own @ factor.dense())


@pytest.mark.parametrize("rank", [2, None])
def test_merging_keeps_the_trace(rank: int | None) -> None:
    factors = [Factor.of_matrix(torch.diag(torch.rand(8) + 0.1), 2) for _ in range(3)]
    found = merged(factors, [0.2, 0.3, 0.5], rank)
    wanted = sum(w * factor.trace() for w, factor in zip([0.2, 0.3, 0.5], factors, strict=True))
    torch.testing.assert_close(found.trace(), wanted)
    dense = sum(w * factor.dense() for w, factor in zip([0.2, 0.3, 0.5], factors, strict=True))
    if rank is None:
        torch.testing.assert_close(found.dense(), dense)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_a_merged_source_has_the_sum_of_g_and_means_of_the_rest(weights: list[float] | None) -> None:
    """A layer that one source has counts with its weight alone. The largest rank is kept."""
    generator = torch.Generator().manual_seed(0)

    def layer(scale: float, low: int = 4) -> LayerFactors:
        inputs, outputs = (
            Factor(torch.randn(2, n, min(n, low), generator=generator), torch.rand(2, n, generator=generator))
            for n in (3, 4)
        )
        anchor = torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator)
        return LayerFactors(inputs, outputs, scale, anchor)

    one, two, own = layer(1.0, low=1), layer(5.0), layer(7.0)
    source = StructuredSource.merge(
        [StructuredSource({"both": one}), StructuredSource({"both": two, "own": own})], weights
    )
    for name, held in (("both", (one, two)), ("own", (own,))):
        given = (weights or [0.5, 0.5])[-len(held) :]
        means = [weight / sum(given) for weight in given]
        found = source._layers[name]
        s, g = source.factors(name)
        assert found.anchor is not None
        torch.testing.assert_close(s, sum(w * each.inputs.dense() for w, each in zip(means, held, strict=True)))
        torch.testing.assert_close(g, sum(w * each.outputs.dense() for w, each in zip(given, held, strict=True)))
        assert found.scale == pytest.approx(sum(w * each.scale for w, each in zip(means, held, strict=True)))
        anchors = [each.anchor[0] @ each.anchor[1] for each in held if each.anchor is not None]
        wanted = sum(w * anchor for w, anchor in zip(means, anchors, strict=True))
        torch.testing.assert_close(found.anchor[0] @ found.anchor[1], wanted)
