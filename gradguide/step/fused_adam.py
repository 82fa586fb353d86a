"""The step of a fused Adam or AdamW, made in the same pass that combines the rows.

Where it applies, the guided gradient is never stored: ``p.grad`` stays as received, and no copy of the parameters is
made. Where a rule acts on the update, its products are measured before it is made: it is computed twice and written
once. The base's state keeps its own format, so checkpoints are those of the base, and a step can be made by either at
any time: ``group["fused"] = False`` hands the next one to the base.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

from gradguide.ops.row import Stack, Write
from gradguide.ops.tensors import MetadataCache, TensorList, common_value
from gradguide.step.buckets import Bucket
from gradguide.step.plan import StepPlan

if TYPE_CHECKING:
    from gradguide.ops.triton.adam import Groups, Moments

__all__ = ["MAX_SETTINGS", "MAX_SOURCES", "AdamLaunch", "launches_of", "preview_products", "step"]


MAX_SOURCES = 4
"""Of how many sources an update that is made in one pass can be freed: with sixteen, the kernel spills registers."""


MAX_SETTINGS = 16
"""How many param groups with settings of their own a launch knows: each is a handful of its arguments."""


@dataclass(frozen=True, slots=True)
class AdamLaunch:
    """What one launch steps: the parameters of a bucket.

    rows: R rows over these parameters.
    direction: the running direction, where the step writes it.
    moments, groups, columns: see ``gradguide.ops.triton.adam``.
    signs: from ``StepPlan.signs``, of the rows in the gradient's pass.
    """

    rows: Stack
    direction: Sequence[Tensor] | None
    moments: Any
    groups: Any
    columns: Any
    signs: Tensor | None

    def own(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients [S, R] of this part's rows."""
        return coefficients if self.signs is None else coefficients * self.signs


def launches_of(
    base: Optimizer,
    plan: StepPlan,
    rows: Sequence[Stack],
    directions: Sequence[Sequence[Tensor] | None],
    signs: Sequence[Tensor | None],
) -> list[AdamLaunch] | None:
    """The launches of a fused step, or None where the base has to step by itself.

    It has to unless it is exactly Adam or AdamW with ``fused=True`` in every group and no amsgrad, nobody hooks into
    its step or wraps it, all parameters are on one device, every tensor has a kernel, and the param groups differ in
    numbers alone, of which there are not too many. States that are not there yet are made as the base makes them.

    Args:
        base: the base optimizer.
        plan: of parameters that lie over no ranks.
        rows: those of the step, for each bucket.
        directions: for each bucket the running direction that the step writes, or None.
        signs: for each bucket the signs of its rows, or None.
    """
    if not _plain(base) or not all(map(_simple, base.param_groups)):
        return None
    if not plan.fused or any(backend is not plan.backends[0] for backend in plan.backends):
        return None
    # Decisions lie on one device, and kernels read them where they lie.
    if any(bucket.gradients[0].device != plan.device for bucket in plan.buckets):
        return None
    from gradguide.ops.triton.adam import plan_adam

    launches = []
    for bucket, these, into, sign in zip(plan.buckets, rows, directions, signs, strict=True):
        groups = _groups(base, bucket)
        if groups is None:
            return None
        moments = _moments(base, bucket.values, plan.cache.metadata)
        if common_value(map(Tensor.get_device, moments.steps)) != bucket.values[0].get_device():
            return None
        # Coefficients are not known yet, and the columns do not depend on them.
        write = None if into is None else Write(into=into, coefficients=torch.empty(0))
        columns = plan_adam(these, write, moments)
        if columns is None:
            return None
        launches.append(AdamLaunch(these, into, moments, groups, columns, sign))
    return launches


def _moments(base: Optimizer, parameters: Sequence[Tensor], cache: MetadataCache) -> Moments:
    from gradguide.ops.triton.adam import Moments

    states: list[dict[str, Tensor]] = [base.state[parameter] for parameter in parameters]
    if not all(states):
        states = [_state(base, parameter) for parameter in parameters]

    def held(name: str) -> TensorList:
        # No other list of this name has this length and begins with this parameter.
        return cache.of((name, id(parameters[0]), len(parameters)), [state[name] for state in states])

    return Moments(
        parameters=parameters,
        first=held("exp_avg"),
        second=held("exp_avg_sq"),
        steps=[state["step"] for state in states],
    )


def _groups(base: Optimizer, bucket: Bucket) -> Groups | None:
    """The param groups of a bucket, those with the same settings as one; None where one launch cannot step them all."""
    from gradguide.ops.triton.adam import Groups, Settings

    kinds: set[tuple[bool, bool, bool]] = set()
    places: dict[Settings, int] = {}
    place_of: dict[int, int] = {}
    for index in dict.fromkeys(bucket.groups):
        group = base.param_groups[index]
        lr = group["lr"]
        # On the device it is what it is, whatever it holds: looking would make the host wait.
        on_device = isinstance(lr, Tensor) and lr.device == bucket.gradients[0].device
        settings = Settings(
            lr=lr if on_device else float(lr),
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        place_of[index] = places.setdefault(settings, len(places))
        decoupled = isinstance(base, AdamW) or group.get("decoupled_weight_decay", False)
        kinds.add((on_device, decoupled, group["maximize"]))
    if len(kinds) > 1 or len(places) > MAX_SETTINGS:
        return None
    on_device, decoupled, maximize = kinds.pop()
    which = array("q", map(place_of.__getitem__, bucket.groups))
    return Groups(settings=list(places), which=which, on_device=on_device, decoupled=decoupled, maximize=maximize)


def preview_products(launches: Sequence[AdamLaunch], gradient: Tensor, first: int, sources: int) -> Tensor:
    """What the update is to be judged by, before it is made.

    Args:
        launches: from :func:`launches_of`.
        gradient (Tensor): shape [S, R], coordinates of the guided gradient.
        first, sources (int): number of the first source among the rows, and how many there are.

    Returns:
        For each scope the update with itself, the parameters with themselves, the update with each source: Tensor
        [S, 2 + sources], float64.
    """
    from gradguide.ops.triton.adam import launch_preview_update

    sums = (
        launch_preview_update(
            launch.columns, launch.rows, launch.own(gradient), launch.moments, launch.groups, first, sources
        )
        for launch in launches
    )
    return reduce(torch.add, sums)


def step(
    launches: Sequence[AdamLaunch],
    gradient: Tensor,
    direction: Tensor,
    scale: Tensor | None,
    pulls: Tensor | None,
    go: Tensor,
) -> list[Tensor]:
    """Make the step.

    Args:
        launches: from :func:`launches_of`.
        gradient, direction (Tensor): shape [S, R], coordinates of the guided gradient and the new direction.
        scale (Tensor | None): shape [S], float64, what the update is multiplied by; None is 1.
        pulls (Tensor | None): shape [S, R], coordinates of what is then added to it.
        go (Tensor): 0-d float32, 1; or 0 to leave everything as it is.

    Returns:
        Squared lengths of the update, each a Tensor [chunks]: their sum is that of the whole update.
    """
    from gradguide.ops.triton.adam import launch_adam, launch_count
    from gradguide.ops.triton.launch import numbers_of

    scale = numbers_of(gradient.device, [1.0] * len(gradient)) if scale is None else scale
    squares = []
    for launch in launches:
        write = None if launch.direction is None else Write(into=launch.direction, coefficients=launch.own(direction))
        squares.append(
            launch_adam(
                launch.columns,
                launch.rows,
                launch.own(gradient),
                write,
                launch.moments,
                launch.groups,
                scale,
                pulls,
                go,
            )
        )
        launch_count(launch.columns, launch.moments, go)
    return squares


def _plain(base: Optimizer) -> bool:
    """Whether stepping in the base's place goes unnoticed: it is no subclass, and nobody waits for its step."""
    waiting = (
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
    )
    return type(base) in (Adam, AdamW) and not waiting and "step" not in vars(base)


def _simple(group: dict[str, Any]) -> bool:
    numbers = [*group["betas"], group["eps"], group["weight_decay"]]
    return bool(
        group["fused"]
        and not group["amsgrad"]
        and not group["differentiable"]
        and not any(isinstance(number, Tensor) for number in numbers)
    )


def _state(base: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The base's state of a parameter, made as a fused Adam makes it if there is none."""
    state: dict[str, Tensor] = base.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
