"""What a step works on: the parameters that have gradients, by bucket and scope, and the passes over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import ops
from gradguide.agreement import describe, is_plain
from gradguide.buckets import Bucket, Label, Scope, gather, labeller, signs_of
from gradguide.naming import Names
from gradguide.ops import Row, Stack, Write
from gradguide.ops.tensors import Interned
from gradguide.ranks import Ranks
from gradguide.roll import Roll
from gradguide.rules.span import Span
from gradguide.sources.source import Source
from gradguide.sources.stored import SourceGradient
from gradguide.zero import check_zero

__all__ = ["UNSIGNED", "Rows", "Survey", "Surveyor", "source_rows", "trained_by"]

UNSIGNED = slice(0, 0)
"""No row has a sign: for rows of the update, which is what the base really did."""

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
    interned: Interned
    backend: str

    @property
    def sharded(self) -> bool:
        """Whether any parameter lies over ranks."""
        return self.ranks.sharded

    def signs(self, size: int, signed: slice) -> list[Tensor | None]:
        """Return for each bucket the signs of its rows: Tensor [size], -1 at ``signed``; None where all are 1.

        Gradients and running directions are kept as received. In a group that maximizes, the step descends along the
        negative gradient. There the rows ``signed``, which are those of what is descended (sources, the base's own
        momentum), count with the opposite sign, so that all rows of a scope belong to one descent.
        """
        if all(bucket.sign > 0 for bucket in self.buckets):
            return [None] * len(self.buckets)
        signs = torch.ones(size, dtype=self._wide, device=self.device)
        signs[signed] = -1.0
        return [None if bucket.sign > 0 else signs for bucket in self.buckets]

    def gram(self, rows: Rows, size: int, signed: slice = UNSIGNED) -> Span:
        """Return Gram matrices [S, size, size] of the scopes, summed over buckets, and of shards over ranks.

        Args:
            signed: rows with the sign of their bucket, see :meth:`signs`.
        """
        parts: dict[tuple[Any, ...], Tensor] = {}
        for bucket, these, signs in zip(self.buckets, rows, self.signs(size, signed), strict=True):
            part = self.ops(bucket).gram(these).to(self.device)
            part = part if signs is None else part * signs.outer(signs)
            parts[bucket.summed] = parts[bucket.summed] + part if bucket.summed in parts else part
        shape = len(self.labels), size, size
        whole = {
            groups: parts[groups] if groups in parts else torch.zeros(shape, dtype=self._wide, device=self.device)
            for groups in self.ranks.groups  # in the order that all ranks have, whatever gradients one of them lacks
        }
        return Span(self.ranks.add_up(whole))

    def combine_(self, rows: Rows, writes: Sequence[Sequence[Write]], signed: slice = UNSIGNED) -> None:
        """For each bucket, write combinations of its rows, of which ``signed`` are those in :meth:`gram`."""
        size = max((write.coefficients.shape[1] for each in writes for write in each), default=0)
        for bucket, these, wanted, signs in zip(self.buckets, rows, writes, self.signs(size, signed), strict=True):
            device = bucket.gradients[0].device
            if signs is not None:
                wanted = [replace(write, coefficients=write.coefficients * signs) for write in wanted]
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
        """Return the backend for a bucket: the portable one where passes may not go by address."""
        return ops.select(self.backend if bucket.plain else "foreach", bucket.gradients[0].device)


class Surveyor:
    """What does not change from step to step: names, scope, sources and backend.

    Args:
        scope: see :class:`gradguide.GradGuide`.
        names: of the base's parameters.
        sources: all that are asked anything.
        options: all that must be the same on every rank, by name; who changes one calls :meth:`ask`.
        backend: see :class:`gradguide.GradGuide`.
    """

    def __init__(
        self, scope: Scope, names: Names, sources: Sequence[Source], options: Mapping[str, object], backend: str
    ) -> None:
        self.known = names
        self._scope: str | dict[Tensor, str] = scope if isinstance(scope, str) else dict(scope.items())
        self.options = dict(options)
        self._backend = backend
        self._places: dict[tuple[int, int], Tensor] = {}
        # The signs of the groups, and the survey without its buckets, which the roll calls.
        self._last: tuple[Roll, list[int], Survey] | None = None
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
        signs = signs_of(base)
        if self._last is not None and self._last[1] == signs:
            roll, _, before = self._last
            called = roll.call(base.param_groups)
            if called is not None:
                return replace(before, buckets=called)
        trained = self.check_ranks(base)
        ranks = self._ranks
        label = labeller(self._scope, self.names)
        labels: dict[Label, int] = {}
        if ranks.sharded:
            # Ranks may lack different gradients; what they add up has the same scopes on all of them.
            everywhere = self.labels(base)
            labels = {label: place for place, label in enumerate(dict.fromkeys(everywhere[p] for p in trained))}
        buckets = gather(base.param_groups, label, self.names, self._covered, labels, signs, sharded=ranks.sharded)
        if not buckets and not ranks.sharded:
            return None
        sources = ranks.parts_of(self.sources, trained, self.names)
        made = Survey(buckets, list(labels), sources, trained[0].device, ranks, Interned(), self._backend)
        self._last = Roll(base.param_groups, buckets), signs, replace(made, buckets=[])
        return made

    def check_ranks(self, base: Optimizer) -> list[Tensor]:
        """Return the trained parameters, after a look at how they lie over ranks and whether these agree.

        Raises:
            RuntimeError: DeepSpeed ZeRO divides the parameters.
            ValueError: FSDP1 divides them, or the ranks differ in an option.
        """
        self.follow(base)
        check_zero(base.param_groups)
        trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad or p.grad is not None]
        self._ranks.update_layouts(trained)
        self._ranks.check_agreement(trained, lambda: self._described(base))
        return trained

    def _described(self, base: Optimizer) -> dict[str, str]:
        """What must be the same on all ranks, as text: options, backend, base, groups and parameters."""
        labels = self.labels(base)
        found: dict[str, str] = {}
        for name, option in self.options.items():
            found |= describe(name, option)
        scope = "a mapping" if isinstance(self._scope, Mapping) else self._scope
        found |= describe("scope", scope) | describe("backend", self._backend) | {"base": type(base).__name__}
        found["parameters in each group"] = str([len(group["params"]) for group in base.param_groups])
        for index, group in enumerate(base.param_groups):
            for key, value in group.items():
                if key not in ("params", "param_names") and is_plain(value):
                    found |= describe(f"group {index} {key}", value)
            for place, p in enumerate(group["params"]):
                trained = "trained" if p.requires_grad else "frozen"
                which = self.names.get(p, "no name"), tuple(p.shape), p.dtype, trained, f"scope {labels[p]}"
                found[f"group {index} parameter {place}"] = ", ".join(map(str, which))
        return found

    def refresh(self, base: Optimizer) -> None:
        """Before a step: sources compute anew what they have to, at the parameters as they are."""
        if not self._ranks.agreed:
            self.check_ranks(base)  # a source's own passes contain collectives
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
        """FSDP2 and loaders put other tensors in a parameter's place; name and scope stay with the place."""
        self.known.of(p for group in base.param_groups for p in group["params"])
        tables = [table for table in (self.names, self._scope) if isinstance(table, dict) and table]
        if not tables:
            return
        held: set[Tensor] | None = None
        for index, group in enumerate(base.param_groups):
            for place, parameter in enumerate(group["params"]):
                if any(parameter in table for table in tables):
                    self._places[index, place] = parameter
                elif (index, place) in self._places:
                    # One that is still there has moved on, and what stands in its place now is nameless.
                    held = held or {p for each in base.param_groups for p in each["params"]}
                    old = self._places.pop((index, place))
                    if old not in held:
                        self._places[index, place] = parameter
                        for table in tables:
                            if old in table:
                                table[parameter] = table.pop(old)


def trained_by(base: Optimizer) -> list[Tensor]:
    """The base's parameters that are not frozen."""
    return [p for group in base.param_groups for p in group["params"] if p.requires_grad]


def source_rows(sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor]) -> list[Row | None]:
    """Source gradients at ``at``; a bucket without names has none."""
    return [source.row(bucket.names, at) if bucket.names else None for source in sources]
