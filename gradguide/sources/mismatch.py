"""Explain why a source and an optimizer do not match, and how to fix it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gradguide.utils.names import adapter_of, module_of, without_adapter

__all__ = ["explain"]

SHOWN = 5
Shapes = Mapping[str, tuple[torch.Size, torch.Size]]


def explain(
    missing: Sequence[str],
    unexpected: Sequence[str],
    other: Shapes,
    *,
    matched: Collection[str],
    reachable: Mapping[str, Tensor],
) -> str:
    """Return a message with the names that do not match, the likely cause and a fix.

    Args:
        missing: trained names that the source lacks.
        unexpected: names of the source that the optimizer lacks.
        other: (shape in the source, shape of the parameter) by name, if the two differ.
        matched: the optimizer's names that the source has.
        reachable: every parameter with a name, including those that are not in the optimizer.
    """
    parts = [
        _part("missing from the source", missing),
        _part("unexpected in the source", unexpected),
        _part("of another shape", [f"{n} {tuple(ours)} for {tuple(theirs)}" for n, (ours, theirs) in other.items()]),
    ]
    if other:
        cause = _other_shapes(other)
    elif missing and unexpected:
        cause = _other_names(missing, unexpected, matched)
    elif missing:
        cause = _not_captured(missing, matched)
    else:
        cause = _not_guided(unexpected, matched, reachable)
    return f"does not match the optimizer's named parameters: {'; '.join(filter(None, parts))}. {cause}"


def _other_shapes(other: Shapes) -> str:
    ranks = {_rank(name, ours): _rank(name, theirs) for name, (ours, theirs) in other.items()}
    ((theirs, ours), *more) = ranks.items()
    if theirs is not None and theirs != ours and not more:
        return (
            f"The source is of an adapter of rank {theirs}, found one of rank {ours}: create the adapter with "
            f"LoraConfig(r={theirs}), or capture a source with this one"
        )
    return (
        "The source is of a model of another size, or with another head: load that model, capture a source with "
        f"this one, or leave {next(iter(other))} out of `names` on both sides"
    )


def _not_captured(missing: Sequence[str], matched: Collection[str]) -> str:
    same_layers = {without_adapter(name) for name in missing} <= {without_adapter(name) for name in matched}
    here, there = adapter_of(missing[0]), next(iter(filter(None, map(adapter_of, matched))), None)
    if same_layers and here:
        return (
            f"The source is of adapter {there!r}, which the optimizer trains together with {here!r}. To use it for one "
            f"of them, pass its names: names=lora_parameters(model, {here!r})"
        )
    return (
        "`names` holds parameters that were not captured (a new head, an adapter added later?). To guide them "
        f"without the source, leave them out of `names`: names={_names_without(missing, matched)}"
    )


def _not_guided(unexpected: Sequence[str], matched: Collection[str], reachable: Mapping[str, Tensor]) -> str:
    inside = any(name in reachable for name in unexpected)
    why = "`names` or the optimizer leaves them out" if inside else "this model has no such parameters"
    same = "lora_parameters(model)" if _is_lora(matched) and not _is_lora(unexpected) else "..."
    also = "; or guide them too, with names=model" if inside else ""
    return (
        f"They were captured, and {why} (an old head?): capture only the parameters to guide, with "
        f"SourceGradient.capture(model, batches, loss, names={same}), and pass the same names here{also}"
    )


def _other_names(missing: Sequence[str], unexpected: Sequence[str], matched: Collection[str]) -> str:
    ours, theirs = ({without_adapter(name) for name in names} for names in (missing, unexpected))
    here, there = (sorted({adapter_of(name) or "" for name in names} - {""}) for names in (missing, unexpected))
    if theirs <= ours and here and there:
        return (
            f"The source has adapter {_list(there)}, the optimizer {_list(here)}: the assignment is ambiguous. Pass "
            f"the names of one adapter: names=lora_parameters(model, {here[0]!r})"
        )
    if _is_lora(missing) and _is_lora(unexpected):
        targets = sorted({module_of(name).rpartition(".")[2] for name in [*matched, *unexpected] if "lora_" in name})
        return (
            f"The adapter adapts other layers than that of the source: create it with target_modules={targets}, or "
            "capture a source with this one"
        )
    return (
        f"The source has for instance {unexpected[0]}, the optimizer {missing[0]}: they are of different models or "
        "adapters. Load the model that the source was captured from, or capture a source with this one. If a new head "
        f"is all that differs, leave it out on both sides: names={_names_without(missing, matched)}, here "
        "and in SourceGradient.capture(...)"
    )


def _names_without(missing: Sequence[str], matched: Collection[str]) -> str:
    """Return a Python expression for ``names`` without the missing ones."""
    if _is_lora(matched) and not _is_lora(missing):
        return "lora_parameters(model)"
    prefixes = sorted({f"{module_of(name)}." if module_of(name) else name for name in missing})
    given = repr(prefixes[0]) if len(prefixes) == 1 else f"({', '.join(map(repr, prefixes[:SHOWN]))})"
    more = "" if len(prefixes) <= SHOWN else " and so on"
    return f"[(n, p) for n, p in model.named_parameters() if not n.startswith({given})]{more}"


def _is_lora(names: Collection[str]) -> bool:
    """Return whether there is a name and all names belong to LoRA parameters."""
    return bool(names) and all(".lora_" in f".{name}" for name in names)


def _rank(name: str, shape: torch.Size) -> int | None:
    """Return the rank of the adapter, from the shape of one of its matrices."""
    if len(shape) < 2:
        return None
    if ".lora_A." in f".{name}" or ".lora_embedding_A." in f".{name}":
        return shape[0]
    if ".lora_B." in f".{name}" or ".lora_embedding_B." in f".{name}":
        return shape[1]
    return None


def _list(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _part(label: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{len(entries)} {label} ({', '.join(entries[:SHOWN])}{more})"
