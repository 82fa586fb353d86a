"""GradGuide's own tensors inside the base's state dict: merged in on save, split off on load.

They are stored under their parameters, because distributed checkpoints keep nothing else. They are split off before the
base loads, because loading casts an optimizer's floating state to the parameter's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.checkpoint.validation import (
    COUNTERS,
    DIRECTION,
    FORMAT,
    HEAD,
    PREFIX,
    check_base_entry,
    check_direction,
    check_groups,
    check_own_keys,
    checked_counters,
)
from gradguide.distributed.layouts import as_dtensor, local, to_layout
from gradguide.ops.pack import lay_out
from gradguide.step.engine import Engine

__all__ = ["Own", "load", "merge"]


class Own(NamedTuple):
    """GradGuide's part of a state dict, checked and ready to be put in place.

    directions: float32, in the shape of this rank's part of the parameter.
    counters: of each parameter that has them, Tensor [HEAD + len(STATISTICS)], float64 on the host.
    """

    directions: dict[Tensor, Tensor]
    counters: dict[Tensor, Tensor]


def merge(state: dict[str, Any], base: Optimizer, engine: Engine, totals: Tensor) -> dict[str, Any]:
    """Return the base's state dict with direction and counters added; the base's own entries stay as they are.

    Raises:
        TypeError: the base's state dict has another form than that of ``torch.optim.Optimizer``.
    """
    if not {"state", "param_groups"} <= state.keys():
        raise TypeError(
            f"{type(base).__name__}.state_dict() must hold 'state' and 'param_groups', found {sorted(state)}: where it "
            "wraps another optimizer, give GradGuide that one and wrap the GradGuide"
        )
    entries = dict(state["state"])
    labels = engine.planner.labels(base)
    stepped = bool(engine.directions) or bool(totals.any())
    # On the host, whatever device they are counted on.
    head = torch.cat([torch.tensor([FORMAT], dtype=torch.float64), totals.cpu()])
    keys = _keys(state)
    stateful = {key for key in keys if entries.get(key)}
    for key, parameter in zip(keys, _parameters(base), strict=True) if stepped else ():
        # An optimizer takes an existing entry for an initialised one. Where the base keeps state, a parameter without
        # a step therefore gets no entry, so that the base alone can load the result. It has no direction either.
        if stateful and key not in stateful and parameter not in engine.directions:
            continue
        own = {COUNTERS: torch.cat([head, engine.scopes.export(labels[parameter]).cpu()])}
        if parameter in engine.directions:
            own[DIRECTION] = as_dtensor(engine.directions[parameter], parameter)
        entries[key] = {**entries.get(key, {}), **own}
    return {**state, "state": entries}


def load(state: dict[str, Any], base: Optimizer, engine: Engine) -> Tensor:
    """Load a state dict into the base and the engine, or change neither.

    Returns:
        Tensor [2]: steps and skipped steps.

    Raises:
        ValueError: groups or shapes differ, an entry is damaged, or the format is newer.
        Exception: what else the base raises where its own part is damaged.

    Warns:
        UserWarning: the state is that of a plain base optimizer that has stepped.
    """
    rest, own = _split(state, base, engine)
    before: dict[str, Any] = {name: vars(base)[name] for name in ("state", "param_groups") if name in vars(base)}
    try:
        base.load_state_dict(rest)
    except BaseException as error:
        vars(base).update(before)  # torch's loader replaces both, and may fail after that
        if isinstance(error, (LookupError, TypeError, AttributeError)):
            raise ValueError(f"{type(base).__name__} cannot load its part of the state: {error!r}") from error
        raise
    return _restore(own, base, engine)


def _split(state: dict[str, Any], base: Optimizer, engine: Engine) -> tuple[dict[str, Any], Own]:
    """Return the base's part of a state dict and GradGuide's, checked against the parameters. Nothing is changed."""
    check_groups(state, base)
    parameters = _parameters(base)
    names = engine.planner.names
    of_key = dict(zip(_keys(state), parameters, strict=True))
    which = {key: f"parameter {names.get(p, f'number {position}')}" for position, (key, p) in enumerate(of_key.items())}
    directions: dict[Tensor, Tensor] = {}
    counters: dict[Tensor, Tensor] = {}
    rest: dict[Any, Any] = {}
    for key, entry in state["state"].items():
        if not isinstance(entry, Mapping):
            rest[key] = entry
            continue
        parameter = of_key.get(key)
        own = {name for name in entry if isinstance(name, str) and name.startswith(PREFIX)}
        check_own_keys(own, which.get(key))
        others = {name: value for name, value in entry.items() if name not in own}
        # An entry that holds nothing of the base's is none of its own.
        if others or not own:
            rest[key] = others
        if parameter is None:
            continue
        check_base_entry(base, others, parameter, which[key])
        if COUNTERS in own:
            counters[parameter] = checked_counters(entry[COUNTERS], counters.values(), which[key])
        if DIRECTION in own:
            check_direction(entry[DIRECTION], parameter, which[key])
            directions[parameter] = entry[DIRECTION]
    if engine.active and rest and not counters:
        warnings.warn(
            "this is the state of a plain base optimizer: its own state is taken over, GradGuide's direction and "
            "counters start anew",
            UserWarning,
            stacklevel=5,
        )
    return {**state, "state": rest}, Own(_laid_out(directions, engine), counters)


def _laid_out(directions: dict[Tensor, Tensor], engine: Engine) -> dict[Tensor, Tensor]:
    """Copy this rank's part of each direction that the rules keep into one block of memory."""
    keep = engine.rules.direction is not None and not engine.rules.direction.share_momentum
    saved = directions if keep else {}
    made = dict(zip(saved, lay_out([local(p) for p in saved], torch.float32), strict=True))
    for parameter, direction in saved.items():
        made[parameter].copy_(to_layout(direction.detach(), parameter))
    return made


def _restore(own: Own, base: Optimizer, engine: Engine) -> Tensor:
    engine.directions = own.directions
    engine.planner.invalidate()
    labels = engine.planner.labels(base)
    engine.scopes.restore({labels[parameter]: counters[HEAD:] for parameter, counters in own.counters.items()})
    return next(iter(own.counters.values()), torch.zeros(HEAD, dtype=torch.float64))[1:HEAD].clone()


def _keys(state: dict[str, Any]) -> list[Any]:
    """Return what stands for the parameters in a state dict, in the order of the groups."""
    return [key for group in state["param_groups"] for key in group["params"]]


def _parameters(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]
