"""The step of a fused Adam or AdamW, made in the same pass that combines the rows.

Where it applies, the guided gradient is never stored: ``p.grad`` stays as received, and no copy of the parameters is
made. Where a rule acts on the update, its products are measured before it is made: it is computed twice and written
once. The base's state keeps its own format, so checkpoints are those of the base, and a step can be made by either at
any time: ``group["fused"] = False`` hands the next one to the base.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

from gradguide.ops.row import Row, Stack, Write, scopes_of
from gradguide.ops.tensors import Interned, Note, Tensors, only
from gradguide.survey import Survey

if TYPE_CHECKING:
    from gradguide.ops.triton.adam import Moments, Settings

__all__ = ["MOST_SOURCES", "Part", "parts_of", "products", "step"]


MOST_SOURCES = 4
"""Of how many sources an update that is made in one pass can be freed: with sixteen, the kernel spills registers."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one launch steps: the parameters of a bucket that share a param group.

    rows: R rows over these parameters.
    direction: the running direction, where the step writes it.
    moments, settings, columns: see ``gradguide.ops.triton.adam``.
    """

    rows: Stack
    direction: Sequence[Tensor] | None
    moments: Any
    settings: Any
    columns: Any


def parts_of(
    base: Optimizer,
    survey: Survey,
    rows: Sequence[Stack],
    directions: Sequence[Sequence[Tensor] | None],
) -> list[Part] | None:
    """The launches of a fused step, or None where the base has to step by itself.

    It has to unless it is exactly Adam or AdamW with ``fused=True`` in every group and no amsgrad, nobody hooks into
    its step or wraps it, all parameters are on one device, and every tensor has a kernel. States that are not there yet
    are made as the base makes them.

    Args:
        base: the base optimizer.
        survey: of parameters that lie over no ranks.
        rows: those of the step, for each bucket.
        directions: for each bucket the running direction that the step writes, or None.
    """
    if not _plain(base) or not all(map(_simple, base.param_groups)):
        return None
    if any(survey.ops(bucket).__name__ != "gradguide.ops.triton" for bucket in survey.buckets):  # type: ignore[attr-defined]
        return None
    # Decisions lie on one device, and kernels read them where they lie.
    if any(bucket.gradients[0].device != survey.device for bucket in survey.buckets):
        return None
    from gradguide.ops.triton.adam import plan_adam

    parts = []
    for bucket, all_rows, kept in zip(survey.buckets, rows, directions, strict=True):
        groups = dict.fromkeys(bucket.groups)
        for index in groups:
            these, into, parameters = all_rows, kept, bucket.values
            if len(groups) > 1:
                taken = _Taken([group == index for group in bucket.groups])
                these, into, parameters = taken.rows(all_rows), taken.known(kept), taken(bucket.values)
            moments = _moments(base, parameters, survey.interned)
            if only(map(Tensor.get_device, moments.steps)) != parameters[0].get_device():
                return None
            # Coefficients are not known yet, and the columns do not depend on them.
            write = None if into is None else Write(into=into, coefficients=torch.empty(0))
            columns = plan_adam(these, write, moments)
            if columns is None:
                return None
            parts.append(Part(these, into, moments, _settings(base, base.param_groups[index]), columns))
    return parts


def _moments(base: Optimizer, parameters: Sequence[Tensor], interned: Interned) -> Moments:
    from gradguide.ops.triton.adam import Moments

    states: list[dict[str, Tensor]] = [base.state[parameter] for parameter in parameters]
    if not all(states):
        states = [_state(base, parameter) for parameter in parameters]

    def held(name: str) -> Tensors:
        # No other list of this name has this length and begins with this parameter.
        return interned.of((name, id(parameters[0]), len(parameters)), [state[name] for state in states])

    return Moments(
        parameters=parameters,
        first=held("exp_avg"),
        second=held("exp_avg_sq"),
        steps=[state["step"] for state in states],
    )


def _settings(base: Optimizer, group: dict[str, Any]) -> Settings:
    from gradguide.ops.triton.adam import Settings

    return Settings(
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=isinstance(base, AdamW) or group.get("decoupled_weight_decay", False),
        maximize=group["maximize"],
    )


def products(parts: Sequence[Part], gradient: Tensor, first: int, sources: int) -> Tensor:
    """What the update is to be judged by, before it is made.

    Args:
        parts: from :func:`parts_of`.
        gradient (Tensor): shape [S, R], coordinates of the guided gradient.
        first, sources (int): number of the first source among the rows, and how many there are.

    Returns:
        For each scope the update with itself, the parameters with themselves, the update with each source: Tensor
        [S, 2 + sources], float64.
    """
    from gradguide.ops.triton.adam import launch_probe

    sums = (
        launch_probe(part.columns, part.rows, gradient, part.moments, part.settings, first, sources) for part in parts
    )
    return reduce(torch.add, sums)


def step(
    parts: Sequence[Part], gradient: Tensor, direction: Tensor, scale: Tensor, pulls: Tensor | None, go: Tensor
) -> list[Tensor]:
    """Make the step.

    Args:
        parts: from :func:`parts_of`.
        gradient, direction (Tensor): shape [S, R], coordinates of the guided gradient and the new direction.
        scale (Tensor): shape [S], float64, what the update is multiplied by.
        pulls (Tensor | None): shape [S, R], coordinates of what is then added to it.
        go (Tensor): 0-d float32, 1; or 0 to leave everything as it is.

    Returns:
        Squared lengths of the update, each a Tensor [chunks]: their sum is that of the whole update.
    """
    from gradguide.ops.triton.adam import launch_adam

    squares = []
    for part in parts:
        write = None if part.direction is None else Write(into=part.direction, coefficients=direction)
        squares.append(
            launch_adam(part.columns, part.rows, gradient, write, part.moments, part.settings, scale, pulls, go)
        )
        torch._foreach_add_(list(part.moments.steps), [go] * len(part.moments.steps))
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


class _Taken:
    """Lists of a bucket cut down to some of its tensors; of a list that is met twice, the same one."""

    def __init__(self, chosen: Sequence[bool]) -> None:
        self._chosen = chosen
        self._made: dict[int, Tensors] = {}

    def __call__(self, part: Sequence[Tensor]) -> Tensors:
        if id(part) not in self._made:
            self._made[id(part)] = Tensors(compress(part, self._chosen), self._note(part))
        return self._made[id(part)]

    def known(self, part: Sequence[Tensor] | None) -> Tensors | None:
        return None if part is None else self(part)

    def rows(self, rows: Stack) -> Stack:
        """The rows over these tensors, and how many of them each scope has."""
        sizes = [sum(self._chosen[scope.start : scope.stop]) for scope in scopes_of(rows)]
        return Stack((None if row is None else self._row(row) for row in rows), sizes)

    def _row(self, row: Row) -> Row:
        return replace(
            row,
            offset=self.known(row.offset),
            scale=self.known(row.scale),
            at=self.known(row.at),
            anchor=self.known(row.anchor),
            steps=self.known(row.steps),
        )

    def _note(self, part: Sequence[Tensor]) -> Note:
        """What the whole list is known to be, its parts are."""
        known = part.note if isinstance(part, Tensors) else Note()
        if known.facts is None or known.facts.dtype is None or not known.facts.contiguous:
            return Note()
        note = Note(known.facts._replace(lengths=array("q", compress(known.facts.lengths, self._chosen))))
        if known.addresses is not None:
            note.addresses = array("q", compress(known.addresses, self._chosen))
        return note
