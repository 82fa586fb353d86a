"""Evaluating the exact objective: the gradient of the loss, and what a term on that gradient adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.distributed.layouts import local, several_ranks
from gradguide.ops import Row, Stack, Write
from gradguide.ops.pack import allocate_contiguous
from gradguide.regularizer.options import Regularizer, slope
from gradguide.rules.decide import DIRECTION, GRADIENT, SOURCES
from gradguide.rules.span import Span, divide
from gradguide.sources.side_effects import Randomness, buffers_kept, gradients_kept
from gradguide.step.engine import Engine
from gradguide.step.plan import Rows, StepPlan
from gradguide.step.planner import trained_by
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["evaluate"]

NEEDS_CLOSURE = (
    "a regularizer evaluates the loss itself, found step() without a closure; call step(closure). GradScaler and "
    "Trainer pass none: train in bfloat16 autocast, which needs no scaler, in a loop of your own"
)


@dataclass(frozen=True, slots=True)
class Slope:
    """Where a regularizer wants the gradient to go, for the parameters of a step.

    rows: for each bucket gradient, direction, the regularizer's sources, and the parameters themselves.
    span: Gram matrices of the rows, [S, R, R].
    v (Tensor): coordinates [S, R] of dR/dg.
    signed: rows with the sign of their bucket, see ``StepPlan.signs``.

    In a group that maximizes, R is a function of the negative gradient. With v in coordinates of the gradient as
    received, the gradient of R is ``H v`` either way, and the step descends it: the gradient as received becomes
    ``g + sign * H v``.
    """

    plan: StepPlan
    rows: Rows
    span: Span
    v: Tensor
    signed: slice


def evaluate(
    closure: Callable[[], Any] | None, base: Optimizer, engine: Engine, regularizer: Regularizer, steps: Tensor
) -> tuple[Any, dict[Tensor, Tensor]]:
    """Leave the gradient of the loss in ``p.grad``, and give what the regularizer adds to it.

    Args:
        closure: see ``Regularizer.hessian``.
        steps (Tensor): 0-d, steps made before this one.

    Returns:
        What the closure returned at first, and ``sign * H v`` by parameter (this rank's part of it).

    Raises:
        RuntimeError: there is no closure, or it does not do what ``Regularizer.hessian`` asks. Parameters, buffers and
            gradients are then as they were before, or, after the first evaluation, as it left them.
    """
    if closure is None:
        raise RuntimeError(NEEDS_CLOSURE)
    rise = torch.ones_like(steps)
    if regularizer.warmup:
        rise = ((steps + 1.0) / regularizer.warmup).clamp(max=1.0)
    how = _difference if regularizer.hessian == "finite-difference" else _exact
    return how(closure, base, engine, regularizer, rise)


def _difference(
    closure: Callable[[], Any], base: Optimizer, engine: Engine, regularizer: Regularizer, rise: Tensor
) -> tuple[Any, dict[Tensor, Tensor]]:
    """``(g(theta + e v) - g(theta)) / e``, both under the same randomness."""
    parameters = trained_by(base)
    start = Randomness(parameters)
    with torch.enable_grad():
        loss = closure()
    slope = _slope(base, engine, regularizer, rise)
    if slope is None:
        return loss, {}
    end = Randomness(parameters)
    copies = slope.plan.snapshot()
    try:
        inverse = _move(slope)
        with gradients_kept(parameters) as first, buffers_kept(), torch.enable_grad():
            start.restore()
            closure()
            products = _quotients(slope, first, inverse)
    finally:
        with torch.no_grad():
            for bucket, copy in zip(slope.plan.buckets, copies, strict=True):
                torch._foreach_copy_(bucket.values, copy)
        end.restore()
    return loss, products


@torch.no_grad()
def _quotients(slope: Slope, first: Mapping[Tensor, Tensor], inverse: Tensor) -> dict[Tensor, Tensor]:
    """Differences first, and only then the division: what both gradients share cancels without rounding."""
    parameters = [p for bucket in slope.plan.buckets for p in bucket.parameters]
    if parameters and all(p.grad is None for p in parameters):
        raise RuntimeError(
            "the closure gave no gradient when it was evaluated a second time; it must clear the gradients, compute "
            "the loss, call backward and return the loss each time"
        )
    found: dict[Tensor, Tensor] = {}
    for bucket in slope.plan.buckets:
        before = [first[p] for p in bucket.parameters]
        # A parameter that the second evaluation did not use has no difference to tell.
        pairs = zip(bucket.parameters, before, strict=True)
        changed = allocate_contiguous(before)
        torch._foreach_copy_(changed, [old if p.grad is None else local(p.grad) for p, old in pairs])
        torch._foreach_sub_(changed, before)
        torch._foreach_mul_(changed, inverse * bucket.sign)
        found.update(zip(bucket.parameters, changed, strict=True))
    return found


def _exact(
    closure: Callable[[], Any], base: Optimizer, engine: Engine, regularizer: Regularizer, rise: Tensor
) -> tuple[Any, dict[Tensor, Tensor]]:
    """The gradient of ``g . v`` with v held fixed."""
    if several_ranks():
        raise RuntimeError(
            "hessian='exact' works in one process, since wrappers average gradients only in an ordinary backward pass; "
            "use hessian='finite-difference'"
        )
    parameters = trained_by(base)
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a {type(loss).__name__}" if not isinstance(loss, Tensor) else f"shape {tuple(loss.shape)}"
        detached = ", detached from its graph" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise RuntimeError(
            f"with hessian='exact' the closure returns the loss, a scalar with its graph, found {found}{detached}"
        )
    before = {p: p.grad for p in parameters}
    try:
        gradients = _differentiated(loss, parameters, create_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # A copy: autograd may give two parameters the same tensor, and this one will be written to.
            parameter.grad = None if gradient is None else gradient.detach().clone()
        slope = _slope(base, engine, regularizer, rise)
        if slope is None:
            return loss.detach(), {}
        toward = _vector(slope)
        signs = {p: bucket.sign for bucket in slope.plan.buckets for p in bucket.parameters}
        curved = [
            (g, toward[p])
            for p, g in zip(parameters, gradients, strict=True)
            if g is not None and p in toward and g.requires_grad
        ]
        products: Sequence[Tensor | None] = [None] * len(parameters)
        if curved:
            outputs, vectors = zip(*curved, strict=True)
            products = _differentiated(outputs, parameters, grad_outputs=vectors)
    except RuntimeError:
        for parameter, old in before.items():
            parameter.grad = old
        raise
    return loss.detach(), {
        p: torch.zeros_like(toward[p]) if product is None else product.contiguous() * signs[p]
        for p, product in zip(parameters, products, strict=True)
        if p in toward
    }


def _differentiated(outputs: Any, parameters: Sequence[Tensor], **options: Any) -> Sequence[Tensor | None]:
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(outputs, parameters, allow_unused=True, **options)
    except RuntimeError as error:
        text = str(error)
        if "second time" in text:
            raise RuntimeError(
                "with hessian='exact' the closure must leave the backward pass to GradGuide, found a loss whose graph "
                "is used up"
            ) from error
        if "not implemented" in text or "not differentiable" in text or "once_differentiable" in text:
            raise RuntimeError(
                f"an operation of the model cannot be differentiated twice ({text.splitlines()[0]}); use "
                "hessian='finite-difference', or load the model with attn_implementation='eager'"
            ) from error
        raise
    return found


@torch.no_grad()
def _slope(base: Optimizer, engine: Engine, regularizer: Regularizer, rise: Tensor) -> Slope | None:
    """What the regularizer, its weights times ``rise`` (Tensor []), makes of the gradients that are there."""
    plan = engine.planner.plan(base)
    if plan is None:
        return None
    sources = plan.sources[len(plan.sources) - len(regularizer.sources) :]
    rows: Rows = [
        Stack(
            [
                Row(offset=bucket.gradients),
                engine.direction_row(plan, base, index) if regularizer.direction else None,
                *plan.source_rows(sources, bucket, bucket.values, "regularizer"),
                Row(offset=bucket.values),
            ],
            bucket.sizes,
        )
        for index, bucket in enumerate(plan.buckets)
    ]
    signed = engine.signed(len(sources))
    span = plan.gram(rows, SOURCES + len(sources) + 1, signed)
    v = slope(span, regularizer, GRADIENT, DIRECTION, range(SOURCES, SOURCES + len(sources)))
    return Slope(plan, rows, span, v * rise.to(v), signed)


@torch.no_grad()
def _move(slope: Slope) -> Tensor:
    """Move the parameters to ``theta + e v``: Tensor [], one over e, 0 where v is zero.

    One e for all scopes: the curvature between them counts too.

    The move is the square root of the precision's epsilon relative to the length of the parameters: there the error of
    the quotient, which grows with e, meets that of rounding, which grows with 1 / e. Parameters count as at least as
    long as the bound on the update takes them to be, so that LoRA's B moves when it starts at zero.
    """
    plan = slope.plan
    length = torch.maximum(slope.span.norm(slope.span.row(-1)), LEAST_LENGTH * plan.numbers().sqrt())
    epsilon = max((torch.finfo(v.dtype).eps for bucket in plan.buckets for v in bucket.values), default=0.0) ** 0.5
    step = divide(epsilon * torch.linalg.vector_norm(length), torch.linalg.vector_norm(slope.span.norm(slope.v)))
    moves = [[Write(into=bucket.values, coefficients=step * slope.v, accumulate=True)] for bucket in plan.buckets]
    plan.combine_(slope.rows, moves, slope.signed)
    return divide(torch.ones_like(step), step)


@torch.no_grad()
def _vector(slope: Slope) -> dict[Tensor, Tensor]:
    """v itself, by parameter."""
    made = [allocate_contiguous(bucket.gradients) for bucket in slope.plan.buckets]
    writes = [[Write(into=into, coefficients=slope.v)] for into in made]
    slope.plan.combine_(slope.rows, writes, slope.signed)
    pairs = zip(slope.plan.buckets, made, strict=True)
    return {p: tensor for bucket, into in pairs for p, tensor in zip(bucket.parameters, into, strict=True)}
