"""The plan of a step: buckets and backends, reused until parameters change, and the passes over the buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradguide import ops
from gradguide.distributed.layouts import all_reduce_sum
from gradguide.distributed.ranks import Ranks
from gradguide.ops import Row, Stack, Write
from gradguide.ops.allocate import allocate_contiguous
from gradguide.ops.tensors import MetadataCache, TensorList, metadata_of, wide_dtype
from gradguide.rules import decide as reference
from gradguide.rules.span import Span
from gradguide.sources.protocol import Source
from gradguide.sources.stored import SourceGradient
from gradguide.step.adam_bound.device import DeviceAdamBound
from gradguide.step.adam_bound.host import AdamBound
from gradguide.step.buckets import Bucket, Label

__all__ = ["Rows", "StepPlan"]

_UNSIGNED = slice(0, 0)
"""No row has a sign. For the update pass: the base's update already has its sign."""

Rows = list[Stack]
"""The R rows of each bucket."""


@dataclass(slots=True)
class PlanCache:
    """Values computed once per plan and discarded with it.

    metadata: metadata of lists of the base's state and of sources.
    stored: the row of each stored source, by id, and bucket. Its tables never change, and the plan holds the source.
    directions: the running directions of each bucket.
    snapshots: memory for a copy of each bucket's parameters.
    positions (Tensor): indices into the scopes' statistics.
    elements: number of elements of each scope.
    element_counts (Tensor): the same on the device; None with Triton.
    adam_bound, device_adam_bound: the proof that a step of Adam is within the bound of the update.
    """

    metadata: MetadataCache = field(default_factory=MetadataCache)
    stored: dict[tuple[int, int], Row] = field(default_factory=dict)
    directions: list[TensorList] | None = None
    snapshots: list[TensorList] | None = None
    positions: Tensor | None = None
    elements: list[int] | None = None
    element_counts: Tensor | None = None
    adam_bound: AdamBound = field(default_factory=AdamBound)
    device_adam_bound: DeviceAdamBound = field(default_factory=DeviceAdamBound)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Parameters, scopes, sources and backends of one step.

    buckets: parameters with this step's gradients.
    labels: labels of the S scopes.
    sources: all sources, restricted to this rank's shards.
    device: device of the summed Gram matrices.
    backends: the backend of each bucket.
    uses_triton (bool): whether the rules also run as Triton kernels.
    rounding: relative error of products, see ``gradguide.ops.rounding``.
    largest: largest number that the dtype of every gradient can hold.
    """

    buckets: list[Bucket]
    labels: list[Label]
    sources: Sequence[Source]
    device: torch.device
    ranks: Ranks
    backends: Sequence[ops.Ops]
    uses_triton: bool
    rounding: float
    largest: float
    cache: PlanCache = field(default_factory=PlanCache)

    def with_gradients(self, gradients: Sequence[Any] | None) -> StepPlan:
        """Return the plan with new gradients of the same metadata, by position. None removes the gradients."""
        buckets = []
        for bucket in self.buckets:
            metadata = bucket.gradients.metadata
            found = [] if gradients is None else list(map(gradients.__getitem__, bucket.positions))
            buckets.append(replace(bucket, gradients=TensorList(found, metadata)))
        return replace(self, buckets=buckets)

    @property
    def sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return self.ranks.sharded

    @property
    def on_cpu(self) -> bool:
        """Whether all parameters are whole and on a CPU, where the host reads values without synchronizing."""
        return not self.sharded and all(bucket.values[0].device.type == "cpu" for bucket in self.buckets)

    @property
    def rules_backend(self) -> ModuleType:
        """The Triton rules if the plan uses Triton, else the PyTorch reference."""
        if not self.uses_triton:
            return reference
        from gradguide.rules.triton import decide

        return decide

    def signs(self, size: int, signed: slice) -> list[Tensor | None]:
        """Return the signs of each bucket's rows: Tensor [size], -1 at ``signed``; None if all are 1.

        Gradients and running directions are stored as received. In a group that maximizes, the step descends along the
        negative gradient. There the ``signed`` rows (sources, the base's momentum), which belong to the descended
        gradient, have the opposite sign. So all rows of a scope refer to one descent.
        """
        if all(bucket.sign > 0 for bucket in self.buckets):
            return [None] * len(self.buckets)
        signs = torch.ones(size, dtype=wide_dtype(self.device), device=self.device)
        signs[signed] = -1.0
        return [None if bucket.sign > 0 else signs for bucket in self.buckets]

    def gram(self, rows: Rows, size: int, signed: slice = _UNSIGNED) -> Span:
        """Return the Gram matrices [S, size, size] of the scopes, summed over buckets and over shards on all ranks.

        Args:
            signed: rows multiplied by the sign of their bucket, see :meth:`signs`.
        """
        parts: dict[tuple[Any, ...], Tensor] = {}
        signs_of = self.signs(size, signed)
        for bucket, backend, these, signs in zip(self.buckets, self.backends, rows, signs_of, strict=True):
            part = backend.gram(these).to(self.device)
            part = part if signs is None else part * signs.outer(signs)
            parts[bucket.reduce_groups] = parts[bucket.reduce_groups] + part if bucket.reduce_groups in parts else part
        shape, wide = (len(self.labels), size, size), wide_dtype(self.device)
        whole = {
            groups: parts[groups] if groups in parts else torch.zeros(shape, dtype=wide, device=self.device)
            for groups in self.ranks.groups  # the same order on all ranks, even if some lack gradients
        }
        return Span(all_reduce_sum(whole), self.rounding, self.largest)

    def combine_(self, rows: Rows, writes: Sequence[Sequence[Write]], signed: slice = _UNSIGNED) -> None:
        """Write combinations of the rows of each bucket. ``signed`` as in :meth:`gram`."""
        size = max((write.coefficients.shape[1] for each in writes for write in each), default=0)
        signs_of = self.signs(size, signed)
        for bucket, backend, these, wanted, signs in zip(
            self.buckets, self.backends, rows, writes, signs_of, strict=True
        ):
            device = bucket.values[0].device
            if signs is not None:
                wanted = [replace(write, coefficients=write.coefficients * signs) for write in wanted]
            if device != self.device:
                wanted = [replace(write, coefficients=write.coefficients.to(device)) for write in wanted]
            backend.combine_(these, wanted)

    @torch.no_grad()
    def snapshot(self) -> list[TensorList]:
        """Copy the parameters of each bucket into memory owned by the plan, and return the copies."""
        if self.cache.snapshots is None:
            copies = [allocate_contiguous(bucket.values) for bucket in self.buckets]
            self.cache.snapshots = [TensorList(each, metadata_of(each)) for each in copies]
        for bucket, copy in zip(self.buckets, self.cache.snapshots, strict=True):
            torch._foreach_copy_(copy, bucket.values)
        return self.cache.snapshots

    def element_counts(self) -> Tensor:
        """Return the number of elements of each scope: Tensor [S], float64."""
        if self.cache.elements is None:
            elements = (bucket.elements for bucket in self.buckets)
            self.cache.elements = list(map(sum, zip([0] * len(self.labels), *elements, strict=True)))
        counts = self.cache.elements
        if self.uses_triton:
            from gradguide.ops.triton.launch import numbers_of

            # The tensor is cached there, because a CUDA graph that reads it may outlive the plan.
            return numbers_of(self.device, counts)
        if self.cache.element_counts is None:
            # Filled on the device: a copy from the host would synchronize.
            parts = [torch.full((1,), count, dtype=wide_dtype(self.device), device=self.device) for count in counts]
            self.cache.element_counts = torch.cat(parts)
        return self.cache.element_counts

    def source_rows(
        self, sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor], stage: str
    ) -> list[Row | None]:
        """Return the rows of the source gradients of a bucket at parameters ``at``; None in a bucket without names."""
        if not bucket.names:
            return [None] * len(sources)
        found: list[Row | None] = []
        for source in sources:
            # Alignment and regularizer pass different sources, so an index would not identify one.
            key = id(source), bucket.positions[0]
            row = self.cache.stored.get(key)
            if row is None:
                row = self._with_metadata(source.row(bucket.names, at), (stage, *key), at)
                if _is_stored(type(source)):
                    self.cache.stored[key] = row
            elif row.at is not None:
                row = replace(row, at=at)
            found.append(row)
        return found

    def _with_metadata(self, row: Row, key: tuple[Any, ...], at: Sequence[Tensor]) -> Row:
        parts = {
            name: part if part is None or part is at else self.cache.metadata.of((*key, name), part)
            for name, part in zip(("offset", "scale", "anchor"), (row.offset, row.scale, row.anchor), strict=True)
        }
        return replace(row, **parts)


def _is_stored(kind: type[Source]) -> bool:
    """Return whether the rows of sources of this type do not change between steps, except for the parameters."""
    return kind.row is SourceGradient.row and kind.refresh is SourceGradient.refresh
