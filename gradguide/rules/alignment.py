"""Source-target alignment: steps that do not raise the source loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradguide.rules.projection import TOLERANCE, multipliers
from gradguide.rules.span import Span
from gradguide.sources.protocol import Source, sources_of
from gradguide.utils.checks import check_choice, check_flag, check_range

__all__ = ["Alignment", "conflicts", "project", "pull"]

MAX_SOURCES = 16


@dataclass(frozen=True, slots=True)
class Alignment:
    """Keep steps from raising the source loss.

    The soft part adds ``weight * s_k`` to the gradient for each source k. With an anchored source this pulls the
    parameters back to the anchor, as in elastic weight consolidation (arXiv 1612.00796). The hard part (``project``)
    removes the remaining conflict. With ``on="gradient"`` it projects g before the base step (GEM, arXiv 1706.08840).
    With ``on="update"`` it projects the update that the base optimizer made: a gradient without conflict may conflict
    again once Adam has divided it by its second moments.

    Source: "source-target gradient alignment", abstract of arXiv 2506.00726.

    Args:
        source: one source or several (at most 16), for instance a :class:`gradguide.SourceGradient`. The keys of a
            mapping are the names of the sources in the metrics.
        on (str): "update" or "gradient": what the hard part acts on. "update" keeps one copy of the parameters during
            the step.
        weight (float | Sequence[float] | None): weight of the soft part, at least 0, for all sources or for each: the
            weight of the source's mean loss relative to the training loss. 0 leaves the hard part alone, so a source
            without one has no effect. None takes the default of each source. For a structured source this is 100: a
            hundredth of a nat of drift per token weighs as much as a nat of training loss. For an anchored source it
            is 1, in the unit of :meth:`gradguide.SourceGradient.anchored`; lower it with many training rows. For any
            other it is 0: a source gradient becomes stale as soon as training starts, and in our tests every weight
            above 0 lowered accuracy.
        project (bool | None): whether the hard part acts. None is True, except for anchored and structured sources:
            any step away from an anchor conflicts with it, so the hard part would block all movement.

    Raises:
        ValueError, TypeError: an option is out of range, or a source is not a ``Source``.
    """

    source: Source | Sequence[Source] | Mapping[str, Source]
    on: str = field(default="update", kw_only=True)
    weight: float | Sequence[float] | None = field(default=None, kw_only=True)
    project: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # Copies: the caller's lists may change later, and an optimizer has matched what they held.
        if isinstance(self.source, (Mapping, Sequence)):
            copied = dict(self.source) if isinstance(self.source, Mapping) else tuple(self.source)
            object.__setattr__(self, "source", copied)
        if isinstance(self.weight, Sequence):
            object.__setattr__(self, "weight", tuple(self.weight))
        sources = sources_of(self._given())
        if not sources:
            raise ValueError("Alignment needs at least one source, found none; leave alignment=None to disable it")
        if len(sources) > MAX_SOURCES:
            raise ValueError(f"Alignment takes at most {MAX_SOURCES} sources, found {len(sources)}; merge some")
        check_choice("on", self.on, ("update", "gradient"))
        given = self.weight if isinstance(self.weight, Sequence) else [] if self.weight is None else [self.weight]
        for weight in given:
            check_range("weight", weight, 0, float("inf"), open_high=True)
        if isinstance(self.weight, Sequence) and len(self.weight) != len(sources):
            raise ValueError(f"weight must be one for each of {len(sources)} sources, found {len(self.weight)}")
        if self.project is not None:
            check_flag("project", self.project)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources: first the projected ones, then the others, each in the given order."""
        return tuple(source for _, source, _ in self._ordered())

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name of each of ``sources``. Without a given name it is the index in the given order."""
        return tuple(name for name, _, _ in self._ordered())

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the effective weight of each of ``sources``."""
        return tuple(weight for _, _, weight in self._ordered())

    @property
    def projected(self) -> int:
        """Return the number of projected sources. They come first in ``sources``."""
        return sum(map(self._projects, self._given()))

    def _given(self) -> Sequence[Source]:
        if isinstance(self.source, Mapping):
            return list(self.source.values())
        return self.source if isinstance(self.source, Sequence) else [self.source]

    def _ordered(self) -> list[tuple[str, Source, float]]:
        """Return name, source and weight of each source, projected sources first."""
        sources = self._given()
        names = map(str, self.source if isinstance(self.source, Mapping) else range(len(sources)))
        if isinstance(self.weight, Sequence):
            weights = [float(weight) for weight in self.weight]
        else:
            weights = [source.weight if self.weight is None else float(self.weight) for source in sources]
        return sorted(zip(names, sources, weights, strict=True), key=lambda entry: not self._projects(entry[1]))

    def _projects(self, source: Source) -> bool:
        # Only anchored and structured sources have a default weight above 0.
        return source.weight == 0 if self.project is None else self.project


def pull(gradient: Tensor, length: Tensor, first: int, weights: Sequence[float]) -> Tensor:
    """Add each source row, times its weight, to the gradient of every scope whose gradient is not zero.

    Args:
        gradient (Tensor): coordinates [S, R].
        length (Tensor): shape [S], the norm of the received gradient.
        first (int): index of the first source row.
        weights: one per source, at least 0.

    Returns:
        Coordinates [S, R].
    """
    pulled = gradient.clone()
    there = (length > 0).to(gradient.dtype)  # torch.where of two Python numbers has the default dtype
    for index, weight in enumerate(weights, first):
        pulled[:, index] += weight * there
    return pulled


def project(span: Span, vector: Tensor, first: int, end: int | None = None) -> Tensor:
    """Return the nearest vector whose inner product with every source row is not negative.

    Args:
        span: the rows.
        vector (Tensor): coordinates [S, R].
        first, end (int): the source rows are ``first:end``; without ``end``, up to the last row.

    Returns:
        Coordinates [S, R]. Scopes without a conflict beyond rounding keep ``vector`` bit for bit.
    """
    inner = (span.gram[:, first:end, :] @ vector.unsqueeze(2)).squeeze(2)
    projected = vector.clone()
    sources = span.gram[:, first:end, first:end]
    projected[:, first:end] += multipliers(sources, inner, span.reach(vector), span.rounding)
    return projected


def conflicts(cosines: Tensor) -> Tensor:
    """Return whether each of ``cosines`` is a conflict beyond rounding: Tensor of bool, same shape."""
    return cosines < -TOLERANCE
