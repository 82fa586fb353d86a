"""A fused Adam or AdamW step in the pass that combines the rows.

The guided gradient is not stored: ``p.grad`` stays as received. No copy of the parameters is made. If a rule acts on
the update, a preview pass computes the update's products first: the update is computed twice and written once.

The base's state keeps its format, so checkpoints are those of the base. Both ways of stepping can alternate: with
``group["fused"] = False`` the base makes the next step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gradguide.base_checks import is_plain_adam
from gradguide.ops.row import Stack, Write
from gradguide.ops.tensors import MetadataCache, TensorList, common_value
from gradguide.step.buckets import Bucket
from gradguide.step.plan import StepPlan

if TYPE_CHECKING:
    from gradguide.ops.triton.launch_adam import Groups, Moments

__all__ = ["MAX_SETTINGS", "MAX_SOURCES", "AdamLaunch", "plan_launches", "preview_products", "step"]

MAX_SOURCES = 4
"""Maximum number of sources per pass. With 16 the kernel spills registers."""

MAX_SETTINGS = 16
"""Maximum number of different group settings per launch. Each adds several kernel arguments."""


@dataclass(frozen=True, slots=True)
class AdamLaunch:
    """Operands of one launch, which steps the parameters of a bucket.

    rows: R rows over these parameters.
    direction: the running direction; None if the step does not write it.
    moments, groups, columns: see ``gradguide.ops.triton.launch_adam``.
    signs: signs of the rows in the gradient pass, from ``StepPlan.signs``.
    """

    rows: Stack
    direction: Sequence[Tensor] | None
    moments: Any
    groups: Any
    columns: Any
    signs: Tensor | None

    def signed(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients [S, R] multiplied by the signs of the rows."""
        return coefficients if self.signs is None else coefficients * self.signs


def plan_launches(
    base: Optimizer,
    plan: StepPlan,
    rows: Sequence[Stack],
    directions: Sequence[Sequence[Tensor] | None],
    signs: Sequence[Tensor | None],
) -> list[AdamLaunch] | None:
    """Return the launches of a fused step, or None if the base must step itself.

    Launches need all of these:

    - The base is exactly Adam or AdamW, with ``fused=True`` and without amsgrad in every group.
    - Its step has no hooks and is not wrapped.
    - All parameters are on one device, and every tensor has a kernel.
    - The groups of a bucket differ only in numeric settings, in at most ``MAX_SETTINGS`` ways.

    Missing states are initialized as in the base.

    Args:
        base: the base optimizer.
        plan: a plan of unsharded parameters.
        rows: the rows of the step, per bucket.
        directions: the running direction that the step writes, or None, per bucket.
        signs: the signs of the rows, or None, per bucket.
    """
    if not is_plain_adam(base) or not all(map(_is_supported, base.param_groups)):
        return None
    # Kernels read the decision on its device.
    if not plan.uses_triton or any(bucket.gradients[0].device != plan.device for bucket in plan.buckets):
        return None
    from gradguide.ops.triton.launch_adam import plan_adam

    launches = []
    for bucket, these, into, sign in zip(plan.buckets, rows, directions, signs, strict=True):
        groups = _groups(base, bucket)
        if groups is None:
            return None
        moments = _moments(base, bucket.values, plan.cache.metadata)
        if common_value(map(Tensor.get_device, moments.steps)) != bucket.values[0].get_device():
            return None
        # The columns do not depend on the coefficients, which are computed later.
        write = None if into is None else Write(into=into, coefficients=torch.empty(0))
        columns = plan_adam(these, write, moments)
        if columns is None:
            return None
        launches.append(AdamLaunch(these, into, moments, groups, columns, sign))
    return launches


def _moments(base: Optimizer, parameters: Sequence[Tensor], cache: MetadataCache) -> Moments:
    from gradguide.ops.triton.launch_adam import Moments

    states: list[dict[str, Tensor]] = list(map(base.state.__getitem__, parameters))
    if not all(states):
        states = [_initialized_state(base, parameter) for parameter in parameters]

    def held(name: str) -> TensorList:
        # Unique: lists of one name differ in their first parameter or their length.
        return cache.of((name, id(parameters[0]), len(parameters)), list(map(itemgetter(name), states)))

    return Moments(
        parameters=parameters,
        first=held("exp_avg"),
        second=held("exp_avg_sq"),
        steps=list(map(itemgetter("step"), states)),
    )


def _groups(base: Optimizer, bucket: Bucket) -> Groups | None:
    """Return the param groups of a bucket, equal settings merged; None if one launch cannot step all of them."""
    from gradguide.ops.triton.launch_adam import Groups, Settings

    kinds: set[tuple[bool, bool]] = set()
    distinct: dict[Settings, int] = {}
    number_of: dict[int, int] = {}
    for index in dict.fromkeys(bucket.groups):
        group = base.param_groups[index]
        lr = group["lr"]
        # A learning rate on the device is not read: that would synchronize.
        on_device = isinstance(lr, Tensor) and lr.device == bucket.gradients[0].device
        settings = Settings(
            lr=lr if on_device else float(lr),
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        number_of[index] = distinct.setdefault(settings, len(distinct))
        decoupled = isinstance(base, AdamW) or group.get("decoupled_weight_decay", False)
        kinds.add((on_device, decoupled))
    if len(kinds) > 1 or len(distinct) > MAX_SETTINGS:
        return None
    on_device, decoupled = kinds.pop()
    one = len(distinct) == 1
    which = array("q", [0]) * len(bucket.groups) if one else array("q", map(number_of.__getitem__, bucket.groups))
    return Groups(
        settings=list(distinct), which=which, on_device=on_device, decoupled=decoupled, maximize=bucket.sign < 0
    )


def preview_products(launches: Sequence[AdamLaunch], gradient: Tensor, first: int, sources: int) -> Tensor:
    """Return the products of the update before it is made.

    Args:
        launches: from :func:`plan_launches`.
        gradient (Tensor): shape [S, R], coordinates of the guided gradient.
        first, sources (int): index of the first source row, and the number of sources.

    Returns:
        Tensor [S, 2 + sources], float64: per scope the squared norm of the update, the squared norm of the parameters,
        and the dot product of the update with each source.
    """
    from gradguide.ops.triton.launch_adam import launch_preview_update

    sums = (
        launch_preview_update(
            launch.columns, launch.rows, launch.signed(gradient), launch.moments, launch.groups, first, sources
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
    """Make the step in place.

    Args:
        launches: from :func:`plan_launches`.
        gradient, direction (Tensor): shape [S, R], coordinates of the guided gradient and the new direction.
        scale (Tensor | None): shape [S], float64, factor on the update. None: 1.
        pulls (Tensor | None): shape [S, R], coordinates of a vector that is added to the scaled update.
        go (Tensor): 0-d float32. 1 makes the step, 0 changes nothing.

    Returns:
        Partial sums of the update's squared norm, each a Tensor [chunks].
    """
    from gradguide.ops.triton.launch import numbers_of
    from gradguide.ops.triton.launch_adam import launch_adam, launch_count

    scale = numbers_of(gradient.device, [1.0] * len(gradient)) if scale is None else scale
    squares = []
    for launch in launches:
        write = (
            None if launch.direction is None else Write(into=launch.direction, coefficients=launch.signed(direction))
        )
        squares.append(
            launch_adam(
                launch.columns,
                launch.rows,
                launch.signed(gradient),
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


def _is_supported(group: dict[str, Any]) -> bool:
    numbers = [*group["betas"], group["eps"], group["weight_decay"]]
    return bool(
        group["fused"]
        and not group["amsgrad"]
        and not group["differentiable"]
        and not any(isinstance(number, Tensor) for number in numbers)
    )


def _initialized_state(base: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the base's state of a parameter. If it is empty, initialize it as a fused Adam does."""
    state: dict[str, Tensor] = base.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
