"""Launch the kernels of the rules: the functions of ``gradguide.rules.decide`` on a device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gradguide.ops.triton.launch import FUSION, REGISTERS, numbers_of, on
from gradguide.rules.decide import SOURCES, Decision, Limit, Rules
from gradguide.rules.magnitude import FITTING
from gradguide.rules.span import Span
from gradguide.rules.triton.kernels.decision import constrain as constrain_kernel
from gradguide.rules.triton.kernels.decision import constrain_preview as constrain_preview_kernel
from gradguide.rules.triton.kernels.decision import decide as decide_kernel

__all__ = ["constrain", "constrain_preview", "decide"]

WARPS = 4

BLOCK = 256
"""Elements that a program checks at a time."""


def decide(
    span: Span,
    rules: Rules,
    statistics: Tensor,
    positions: Tensor,
    totals: Tensor,
    *,
    finite: Tensor | None = None,
    regularized: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """Return the decision of ``gradguide.rules.decide.decide``, to rounding. ``finite`` is ignored and recomputed."""
    gram = span.gram.contiguous()
    scopes, rows, _ = gram.shape
    direction, alignment, magnitude = rules.direction, rules.alignment, rules.magnitude
    weights = () if alignment is None else alignment.weights
    settings = numbers_of(gram.device, [
        0.0 if direction is None else direction.damping,
        0.0 if direction is None else direction.decay,
        0.0 if magnitude is None else magnitude.max_norm,
        FITTING * span.largest,
        *weights,
    ])  # fmt: skip
    clipped, turned, guided = (torch.empty_like(gram[:, 0]) for _ in range(3))
    numbers = _numbers(gram)
    go = torch.empty((), dtype=torch.float32, device=gram.device)
    decays, gains = (gram, gram) if rates is None else rates
    size = triton.next_power_of_2(rows)
    with on(gram.device):
        decide_kernel[(scopes,)](
            gram, statistics, positions, totals, settings, decays, gains, clipped, turned, guided, numbers, go, scopes,
            BLOCK=BLOCK, ROWS=rows, SIZE=size,
            SOURCE_COUNT=rules.source_count, REGULARIZED=regularized,
            DIRECTED=direction is not None, DAMPED=direction is not None and direction.damping > 0,
            SHARED=rates is not None, PULLED=any(weights),
            PROJECTED=rules.gradient_source_count,
            CLIPPED=magnitude is not None,
            num_warps=WARPS, maxnreg=REGISTERS, **FUSION,
        )  # fmt: skip
    guided_norm, clip_factor, coherence, damping = numbers
    return Decision(
        clipped=clipped,
        direction=turned,
        guided=guided,
        guided_norm=guided_norm,
        clip_factor=clip_factor,
        coherence=None if direction is None else coherence,
        damping=None if direction is None else damping,
        go=go,
    )


def constrain(span: Span, rules: Rules, numbers: Tensor) -> Limit:
    """Return the result of ``gradguide.rules.decide.constrain``, to rounding."""
    gram = span.gram.contiguous()
    coefficients, found = torch.empty_like(gram[:, 0]), _numbers(gram)
    with on(gram.device):
        constrain_kernel[(len(gram),)](
            gram, numbers, _bound(gram, rules), coefficients, found, len(gram), **_layout(rules)
        )  # fmt: skip
    scale, factor, norm_before, norm_after = found
    return Limit(scale, coefficients, factor, norm_before, norm_after)


def constrain_preview(step: Span, products: Tensor, rules: Rules, numbers: Tensor) -> Limit:
    """Return the result of ``gradguide.rules.decide.constrain_preview``, to rounding."""
    gram, products = step.gram.contiguous(), products.contiguous()
    pulls, found = torch.empty_like(gram[:, 0]), _numbers(gram)
    with on(gram.device):
        constrain_preview_kernel[(len(gram),)](
            gram, products, numbers, _bound(gram, rules), pulls, found, len(gram), STEP_ROWS=gram.shape[1],
            **_layout(rules),
        )  # fmt: skip
    scale, factor, norm_before, norm_after = found
    return Limit(scale, pulls if rules.update_source_count else None, factor, norm_before, norm_after)


def _numbers(gram: Tensor) -> Tensor:
    """Return memory for the four numbers that a kernel writes for each scope."""
    return torch.empty(4, len(gram), dtype=gram.dtype, device=gram.device)


def _bound(gram: Tensor, rules: Rules) -> Tensor:
    return numbers_of(gram.device, [0.0 if rules.max_update is None else rules.max_update])


def _layout(rules: Rules) -> dict[str, Any]:
    """Return the compile-time arguments and launch options of the kernels that constrain an update."""
    rows = SOURCES + rules.update_source_count
    size = triton.next_power_of_2(rows)
    return {
        "ROWS": rows, "SIZE": size, "SOURCE_COUNT": rules.update_source_count, "BOUNDED": rules.max_update is not None,
        "num_warps": WARPS, "maxnreg": REGISTERS, **FUSION,
    }  # fmt: skip
