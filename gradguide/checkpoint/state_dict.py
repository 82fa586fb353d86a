"""Add GradGuide's own tensors to the base's state dict on save, and extract them on load.

They are stored in the entries of their parameters, because distributed checkpoints keep only those. They are extracted
before the base loads, because loading casts floating-point state to the parameter's dtype.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.checkpoint.entries import (
    BASE_STEP,
    COUNTERS,
    DIRECTION,
    HEAD,
    SCOPE,
    make_counters,
    own_names,
    passed_through_base,
    statistics_of,
)
from gradguide.checkpoint.validation import (
    check_base_entry,
    check_counters,
    check_direction,
    check_groups,
    check_own_keys,
    read_counters,
)
from gradguide.distributed.layouts import as_dtensor, local, to_layout
from gradguide.ops.allocate import allocate_contiguous
from gradguide.step.buckets import Label
from gradguide.step.engine import Engine
from gradguide.step.planner import all_parameters

__all__ = ["load", "merge"]

# The kinds of direction. The statistics of one are wrong for another.
_NONE, _OWN, _SHARED = "None", "Direction()", "Direction(share_momentum=True)"
_DROPPED = {_OWN: "a running direction, which is", _SHARED: "statistics of the base's momentum as direction, which are"}


class _Own(NamedTuple):
    """GradGuide's part of a state dict after validation.

    directions: by parameter; float32, in the shape of the parameter's local part.
    counters: by parameter, for those that have counters; float64 on the host.
    """

    directions: dict[Tensor, Tensor]
    counters: dict[Tensor, Tensor]


def merge(state: dict[str, Any], base: Optimizer, engine: Engine, totals: Tensor) -> dict[str, Any]:
    """Return the base's state dict with direction and counters added. The base's own entries are unchanged.

    Raises:
        TypeError: the base's state dict does not have the form of ``torch.optim.Optimizer.state_dict()``.
    """
    if not {"state", "param_groups"} <= state.keys():
        raise TypeError(
            f"{type(base).__name__}.state_dict() must hold 'state' and 'param_groups', found {sorted(state)}: where it "
            "wraps another optimizer, give GradGuide that one and wrap the GradGuide"
        )
    # A base that loaded this state dict itself has own entries, which are stale and in its parameters' dtype.
    entries = {key: _without(own_names(entry), entry) for key, entry in state["state"].items()}
    labels = engine.planner.labels(base)
    scopes = {label: number for number, label in enumerate(dict.fromkeys(labels.values()), start=1)}
    # Distributed checkpoints load only what the state has after a step on zeros, which is not counted.
    stepped = bool(engine.directions) or bool(totals.any()) or len(engine.scopes.statistics) > 0
    totals = totals.cpu()
    keys = _keys(state)
    stateful = {key for key in keys if entries.get(key)}
    # Optimizers treat an existing entry as initialised. So if the base keeps state, a parameter without a step gets no
    # entry, and the base alone can load the result. Such a parameter has no direction, or one of zeros from a skipped
    # step. If all steps were skipped, the base may keep state from its first one on.
    only_skipped = not stateful and not totals[0] and bool(totals[1])
    for key, parameter in zip(keys, all_parameters(base), strict=True) if stepped and not only_skipped else ():
        direction = engine.directions.get(parameter)
        if stateful and key not in stateful and (direction is None or not bool(direction.any())):
            continue
        label = labels[parameter]
        step = _step_of(entries.get(key, {}))
        own = {COUNTERS: make_counters(totals, engine.scopes.export(label), scopes[label], step)}
        if direction is not None:
            own[DIRECTION] = as_dtensor(direction, parameter)
        entries[key] = {**entries.get(key, {}), **own}
    return {**state, "state": entries}


def load(state: dict[str, Any], base: Optimizer, engine: Engine) -> Tensor:
    """Load a state dict into the base and the engine, or change neither.

    Returns:
        Tensor [2]: steps and skipped steps.

    Raises:
        ValueError: groups or shapes differ, an entry is damaged, or the format is newer.
        Exception: any other error that the base raises if its own part is damaged.

    Warns:
        UserWarning: the state is from a plain base optimizer that has stepped, or has a direction of another kind than
            the engine (none, its own, or the base's momentum), or one of other scopes. The direction and its statistics
            are then dropped.
    """
    rest, own = _split(state, base, engine)
    before: dict[str, Any] = {name: vars(base)[name] for name in ("state", "param_groups") if name in vars(base)}
    try:
        base.load_state_dict(rest)
    except BaseException as error:
        vars(base).update(before)  # torch's loader may fail after it replaced both
        if isinstance(error, (LookupError, TypeError, AttributeError)):
            raise ValueError(f"{type(base).__name__} cannot load its part of the state: {error!r}") from error
        raise
    return _restore(own, base, engine)


def _split(state: dict[str, Any], base: Optimizer, engine: Engine) -> tuple[dict[str, Any], _Own]:
    """Split a state dict into the base's part and GradGuide's, and check both. Nothing is changed."""
    check_groups(state, base)
    parameters = all_parameters(base)
    names = engine.planner.names
    of_key = dict(zip(_keys(state), parameters, strict=True))
    which = {key: f"parameter {names.get(p, f'number {position}')}" for position, (key, p) in enumerate(of_key.items())}
    directions: dict[Tensor, Tensor] = {}
    counters: dict[Tensor, Tensor] = {}
    rest: dict[Any, Any] = {}
    # In a model of several dtypes, the base's loader leaves the entries of float64 parameters as they were.
    stale = any(isinstance(entry, Mapping) and passed_through_base(entry) for entry in state["state"].values())
    stepped_alone = False
    for key, entry in state["state"].items():
        if not isinstance(entry, Mapping):
            rest[key] = entry
            continue
        parameter = of_key.get(key)
        own = own_names(entry)
        check_own_keys(own, which.get(key))
        others = _without(own, entry)
        # An entry with only own keys was not in the base's state.
        if others or not own:
            rest[key] = others
        if parameter is None:
            continue
        check_base_entry(base, others, parameter, which[key])
        if stale:
            continue
        if COUNTERS in own:
            read = read_counters(entry[COUNTERS], which[key])
            check_counters(read, counters.values(), which[key])
            counters[parameter] = read
            # Casts do not show in float64.
            stepped_alone |= parameter.dtype == torch.float64 and _step_of(others) > float(read[BASE_STEP]) > 0
        if DIRECTION in own:
            check_direction(entry[DIRECTION], parameter, which[key])
            directions[parameter] = entry[DIRECTION]
    if stepped_alone:
        directions, counters = {}, {}
    if engine.rules.active and (rest or stale) and not counters:
        warnings.warn(
            "this is the state of a plain base optimizer: its own state is loaded, and GradGuide's direction and "
            "counters start from zero. If GradGuide saved it, torch loaded it with flatten_optimizer_state_dict=True, "
            "which leaves out what the base lacks: load it without that",
            UserWarning,
            stacklevel=5,
        )
    saved, kind = _saved_kind(directions, counters), _kind(engine)
    dropped = None
    if saved not in (_NONE, kind):
        default = ", the default since version 0.3" if kind == _NONE else ""
        dropped = f"this optimizer has direction={kind}{default}. Pass direction={saved} to continue with it"
    elif saved != _NONE and not _same_scopes(counters, engine.planner.labels(base)):
        dropped = "other parameters share a scope here. Pass the scope= that it was saved with to continue with it"
    if dropped is not None:
        directions = {}
        for numbers in counters.values():
            statistics_of(numbers).zero_()
        warnings.warn(f"the state has {_DROPPED[saved]} dropped: {dropped}", UserWarning, stacklevel=5)
    return {**state, "state": rest}, _Own(_allocate_directions(directions), counters)


def _without(names: set[str], entry: Any) -> Any:
    return {name: value for name, value in entry.items() if name not in names} if names else entry


def _kind(engine: Engine) -> str:
    return _NONE if engine.rules.direction is None else _SHARED if engine.rules.share_momentum else _OWN


def _saved_kind(directions: dict[Tensor, Tensor], counters: dict[Tensor, Tensor]) -> str:
    """Return the kind of direction that a state is of. All statistics are of the direction."""
    if directions:
        return _OWN
    return _SHARED if any(bool(statistics_of(numbers).any()) for numbers in counters.values()) else _NONE


def _same_scopes(counters: dict[Tensor, Tensor], labels: Mapping[Tensor, Label]) -> bool:
    """Return whether the same parameters share a scope as when the counters were saved, if these tell."""
    pairs = {(int(numbers[SCOPE]), labels[p]) for p, numbers in counters.items() if numbers[SCOPE] > 0}
    return len(pairs) == len({number for number, _ in pairs}) == len({label for _, label in pairs})


def _step_of(entry: Any) -> float:
    """Return the base's own count of steps in the entry of a parameter; 0 if there is none."""
    step = entry.get("step") if isinstance(entry, Mapping) else None
    try:
        found = 0.0 if step is None else float(local(step.detach()) if isinstance(step, Tensor) else step)
    except (RuntimeError, TypeError, ValueError):  # several numbers, a tensor subclass without data, damage
        return 0.0
    return found if 0.0 < found < math.inf else 0.0


def _allocate_directions(directions: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Copy the local part of each direction into one block of memory."""
    copies = dict(zip(directions, allocate_contiguous([local(p) for p in directions], torch.float32), strict=True))
    for parameter, direction in directions.items():
        copies[parameter].copy_(to_layout(direction.detach(), parameter))
    return copies


def _restore(own: _Own, base: Optimizer, engine: Engine) -> Tensor:
    engine.directions = own.directions
    engine.planner.invalidate()
    labels = engine.planner.labels(base)
    engine.scopes.restore({labels[parameter]: statistics_of(numbers) for parameter, numbers in own.counters.items()})
    return next(iter(own.counters.values()), torch.zeros(HEAD, dtype=torch.float64))[1:HEAD].clone()


def _keys(state: dict[str, Any]) -> list[Any]:
    """Return the keys of the parameters in a state dict, in the order of the groups."""
    return [key for group in state["param_groups"] for key in group["params"]]
