"""GradGuide's own tensors inside the base's state dict: merged in on save, split off on load.

They lie under the parameters that they belong to, because distributed checkpoints keep nothing else, and they are split
off before the base loads, because loading casts an optimizer's floating state to the parameter's dtype.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.guidance import Guidance
from gradguide.ops.pack import lay_out
from gradguide.rules.decision import STATISTICS
from gradguide.sharding import gathered, local, spread

__all__ = ["FORMAT", "merge", "restore", "split"]

FORMAT = 1
DIRECTION = "gradguide.direction"
COUNTERS = "gradguide.counters"
_PREFIX = "gradguide."
# A counters tensor is [format, steps, skipped, *STATISTICS of the parameter's scope].
_HEAD = 3
# What torch's optimizers keep in the shape of the parameter; a size that differs would else show only in a later step.
_ELEMENTWISE = frozenset(
    {DIRECTION, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "exp_inf", "acc_delta"}
)


class Own(NamedTuple):
    """What a state dict holds of GradGuide, by position of the parameter; both empty for a plain base's."""

    directions: dict[int, Tensor]
    counters: dict[int, Tensor]


def merge(state: dict[str, Any], base: Optimizer, guidance: Guidance, totals: Tensor) -> dict[str, Any]:
    """The base's state dict with direction and counters added; the base's own entries are not touched."""
    entries = dict(state["state"])
    labels = guidance.surveyor.labels(base)
    stepped = bool(guidance.directions) or bool(totals.any())
    # On the host, whatever device they are counted on.
    head = torch.cat([torch.tensor([FORMAT], dtype=torch.float64), totals.cpu()])
    for position, parameter in enumerate(_parameters(base)) if stepped else ():
        # Bases take an entry for a step made. Where they keep state, a parameter without a step gets none of ours
        # either, so that the base alone can load this; it has no direction, and its scope's numbers lie elsewhere.
        if state["state"] and position not in state["state"] and parameter not in guidance.directions:
            continue
        own = {COUNTERS: torch.cat([head, guidance.scopes.export(labels[parameter]).cpu()])}
        if parameter in guidance.directions:
            own[DIRECTION] = spread(guidance.directions[parameter], parameter)
        entries[position] = {**entries.get(position, {}), **own}
    return {**state, "state": entries}


def split(state: dict[str, Any], base: Optimizer, guidance: Guidance) -> tuple[dict[str, Any], Own]:
    """The base's part of a state dict, and ours, checked against the present parameters. Nothing is changed.

    Raises:
        ValueError: number or sizes of the groups differ, a direction has another shape, or the format is newer.

    Warns:
        UserWarning: nothing of GradGuide is in it although the base had stepped.
    """
    _check_groups(state, base)
    parameters = _parameters(base)
    positions = {key: i for i, key in enumerate(key for group in state["param_groups"] for key in group["params"])}
    own = Own({}, {})
    entries: dict[Any, Any] = {}
    for key, entry in state["state"].items():
        if key not in positions:
            entries[key] = entry
            continue
        position = positions[key]
        _check_sizes(entry, position, parameters[position], guidance)
        rest = {name: value for name, value in entry.items() if not str(name).startswith(_PREFIX)}
        if rest or not entry:
            entries[key] = rest
        if COUNTERS in entry:
            own.counters[position] = _checked_counters(entry[COUNTERS])
        if DIRECTION in entry:
            own.directions[position] = entry[DIRECTION]
    if guidance.active and entries and not own.counters:
        warnings.warn(
            "this is the state of a plain base optimizer: its own state is taken over, GradGuide's direction and "
            "counters start anew",
            UserWarning,
            stacklevel=3,
        )
    return {**state, "state": entries}, own


def restore(own: Own, base: Optimizer, guidance: Guidance) -> Tensor:
    """Put direction and scope statistics in place. Returns the totals, Tensor [2]: steps and skipped steps."""
    parameters = _parameters(base)
    keep = guidance.rules.direction is not None and not guidance.rules.direction.share_momentum
    found = {parameters[position]: direction for position, direction in own.directions.items() if keep}
    guidance.directions = dict(zip(found, lay_out([local(p) for p in found], torch.float32), strict=True))
    for parameter, direction in found.items():
        guidance.directions[parameter].copy_(gathered(direction.detach(), parameter))
    labels = guidance.surveyor.labels(base)
    statistics = {labels[parameters[position]]: counters[_HEAD:].cpu() for position, counters in own.counters.items()}
    guidance.scopes.restore(statistics)
    totals = next(iter(own.counters.values()), torch.zeros(_HEAD, dtype=torch.float64))[1:_HEAD]
    return totals.detach().to("cpu", torch.float64, copy=True)


def _parameters(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]


def _check_groups(state: dict[str, Any], base: Optimizer) -> None:
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
        state["state"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the state dict of an optimizer: {error!r}") from error
    present = [len(group["params"]) for group in base.param_groups]
    if len(saved) != len(present):
        raise ValueError(
            f"the state has {len(saved)} param groups, the optimizer has {len(present)}: build it with the same groups "
            "as when the state was saved"
        )
    for index, (before, now) in enumerate(zip(saved, present, strict=True)):
        if before != now:
            raise ValueError(
                f"param group {index} has {before} parameters in the state and {now} in the optimizer: parameters were "
                "frozen, or adapters added, since it was saved"
            )


def _check_sizes(entry: dict[str, Any], position: int, parameter: Tensor, guidance: Guidance) -> None:
    for name in _ELEMENTWISE & entry.keys():
        value = entry[name]
        if value is None and name != DIRECTION:  # SGD has no momentum before its first step
            continue
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            which = guidance.surveyor.names.get(parameter, f"number {position}")
            raise ValueError(
                f"the saved {name} of parameter {which} has shape {found}, the parameter {tuple(parameter.shape)}: the "
                "state is of another model, of adapters of another rank, or of parameters in another order"
            )


def _checked_counters(counters: Any) -> Tensor:
    if not isinstance(counters, Tensor) or counters.dim() != 1 or counters.numel() == 0:
        raise ValueError(f"{COUNTERS} must be a tensor of {_HEAD + len(STATISTICS)} numbers, found {counters!r}")
    version = int(counters[0])
    if version > FORMAT:
        raise ValueError(
            f"the state has format {version}, this version of gradguide reads up to {FORMAT}: upgrade gradguide"
        )
    if counters.numel() != _HEAD + len(STATISTICS):
        raise ValueError(f"{COUNTERS} must hold {_HEAD + len(STATISTICS)} numbers, found {counters.numel()}")
    return counters.to(torch.float64)
