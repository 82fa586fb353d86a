"""Decisions on a CUDA device: one launch each, in place of some dozens of small operations on Gram matrices."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gradguide.ops.triton.launch import FUSION, numbers_of, on
from gradguide.rules.decision import Decision, Rules
from gradguide.rules.span import Span
from gradguide.rules.triton.kernels.decision import decide as decide_kernel
from gradguide.rules.triton.kernels.decision import limit as limit_kernel
from gradguide.rules.triton.kernels.decision import limit_unmade as limit_unmade_kernel

__all__ = ["decide", "limit", "limit_unmade"]

WARPS = 4

BLOCK = 256
"""Numbers that a program looks through at a time."""


def decide(
    span: Span,
    rules: Rules,
    statistics: Tensor,
    positions: Tensor,
    totals: Tensor,
    *,
    finite: Tensor | None = None,
    propagate: bool = False,
    regularized: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """The decision of ``gradguide.rules.decision.decide``, to rounding; ``finite`` is found out anew."""
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
    go = torch.empty((), dtype=torch.float32, device=gram.device)
    decays, gains = (gram, gram) if rates is None else rates
    scaled = direction is not None and rules.power > 0
    with on(gram.device):
        decide_kernel[(scopes,)](
            gram, statistics, positions, totals, settings, decays, gains, gradient, turned, guided, numbers, go, scopes,
            PROPAGATE=propagate, BLOCK=BLOCK, ROWS=rows, SIZE=triton.next_power_of_2(rows),
            SOURCE_COUNT=rules.sources, REGULARIZED=regularized,
            DIRECTED=direction is not None, DAMPED=direction is not None and direction.damping > 0,
            SHARED=rates is not None, PULLED=any(weights),
            PROJECTED=rules.gradient_sources,
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
        scale=scale,
        go=go,
    )


def limit(span: Span, rules: Rules, scale: Tensor, numbers: Tensor) -> Tensor:
    """The update of ``gradguide.rules.decision.limit``, to rounding."""
    gram = span.gram.contiguous()
    wanted = torch.empty_like(gram[:, 0])
    with on(gram.device):
        limit_kernel[(len(gram),)](
            gram, scale, numbers, _bound(gram, rules), wanted, len(gram), **_layout(rules, gram.shape[1])
        )  # fmt: skip
    return wanted


def limit_unmade(
    step: Span, products: Tensor, rules: Rules, scale: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What ``gradguide.rules.decision.limit_unmade`` gives, to rounding."""
    gram, products = step.gram.contiguous(), products.contiguous()
    factor, pulls = torch.empty_like(gram[:, 0, 0]), torch.empty_like(gram[:, 0])
    rows = rules.first_source + rules.update_sources
    with on(gram.device):
        limit_unmade_kernel[(len(gram),)](
            gram, products, scale, numbers, _bound(gram, rules), factor, pulls, len(gram), STEP_ROWS=gram.shape[1],
            **_layout(rules, rows),
        )  # fmt: skip
    return factor, pulls if rules.update_sources else None


def _bound(gram: Tensor, rules: Rules) -> Tensor:
    return numbers_of(gram.device, [0.0 if rules.max_update is None else rules.max_update])


def _layout(rules: Rules, rows: int) -> dict[str, Any]:
    """What kernels that limit an update with so many rows in its span are specialised on."""
    return {
        "ROWS": rows, "SIZE": max(triton.next_power_of_2(rows), 2),
        "SOURCE_COUNT": rules.update_sources, "BOUNDED": rules.bounds_update, "BLOCK": BLOCK,
        "num_warps": WARPS, **FUSION,
    }  # fmt: skip
