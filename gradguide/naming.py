"""Parameter names, the same with and without the prefixes that wrappers put before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = ["NamesLike", "canonical", "carried", "module_of", "named"]

NamesLike: TypeAlias = (
    Mapping[Tensor, str] | Mapping[nn.Parameter, str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
)

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """The name without what DDP, FSDP, activation checkpointing and torch.compile add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def module_of(name: str) -> str:
    """The module a parameter belongs to; the parts of one layer's LoRA adapter belong to that layer together."""
    before, found, _ = name.partition(".lora_")
    return before if found else name.rpartition(".")[0]


def named(names: NamesLike) -> dict[Tensor, str]:
    """Parameter to canonical name, from (name, parameter) pairs or a mapping either way round.

    Raises:
        TypeError: an entry is not a parameter and its name.
        ValueError: one name for two parameters.
    """
    pairs: Iterable[object] = names.items() if isinstance(names, Mapping) else names
    result: dict[Tensor, str] = {}
    taken: dict[str, Tensor] = {}
    for pair in pairs:
        match pair:
            case (str() as name, Tensor() as parameter) | (Tensor() as parameter, str() as name):
                name = canonical(name)
            case _:
                raise TypeError(
                    f"names must pair parameters with their names, as model.named_parameters() does, found {pair!r}"
                )
        if taken.setdefault(name, parameter) is not parameter:
            raise ValueError(f"names must be unique, found {name!r} for two parameters")
        result.setdefault(parameter, name)
    return result


def carried(groups: Iterable[dict[str, Any]]) -> dict[Tensor, str]:
    """Names that param groups carry themselves: torch keeps them when an optimizer is given named parameters."""
    known: dict[Tensor, str] = {}
    for group in groups:
        parameters = group["params"]
        pairs = parameters if "param_names" not in group else zip(group["param_names"], parameters, strict=True)
        for pair in pairs:
            if isinstance(pair, tuple):
                known[pair[1]] = canonical(pair[0])
    return known
