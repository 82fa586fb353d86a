"""Products of rows that do not change: taken once, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradguide.ops.row import Row, Stack, sizes_of

if TYPE_CHECKING:
    from gradguide.ops import Ops

__all__ = ["FixedProducts"]

_MOST = 16
"""Of how many lists of rows products are kept: a step has one for each precision and device."""


class FixedProducts:
    """Of K stored sources without curvature, K² products are the same at every step: only those with gradient and
    direction are left to take, about 3 K in place of K² / 2."""

    def __init__(self) -> None:
        # The lists themselves are kept, so that no other list can come to have their identity.
        self._kept: OrderedDict[Hashable, tuple[list[Sequence[Tensor]], Tensor]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has lists of its own.
        return {"_kept": OrderedDict()}

    def gram(self, ops: Ops, rows: Sequence[Row | None]) -> Tensor:
        """Gram matrices of the rows: Tensor [S, R, R]."""
        places = [index for index, row in enumerate(rows) if row is not None and row.fixed]
        if len(places) < 2:
            return ops.gram(rows)
        lists = [row.offset for row in rows if row is not None and row.fixed and row.offset is not None]
        sizes = tuple(sizes_of(rows))
        key = (sizes, len(rows), *places, *map(id, lists))
        known = self._kept.get(key)
        if known is None:
            shape = len(sizes), len(rows), len(rows)
            block = torch.zeros(shape, dtype=torch.float64, device=lists[0][0].device)
            only = ops.gram(Stack([rows[index] for index in places], sizes))
            for line, index in enumerate(places):
                for column, other in enumerate(places):
                    block[:, index, other] = only[:, line, column]
            known = self._kept[key] = lists, block
            # A change in which parameters have gradients makes new lists, and the old ones never come again.
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        found = ops.gram(rows, frozenset(places))
        # A backend may have taken them all the same.
        return torch.where(known[1] != 0, known[1].to(found), found)
