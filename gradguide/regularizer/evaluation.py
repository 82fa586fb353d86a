"""Evaluate the exact objective: the gradient of the loss, and the gradient of the regularizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import is_step_on_zeros
from gradguide.distributed.layouts import local, reduce_partial
from gradguide.ops import Row, Stack, Write
from gradguide.ops.allocate import allocate_contiguous
from gradguide.ops.tensors import TensorList
from gradguide.regularizer.options import Regularizer, derivative
from gradguide.rules.decide import SOURCES
from gradguide.rules.span import Span, divide
from gradguide.sources.side_effects import RandomState, leaves, preserve_buffers, preserve_gradients
from gradguide.step.engine import Engine
from gradguide.step.plan import Rows, StepPlan
from gradguide.step.planner import all_parameters, trainable_parameters
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["evaluate"]

NEEDS_CLOSURE = (
    "a regularizer evaluates the loss itself, found step() without a closure; call step(closure). GradScaler and "
    "Trainer pass none: train in bfloat16 autocast, which needs no scaler, in a loop of your own"
)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """The derivative v = dR/dg of a regularizer, along which the parameters of a step are perturbed.

    rows: per bucket the gradient, the direction, the regularizer's sources, and the parameters.
    span: Gram matrices of the rows, [S, R, R].
    v (Tensor): coordinates [S, R] of dR/dg.
    signed: rows multiplied by the sign of their bucket, see ``StepPlan.signs``.

    In a group that maximizes, R is a function of the negative gradient. With v in coordinates of the gradient as
    received, the gradient of R is ``H v`` for both signs. The step descends it, so the gradient as received becomes
    ``g + sign * H v``.
    """

    plan: StepPlan
    rows: Rows
    span: Span
    v: Tensor
    signed: slice


def evaluate(
    closure: Callable[[], Any] | None, base: Optimizer, engine: Engine, regularizer: Regularizer, steps: Tensor
) -> tuple[Any, dict[Tensor, Tensor] | None]:
    """Store the gradient of the loss in ``p.grad`` and return the regularizer's gradient.

    Args:
        closure: see ``Regularizer``. It is evaluated twice, with the same random state.
        steps (Tensor): 0-d, number of earlier steps.

    Returns:
        The result of the first closure call, and ``sign * H v`` by parameter (this rank's shard), with ``H v = (g(theta
        + e v) - g(theta)) / e``. Both None for the step on zeros of a checkpoint loader, which has no closure.

    Raises:
        RuntimeError: the closure is missing, does not clear the gradients, or gives none the second time. Parameters,
            buffers and gradients are then those before the call, or those after the first evaluation.
    """
    if closure is None and is_step_on_zeros(base):
        return None, None
    if closure is None:
        raise RuntimeError(NEEDS_CLOSURE)
    warmup_factor = torch.ones_like(steps)
    if regularizer.warmup:
        warmup_factor = ((steps + 1.0) / regularizer.warmup).clamp(max=1.0)
    parameters = trainable_parameters(base)
    start = RandomState(parameters)
    earlier = _gradients_before(parameters)
    with torch.enable_grad():
        loss = closure()
    earlier = [each for each in earlier if each.parameter.grad is each.gradient()]
    perturbation = _measure(base, engine, regularizer, warmup_factor)
    if perturbation is None:
        return loss, {}
    end = RandomState(parameters)
    copies = perturbation.plan.snapshot()
    try:
        inverse_step = _perturb(perturbation, copies)
        torch.clear_autocast_cache()  # an outer autocast keeps casts of the parameters before the change
        reached, models = _reached(loss, base, engine), engine.planner.name_lookup.models()
        with preserve_gradients(reached) as first, preserve_buffers(models), torch.enable_grad():
            start.restore()
            marks = _mark(earlier)
            closure()
            _check_cleared(marks)
            products = _difference_quotients(perturbation.plan, first, inverse_step)
    finally:
        with torch.no_grad():
            for bucket, copy in zip(perturbation.plan.buckets, copies, strict=True):
                torch._foreach_copy_(bucket.values, copy)
        torch.clear_autocast_cache()
        end.restore()
    return loss, products


class _Earlier(NamedTuple):
    """A gradient from before the closure, and the norm of its local part: Tensor []."""

    parameter: Tensor
    gradient: ref[Tensor]  # no strong reference: a closure that clears it frees its memory
    norm: Tensor


class _Mark(NamedTuple):
    """A tensor in place of an earlier gradient, for the second evaluation. ``version`` is that of its local part."""

    parameter: Tensor
    tensor: Tensor
    version: int


@torch.no_grad()
def _gradients_before(parameters: Sequence[Tensor]) -> list[_Earlier]:
    there = [(p, g, local(g)) for p in parameters if (g := p.grad) is not None and g.layout == torch.strided]
    there = [each for each in there if each[2].numel()]
    norms = torch._foreach_norm([part for _, _, part in there]) if there else ()
    return [_Earlier(p, ref(g), norm) for (p, g, _), norm in zip(there, norms, strict=True)]


@torch.no_grad()
def _mark(earlier: Sequence[_Earlier]) -> list[_Mark]:
    """Set ``p.grad`` to a large constant where the closure may add to an earlier gradient that is not zero.

    Args:
        earlier: gradients that are the same tensors after the closure. They may have been cleared in place.
    """
    if not earlier:
        return []
    norms = torch.stack([each.norm.float().to(earlier[0].norm.device) for each in earlier]).tolist()
    marks = []
    for each, norm in zip(earlier, norms, strict=True):
        if norm > 0 and (gradient := each.gradient()) is not None:
            mark = each.parameter.grad = torch.full_like(gradient, torch.finfo(gradient.dtype).max / 4)
            marks.append(_Mark(each.parameter, mark, local(mark)._version))
    return marks


@torch.no_grad()
def _check_cleared(marks: Sequence[_Mark]) -> None:
    """Raise RuntimeError if the closure added to a mark, so to earlier gradients, which only the first evaluation has.

    A mark that the closure did not touch is removed.
    """
    found = []
    for parameter, mark, version in marks:
        if parameter.grad is mark and local(mark)._version == version:
            parameter.grad = None
        elif parameter.grad is not None:
            part = local(parameter.grad)
            found.append((part[(0,) * part.dim()] / torch.finfo(part.dtype).max).float())
    if not found:
        return
    shares = torch.stack([share.to(found[0].device) for share in found])
    if bool(((shares > 0.125) & shares.isfinite()).any()):
        raise RuntimeError(
            "the closure adds to gradients from before it, which the second evaluation lacks. Call zero_grad() in "
            "the closure, and make all backward passes of a step in it: no accumulation over several closures"
        )


def _reached(loss: Any, base: Optimizer, engine: Engine) -> list[Tensor]:
    """Return the tensors whose gradients the closure may change, also those of other optimizers.

    A graph does not contain the parameters inside a reentrant checkpoint, so those of the named models are added.
    """
    found = all_parameters(base)
    found += engine.planner.name_lookup.reachable().values()
    found += leaves(loss) if isinstance(loss, Tensor) else []
    return [tensor for tensor in dict.fromkeys(found) if tensor.requires_grad or tensor.grad is not None]


@torch.no_grad()
def _difference_quotients(plan: StepPlan, first: Mapping[Tensor, Tensor], inverse_step: Tensor) -> dict[Tensor, Tensor]:
    """Return the difference quotients. Subtract before dividing: the common part cancels without rounding."""
    parameters = [p for bucket in plan.buckets for p in bucket.parameters]
    if parameters and all(p.grad is None for p in parameters):
        raise RuntimeError(
            "the closure gave no gradient when it was evaluated a second time; it must clear the gradients, compute "
            "the loss, call backward and return the loss each time"
        )
    found: dict[Tensor, Tensor] = {}
    for bucket in plan.buckets:
        before = [first[p] for p in bucket.parameters]
        # If the second evaluation did not use a parameter, its difference is zero.
        pairs = zip(bucket.parameters, before, strict=True)
        changed = allocate_contiguous(before)
        torch._foreach_copy_(changed, [old if p.grad is None else local(reduce_partial(p.grad, p)) for p, old in pairs])
        torch._foreach_sub_(changed, before)
        torch._foreach_mul_(changed, inverse_step * bucket.sign)
        found.update(zip(bucket.parameters, changed, strict=True))
    return found


@torch.no_grad()
def _measure(base: Optimizer, engine: Engine, regularizer: Regularizer, warmup_factor: Tensor) -> Perturbation | None:
    """Return dR/dg at the present gradients. ``warmup_factor`` (Tensor []) scales the regularizer's weights."""
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
    signed = engine.signed_rows(len(sources))
    span = plan.gram(rows, SOURCES + len(sources) + 1, signed)
    v = derivative(span, regularizer)
    return Perturbation(plan, rows, span, v * warmup_factor.to(v), signed)


@torch.no_grad()
def _perturb(perturbation: Perturbation, copies: Sequence[TensorList]) -> Tensor:
    """Move the parameters to ``theta + e v``. Return 1 / e, Tensor [], or 0 if v is zero.

    Frozen parameters that keep a gradient do not move: their gradient is no function of the parameters.

    All scopes share one e, since ``H v`` includes the curvature between scopes.

    The norm of ``e v`` is the norm of the parameters times the square root of the precision's epsilon. This balances
    truncation error, which grows with e, and rounding error, which grows with 1 / e. The norm of the parameters has the
    same lower limit as in the bound on the update, so that LoRA's B moves when it starts at zero.
    """
    plan, span, v = perturbation.plan, perturbation.span, perturbation.v
    length = torch.maximum(span.norm(span.row(-1)), LEAST_LENGTH * plan.element_counts().sqrt())
    epsilon = max((torch.finfo(p.dtype).eps for bucket in plan.buckets for p in bucket.values), default=0.0) ** 0.5
    step = divide(epsilon * torch.linalg.vector_norm(length), torch.linalg.vector_norm(span.norm(v)))
    moves = [[Write(into=bucket.values, coefficients=step * v, accumulate=True)] for bucket in plan.buckets]
    plan.combine_(perturbation.rows, moves, perturbation.signed)
    for bucket, copy in zip(plan.buckets, copies, strict=True):
        for parameter, value, old in zip(bucket.parameters, bucket.values, copy, strict=True):
            if not parameter.requires_grad:
                value.copy_(old)
    return divide(torch.ones_like(step), step)
