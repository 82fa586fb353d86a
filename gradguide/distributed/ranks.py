"""Read layouts, and compare options over ranks. ``gradguide.distributed`` lists what a step communicates."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradguide.distributed.agreement import check_agreement
from gradguide.distributed.layouts import Layout, check_divided, is_distributed, layout_of, local

__all__ = ["Ranks", "replica_groups"]


class Ranks:
    """Layouts and process groups of the parameters. No effect in a single process."""

    def __init__(self) -> None:
        self.groups: list[tuple[Any, ...]] = [()]
        self.sharded = False  # whether any parameter is a DTensor
        self.replicas: tuple[Any, ...] = (None,)  # of the last comparison; see replica_groups
        self._meshes: list[Any] = []
        self._agreed: list[Any] | None = None  # meshes of the last comparison

    @property
    def agreed(self) -> bool:
        """Whether the ranks were compared after the last change of options."""
        return self._agreed is not None

    def update_layouts(self, parameters: Sequence[Tensor]) -> None:
        """Read the layouts of the parameters over ranks. Wrappers may change them between steps.

        Raises:
            ValueError: FSDP1 shards the parameters.
        """
        check_divided(parameters)
        layouts = [layout_of(p) for p in parameters]
        self.groups = list(dict.fromkeys(() if lay is None else lay.reduce_groups for lay in layouts)) or [()]
        self.sharded = any(lay is not None for lay in layouts)
        self._meshes = _meshes(layouts)

    def check_agreement(self, parameters: Sequence[Tensor], describe_options: Callable[[], Mapping[str, str]]) -> None:
        """Compare options over the ranks that share the parameters, once per set of meshes.

        This runs before every other collective of a step, since ranks with different options could deadlock there.
        Ranks share DTensors and the parameters of DistributedDataParallel.

        Args:
            parameters: all trained parameters.
            describe_options: returns the values that must be equal on all ranks, by name.

        Raises:
            ValueError: the ranks differ. It is raised on every rank.
        """
        if self._agreed is not None and list(map(id, self._agreed)) == list(map(id, self._meshes)):
            return
        # All dimensions of a mesh: replicas of a shard must agree too.
        groups = [mesh.get_group(dim) for mesh in self._meshes for dim in range(mesh.ndim)]
        self.replicas = replica_groups(parameters)
        groups = groups or [group for group in self.replicas if group is not None]
        if groups:
            check_agreement(describe_options(), groups, local(parameters[0]).device)
        self._agreed = self._meshes

    def layouts(self, parameters: Sequence[Tensor], names: Mapping[Tensor, str]) -> dict[str, Layout]:
        """Return the layouts of the named parameters that are DTensors."""
        if not self.sharded:
            return {}
        known = {names[p]: layout_of(p) for p in parameters if p in names}
        return {name: layout for name, layout in known.items() if layout is not None}


def replica_groups(parameters: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the process groups that together connect the ranks of the parameters. None is the default group.

    DTensors have the ranks of their largest mesh, which may be fewer than all.
    """
    meshes = _meshes([layout_of(p) for p in parameters])
    return tuple(meshes[0].get_all_groups()) if meshes else (_ddp_group(parameters),)


def _meshes(layouts: Iterable[Layout | None]) -> list[Any]:
    """Return the meshes of some layouts, the largest first: the order of the parameters may differ between ranks."""
    meshes = {id(layout.mesh): layout.mesh for layout in layouts if layout is not None}
    return sorted(meshes.values(), key=lambda mesh: -mesh.size())


def _ddp_group(parameters: Sequence[Tensor]) -> Any:
    """Return the process group of the DistributedDataParallel module that contains the parameters, if any.

    Parameters do not reference the module. The garbage collector finds its parameter list in about 0.1 s.
    """
    first = next((p for p in parameters if p.requires_grad), None)
    if first is None or not is_distributed():
        return None
    lists = [holder for holder in gc.get_referrers(first) if type(holder) is list]
    for holder in gc.get_referrers(*lists) if lists else []:
        # The referrer is the module or its __dict__.
        attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        held = attributes.get("_module_parameters")
        if any(held is each for each in lists) and "process_group" in attributes:
            return attributes["process_group"]
    return None
