"""Parameter names: the accepted forms of ``names``, and canonical names without wrappers."""

from __future__ import annotations

import re
import weakref
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = [
    "NamedParameters",
    "Names",
    "NamesLike",
    "adapter_of",
    "canonical_names",
    "model_modules",
    "model_names",
    "module_of",
    "names_in_groups",
    "normalize_names",
    "without_adapter",
]

NamesLike: TypeAlias = (
    nn.Module
    | Mapping[Tensor, str]
    | Mapping[nn.Parameter, str]
    | Mapping[str, Tensor]
    | Mapping[str, nn.Parameter]
    | Iterable[tuple[str, Tensor]]
    | Iterable[tuple[str, nn.Parameter]]
)

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DDP = "module."
# In PEFT, the adapter's name follows one of these. Other libraries and PEFT's files have no adapter there.
_METHODS = (
    "lora|ia3|hada|lokr|oft|boft|vera_lambda|hra|osf|fourierft|miss|shira|ln_tuning|adamss|beft|c3a|delora|frod|glora|"
    "gralora|hira|peanut|psoft|pvera_lambda|randlora|supertuning|tinylora|unilora|vblora|waveft"
)
_ADAPTER = re.compile(
    rf"(?:^|\.)(?:(?:{_METHODS})_\w+|prompt_encoder|modules_to_save|trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=\.|$)"
)


def canonical_names(names: Sequence[str], taken: Container[str] = ()) -> list[str]:
    """Return the names without the parts that DDP, FSDP, activation checkpointing and torch.compile add.

    DDP prefixes every name with ``module.``. The prefix is removed if all names start with it. Otherwise it is kept,
    because it is the name of a submodule. It is also kept if a shortened name would be in ``taken``.
    """
    found = list(map(_unwrapped, names))
    while found and all(name.startswith(_DDP) for name in found):
        shorter = [name.removeprefix(_DDP) for name in found]
        if any(name in taken for name in shorter):
            break
        found = shorter
    return found


def module_of(name: str) -> str:
    """Return the name of a parameter's module. For a LoRA parameter, it is the adapted layer."""
    before, found, _ = name.partition(".lora_")
    return before if found else name.rpartition(".")[0]


def adapter_of(name: str) -> str | None:
    """Return the name of a parameter's PEFT adapter, or None if it is not in an adapter."""
    found = _ADAPTER.search(name)
    return found[1] if found else None


def without_adapter(name: str) -> str:
    """Return the name without its adapter and without a leading ``module.``, to compare names of two models."""
    while name.startswith(_DDP):
        name = name.removeprefix(_DDP)
    found = _ADAPTER.search(name)
    return name if found is None else name[: found.start(1) - 1] + name[found.end(1) :]


class NamedParameters(list[tuple[str, nn.Parameter]]):
    """(name, parameter) pairs of a model, with a weak reference to the model.

    The reference gives access to parameters that replace these under the same names, and to the frozen weights that
    identify the base model. A copy or a pickle is a plain list.
    """

    def __init__(self, pairs: Iterable[tuple[str, nn.Parameter]], model: nn.Module) -> None:
        super().__init__(pairs)
        self.model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class Names:
    """Names of an optimizer's parameters.

    Pairs are stored. A model is read at each lookup of a new parameter, so parameters that replaced others later
    (``fully_shard``, a new adapter) have names too. Models are referenced weakly, so the optimizer neither keeps frozen
    weights alive nor copies them. A copy or a pickle contains the names found so far.

    Attributes:
        found: canonical name by parameter, for all given pairs and all parameters that were found in a model.
    """

    def __init__(self, given: NamesLike | None = None) -> None:
        self.found: dict[Tensor, str] = {}
        # Each model, with the names to use (None: all).
        self._models: list[tuple[weakref.ref[nn.Module], frozenset[str] | None]] = []
        self._read_from_model: set[Tensor] = set()
        self._absent: set[Tensor] = set()  # not in any model; a new Names object looks them up again
        self._add(given)

    def merged(self, given: NamesLike | None) -> Names:
        """Return the union of these names and ``given``; in conflicts ``given`` takes precedence.

        Raises:
            TypeError, ValueError: see ``normalize_names``. These names are unchanged.
        """
        result = Names()
        result.found = dict(self.found)
        result._models = list(self._models)
        result._read_from_model = set(self._read_from_model)
        result._add(given)
        return result

    def of(self, parameters: Iterable[Tensor]) -> dict[Tensor, str]:
        """Return the names of the parameters that have one. Models are read if a parameter is new."""
        wanted = list(parameters)
        unknown = {p for p in wanted if p not in self.found and p not in self._absent}
        if unknown:
            for model, names in self._read():
                chosen = {p: name for name, p in model.items() if p in unknown and (names is None or name in names)}
                self.found.update(chosen)
                self._read_from_model.update(chosen)
                unknown -= chosen.keys()
            self._absent = self._absent.intersection(wanted) | unknown  # the others may have been replaced
        return {p: self.found[p] for p in wanted if p in self.found}

    def forget_removed(self, present: Iterable[Tensor]) -> set[Tensor]:
        """Remove and return parameters found in a model, which neither a model nor ``present`` has any more."""
        kept = {*present, *(p for model, _ in self._read() for p in model.values())}
        removed = self._read_from_model - kept
        self._read_from_model &= kept
        for parameter in removed:
            self.found.pop(parameter, None)
        return removed

    def reachable(self) -> dict[str, Tensor]:
        """Return all parameters of the models and pairs by name, including frozen ones and those not in the names."""
        result = {name: p for p, name in self.found.items()}
        for model, _ in self._read():
            result |= model
        return result

    def models(self) -> list[nn.Module]:
        """Return the models that still exist, the last one given first."""
        return [model for ref, _ in self._models if (model := ref()) is not None]

    def _add(self, given: NamesLike | None) -> None:
        if given is None:
            return
        if isinstance(given, nn.Module):
            self._add_model((weakref.ref(given), None))
            self.found.update({p: name for name, p in model_names(given).items() if p in self.found})
            return
        pairs = normalize_names(given, self.found)
        if isinstance(given, NamedParameters):
            self._add_model((given.model, frozenset(pairs.values())))
        self.found.update(pairs)

    def _add_model(self, entry: tuple[weakref.ref[nn.Module], frozenset[str] | None]) -> None:
        """Put a model first. Given again, it is not read twice."""
        self._models = [entry, *(each for each in self._models if each != entry)]

    def replace(self, replaced: Mapping[Tensor, Tensor]) -> None:
        """Move the name of each key of ``replaced`` to its value, the new parameter."""
        self.found = {replaced.get(p, p): name for p, name in self.found.items()}
        self._read_from_model = {replaced.get(p, p) for p in self._read_from_model}

    def _read(self) -> list[tuple[dict[str, Tensor], frozenset[str] | None]]:
        models = [(model(), names) for model, names in self._models]
        return [(model_names(model), names) for model, names in models if model is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {"found": self.found, "_models": [], "_read_from_model": set(), "_absent": set()}


def model_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model by canonical name, in its order. A shared parameter has its first name."""
    pairs = list(model.named_parameters())
    return dict(zip(canonical_names([name for name, _ in pairs]), (p for _, p in pairs), strict=True))


def model_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model by the names that its parameters' canonical names begin with, in its order."""
    first = next((name for name, _ in model.named_parameters()), "")
    prefix = _unwrapped(first).removesuffix(next(iter(model_names(model)), ""))
    found = [(f"{_unwrapped(name)}.", module) for name, module in model.named_modules()]
    return [(name.removeprefix(prefix).removesuffix("."), module) for name, module in found]


def normalize_names(names: NamesLike, others: Mapping[Tensor, str] | None = None) -> dict[Tensor, str]:
    """Return canonical names by parameter, from (name, parameter) pairs, or a mapping in either direction.

    Args:
        names: iterated once.
        others: names of other parameters; see ``taken`` of ``canonical_names``.

    Raises:
        TypeError: an entry is not a pair of a parameter and its name.
        ValueError: two parameters share a name.
    """
    if not isinstance(names, Iterable):
        raise TypeError(f"names must be a model, pairs as of model.named_parameters(), or a mapping, found {names!r}")
    entries: Iterable[object] = names.items() if isinstance(names, Mapping) else names
    pairs: list[tuple[str, Tensor]] = []
    for entry in entries:
        match entry:
            case (str() as name, Tensor() as parameter) | (Tensor() as parameter, str() as name):
                pairs.append((name, parameter))
            case _:
                raise TypeError(
                    f"names must pair parameters with their names, as model.named_parameters() does, found {entry!r}"
                )
    given = [name for name, _ in pairs]
    parameters = [p for _, p in pairs]
    present = set(parameters)
    if not isinstance(names, NamedParameters):  # these are canonical already
        given = canonical_names(given, {name for p, name in (others or {}).items() if p not in present})
    return _unique(given, parameters)


def names_in_groups(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """Return the (name, parameter) pairs in param groups: torch stores names if an optimizer gets named parameters."""
    found: list[tuple[str, Tensor]] = []
    for group in groups:
        parameters = group["params"]
        pairs = parameters if "param_names" not in group else zip(group["param_names"], parameters, strict=True)
        found += [pair for pair in pairs if isinstance(pair, tuple)]
    return found


def _unwrapped(name: str) -> str:
    """Return the name without the parts that wrappers other than DDP add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unique(names: Iterable[str], parameters: Iterable[Tensor]) -> dict[Tensor, str]:
    result: dict[Tensor, str] = {}
    owners: dict[str, Tensor] = {}
    for name, parameter in zip(names, parameters, strict=True):
        if owners.setdefault(name, parameter) is not parameter:
            raise ValueError(f"names must be unique, found {name!r} for two parameters")
        result.setdefault(parameter, name)
    return result
