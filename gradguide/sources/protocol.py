"""Define the interface of a source: it returns the source-task gradient at the current parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradguide.distributed.layouts import Layout
from gradguide.ops.row import Row

__all__ = ["Source", "row_or_zeros", "sources_of"]


@runtime_checkable
class Source(Protocol):
    """A source-task gradient over named parameters.

    A source may also have an attribute ``drift`` (Tensor [] or None): the modelled KL at the last step, in nats per
    token. It is read for ``metrics()["source_drift"]`` only.
    """

    @property
    def weight(self) -> float:
        """Default weight of the pull.

        A source with another weight than 0 is not projected, unless ``Alignment(project=True)`` says so: it pulls back
        to an anchor, and any step away from an anchor conflicts with it.
        """
        ...

    def shapes(self) -> dict[str, torch.Size] | None:
        """Return the shape of each parameter that the source covers, by name; None if it covers any parameter."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of all that determines the rows. It must be the same on all ranks, or they diverge."""
        ...

    def shards(self, layouts: Mapping[str, Layout]) -> Source:
        """Return the source for this rank's shards of the parameters, whose layouts are given by name."""
        ...

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Update the source for the current parameters. Called before each step.

        Args:
            parameters: the guided parameters, by name.
            trained: all trained parameters. Their gradients must not change.
        """
        ...

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """Return the source-task gradient for the parameters ``names``, whose values are ``at``, on their device."""
        ...


def row_or_zeros(parts: Mapping[str, Tensor], names: Sequence[str], at: Sequence[Tensor]) -> Row:
    """Return a row of the parts of ``names``; zeros in the shape of the parameter in ``at`` for a name without one."""
    pairs = zip(names, at, strict=True)
    return Row(offset=[parts[name] if name in parts else torch.zeros_like(p) for name, p in pairs])


def sources_of(source: Source | Sequence[Source]) -> tuple[Source, ...]:
    """Return one source or several as a tuple.

    Raises:
        TypeError: an element does not implement :class:`Source`.
    """
    sources = tuple(source) if isinstance(source, Sequence) else (source,)
    for each in sources:
        if not isinstance(each, Source):
            raise TypeError(f"source must be a SourceGradient or the like, found {type(each).__name__}")
    return sources
