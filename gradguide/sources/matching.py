"""Match the entries of sources with the parameters of an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradguide.sources.base_model import check_base_model
from gradguide.sources.mismatch import explain
from gradguide.sources.protocol import Source
from gradguide.sources.stored import SourceGradient
from gradguide.sources.structured import StructuredSource
from gradguide.utils.names import Names, without_adapter

__all__ = ["match_sources"]


def match_sources(
    sources: Sequence[Source], groups: Iterable[dict[str, Any]], names: Names, earlier: Sequence[Source] = ()
) -> tuple[Source, ...]:
    """Return the sources, renamed to the names of the optimizer's parameters.

    Each source must cover exactly the optimizer's named trained parameters, with equal shapes. Frozen parameters (the
    base model of an adapter, an adapter frozen since) are optional.

    Names match if they are equal. Names that differ only in the PEFT adapter or in a leading ``module.`` match if there
    is one candidate. So a source captured with adapter "default" works for adapter "b", unless the optimizer trains
    both.

    Args:
        sources: each is matched separately.
        groups: param groups of the optimizer.
        names: parameters without a name are guided without the sources.
        earlier: sources that were matched with the same model before; see ``StructuredSource.bound``.

    Raises:
        ValueError: there are no names, two parameters of the optimizer share a name, or a source does not match. The
            message lists missing and unexpected names and other shapes, with the likely cause. A source of another base
            model raises too: see ``check_base_model``.

    Warns:
        UserWarning: all sources are structured, and an adapter or a weight of more than two dimensions has no pull.
    """
    if not sources:
        return ()
    listed = [p for group in groups for p in group["params"]]
    parameters = _by_name(names.of(listed))
    matched = []
    for index, source in enumerate(sources):
        which = f"source {index} " if len(sources) > 1 else "the source "
        matched.append(_matched(source, parameters, names, which, earlier))
    _warn_if_uncovered(matched, parameters)
    return tuple(matched)


def _by_name(names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    if not names:
        raise ValueError(
            "a source is keyed by parameter names, found none: pass names=model, or give the base optimizer named "
            "parameters"
        )
    parameters: dict[str, Tensor] = {}
    for p, name in names.items():
        if parameters.setdefault(name, p) is not p:
            raise ValueError(f"names must be unique, found {name!r} for two parameters of the optimizer")
    return parameters


def _matched(
    source: Source, parameters: Mapping[str, Tensor], names: Names, which: str, earlier: Sequence[Source]
) -> Source:
    if isinstance(source, StructuredSource):
        return _bound(source, parameters, names, which, earlier)
    found = source.shapes()
    if found is None:
        return source
    shapes = {name: p.shape for name, p in parameters.items()}
    trained = [name for name, p in parameters.items() if p.requires_grad]
    own = isinstance(source, SourceGradient)
    pairs = _pairs(found, shapes, trained) if own else {name: name for name in found if name in shapes}
    taken = set(pairs.values())
    missing = [name for name in trained if name not in taken]
    unexpected = [name for name in found if name not in pairs]
    other = {n: (found[name], shapes[n]) for name, n in pairs.items() if found[name] != shapes[n]}
    if missing or unexpected or other:
        raise ValueError(which + explain(missing, unexpected, other, matched=taken, reachable=names.reachable()))
    if isinstance(source, SourceGradient):
        check_base_model(source.metadata, names, which)
        if any(name != n for name, n in pairs.items()):
            return source.renamed(pairs)
    return source


def _bound(
    source: StructuredSource, parameters: Mapping[str, Tensor], names: Names, which: str, earlier: Sequence[Source]
) -> StructuredSource:
    """Bind a structured source to the model that ``names`` refers to."""
    models = names.models()
    if not models:
        raise ValueError(f"{which}is structured, and needs the model's layers: pass names=model")
    # Trained weights are compared when the source is bound.
    check_base_model(source.metadata, names, which, warn=any(not p.requires_grad for p in names.reachable().values()))
    return source.bound(models[0], [each for each in earlier if isinstance(each, StructuredSource)], parameters)


def _warn_if_uncovered(sources: Sequence[Source], parameters: Mapping[str, Tensor]) -> None:
    """Warn if structured sources alone leave adapters or stacked weights free, such as those of fused experts."""
    structured = [source for source in sources if isinstance(source, StructuredSource)]
    if len(structured) < len(sources):
        return
    pulled = set().union(*(source.pulled for source in structured))
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    free = [n for n, p in trained.items() if n not in pulled and (p.dim() > 2 or (p.dim() == 2 and ".lora_" in n))]
    if free:
        share = sum(trained[name].numel() for name in free) / sum(p.numel() for p in trained.values())
        warnings.warn(
            f"no source pulls {len(free)} adapter matrices or stacked weights, {100 * share:.0f}% of the trained "
            f"elements (first: {free[0]}), so what they change is not kept: structured sources have linear layers "
            "only. Leave them out of the adapter, capture their layers with modules=, or use SourceGradient.anchored()",
            UserWarning,
            stacklevel=4,
        )


def _pairs(found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size], trained: Iterable[str]) -> dict[str, str]:
    """Return the optimizer's name for each name of the source that has a match."""
    pairs = {name: name for name in found if name in shapes}
    theirs = _by_key(name for name in found if name not in pairs)
    ours = _by_key(name for name in trained if name not in pairs)
    for key, candidates in theirs.items():
        if len(candidates) == len(ours.get(key, ())) == 1:
            pairs[candidates[0]] = ours[key][0]
    return {name: pairs[name] for name in found if name in pairs}  # in the source's order


def _by_key(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(without_adapter(name), []).append(name)
    return found
