"""What ranks have to do together where parameters are sharded: agree, keep their parts of the sources, add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradguide.sharding import Layout, add_up_, check_agreement, check_divided, layout_of, local
from gradguide.sources.source import Source

__all__ = ["Ranks"]


class Ranks:
    """One process among those that share the parameters; of no effect where nothing is sharded."""

    def __init__(self) -> None:
        self.groups: list[tuple[Any, ...]] = [()]
        self.sharded = False  # whether any parameter is a DTensor
        self._agreed = False
        self._shards: tuple[dict[str, Layout], list[Source]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Process groups end with the processes, and parts of the sources are cut anew.
        return {"groups": [()], "sharded": False, "_agreed": False, "_shards": None}

    def meet(self, parameters: Sequence[Tensor]) -> None:
        """Look at how the parameters lie, each step anew, since wrappers replace them.

        Raises:
            ValueError: they are divided among ranks in a way that cannot be told.
        """
        check_divided(parameters)
        layouts = [layout_of(p) for p in parameters]
        self.groups = list(dict.fromkeys(() if lay is None else lay.summed for lay in layouts)) or [()]
        self.sharded = any(lay is not None for lay in layouts)

    def agree(self, parameters: Sequence[Tensor], told: object, sources: Sequence[Source]) -> None:
        """Before the first sum: whatever differs between ranks is an error on all of them, and no hang.

        Args:
            parameters: all that are trained.
            told: what must be the same on all ranks; its ``repr`` is compared.
            sources: likewise, by their fingerprints.

        Raises:
            ValueError: the ranks differ.
        """
        groups = next((groups for groups in self.groups if groups), None)
        if groups is None or self._agreed:
            return
        fingerprints = [source.fingerprint() for source in sources]
        check_agreement(repr((told, fingerprints)), groups, local(parameters[0]).device)
        self._agreed = True

    def parts_of(
        self, sources: Sequence[Source], parameters: Sequence[Tensor], names: Mapping[Tensor, str]
    ) -> Sequence[Source]:
        """The sources, for this rank's parts of the parameters that have names."""
        if not self.sharded or not sources:
            return sources
        known = {names[p]: layout_of(p) for p in parameters if p in names}
        layouts = {name: layout for name, layout in known.items() if layout is not None}
        if self._shards is None or self._shards[0] != layouts:
            self._shards = layouts, [source.shards(layouts) for source in sources]
        return self._shards[1]

    def add_up(self, parts: dict[tuple[Any, ...], Tensor]) -> Tensor:
        """Sum over ranks and over ``parts``, which has a tensor for each of ``groups``."""
        total = add_up_(parts)
        assert total is not None
        return total
