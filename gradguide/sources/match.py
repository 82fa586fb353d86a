"""Whether sources and parameters speak of the same things."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradguide.sources.source import Source

__all__ = ["check_match"]

SHOWN = 5


def check_match(sources: Sequence[Source], groups: Iterable[dict[str, Any]], names: Mapping[Tensor, str]) -> None:
    """Raise unless every source has exactly the optimizer's named parameters that are trained, in their shapes.

    A frozen parameter (the base model under an adapter, an adapter that is frozen by now) may be in a source or not.

    Args:
        sources: to be checked, each for itself.
        groups: param groups of the optimizer.
        names: parameter to name; parameters outside it are guided without the sources.

    Raises:
        ValueError: there are no names, or what is missing, unexpected, or of another shape, as a list.
    """
    if not names:
        raise ValueError(
            "a source is keyed by parameter names, found none: pass names=model.named_parameters(), or give the base "
            "optimizer named parameters"
        )
    parameters = {names[p]: p for group in groups for p in group["params"] if p in names}
    shapes = {name: p.shape for name, p in parameters.items()}
    trained = {name for name, p in parameters.items() if p.requires_grad}
    for index, source in enumerate(sources):
        found = source.shapes()
        if found is None:
            continue
        missing = [name for name in shapes if name in trained and name not in found]
        unexpected = [name for name in found if name not in shapes]
        other = [
            f"{n} {tuple(found[n])} for {tuple(shapes[n])}" for n in shapes if n in found and found[n] != shapes[n]
        ]
        if missing or unexpected or other:
            parts = [
                _part("missing from the source", missing),
                _part("unexpected in the source", unexpected),
                _part("of another shape", other),
            ]
            which = f"source {index} " if len(sources) > 1 else "the source "
            raise ValueError(
                f"{which}does not match the optimizer's named parameters: {'; '.join(filter(None, parts))}. It was "
                "captured from another model or adapter, or `names` holds parameters that it does not speak of (a new "
                "head): leave those out of `names`, and they are guided without it"
            )


def _part(label: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{len(entries)} {label} ({', '.join(entries[:SHOWN])}{more})"
