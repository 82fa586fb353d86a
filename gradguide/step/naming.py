"""Names and scopes of an optimizer's parameters, including parameters that ``fully_shard`` replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradguide.distributed.resharded import find_sharded
from gradguide.step.buckets import Scope, scope_labeler
from gradguide.utils.names import Names, NamesLike, names_in_groups

__all__ = ["extend_names", "resolve_names"]

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
