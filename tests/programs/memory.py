"""What GradGuide remembers, read from its state dict, against what the oracle does."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.programs.compare import Disagreement, Tally, check
from tests.programs.model import Model, Plan
from tests.programs.numbers import as_array, spacing
from tests.programs.oracle import Guided, Statistics
from tests.programs.space import Vector
from tests.programs.world import World

__all__ = ["check_memory"]

Array = NDArray[np.float64]
HEAD = 3
"""A counters tensor is [format, steps, skipped, *statistics, sources, scope]."""


def check_memory(
    world: World, model: Model, tally: Tally, plan: Plan | None = None, guided: Sequence[Guided] = ()
) -> None:
    """Compare directions, statistics and counts with the oracle's, and go on from those found.

    Args:
        plan, guided: the step just made; without one, nothing may have changed since the last comparison.
    """
    directions, statistics, counts = observed(world, model)
    if counts is not None and counts != (model.steps, model.skipped):
        raise Disagreement(f"steps and skipped steps are {counts}, expected {(model.steps, model.skipped)}")
    undecided = [] if plan is None else [s.label for s, g in zip(plan.scopes, guided, strict=True) if not g.decided]
    allowances = {} if plan is None else {s.label: g.allowance for s, g in zip(plan.scopes, guided, strict=True)}
    for number, found in directions.items():
        expected = model.directions.get(number, Vector(np.zeros_like(found), np.zeros_like(found)))
        stored, kept = spacing(expected.value, torch.float32), partial(unmoved, expected.value)
        check(f"direction of parameter {number}", found, expected, stored, 0.0, kept, tally)
        if model.exact:
            model.directions[number] = Vector(found, np.zeros_like(found))
    for label, seen in statistics.items():
        expected_seen = model.statistics.get(label, Statistics())
        if label not in undecided and not alike(seen, expected_seen, 1e-3 + allowances.get(label, 0.0)):
            raise Disagreement(f"statistics of scope {label!r} are {seen}, expected {expected_seen}")
        if model.exact:
            model.statistics[label] = seen


def unmoved(wanted: Array, generator: np.random.Generator) -> Array:
    """Nothing decides about a direction."""
    return wanted


def observed(world: World, model: Model) -> tuple[dict[int, Array], dict[Hashable, Statistics], tuple[int, int] | None]:
    """Directions by parameter, statistics by scope, steps and skipped steps, as the state dict has them."""
    state: dict[int, dict[str, Any]] = world.guide.state_dict()["state"]
    directions, statistics, counts = {}, {}, None
    for position, (group, place, number) in enumerate(world.present()):
        entry = state.get(position, {})
        if "gradguide.direction" in entry:
            # As the gradients are received; the oracle's is in the frame of descent.
            directions[number] = world.sign(group) * as_array(entry["gradguide.direction"])
        if "gradguide.counters" in entry:
            numbers = entry["gradguide.counters"].tolist()
            counts = int(numbers[1]), int(numbers[2])
            statistics[model.label(world, group, place, number)] = Statistics(*numbers[HEAD:-2])
    return directions, statistics, counts


def alike(found: Statistics, expected: Statistics, slack: float) -> bool:
    """Whether statistics are the same to the rounding of the norms that went into them."""
    pairs = [(getattr(found, name), getattr(expected, name)) for name in Statistics.__dataclass_fields__]
    return all(abs(a - b) <= slack * max(abs(a), abs(b)) for a, b in pairs)
