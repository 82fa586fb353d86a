"""The metrics of a step against the oracle's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.programs.compare import Disagreement
from tests.programs.model import Model, Plan, source_names
from tests.programs.oracle import CONFLICT, Guided, Limited
from tests.programs.space import PRODUCTS, cosine, length
from tests.programs.world import World

__all__ = ["check_metrics"]


def check_metrics(world: World, model: Model, plan: Plan, guided: Sequence[Guided], updates: Sequence[Limited]) -> None:
    """Compare what ``metrics()`` says of the step just made."""
    found, products = world.guide.metrics(), PRODUCTS[world.program.backend]
    lengths = [scope.rows.gradient.norm for scope in plan.scopes]
    norm = total([g.norm for g in guided])
    expected = {"grad_norm": (total(lengths), 1e-5 * total(lengths)), "steps": (model.steps, 0.0)}
    expected["skipped"] = (model.skipped, 0.0)
    if norm > 0 and all(g.decided for g in guided):
        factor = total([g.norm * g.factor for g in guided]) / norm
        slack = 1e-3 + products * max((g.reach / g.norm) ** 2 for g in guided if g.norm > 0)
        slack += max(g.allowance for g in guided)
        expected |= {"guided_norm": (norm, slack * norm), "clip_factor": (factor, slack * factor)}
        alive = [g for g, size in zip(guided, lengths, strict=True) if size > 0]
        if world.program.direction is not None and alive:
            expected["damping"] = (float(np.mean([g.strength for g in alive])), 1e-2)
    made = total([u.norm for u in updates])
    if world.program.magnitude is not None and world.program.magnitude.max_update is not None and made > 0:
        terms = [u.reach / left for u in updates if (left := u.update.norm) > 0]
        slack = 1e-5 + products * max(terms, default=0.0) ** 2
        expected["update_factor"] = (total([u.norm * u.factor for u in updates]) / made, slack)
    if world.spec is not None and total(lengths) > 0:
        for k, name in enumerate(source_names(world.spec)):
            key = f"/{name}" if len(world.spec.sources) > 1 else ""
            rows = [scope.rows.sources[k] for scope in plan.scopes]
            pairs = list(zip(plan.scopes, rows, strict=True))
            size = total([row.norm for row in rows])
            inner = [
                cosine(s.rows.gradient.value, row.value) * (s.rows.gradient.norm / total(lengths)) * row.norm
                for s, row in pairs
            ]
            if size > 0 and total([length(row.error) for row in rows]) < 1e-6 * size:
                expected["source_cosine" + key] = (math.fsum(inner) / size, 1e-5)
            cosines = [cosine(s.rows.gradient.value, row.value) for s, row in pairs]
            errors = [length(row.error) / row.norm if row.norm else 0.0 for _, row in pairs]
            if all(abs(c + CONFLICT) > products + 1e-7 + 8 * e for c, e in zip(cosines, errors, strict=True)):
                expected["conflict" + key] = (float(min(cosines) < -CONFLICT), 0.0)
    for key, (value, slack) in expected.items():
        if not abs(found[key] - value) <= slack:
            raise Disagreement(f"metrics: {key} is {found[key]!r}, expected {value!r} to {slack:.3g}")


def total(lengths: Sequence[float]) -> float:
    """Length of vectors together."""
    largest = max(lengths, default=0.0)
    return 0.0 if largest == 0 else largest * float(np.linalg.norm(np.array(lengths) / largest))
