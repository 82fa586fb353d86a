"""Make the plan of a step, or reuse the last one if only gradients changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import ops
from gradguide.base_checks import check_differentiable, is_step_on_zeros
from gradguide.distributed.agreement import describe, is_plain
from gradguide.distributed.deepspeed import check_zero
from gradguide.distributed.layouts import Layout
from gradguide.distributed.ranks import Ranks
from gradguide.ops.rounding import rounding
from gradguide.ops.tensors import DTYPE, metadata_of, same_objects
from gradguide.sources.matching import match_sources
from gradguide.sources.protocol import Source
from gradguide.sources.replay import ReplaySource
from gradguide.sources.side_effects import preserve_buffers
from gradguide.sources.stored import SourceGradient
from gradguide.step.buckets import Label, Labeler, Scope, build_buckets, scope_labeler, signs_of
from gradguide.step.plan import StepPlan
from gradguide.step.signature import Signature
from gradguide.utils.names import Names

__all__ = ["StepPlanner", "all_parameters", "trainable_parameters"]


class StepPlanner:
    """Names, scopes, sources and backend of an optimizer, and the plan of the last step.

    Args:
        base: the base optimizer.
        scope: see :class:`gradguide.GradGuide`.
        names: names of the base's parameters.
        sources: the sources of alignment and regularizer.
        options: options that must agree over ranks, by name. They are compared again after :meth:`set_sources`.
        backend: see :class:`gradguide.GradGuide`.
    """

    def __init__(
        self,
        base: Optimizer,
        scope: Scope,
        names: Names,
        sources: Sequence[Source],
        options: Mapping[str, object],
        backend: str,
    ) -> None:
        self.name_lookup = names
        self._scope: str | dict[Tensor, str] = scope if isinstance(scope, str) else dict(scope.items())
        self.options = dict(options)
        self._backend = backend
        self._places: dict[tuple[int, int], Tensor] = {}  # parameter by index of its group, and index in the group
        self._plan: tuple[Signature, StepPlan] | None = None
        self.track_replaced(base)
        self.set_sources(sources, base)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parameters and perhaps other ranks, so its plan is stale.
        return {**vars(self), "_plan": None, "_ranks": Ranks(), "_shards": ({}, self.sources)}

    @property
    def names(self) -> dict[Tensor, str]:
        """Names by parameter, for all parameters looked up so far."""
        return self.name_lookup.found

    def set_sources(self, sources: Sequence[Source], base: Optimizer) -> None:
        """Replace the sources. They must match the named parameters of ``base``."""
        self.sources = sources
        # The parameters of the base, and the names of those that the sources were matched with.
        self._present = all_parameters(base)
        self._matched = self._names_of(self._present)
        # Validation ensured that all sources have the trained parameters. Frozen ones may be missing in some.
        shapes = [shapes for source in sources if (shapes := source.shapes()) is not None]
        self._covered = frozenset(self.names.values() if sources else ()).intersection(*shapes)
        self._ranks = Ranks()
        self._shards: tuple[dict[str, Layout], Sequence[Source]] = {}, self.sources
        self.invalidate()

    def set_names(self, names: Names, base: Optimizer) -> None:
        """Replace the names. Call :meth:`set_sources` afterwards."""
        self.name_lookup = names
        self.track_replaced(base)

    def _names_of(self, parameters: Sequence[Tensor]) -> frozenset[str]:
        return frozenset(self.name_lookup.of(parameters).values())

    def _match_added(self, base: Optimizer) -> None:
        """Match the sources again if named parameters were added to the base itself, or to the list of a group.

        Raises:
            ValueError: a source does not match them.
        """
        self.track_replaced(base)
        present = all_parameters(base)
        if same_objects(present, self._present):
            return
        if self.sources and not self._names_of(present) <= self._matched:
            sources = match_sources(self.sources, base.param_groups, self.name_lookup, self.sources)
            self.set_sources(sources, base)
        self._present = present
        if removed := self.name_lookup.forget_removed(present):
            self._places = {place: p for place, p in self._places.items() if p not in removed}

    def invalidate(self) -> None:
        """Discard the plan. The next step makes a new one."""
        self._plan = None

    def plan(self, base: Optimizer) -> StepPlan | None:
        """Return the plan of this step, or None if no parameter has a gradient.

        The last plan is reused with the new gradients. It is discarded in four cases:

        - Its :class:`Signature` no longer matches the groups, the parameters or the gradients.
        - :meth:`set_sources` is called: by ``GradGuide.set_alignment`` and ``GradGuide.add_param_group``, and after
          named parameters were added otherwise.
        - :meth:`invalidate` is called: after a checkpoint is loaded.
        - The optimizer is copied or unpickled: :meth:`__getstate__` leaves it out.

        Raises:
            ValueError: a gradient cannot be guided, a source does not match added parameters, or the ranks differ in an
                option.
        """
        signs = signs_of(base)
        gradients = None if self._plan is None else self._plan[0].gradients(base.param_groups, signs)
        if self._plan is not None and gradients is not None:
            return self._plan[1].with_gradients(gradients)
        made = self._new_plan(base, signs)
        # A reference would keep the memory of gradients alive between steps.
        self._plan = None if made is None else (Signature(base.param_groups, signs), made.with_gradients(None))
        return made

    def _new_plan(self, base: Optimizer, signs: Sequence[int]) -> StepPlan | None:
        trained = self.check_ranks(base)
        ranks = self._ranks
        label = scope_labeler(self._scope, self.names)
        labels: dict[Label, int] = {}
        if ranks.sharded:
            # Ranks may lack different gradients, but collectives need the same scopes on all ranks.
            everywhere = _labels_of(base, label)
            labels = {label: place for place, label in enumerate(dict.fromkeys(everywhere[p] for p in trained))}
        buckets = build_buckets(base.param_groups, label, self.names, self._covered, labels, signs)
        if not buckets and not ranks.sharded:
            return None
        for bucket in buckets:
            # Valid as long as the signature matches.
            bucket.values.metadata = metadata_of(bucket.values)
            bucket.gradients.metadata = metadata_of(bucket.gradients)
        sources = self._sharded_sources(ranks.layouts(trained, self.names))
        device = trained[0].device
        backends = [ops.select(self._backend, bucket.gradients[0].device) for bucket in buckets]
        fused = ops.is_fused(self._backend, device)
        tensors = [tensor for bucket in buckets for tensor in (*bucket.gradients, *bucket.values)]
        error = rounding(fused, device, tensors, sharded=ranks.sharded)
        # With all trained parameters, so that ranks agree that lack different gradients.
        largest = min(torch.finfo(dtype).max for dtype in set(map(DTYPE, (*tensors, *trained))))
        return StepPlan(buckets, list(labels), sources, device, ranks, backends, fused, error, largest)

    def _sharded_sources(self, layouts: dict[str, Layout]) -> Sequence[Source]:
        """Return the sources restricted to this rank's shards."""
        if self._shards[0] != layouts:
            self._shards = layouts, [source.shards(layouts) for source in self.sources] if layouts else self.sources
        return self._shards[1]

    def check_ranks(self, base: Optimizer) -> list[Tensor]:
        """Read layouts, compare options over ranks, and return the trained parameters.

        Raises:
            RuntimeError: DeepSpeed ZeRO shards the parameters.
            ValueError: FSDP1 shards them, the ranks differ in an option, a group is differentiable, or a source does
                not match added parameters.
        """
        self._match_added(base)
        check_differentiable(base.param_groups)
        check_zero(base.param_groups)
        trained = [p for p in all_parameters(base) if p.requires_grad or p.grad is not None]
        self._ranks.update_layouts(trained)
        self._ranks.check_agreement(trained, lambda: self._describe_options(base))
        return trained

    def refresh(self, base: Optimizer) -> None:
        """Refresh the sources, before a step."""
        # The default refresh does nothing.
        live = any(type(source).refresh is not SourceGradient.refresh for source in self.sources)
        if live:
            self._match_added(base)
        if not self._ranks.agreed:
            self.check_ranks(base)  # before the collectives in a source's own passes
        if not live or is_step_on_zeros(base):  # which must draw no batch
            return
        trained = trainable_parameters(base)
        covered = {self.names[p]: p for p in trained if self.names.get(p) in self._covered}
        passes = any(isinstance(source, ReplaySource) and source.due(covered) for source in self.sources)
        with preserve_buffers(self.name_lookup.models()) if passes else nullcontext():
            for source in {id(source): source for source in self.sources}.values():  # one may have two roles
                if isinstance(source, ReplaySource):
                    source.groups = self._ranks.replicas
                source.refresh(covered, trained)

    def labels(self, base: Optimizer) -> dict[Tensor, Label]:
        """Return the scope label of every parameter of the base."""
        self.track_replaced(base)
        return _labels_of(base, scope_labeler(self._scope, self.names))

    def track_replaced(self, base: Optimizer) -> None:
        """Transfer name and scope to tensors that replace a parameter, as FSDP2 and some loaders do."""
        self.name_lookup.of(all_parameters(base))
        tables = [table for table in (self.names, self._scope) if isinstance(table, dict) and table]
        if not tables:
            return
        held: set[Tensor] | None = None
        for index, group in enumerate(base.param_groups):
            for place, parameter in enumerate(group["params"]):
                if any(parameter in table for table in tables):
                    self._places[index, place] = parameter
                elif (index, place) in self._places:
                    # If the old parameter is still in a group, it has moved and was not replaced.
                    held = held or set(all_parameters(base))
                    old = self._places.pop((index, place))
                    if old not in held:
                        self._places[index, place] = parameter
                        for table in tables:
                            if old in table:
                                table[parameter] = table.pop(old)

    def _describe_options(self, base: Optimizer) -> dict[str, str]:
        """Return the values that must agree over ranks, as text: options, backend, base, groups and parameters."""
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


def _labels_of(base: Optimizer, label: Labeler) -> dict[Tensor, Label]:
    return {
        parameter: label(parameter, index, place)
        for index, group in enumerate(base.param_groups)
        for place, parameter in enumerate(group["params"])
    }


def all_parameters(base: Optimizer) -> list[Tensor]:
    """Return the base's parameters, group by group."""
    return [p for group in base.param_groups for p in group["params"]]


def trainable_parameters(base: Optimizer) -> list[Tensor]:
    """Return the base's parameters that require a gradient."""
    return [p for p in all_parameters(base) if p.requires_grad]
