"""What a source is: an answer to "what is the source-task gradient at the present parameters?"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradguide.ops.row import Row
from gradguide.sharding import Layout

__all__ = ["Source"]


@runtime_checkable
class Source(Protocol):
    """A source-task gradient over named parameters."""

    @property
    def weight(self) -> float:
        """Weight of its pull where none is asked for."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter that the source speaks of, by name."""
        ...

    def fingerprint(self) -> str:
        """A digest of all that the source answers with: the same on all ranks, or they drift apart."""
        ...

    def shards(self, layouts: Mapping[str, Layout]) -> Source:
        """The same source for this rank's parts of the parameters that lie over ranks as ``layouts`` says."""
        ...

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """The source-task gradient at ``at``, the values of the parameters called ``names``, on their device."""
        ...
