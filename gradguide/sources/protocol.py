"""What a source is: an answer to "what is the source-task gradient at the present parameters?"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradguide.distributed.layouts import Layout
from gradguide.ops.row import Row

__all__ = ["Source", "sources_of"]


@runtime_checkable
class Source(Protocol):
    """A source-task gradient over named parameters."""

    @property
    def weight(self) -> float:
        """Weight of its pull where none is asked for."""
        ...

    def shapes(self) -> dict[str, torch.Size] | None:
        """Shape of each parameter that the source speaks of, by name; None where it answers for any."""
        ...

    def fingerprint(self) -> str:
        """A digest of all that the source answers with: the same on all ranks, or they drift apart."""
        ...

    def shards(self, layouts: Mapping[str, Layout]) -> Source:
        """The same source for this rank's parts of the parameters that lie over ranks as ``layouts`` says."""
        ...

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Called before each step: what is computed anew is computed here.

        Args:
            parameters: those that sources are asked about, by name.
            trained: all that are trained, whose gradients must stay as they are.
        """
        ...

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """The source-task gradient at ``at``, the values of the parameters called ``names``, on their device."""
        ...


def sources_of(source: Source | Sequence[Source]) -> tuple[Source, ...]:
    """One source or several as a tuple.

    Raises:
        TypeError: one of them is none.
    """
    sources = tuple(source) if isinstance(source, Sequence) else (source,)
    for each in sources:
        if not isinstance(each, Source):
            raise TypeError(f"source must be a SourceGradient or the like, found {type(each).__name__}")
    return sources
