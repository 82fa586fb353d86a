"""One step, made by GradGuide and by the oracle, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.programs.bases import check_same, check_state, copied, held_state, shadow_of
from tests.programs.compare import TIGHT, Disagreement, OverflowedError, Tally, check, check_conflicts
from tests.programs.gradients import put_gradients
from tests.programs.measures import check_metrics
from tests.programs.memory import check_memory
from tests.programs.model import Model, Plan, ScopePlan
from tests.programs.numbers import as_array, spacing, twin, unit
from tests.programs.oracle import Guided, Limited, guide, limit
from tests.programs.program import Step
from tests.programs.space import Vector, length
from tests.programs.world import World

__all__ = ["make_step"]

Array = NDArray[np.float64]


def make_step(event: Step, world: World, model: Model, tally: Tally) -> bool:
    """Give the gradients, step, and compare."""
    present = {number for _, _, number in world.present()}
    put_gradients(event, world, model)
    plan = model.plan(world)
    before = [twin(p) for p in world.parameters]
    received = [copied(p.grad) for p in world.parameters]
    shadow, shadows = shadow_of(world)
    program = world.program
    active = not (program.direction is None and program.magnitude is None and world.spec is None)
    stops = active and not plan.finite
    call = (lambda: 7.0) if event.closure else None
    handed: list[Tensor | None] = []  # to the base, which may write into the gradients
    hook = world.base.register_step_pre_hook(lambda *_: handed.extend(copied(p.grad) for p in world.parameters))
    try:
        result = world.guide.step(call) if call is not None else world.guide.step()
    except FloatingPointError:
        if not stops or program.nonfinite != "raise":
            raise
    else:
        if stops and program.nonfinite == "raise":
            raise Disagreement("a gradient that is not finite was not refused")
        if event.closure and result != 7.0:
            raise Disagreement(f"the closure's result is lost: {result!r}")
    finally:
        hook.remove()

    outside = [n for n in range(len(world.parameters)) if n not in present or received[n] is None]
    check_same("parameters without a gradient", [before[n] for n in outside], [world.parameters[n] for n in outside])
    if any(world.parameters[n].grad is not None for n in outside):
        raise Disagreement("a parameter without a gradient has one after the step")
    if not plan.scopes or stops:
        model.skipped += bool(plan.scopes) and program.nonfinite == "skip"
        check_same("parameters of a step that is not made", before, [p.detach() for p in world.parameters])
        check_same("gradients of a step that is not made", received, [p.grad for p in world.parameters])
        check_state(world.base, world.parameters, held_state(shadow, shadows), exact=True)
        if active and program.watched:
            check_memory(world, model, tally)
        return False

    guided = [decide(scope, world, handed, tally) for scope in plan.scopes] if active else []
    if not active:
        check_same("gradients without any rule", received, handed)
    for other, gradient in zip(shadows, handed, strict=True):
        other.grad = copied(gradient)
    shadow.step()
    check_state(world.base, world.parameters, held_state(shadow, shadows), exact=all(p.is_contiguous() for p in before))
    if not all(bool(p.isfinite().all()) and float(p.abs().max()) < 1e30 for p in shadows if p.numel()):
        return True
    check_same("gradients after the step", [p.grad for p in shadows], [p.grad for p in world.parameters])
    if not active:
        check_same("parameters without any rule", shadows, [p.detach() for p in world.parameters])
        return False
    updates = [check_update(scope, world, model, before, shadows, tally) for scope in plan.scopes]
    remember(plan, guided, model, world)
    if program.watched:
        check_memory(world, model, tally, plan, guided)
    if event.metrics:
        check_metrics(world, model, plan, guided, updates)
    return False


def decide(scope: ScopePlan, world: World, handed: Sequence[Tensor | None], tally: Tally) -> Guided:
    """Compare the guided gradient of one scope with the oracle's."""
    program, alignment = world.program, world.spec
    on = alignment is not None and alignment.on == "gradient"
    products = scope.rows.products

    def again(generator: np.random.Generator | None = None) -> Guided:
        rules = program.direction, program.magnitude
        return guide(scope.rows, scope.statistics, *rules, on=on, generator=generator)

    guided = again()
    gradients = [g for g in (handed[n] for n in scope.members) if g is not None]
    if guided.reach * guided.factor >= 0.99 * min(torch.finfo(g.dtype).max for g in gradients):
        raise OverflowedError  # the gradient is scaled down: tests/contract/test_range.py
    found = np.concatenate([as_array(g) for g in gradients]) * scope.signs
    stored = spaced(guided.gradient.value, gradients) + guided.allowance * np.abs(guided.gradient.value)
    what, reach = f"guided gradient of scope {scope.label!r}", guided.reach * guided.factor
    other = lambda generator: again(generator).gradient.value  # noqa: E731
    origin = guided.origin if on and sum(scope.rows.projecting) > 1 else None
    decided = check(what, found, guided.gradient, stored, reach, other, tally, products=products, origin=origin)
    if on:
        projected = [s for s, wanted in zip(scope.rows.sources, scope.rows.projecting, strict=True) if wanted]
        slack = TIGHT * length(guided.gradient.error) + length(stored)
        check_conflicts(what, found, projected, guided.start, reach, slack, products + scope.fineness)
    if program.magnitude is not None and program.magnitude.max_norm < np.inf:
        # What is written is rounded too where all rows cancel, and the oracle has zeros.
        written = length(stored) + length(spaced(found, gradients))
        longest = program.magnitude.max_norm * (1 + 1e-5) + written
        if length(found) > longest:
            raise Disagreement(f"{what}: is {length(found):.7g} long, at most {longest:.7g} allowed")
    return replace(guided, decided=decided)


def check_update(
    scope: ScopePlan, world: World, model: Model, before: Sequence[Tensor], after: Sequence[Tensor], tally: Tally
) -> Limited:
    """Compare the parameters of one scope with those before and what the rules leave of the base's update."""
    magnitude, alignment, numbers = world.program.magnitude, world.spec, scope.members
    start = np.concatenate([as_array(before[n]) for n in numbers])
    made = np.concatenate([as_array(after[n]) for n in numbers])
    found = np.concatenate([as_array(world.parameters[n]) for n in numbers])
    fine, products = scope.fineness, scope.rows.products
    sources = []
    if alignment is not None and alignment.on == "update":
        covered, values = model.covered(world), [before[n] for n in numbers]
        rows = [model.source_row(world, k, numbers, values, covered) for k in range(len(alignment.sources))]
        sources = [row for row, wanted in zip(rows, scope.rows.projecting, strict=True) if wanted]
    update, origin = Vector(made - start, fine * np.abs(made - start)), Vector(start, fine * np.abs(start))
    largest = None if magnitude is None else magnitude.max_update
    limited = limit(update, origin, sources, largest, products)
    if not limited.acted and np.array_equal(found, made):
        return limited

    def again(generator: np.random.Generator) -> Array:
        return limit(update, origin, sources, largest, products, generator).update.value

    # The parameters before the step are terms of those after it.
    end = Vector(limited.update.value, limited.update.error + fine * np.abs(start))
    what = f"update of scope {scope.label!r}"
    stored = spaced(start + end.value, [before[n] for n in numbers])
    nearest = limited.origin if len(sources) > 1 else None
    check(what, found - start, end, stored, limited.reach, again, tally, products=products, origin=nearest)
    slack = TIGHT * length(end.error) + length(stored)
    check_conflicts(what, start - found, sources, length(limited.origin), limited.reach, slack, products + fine)
    moved = length(found - start)
    if moved > limited.bound * (1 + 1e-5) + length(stored):
        raise Disagreement(f"{what}: moved by {moved:.7g}, at most {limited.bound:.7g} allowed")
    if not limited.acted and not any(
        limit(update, origin, sources, largest, products, np.random.default_rng(i)).acted for i in range(8)
    ):
        raise Disagreement(f"{what}: no rule acts on the update, yet it is not the base's, bit for bit")
    return limited


def remember(plan: Plan, guided: Sequence[Guided], model: Model, world: World) -> None:
    """The oracle's state after a step."""
    for scope, result in zip(plan.scopes, guided, strict=True):
        model.statistics[scope.label] = result.statistics
        sizes = [world.parameters[n].numel() for n in scope.members]
        own = world.program.direction is not None and not world.program.direction.share_momentum
        ends = np.cumsum(sizes)[:-1]
        values, errors = np.split(result.direction.value, ends), np.split(result.direction.error, ends)
        for number, value, error in zip(scope.members, values, errors, strict=True):
            if own:
                model.directions[number] = Vector(value, error + unit(torch.float32) * np.abs(value))
    model.steps += any(scope.rows.gradient.norm > 0 for scope in plan.scopes)


def spaced(values: Array, like: Sequence[Tensor]) -> Array:
    """Distance of neighbouring numbers in the dtype of the tensors, which the values are spread over."""
    sizes = np.cumsum([t.numel() for t in like])[:-1]
    return np.concatenate([spacing(v, t.dtype) for v, t in zip(np.split(values, sizes), like, strict=True)])
