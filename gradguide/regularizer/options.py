"""Options of the regularizer, and the derivative of its terms with respect to the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradguide.rules.decide import DIRECTION, GRADIENT
from gradguide.rules.span import Span, divide
from gradguide.sources.protocol import Source, sources_of
from gradguide.utils.checks import check_range, check_steps

__all__ = ["Regularizer", "derivative"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularizer:
    """Add terms on the gradient to the loss, instead of changing the gradient afterwards.

    The objective is ``L + R`` with ``R(g) = direction * (1 - cos(g, d)) + magnitude * |g|^2 + alignment * sum_k (1 -
    cos(g, s_k))``, where g is the gradient of L, d the running direction before the step and s_k the source gradients
    at the current parameters; d and s_k are constants. The gradient of the objective is ``g + H v``, where H is the
    Hessian of L and ``v = dR/dg`` a combination of g, d and s_k. With several scopes R is the sum over scopes.

    It needs ``step(closure)`` with a usual closure: clear the gradients, call backward, return the loss. The closure
    must use the same batch on every call. ``H v`` is the difference quotient of the gradients at the parameters and at
    parameters perturbed along v, which costs one more forward and backward pass. Its error is about 1e-8 with float64
    parameters, 1e-3 with float32, and up to a third with bfloat16, whose resolution is too coarse for a small
    perturbation. :func:`gradguide.guided_loss` has no such error, but differentiates twice.

    The second evaluation leaves parameters, gradients, buffers and torch's random state as after the first. Gradients
    of other optimizers' parameters are kept if the closure returns the loss with its graph, or if GradGuide has
    ``names=model``. Buffers of a compiled model, such as BatchNorm's statistics, are kept only with ``names=model``.

    Source: the terms of the abstract of arXiv 2506.00726; the difference quotient for ``H v`` is that of arXiv
    2202.03599 (penalising gradient norm), section 3.

    Args:
        direction, magnitude, alignment (float): weights of the three terms, at least 0, not all 0. ``direction`` needs
            a GradGuide with a direction. ``alignment`` needs a source.
        source: one source or several, for the alignment term.
        warmup (int): steps over which the weights grow linearly to their value, at least 0. Gradient penalties from
            the first step destabilize Adam, whose second moments are still small then (arXiv 2406.09723).

    Raises:
        ValueError, TypeError: an option is out of range, or a weight lacks its source.
    """

    direction: float = 0.0
    magnitude: float = 0.0
    alignment: float = 0.0
    source: Source | Sequence[Source] | None = None
    warmup: int = 10
    sources: tuple[Source, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("direction", "magnitude", "alignment"):
            check_range(name, getattr(self, name), 0, float("inf"), open_high=True)
        if not (self.direction or self.magnitude or self.alignment):
            raise ValueError("Regularizer needs a weight above 0, found none; leave regularizer=None to disable it")
        object.__setattr__(self, "sources", () if self.source is None else sources_of(self.source))
        if self.alignment > 0 and not self.sources:
            raise ValueError(f"Regularizer(alignment={self.alignment}) needs a source, found none")
        if self.sources and not self.alignment:
            raise ValueError("Regularizer(source=...) needs alignment above 0, found 0")
        check_steps("warmup", self.warmup)
        check_range("warmup", self.warmup, 0, float("inf"), open_high=True)


def derivative(span: Span, regularizer: Regularizer) -> Tensor:
    """Return ``v = dR/dg`` for each scope.

    Args:
        span: rows of gradient, direction, the regularizer's sources, and others. A row of norm 0 adds no term.
        regularizer: weights of the terms.

    Returns:
        Tensor [S, R]: coordinates of v.
    """
    v = torch.zeros_like(span.lengths)
    v[:, GRADIENT] += 2.0 * regularizer.magnitude
    weights = [regularizer.direction, *([regularizer.alignment] * len(regularizer.sources))]
    length = span.lengths[:, GRADIENT]
    for row, weight in enumerate(weights, DIRECTION):
        if weight > 0:
            # d cos(g, d) / dg = d / (|g| |d|) - cos(g, d) g / |g|^2
            one_over = divide(torch.ones_like(length), length * span.lengths[:, row])
            cosine = span.gram[:, GRADIENT, row] * one_over
            v[:, row] -= weight * one_over
            v[:, GRADIENT] += weight * divide(cosine, length.square())
    return v
