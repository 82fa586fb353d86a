"""What a step works on: the parameters that have gradients, by bucket and scope, and the passes over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import ops
from gradguide.buckets import Bucket, Label, Scope, gather, labeller
from gradguide.naming import Names
from gradguide.ops import Row, Stack, Write
from gradguide.ops.fixed import FixedProducts
from gradguide.ops.tensors import Interned
from gradguide.ranks import Ranks
from gradguide.roll import Roll
from gradguide.rules.span import Span
from gradguide.sources.source import Source
from gradguide.sources.stored import SourceGradient

__all__ = ["Rows", "Survey", "Surveyor", "source_rows", "trained_by"]

Rows = list[Stack]
"""For each bucket its R rows."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The parameters of one step.

    labels: of the S scopes.
    sources: all there are, for this rank's parts of the parameters.
    device: where Gram matrices of all scopes come together.
    interned: notes on lists of these parameters' tensors, from earlier steps over the same buckets.
    """

    buckets: list[Bucket]
    labels: list[Label]
    sources: Sequence[Source]
    device: torch.device
    ranks: Ranks
    products: FixedProducts
    interned: Interned
    backend: str

    @property
    def sharded(self) -> bool:
        """Whether any parameter lies over ranks."""
        return self.ranks.sharded

    def gram(self, rows: Rows, size: int) -> Span:
        """Gram matrices [S, size, size] of the scopes, summed over buckets, and of shards over ranks."""
        parts: dict[tuple[Any, ...], Tensor] = {}
        for bucket, these in zip(self.buckets, rows, strict=True):
            part = self.products.gram(self.ops(bucket), these).to(self.device)
            parts[bucket.summed] = parts[bucket.summed] + part if bucket.summed in parts else part
        shape = len(self.labels), size, size
        whole = {
            groups: parts[groups] if groups in parts else torch.zeros(shape, dtype=self._wide, device=self.device)
            for groups in self.ranks.groups  # in the order that all ranks have, whatever gradients one of them lacks
        }
        return Span(self.ranks.add_up(whole))

    def combine_(self, rows: Rows, writes: Sequence[Sequence[Write]]) -> None:
        """For each bucket, write combinations of its rows."""
        for bucket, these, wanted in zip(self.buckets, rows, writes, strict=True):
            device = bucket.gradients[0].device
            if device != self.device:
                wanted = [replace(write, coefficients=write.coefficients.to(device)) for write in wanted]
            self.ops(bucket).combine_(these, wanted)

    def numbers(self) -> Tensor:
        """How many numbers each scope has: Tensor [S], float64."""
        counts = list(map(sum, zip([0] * len(self.labels), *(bucket.elements for bucket in self.buckets), strict=True)))
        if self.fused:
            from gradguide.ops.triton.launch import numbers_of

            return numbers_of(self.device, counts)
        # Filled on the device: a copy from the host would make it wait.
        return torch.cat([torch.full((1,), count, dtype=self._wide, device=self.device) for count in counts])

    @property
    def _wide(self) -> torch.dtype:
        """Float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def fused(self) -> bool:
        """Whether kernels pass over the rows, so that they can decide as well."""
        return ops.is_fused(self.backend, self.device)

    def ops(self, bucket: Bucket) -> ops.Ops:
        """The backend for a bucket."""
        return ops.select(self.backend, bucket.gradients[0].device)


class Surveyor:
    """What does not change from step to step: names, scope, sources and backend.

    Args:
        scope: see :class:`gradguide.GradGuide`.
        names: of the base's parameters.
        sources: all that are asked anything.
        told: options that must be the same on all ranks.
        backend: see :class:`gradguide.GradGuide`.
    """

    def __init__(self, scope: Scope, names: Names, sources: Sequence[Source], told: object, backend: str) -> None:
        self.known = names
        self._scope = dict(scope.items()) if isinstance(scope, Mapping) else scope
        self._told = told
        self._backend = backend
        self._places: dict[tuple[int, int], str] = {}
        self._last: tuple[Roll, Survey] | None = None  # the survey without its buckets, which the roll calls
        self.ask(sources)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own, and looks at everything anew.
        return {**vars(self), "_last": None}

    @property
    def names(self) -> dict[Tensor, str]:
        """Parameter to name, as far as names were looked up."""
        return self.known.found

    def ask(self, sources: Sequence[Source]) -> None:
        """Ask these sources from now on, which match the parameters that have names."""
        self.sources = sources
        # What is trained all sources know, which is checked where they are given; what is frozen perhaps only some.
        shapes = [shapes for source in sources if (shapes := source.shapes()) is not None]
        everything = frozenset(self.names.values()) if sources else frozenset()
        self._covered = frozenset.intersection(everything, *map(frozenset, shapes)) if shapes else everything
        self._ranks = Ranks()
        self._products = FixedProducts()
        self._last = None

    def rename(self, names: Names, base: Optimizer) -> None:
        """Use these names from now on; sources that match them must be asked next."""
        self.known = names
        self.follow(base)

    def survey(self, base: Optimizer) -> Survey | None:
        """The parameters of this step, or None if none has a gradient.

        Raises:
            ValueError: a gradient cannot be guided, or ranks disagree.
        """
        if self._last is not None:
            roll, before = self._last
            called = roll.call(base.param_groups)
            if called is not None:
                return replace(before, buckets=called)
        self.follow(base)
        trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad or p.grad is not None]
        ranks = self._ranks
        ranks.meet(trained)
        label = labeller(self._scope, self.names)
        labels: dict[Label, int] = {}
        if ranks.sharded:
            # Ranks may lack different gradients; what they add up has the same scopes on all of them.
            everywhere = self.labels(base)
            labels = {label: place for place, label in enumerate(dict.fromkeys(everywhere[p] for p in trained))}
        buckets = gather(base.param_groups, label, self.names, self._covered, labels, sharded=ranks.sharded)
        if not buckets and not ranks.sharded:
            return None
        if ranks.sharded:
            parameters = [(self.names.get(p), tuple(p.shape), str(p.dtype), repr(everywhere[p])) for p in trained]
            ranks.agree(trained, (parameters, self._told), self.sources)
        sources = ranks.parts_of(self.sources, trained, self.names)
        made = Survey(
            buckets, list(labels), sources, trained[0].device, ranks, self._products, Interned(), self._backend
        )
        self._last = Roll(base.param_groups, buckets), replace(made, buckets=[])
        return made

    def refresh(self, base: Optimizer) -> None:
        """Before a step: sources compute anew what they have to, at the parameters as they are."""
        if all(type(source).refresh is SourceGradient.refresh for source in self.sources):
            return  # which does nothing
        self.follow(base)
        trained = trained_by(base)
        known = {self.names[p]: p for p in trained if self.names.get(p) in self._covered}
        for source in self.sources:
            source.refresh(known, trained)

    def labels(self, base: Optimizer) -> dict[Tensor, Label]:
        """Scope label of every parameter of the base."""
        self.follow(base)
        label = labeller(self._scope, self.names)
        return {
            parameter: label(parameter, index, place)
            for index, group in enumerate(base.param_groups)
            for place, parameter in enumerate(group["params"])
        }

    def follow(self, base: Optimizer) -> None:
        """FSDP2 and loaders put other tensors in a parameter's place; the name stays with the place."""
        self.known.of(p for group in base.param_groups for p in group["params"])
        if not self.names:
            return
        for index, group in enumerate(base.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = self.names.get(parameter)
                if name is not None:
                    self._places[index, place] = name
                elif (index, place) in self._places and self._places[index, place] not in self._held(base):
                    self.names[parameter] = self._places[index, place]

    def _held(self, base: Optimizer) -> set[str]:
        """Names whose parameter is still there: then what stands in its place is a new one, and nameless."""
        return {self.names[p] for group in base.param_groups for p in group["params"] if p in self.names}


def trained_by(base: Optimizer) -> list[Tensor]:
    """The base's parameters that are not frozen."""
    return [p for group in base.param_groups for p in group["params"] if p.requires_grad]


def source_rows(sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor]) -> list[Row | None]:
    """Source gradients at ``at``; a bucket without names has none."""
    return [source.row(bucket.names, at) if bucket.names else None for source in sources]
