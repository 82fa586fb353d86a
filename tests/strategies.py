"""Hypothesis strategies for rows: random, parallel, opposite, zero, tiny and huge vectors."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from gradguide.rules.span import Span

__all__ = ["EXTREMES", "rows", "span_of"]

EXTREMES = (1e-30, 1e-8, 1.0, 1e8, 1e30)


@st.composite
def rows(draw: st.DrawFn, count: int, length: int = 12, scopes: int = 2) -> Tensor:
    """Draw float64 rows [scopes, count, length]: random, zero, or parallel or opposite to another row."""
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    result = torch.randn(scopes, count, length, generator=generator, dtype=torch.float64)
    for scope in range(scopes):
        for index in range(count):
            kind = draw(st.sampled_from(["random", "random", "random", "zero", "parallel", "opposite"]))
            if kind == "zero":
                result[scope, index] = 0.0
            elif kind != "random" and index > 0:
                sign = 1.0 if kind == "parallel" else -1.0
                result[scope, index] = sign * result[scope, draw(st.integers(0, index - 1))]
            result[scope, index] *= draw(st.sampled_from(EXTREMES))
    return result


def span_of(vectors: Tensor) -> Span:
    """Return the span of rows [S, R, n]."""
    return Span(vectors @ vectors.transpose(1, 2))
