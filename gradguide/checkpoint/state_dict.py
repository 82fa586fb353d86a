"""Add GradGuide's own tensors to the base's state dict on save, and extract them on load.

They are stored in the entries of their parameters, because distributed checkpoints keep only those. They are extracted
before the base loads, because loading casts floating-point state to the parameter's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.checkpoint.entries import (
    COUNTERS,
    DIRECTION,
    HEAD,
    SCOPE,
    SOURCES,
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
    totals, sources = totals.cpu(), len(engine.planner.sources)
    keys = _keys(state)
    stateful = {key for key in keys if entries.get(key)}
    # Optimizers treat an existing entry as initialised. So if the base keeps state, a parameter without a step gets no
    # entry, and the base alone can load the result. Such a parameter has no direction, or one of zeros from a skipped
    # step.
    for key, parameter in zip(keys, all_parameters(base), strict=True) if stepped else ():
        direction = engine.directions.get(parameter)
        if stateful and key not in stateful and (direction is None or not bool(direction.any())):
            continue
        label = labels[parameter]
        own = {COUNTERS: make_counters(totals, engine.scopes.export(label), sources, scopes[label])}
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
        UserWarning: the state is from a plain base optimizer that has stepped. Or it has a direction of another kind
            than the engine (its own, or the base's momentum) or of other scopes, which is dropped with its statistics.
            Or it was saved with sources, and the engine has none.
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
    names = engine.planner.names
    of_key = dict(zip(_keys(state), all_parameters(base), strict=True))
    which = {key: f"parameter {names.get(p, f'number {position}')}" for position, (key, p) in enumerate(of_key.items())}
    rest = dict(state["state"])
    entries = {key: entry for key, entry in rest.items() if isinstance(entry, Mapping)}
    # In a model of several dtypes, the base's loader leaves the entries of float64 parameters as they were.
    stale = any(map(passed_through_base, entries.values()))
    own = _Own({}, {})
    for key, entry in entries.items():
        own_keys = own_names(entry)
        check_own_keys(own_keys, which.get(key))
        rest[key] = others = _without(own_keys, entry)
        if own_keys and not others:  # such an entry was not in the base's state
            del rest[key]
        if key in of_key:
            check_base_entry(base, others, of_key[key], which[key])
            if not stale:
                _read(own, entry, of_key[key], which[key])
    stepped = stale or any(map(_has_stepped, rest.values()))
    if engine.rules.active and stepped and not own.counters:
        warnings.warn(
            "this is the state of a plain base optimizer: its own state is loaded, and GradGuide's direction and "
            "counters start from zero. If GradGuide saved it, torch loaded it with flatten_optimizer_state_dict=True, "
            "which leaves out what the base lacks: load it without that",
            UserWarning,
            stacklevel=5,
        )
    _drop_other_kind(own, engine, base)
    _warn_without_sources(own, engine)
    return {**state, "state": rest}, _Own(_allocate_directions(own.directions), own.counters)


def _read(own: _Own, entry: Mapping[str, Any], parameter: Tensor, which: str) -> None:
    """Check the own tensors in the entry of a parameter, and add them to ``own``."""
    if COUNTERS in entry:
        counters = read_counters(entry[COUNTERS], which)
        check_counters(counters, own.counters.values(), which)
        own.counters[parameter] = counters
    if DIRECTION in entry:
        check_direction(entry[DIRECTION], parameter, which)
        own.directions[parameter] = entry[DIRECTION]


def _drop_other_kind(own: _Own, engine: Engine, base: Optimizer) -> None:
    """Remove direction and statistics, with a warning, if their kind or scopes are not those of the engine."""
    saved, kind = _saved_kind(own), _kind(engine)
    if saved == _NONE:
        return
    if saved != kind:
        default = ", the default since version 0.3" if kind == _NONE else ""
        reason = f"this optimizer has direction={kind}{default}. Pass direction={saved} to continue with it"
    elif not _same_scopes(own.counters, engine.planner.labels(base)):
        reason = "other parameters share a scope here. Pass the scope= that it was saved with to continue with it"
    else:
        return
    own.directions.clear()
    for counters in own.counters.values():
        statistics_of(counters).zero_()
    warnings.warn(f"the state has {_DROPPED[saved]} dropped: {reason}", UserWarning, stacklevel=6)


def _warn_without_sources(own: _Own, engine: Engine) -> None:
    saved = max((int(counters[SOURCES]) for counters in own.counters.values()), default=0)
    if saved and not engine.planner.sources:
        warnings.warn(
            f"the state was saved with {saved} source{'s' * (saved > 1)}, and this optimizer has none: nothing keeps "
            "what the model knew. Checkpoints contain no sources: pass alignment=Alignment(source) before loading",
            UserWarning,
            stacklevel=6,
        )


def _without(names: set[str], entry: Any) -> Any:
    return {name: value for name, value in entry.items() if name not in names} if names else entry


def _has_stepped(entry: Any) -> bool:
    """Return whether a base has stepped, by the entry of a parameter. Adagrad has entries before its first step."""
    step = entry.get("step") if isinstance(entry, Mapping) else None
    if not isinstance(step, Tensor):
        return True
    try:
        return bool(step.any())
    except RuntimeError:  # a tensor without data, which the base may refuse
        return True


def _kind(engine: Engine) -> str:
    return _NONE if engine.rules.direction is None else _SHARED if engine.rules.share_momentum else _OWN


def _saved_kind(own: _Own) -> str:
    """Return the kind of direction that a state is of. All statistics are of the direction."""
    if own.directions:
        return _OWN
    return _SHARED if any(bool(statistics_of(counters).any()) for counters in own.counters.values()) else _NONE


def _same_scopes(counters: Mapping[Tensor, Tensor], labels: Mapping[Tensor, Label]) -> bool:
    """Return whether the same parameters share a scope as when the counters were saved, if these tell."""
    pairs = {(int(numbers[SCOPE]), labels[p]) for p, numbers in counters.items() if numbers[SCOPE] > 0}
    return len(pairs) == len({number for number, _ in pairs}) == len({label for _, label in pairs})


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
