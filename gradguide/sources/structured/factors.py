"""Symmetric positive semidefinite factors, low rank plus diagonal, and a sketch that estimates one in a single pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gradguide.ops.tensors import to_float64
from gradguide.utils.checks import check_range

__all__ = [
    "OVERSAMPLING",
    "Covariance",
    "Factor",
    "LayerFactors",
    "Product",
    "check_factors",
    "merged",
    "stacked",
    "weighted_sum",
]

OVERSAMPLING = 16
"""Columns of a sketch beyond twice its rank. The error of factors of rank 32, as a multiple of that of the best
approximation of that rank: at most 1.4 on matrices of a language model of width 576, and 1.5 to 1.8 for eigenvalues 1/k
of matrices of sizes 1,024 to 14,336; 1.2 for 1/sqrt(k). The diagonal stays exact."""


Product: TypeAlias = tuple[Tensor, Tensor]
"""A matrix as ([out, R], [R, in])."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A positive semidefinite matrix ``M = basis @ basis.T + diag(rest)``.

    Args:
        basis (Tensor): shape [..., n, rank].
        rest (Tensor): shape [..., n], at least 0.

    Optional leading dimensions stack the factors of several layers.
    """

    basis: Tensor
    rest: Tensor

    @property
    def size(self) -> int:
        """Number of rows of the matrix."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        """Number of columns of the basis."""
        return self.basis.shape[-1]

    def apply(self, rows: Tensor) -> Tensor:
        """Return ``rows @ M`` for rows [L, m, n], of a stack of L factors."""
        # bmm, since matmul makes about ten more calls for its broadcasting.
        low = torch.bmm(torch.bmm(rows, self.basis), self.basis.mT)
        return torch.addcmul(low, rows, self.rest.unsqueeze(1))

    def dense(self) -> Tensor:
        """Return the whole matrix: Tensor [..., n, n], float32."""
        basis = self.basis.float()
        return basis @ basis.mT + torch.diag_embed(self.rest.float())

    def trace(self) -> Tensor:
        """Return the trace, summed over leading dimensions: Tensor []."""
        return self.basis.float().square().sum() + self.rest.float().sum()

    def inner(self, other: Factor) -> float:
        """Return the Frobenius inner product with another factor, tr(M N), without forming either matrix.

        It is summed over leading dimensions.
        """
        u, v, p, q = (to_float64(part) for part in (self.basis, other.basis, self.rest, other.rest))
        low = (u.mT @ v).square().sum() + (q * u.square().sum(-1)).sum() + (p * v.square().sum(-1)).sum()
        return float(low + (p * q).sum())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factor:
        """Return the factor on another device or in another dtype."""
        return Factor(self.basis.to(device, dtype), self.rest.to(device, dtype))

    def flat(self) -> Factor:
        """Return a stack of stacks [K, L, ...] as one stack [K * L, ...]."""
        return Factor(self.basis.flatten(0, 1), self.rest.flatten(0, 1))

    def unstacked(self) -> list[Factor]:
        """Return the factors of a stack of L, as stacks of one."""
        return [Factor(basis[None], rest[None]) for basis, rest in zip(self.basis, self.rest, strict=True)]

    @staticmethod
    def of_matrix(matrix: Tensor, rank: int | None) -> Factor:
        """Return the best factor of rank ``rank`` for ``matrix`` [n, n], plus the remaining diagonal.

        ``rank=None`` keeps the whole matrix.
        """
        size = matrix.shape[0]
        kept = size if rank is None else min(rank, size)
        matrix = to_float64(matrix)
        values, vectors = torch.linalg.eigh(matrix)
        basis = vectors[:, -kept:].flip(1) * values[-kept:].flip(0).clamp(min=0.0).sqrt()
        rest = torch.zeros(size, dtype=torch.float64, device=matrix.device)
        if kept < size:
            rest = (matrix.diagonal() - basis.square().sum(1)).clamp(min=0.0)
        return Factor(basis.float(), rest.float())


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """The stored factors of one linear layer: K pairs of S and G, of which ``1/2 sum tr(D^T G D S)`` is the KL.

    inputs (Factor): S of each pair, from the layer's inputs: basis [K, in, rank], rest [K, in].
    outputs (Factor): G of each pair, from gradients of log p at the output: basis [K, out, rank], rest [K, out].
    scale (float): E|y|^2 of the layer's outputs y.
    anchor: the adapters' change of the weight at capture, as ([out, R], [R, in]); None for the base model.
    weight (Tensor): a sample of the weight at capture, see ``captured_weight``; None if it was quantised.
    """

    inputs: Factor
    outputs: Factor
    scale: float
    anchor: Product | None = None
    weight: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs of the layer."""
        return self.outputs.size, self.inputs.size

    @property
    def pairs(self) -> int:
        """The number K of pairs."""
        return self.inputs.rest.shape[0]


def check_factors(name: str, factors: LayerFactors) -> None:
    """Raise unless the factors of layer ``name`` have matching shapes and valid values.

    Raises:
        ValueError: a tensor has another shape or dtype, or is not finite; or a diagonal or the scale is negative.
    """
    for factor in (factors.inputs, factors.outputs):
        shapes = tuple(factor.basis.shape), tuple(factor.rest.shape)
        if len(shapes[0]) != 3 or shapes[0][:2] != shapes[1]:
            raise ValueError(
                f"the factors of {name} must be [K, n, rank] and [K, n], found {shapes[0]} and {shapes[1]}"
            )
    counts = factors.outputs.rest.shape[0], factors.inputs.rest.shape[0]
    if counts[0] != counts[1]:
        raise ValueError(f"{name} must have as many G as S, found {counts[0]} and {counts[1]}")
    sizes = factors.shape
    left, right = factors.anchor or (torch.empty(sizes[0], 0), torch.empty(0, sizes[1]))
    if (
        left.dim() != 2
        or right.dim() != 2
        or (*left.shape, *right.shape) != (sizes[0], len(right), len(right), sizes[1])
    ):
        raise ValueError(f"the anchor of {name} must be [{sizes[0]}, R] and [R, {sizes[1]}]")
    parts = [factors.inputs.basis, factors.inputs.rest, factors.outputs.basis, factors.outputs.rest, left, right]
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in parts):
        raise ValueError(f"the factors of {name} must be finite floating numbers, found NaN, Inf or another dtype")
    if bool((factors.inputs.rest < 0).any()) or bool((factors.outputs.rest < 0).any()):
        raise ValueError(f"the diagonal rest of {name} must be at least 0")
    check_range(f"the output scale of {name}", factors.scale, 0, float("inf"), open_high=True)
    if factors.weight is not None and not (factors.weight.is_floating_point() and factors.weight.dim() == 1):
        raise ValueError(f"the sample of the weight of {name} must be a list of floating numbers")


class Covariance:
    """A running estimate of ``sum_i w_i x_i x_i^T`` for vectors of one size and weights, in bounded memory.

    With a rank, it stores the diagonal and the product with a fixed random matrix of ``2 * rank + OVERSAMPLING``
    columns: ``n (2 rank + 17)`` float32 elements. :meth:`factor` computes the Nystrom approximation from that sketch,
    and truncates it to the rank (Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736, algorithm 3). The sketch is
    linear, so the sketches of several processes can be summed. Without a rank, or if the sketch would be as large as
    the matrix, it stores the whole matrix.

    Args:
        size (int): n, length of the vectors.
        rank (int | None): rank to keep; None for the whole matrix.
        device (torch.device): device of the sums, which are float32.
    """

    def __init__(self, size: int, rank: int | None, device: torch.device) -> None:
        self.size = size
        self.rank = rank
        columns = size if rank is None else min(size, 2 * rank + OVERSAMPLING)
        self._test = None if columns == size else _test_matrix(size, columns, device)
        self.sums = torch.zeros(size, columns, device=device)
        self.diagonal = torch.zeros(size, device=device)

    def add(self, rows: Tensor, squares: Tensor, weights: Tensor) -> None:
        """Add the weighted products of vectors, outside of autocast.

        Args:
            rows (Tensor): the vectors x_i, shape [m, n], float32.
            squares (Tensor): the square of each element, shape [m, n].
            weights (Tensor): a factor of each product, shape [m], at least 0.
        """
        projected = rows if self._test is None else rows @ self._test
        self.sums.addmm_(rows.T, projected * weights.unsqueeze(1))
        self.diagonal.addmv_(squares.T, weights)

    def factor(self, scale: float) -> Factor:
        """Return the factor of ``scale`` times the sum."""
        if self._test is None:
            return Factor.of_matrix(self.sums * scale, self.rank)
        assert self.rank is not None
        both = to_float64(torch.cat([self.sums, self._test], dim=1))
        weights = _nystrom_weights((both.T @ both).cpu(), scale, self.rank)
        basis = both @ weights.to(both.device)
        rest = (to_float64(self.diagonal) * scale - basis.square().sum(1)).clamp(min=0.0)
        return Factor(basis.float(), rest.float())


def _nystrom_weights(gram: Tensor, scale: float, rank: int) -> Tensor:
    """Return the matrix that turns a sketch and its test matrix into a basis of the Nystrom approximation.

    The sketch Y of the matrix is shifted by ``shift`` times the test matrix T, so that the small matrix ``T^T Y`` is
    positive definite. The shift has the size of rounding errors, and is subtracted from the eigenvalues. Decompositions
    of matrices of this size take milliseconds on the host, and longer on a GPU.

    Args:
        gram (Tensor): all inner products of [Y T], shape [2 k, 2 k], float64, on the host.
        scale (float): factor of the sketch.
        rank (int): number of eigenvalues to keep.

    Returns:
        Tensor [2 k, rank] on the host, float64.
    """
    k = len(gram) // 2
    products, core, tests = gram[:k, :k] * scale**2, gram[k:, :k] * scale, gram[k:, k:]
    shift = torch.finfo(torch.float32).eps * float(products.trace()) ** 0.5
    if shift == 0:
        return gram.new_zeros(2 * k, rank)
    core = (core + core.T) / 2
    values, vectors = torch.linalg.eigh(core + shift * tests)
    whiten = vectors * values.clamp(min=shift).rsqrt()
    values, vectors = torch.linalg.eigh(whiten.T @ (products + 2 * shift * core + shift**2 * tests) @ whiten)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = (1.0 - shift / values.clamp(min=shift)).sqrt()
    weights = whiten @ vectors * kept
    return torch.cat([scale * weights, shift * weights])


def stacked(factors: Sequence[Factor], dim: int = 0) -> Factor:
    """Stack factors of one size along a new dimension. Bases are padded with zeros to the largest rank."""
    rank = max(factor.rank for factor in factors)
    bases = [torch.nn.functional.pad(factor.basis, (0, rank - factor.rank)) for factor in factors]
    return Factor(torch.stack(bases, dim), torch.stack([factor.rest for factor in factors], dim))


def merged(factors: Sequence[Factor], weights: Sequence[float], rank: int | None) -> Factor:
    """Return the weighted sum of factors of one shape, truncated to ``rank`` (None keeps the sum of their ranks).

    The diagonal of the truncated part is added to the diagonal rest.
    """
    pairs = list(zip(factors, weights, strict=True))
    basis = torch.cat([to_float64(factor.basis) * weight**0.5 for factor, weight in pairs], dim=-1)
    rest = torch.stack([to_float64(factor.rest) * weight for factor, weight in pairs]).sum(0)
    if rank is None or basis.shape[-1] <= rank:
        return Factor(basis.float(), rest.float())
    vectors, values, _ = torch.linalg.svd(basis, full_matrices=False)
    kept = vectors[..., :rank] * values[..., None, :rank]
    lost = (basis.square().sum(-1) - kept.square().sum(-1)).clamp(min=0.0)
    return Factor(kept.float(), (rest + lost).float())


def weighted_sum(products: Sequence[tuple[Product, float]]) -> Product | None:
    """Return the weighted sum of products as one product; None for an empty sequence."""
    if not products:
        return None
    return torch.cat([left * w for (left, _), w in products], dim=1), torch.cat([right for (_, right), _ in products])


_test_matrices: WeakValueDictionary[tuple[int, int, torch.device], Tensor] = WeakValueDictionary()
"""Test matrices in use. All sketches of one size share one."""


def _test_matrix(size: int, columns: int, device: torch.device) -> Tensor:
    """Return a random matrix [size, columns], the same on every rank and in every capture."""
    found = _test_matrices.get((size, columns, device))
    if found is None:
        generator = torch.Generator().manual_seed(size)
        found = torch.randn(size, columns, generator=generator).to(device)
        _test_matrices[size, columns, device] = found
    return found
