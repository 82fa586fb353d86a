"""Match parameters from before ``fully_shard`` with the DTensors that replaced them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradguide.distributed.layouts import Layout, layout_of, local, shard

__all__ = ["find_sharded"]

SAMPLES = 16


def find_sharded(old: Iterable[Tensor], groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
    """Return, by parameter of ``old``, the DTensor of the optimizer that replaces it.

    ``fully_shard`` creates new parameters and keeps no reference to the old ones. A DTensor replaces a plain tensor of
    its global shape with the same values in this rank's shard. If several have the same values (zeros, ones), the order
    decides, provided that only one assignment preserves the order of ``old``. There is no communication.

    Args:
        old: named or labelled parameters, in the model's order.
        groups: param groups of the optimizer.

    Raises:
        ValueError: a DTensor could replace several parameters, or its values match no parameter of its shape.
    """
    held = [list(group["params"]) for group in groups]
    previous, there = dict.fromkeys(old), set(chain.from_iterable(held))
    left = [p for p in previous if p not in there and layout_of(p) is None]
    shapes = {p.shape for p in left}
    new = [[p for p in group if p.shape in shapes and p not in previous and layout_of(p) is not None] for group in held]
    everything = list(chain.from_iterable(new))
    candidates = _candidates(everything, left)
    # Param groups may have another order than the model, such as those with and without weight decay.
    for sequence in (everything, *new):
        _resolve_by_order(candidates, sequence)
    _check_unique(candidates, left)
    return {left[index]: p for p, indices in candidates.items() for index in indices}


class _Kind(NamedTuple):
    shape: torch.Size
    layout: Layout | None
    dtype: torch.dtype


def _candidates(new: Sequence[Tensor], old: Sequence[Tensor]) -> dict[Tensor, list[int]]:
    """Return for each of ``new`` the indices in ``old`` of tensors with the same values in this rank's shard."""
    kinds = {p: _Kind(p.shape, layout_of(p), p.dtype) for p in new}
    by_sample: dict[tuple[_Kind, tuple[float, ...] | None], list[int]] = {}
    for kind in dict.fromkeys(kinds.values()):
        for index, q in enumerate(old):
            if q.shape == kind.shape:
                by_sample.setdefault((kind, _sample(_part(q, kind))), []).append(index)
    candidates = {}
    for p, kind in kinds.items():
        mine = local(p).detach()
        # Parameters on the meta device have no values to compare.
        alike = [*by_sample.get((kind, _sample(mine)), []), *by_sample.get((kind, None), [])]
        candidates[p] = [index for index in dict.fromkeys(alike) if _equal(mine, _part(old[index], kind))]
    return candidates


def _resolve_by_order(candidates: dict[Tensor, list[int]], sequence: Iterable[Tensor]) -> None:
    """Replace the candidates of a sequence by the assignment with increasing indices, if there is exactly one."""
    named = [p for p in sequence if candidates[p]]
    first: list[int] = []
    for p in named:
        later = [index for index in candidates[p] if not first or index > first[-1]]
        if not later:
            return
        first.append(min(later))
    last: list[int] = []
    for p in reversed(named):
        last.append(max(index for index in candidates[p] if not last or index < last[-1]))
    if first == last[::-1]:
        candidates.update((p, [index]) for p, index in zip(named, first, strict=True))


def _check_unique(candidates: dict[Tensor, list[int]], left: Sequence[Tensor]) -> None:
    """Raise ValueError unless each DTensor has one candidate that no other has, or none and needs none."""
    taken = Counter(chain.from_iterable(candidates.values()))
    unmatched = {p.shape for index, p in enumerate(left) if index not in taken}
    for p, indices in candidates.items():
        # A DTensor without candidates has no name. It is ambiguous if a named parameter of its shape is unmatched.
        unique = len(indices) == 1 and taken[indices[0]] == 1 if indices else p.shape not in unmatched
        if not unique:
            raise ValueError(
                "names or scopes hold parameters from before fully_shard, and it is not certain which of them the "
                f"DTensor of shape {tuple(p.shape)} in the optimizer replaces: give names=model, the sharded model, "
                "or scopes of its parameters"
            )


def _part(whole: Tensor, kind: _Kind) -> Tensor:
    """Return this rank's part of a parameter from before sharding, in the dtype of the DTensor."""
    assert kind.layout is not None
    return shard(whole.detach(), kind.layout).to(kind.dtype)


def _sample(part: Tensor) -> tuple[float, ...] | None:
    """Return a few elements as a hash key, to avoid most full comparisons; None on the meta device."""
    if part.is_meta:
        return None
    flat = part.reshape(-1)
    return tuple(flat[:: max(1, flat.numel() // SAMPLES)].tolist())


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    return theirs.is_meta or torch.equal(mine, theirs.to(mine.device))
