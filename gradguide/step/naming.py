"""Names and scopes of an optimizer's parameters, including parameters that ``fully_shard`` replaced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradguide.distributed.resharded import find_sharded
from gradguide.sources.protocol import Source
from gradguide.step.buckets import Label, Scope, scope_labeler
from gradguide.step.engine import Engine
from gradguide.utils.names import Names, NamesLike, names_in_groups

__all__ = ["extend_names", "resolve_names", "set_names"]

Groups = Sequence[Mapping[str, Any]]


def resolve_names(groups: Groups, names: NamesLike | None, scope: Scope) -> tuple[Names, Scope]:
    """Return names and scope of the parameters in the groups.

    Args:
        groups: param groups of the base optimizer, which may contain names.
        names, scope: as given to :class:`gradguide.GradGuide`.

    Raises:
        TypeError, ValueError: names or scope have an unsupported form, or a replaced parameter is ambiguous.
    """
    if isinstance(scope, Mapping):
        for key in scope:
            if not isinstance(key, Tensor):
                raise TypeError(f"scope must map parameters (tensors) to labels, found the key {key!r}")
    known = Names(names if names is not None else names_in_groups(groups))
    known.of(p for group in groups for p in group["params"])
    replaced = find_sharded([*known.found, *(scope if isinstance(scope, Mapping) else ())], groups)
    known.replace(replaced)
    if isinstance(scope, Mapping):
        scope = {replaced.get(p, p): label for p, label in scope.items()}
    scope_labeler(scope, known.found)
    return known, scope


def extend_names(known: Names, given: NamesLike | None, groups: Groups) -> Names:
    """Add the names in ``given`` and return all names of the parameters in the groups.

    Raises:
        TypeError, ValueError: see :func:`resolve_names`.
    """
    extended = known.merged(given)
    extended.replace(find_sharded(extended.found, groups))
    return extended


def set_names(engine: Engine, names: Names, sources: Sequence[Source], base: Optimizer) -> None:
    """Replace the names, and the sources that match them. With ``scope="module"`` names change the scopes.

    A scope that keeps its parameters keeps its statistics. Others start from zero, and their directions too. The
    warning comes last, because it may be raised as an error.

    Warns:
        UserWarning: a scope that has statistics has other parameters now.
    """
    before = engine.planner.labels(base)
    engine.planner.set_names(names, base)
    engine.planner.set_sources(sources, base)
    after = engine.planner.labels(base)
    if before == after:
        return
    statistics = {label: engine.scopes.export(label).cpu() for label in before.values()}
    begun = [p for p, label in before.items() if statistics[label].any()]
    earlier, present = _members(begun, before), _members(begun, after)
    same = (label for label, held in present.items() if earlier[before[begun[held[0]]]] == held)
    kept = {label: statistics[before[begun[present[label][0]]]] for label in same}
    lost = [p for p in begun if after[p] not in kept]
    for p in lost:
        engine.directions.pop(p, None)
    engine.scopes.restore(kept)
    if lost:
        warnings.warn(
            f"the new names change the scopes of {len(lost)} parameters, such as {names.found.get(lost[0])}: their "
            "direction starts from zero. Give names=model when GradGuide is made",
            UserWarning,
            stacklevel=3,
        )


def _members(parameters: Sequence[Tensor], labels: Mapping[Tensor, Label]) -> dict[Label, list[int]]:
    """Return the positions of the parameters of each scope."""
    found: dict[Label, list[int]] = {}
    for position, parameter in enumerate(parameters):
        found.setdefault(labels[parameter], []).append(position)
    return found
