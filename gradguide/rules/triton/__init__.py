"""Decisions on a CUDA device: one launch each, in place of some dozens of small operations on Gram matrices."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradguide.ops.triton.launch import FUSION, numbers_of, on
from gradguide.rules.decision import SOURCES, STATISTICS, Decision, Rules
from gradguide.rules.span import Span
from gradguide.rules.triton.kernels.decision import decide as decide_kernel
from gradguide.rules.triton.kernels.decision import limit as limit_kernel

__all__ = ["decide", "limit"]

WARPS = 4


def decide(
    span: Span,
    finite: Tensor,
    rules: Rules,
    statistics: Tensor,
    *,
    regularized: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """The decision of ``gradguide.rules.decision.decide``, to rounding."""
    gram = span.gram.contiguous()
    scopes, rows, _ = gram.shape
    direction, alignment, magnitude = rules.direction, rules.alignment, rules.magnitude
    weights = () if alignment is None else alignment.weights
    settings = numbers_of(gram.device, [
        0.0 if direction is None else direction.damping,
        0.0 if direction is None else direction.decay,
        0.0 if magnitude is None else magnitude.bound,
        rules.power,
        *weights,
    ])  # fmt: skip
    gradient, turned, guided = (torch.empty_like(gram[:, 0]) for _ in range(3))
    numbers = torch.empty(4, scopes, dtype=gram.dtype, device=gram.device)
    remembered = torch.empty(scopes, len(STATISTICS), dtype=gram.dtype, device=gram.device)
    decays, gains = (gram, gram) if rates is None else rates
    scaled = direction is not None and rules.power > 0
    with on(gram.device):
        decide_kernel[(scopes,)](
            gram, finite, statistics, settings, decays, gains, gradient, turned, guided, numbers, remembered, scopes,
            ROWS=rows, SIZE=triton.next_power_of_2(rows), SOURCE_COUNT=rules.sources, REGULARIZED=regularized,
            DIRECTED=direction is not None, DAMPED=direction is not None and direction.damping > 0,
            SHARED=rates is not None, PULLED=any(weights),
            PROJECTED=alignment is not None and alignment.project and alignment.on == "gradient",
            CLIPPED=magnitude is not None, ADAPTIVE=magnitude is not None and magnitude.adaptive, SCALED=scaled,
            num_warps=WARPS, **FUSION,
        )  # fmt: skip
    norm, factor, coherence, scale = numbers
    return Decision(
        gradient=gradient,
        direction=turned,
        guided=guided,
        norm=norm,
        factor=factor,
        coherence=None if direction is None else coherence,
        scale=scale if scaled else None,
        statistics=remembered,
    )


def limit(span: Span, rules: Rules, scale: Tensor | None, numbers: Tensor) -> Tensor:
    """The update of ``gradguide.rules.decision.limit``, to rounding."""
    gram = span.gram.contiguous()
    scopes, rows, _ = gram.shape
    wanted = torch.empty_like(gram[:, 0])
    bound = 0.0 if rules.max_update is None else rules.max_update
    with on(gram.device):
        limit_kernel[(scopes,)](
            gram, gram.isfinite().all(), gram if scale is None else scale, numbers, numbers_of(gram.device, [bound]),
            wanted, ROWS=rows, SIZE=max(triton.next_power_of_2(rows), SOURCES),
            SOURCE_COUNT=rules.sources if rules.aligns_update else 0, SCALED=scale is not None,
            BOUNDED=rules.bounds_update, num_warps=WARPS, **FUSION,
        )  # fmt: skip
    return wanted
