"""Keep the pull on each parameter in memory that stays in place from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from gradguide.distributed.layouts import layout_of, shard

__all__ = ["Pull", "PullRows"]

Pull: TypeAlias = tuple[Sequence[str], Tensor]
"""The pulls on several parameters of one shape, by name: Tensor [parameters, ...]."""


class PullRows:
    """The pull on each parameter. Of a sharded parameter it is this rank's part.

    Tensors at the same addresses let a plan reuse their metadata, and a few launches fill all of them. The memory is
    allocated again if a name, a shape or the device of a pull changes.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._stacks: list[Tensor] = []
        self._rows: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[PullRows], tuple[()]]:
        # Pickle does not keep views of one tensor together, so a copy allocates its own memory.
        return PullRows, ()

    def update(self, pulls: Sequence[Pull], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the pulls by name. Pulls on the same parameter, which several layers share, are added."""
        names = list(chain.from_iterable(names for names, _ in pulls))
        if len(set(names)) < len(names) or any(layout_of(parameters[name]) is not None for name in names):
            layouts = {name: layout_of(parameters[name]) for name in names}
            rows: dict[str, Tensor] = {}
            for name, pull in ((name, pull) for names, stack in pulls for name, pull in zip(names, stack, strict=True)):
                layout = layouts[name]
                part = pull.contiguous() if layout is None else shard(pull, layout)
                rows[name] = part if name not in rows else rows[name] + part
            return rows
        stacks = [stack for _, stack in pulls]
        key = names, [(stack.shape, stack.device) for stack in stacks]
        if key != self._key:
            self._key, self._stacks = key, [stack.contiguous() for stack in stacks]
            self._rows = dict(zip(names, chain.from_iterable(stack.unbind() for stack in self._stacks), strict=True))
        else:
            torch._foreach_copy_(self._stacks, stacks)
        return self._rows
