"""Identify the base model of a source by an id and a few frozen weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import Layout, all_reduce_over, layout_of, local
from gradguide.utils.names import Names, adapter_of, model_names

__all__ = ["ABSOLUTE", "RELATIVE", "base_of", "check_base_model", "elements", "identity"]

MAX_WEIGHTS = 8
# Flat positions. They do not depend on the size of a weight, so an embedding with added rows still matches.
POSITIONS = (3, 31, 127, 511, 2047, 8191, 32767, 131071)
# Tolerates rounding from float32 to bfloat16 (2^-8, relative) and to float16 subnormals (2^-25).
RELATIVE = 2.0**-7
ABSOLUTE = 2.0**-24
SHOWN = 3
_PEFT = "base_model.model."


def identity(model: nn.Module) -> str:
    """Return the id of a model: the path it was loaded from, else its model type, else its class, and its size.

    Path and type come from the first module that has a ``config``, inside PEFT and other wrappers.
    """
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_name_or_path", None) or getattr(config, "model_type", None)
        if isinstance(name, str):
            return f"{name} ({size})"
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner  # torch.compile and DDP
    return f"{type(model).__name__.removeprefix('FSDP')} ({size})"


def base_of(model: nn.Module) -> dict[str, Any]:
    """Return the metadata that identifies a base model.

    It holds a few elements from each of up to 8 frozen weights, evenly distributed over the model. Excluded are
    adapters, heads that PEFT trains copies of, quantised weights, and weights on the meta device. In a PEFT model, only
    weights inside the adapted model are used, not a head around it. If weights are sharded, every rank must call this.

    Returns:
        JSON types: ``id``, and ``weights``: lists of elements by name, empty if no weight is frozen.
    """
    frozen = {name: p for name, p in model_names(model).items() if _is_comparable(name, p)}
    adapted = {name: p for name, p in frozen.items() if _PEFT in name} or frozen
    weights = {_base_name(name): p for name, p in adapted.items()}
    matrices = {name: p for name, p in weights.items() if p.dim() > 1} or weights
    names = list(matrices)
    count = min(MAX_WEIGHTS, len(names))
    chosen = [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)]
    numbers = {name: _elements(matrices[name]) for name in chosen}
    return {
        "id": identity(model),
        "weights": {name: found for name, found in numbers.items() if found and all(map(math.isfinite, found))},
    }


def check_base_model(metadata: Mapping[str, Any], names: Names, which: str, *, warn: bool = True) -> None:
    """Raise if the base model of a source differs from the model reachable through ``names``.

    Only weights that are frozen now are compared. If exactly one of several weights differs, it is accepted: a layer
    such as a pooler is initialised randomly at each load. Quantised and meta weights are excluded. If weights are
    sharded, every rank must call this, because each weight needs one all-reduce.

    Args:
        metadata: the metadata of the source.
        names: the names of the optimizer.
        which: the label of the source in messages.
        warn: whether to warn if no weight could be compared.

    Raises:
        ValueError: at least two weights differ, or all compared weights differ.

    Warns:
        UserWarning: no weight could be compared, because none is frozen and reachable through ``names``.
    """
    bases = [base for base in _bases(metadata) if base["weights"]]
    if not bases:
        return
    present = {_base_name(name): p for name, p in names.reachable().items() if _is_comparable(name, p)}
    here = next((f" ({identity(model)})" for model in names.models()), "")
    for base in bases:
        stored: Mapping[str, list[float]] = base["weights"]
        found = {name: (stored[name], _elements(present[name])) for name in stored if name in present}
        if not found and warn:
            warnings.warn(
                f"{which}is of base model {base['id']}, which could not be compared with this one: none of the frozen "
                "weights in its file is reachable through names. Pass names=model, or names=lora_parameters(model)",
                UserWarning,
                stacklevel=5,
            )
        other = [name for name, (there, now) in found.items() if not _all_close(there, now)]
        if len(other) > 1 or (other and len(other) == len(found)):
            shown = ", ".join(f"{n}: {found[n][0][0]:.6g} there, {found[n][1][0]:.6g} here" for n in other[:SHOWN])
            raise ValueError(
                f"{which}is of base model {base['id']}, found another one{here}: {len(other)} of {len(found)} "
                f"frozen weights that were compared differ ({shown}). Load the base model that the source was captured "
                "from, or capture a source with this one. If the difference is intended, remove the entry 'base' (of a "
                "merged source: 'merged') from source.metadata"
            )


def _bases(metadata: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "base" in metadata:
        yield metadata["base"]
    for merged in metadata.get("merged", ()):
        yield from _bases(merged)


def _base_name(name: str) -> str:
    """Return the name that a weight has in the base model without adapters."""
    return ".".join(part for part in name.replace(_PEFT, "").split(".") if part != "base_layer")


def _is_comparable(name: str, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) or layout_of(weight) is not None
    of_base = adapter_of(name) is None and "original_module" not in name.split(".")
    numbers = weight.is_floating_point() and weight.element_size() > 1 and weight.numel() > POSITIONS[0]
    return plain and of_base and numbers and not weight.requires_grad and not weight.is_meta


def _all_close(there: list[float], here: list[float]) -> bool:
    if len(here) < len(there):
        return False
    return all(
        abs(a - b) <= RELATIVE * max(abs(a), abs(b)) + ABSOLUTE for a, b in zip(there, here[: len(there)], strict=True)
    )


def _elements(weight: Tensor) -> list[float]:
    """Return the elements at those ``POSITIONS`` that exist."""
    return elements(weight, [position for position in POSITIONS if position < weight.numel()])


@torch.no_grad()
def elements(weight: Tensor, positions: list[int]) -> list[float]:
    """Return the elements at flat positions. A sharded weight needs an all-reduce of as many numbers."""
    layout = layout_of(weight)
    if layout is None:
        index = torch.tensor(positions, device=weight.device)
        taken: list[float] = torch.take(weight.detach(), index).tolist()
        return taken
    return _sharded_elements(weight, layout, positions)


def _sharded_elements(weight: Tensor, layout: Layout, positions: list[int]) -> list[float]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part = local(weight)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, layout.mesh, layout.placements)
    numbers = torch.zeros(len(positions), dtype=torch.float64, device=part.device)
    for row, position in enumerate(positions):
        place = []
        for size, first in zip(reversed(weight.shape), reversed(offset), strict=True):
            position, index = divmod(position, size)
            place.append(index - first)
        place.reverse()
        if all(0 <= index < size for index, size in zip(place, shape, strict=True)):
            numbers[row] = part[tuple(place)]
    found: list[float] = all_reduce_over(numbers, layout.reduce_groups).tolist()
    return found
