"""Names and scopes of an optimizer's parameters, also where ``fully_shard`` replaced the named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradguide.distributed.resharded import find_sharded
from gradguide.step.buckets import Scope, scope_labeler
from gradguide.utils.names import Names, NamesLike, carried

__all__ = ["extend_names", "resolve_names"]

Groups = Sequence[Mapping[str, Any]]


def resolve_names(groups: Groups, names: NamesLike | None, scope: Scope) -> tuple[Names, Scope]:
    """Return names and scope for the parameters that the groups hold.

    Args:
        groups: param groups of the base optimizer, which may carry names themselves.
        names, scope: as given to :class:`gradguide.GradGuide`.

    Raises:
        TypeError, ValueError: names or scope are of another form, or a replaced parameter cannot be told for certain.
    """
    held = [dict(group) for group in groups]
    known = Names(names if names is not None else carried(held))
    known.of(p for group in held for p in group["params"])
    replaced = find_sharded([*known.found, *(scope if isinstance(scope, Mapping) else ())], held)
    known.replace(replaced)
    if isinstance(scope, Mapping):
        scope = {replaced.get(p, p): label for p, label in scope.items()}
    scope_labeler(scope, known.found)
    return known, scope


def extend_names(known: Names, given: NamesLike | None, groups: Groups) -> Names:
    """Return the names with those of ``given`` added, for the parameters that the groups hold.

    Raises:
        TypeError, ValueError: as :func:`resolve_names`.
    """
    extended = known.merged(given)
    extended.replace(find_sharded(extended.found, [dict(group) for group in groups]))
    return extended
