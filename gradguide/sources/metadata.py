"""Create and check the metadata of a stored source."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradguide.sources.base_model import base_of
from gradguide.utils.versions import installed_version

__all__ = ["check_depth", "check_metadata", "metadata_of"]

_MAX_DEPTH = 64


def metadata_of(model: nn.Module, *, examples: int, loss: float, curvature: str | None) -> dict[str, Any]:
    """Return the metadata of a capture, of JSON types.

    Args:
        model: the model that was captured.
        examples: number of examples.
        loss: mean loss over the examples, in nats.
        curvature: "true", "empirical", or None.
    """
    return {
        "examples": examples,
        "loss": loss,
        "curvature": curvature,
        "adapter": _adapter(model),
        "base": base_of(model),
        "versions": {name: installed_version(name) for name in ("gradguide", "torch", "peft", "transformers")},
    }


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise unless the entries that the library reads have the types that it writes. Other entries may be anything.

    Raises:
        ValueError: an entry has another type, or is nested deeper than ``_MAX_DEPTH``.
    """
    check_depth(metadata)
    _check(metadata)
    if reserved := {"names", "format"} & metadata.keys():
        raise ValueError(f"metadata must not have {sorted(reserved)}, which files use themselves")


def _check(metadata: object) -> None:
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise ValueError(f"metadata must map names to JSON types, found {_short(metadata)}")
    text = (str, type(None))
    for key, kinds in {"examples": (int, type(None)), "adapter": text, "curvature": text}.items():
        if not isinstance(metadata.get(key), kinds) or isinstance(metadata.get(key), bool):
            raise ValueError(f"metadata {key!r} must be {kinds[0].__name__} or None, found {_short(metadata[key])}")
    if not (metadata.get("loss") is None or _is_number(metadata["loss"])):
        raise ValueError(f"metadata 'loss' must be a number or None, found {_short(metadata['loss'])}")
    versions = metadata.get("versions", {})
    if not isinstance(versions, Mapping) or not all(isinstance(v, text) for v in versions.values()):
        raise ValueError(f"metadata 'versions' must map packages to versions, found {_short(versions)}")
    _check_base(metadata.get("base", {"id": "", "weights": {}}))
    merged = metadata.get("merged", [])
    if not isinstance(merged, list):
        raise ValueError(f"metadata 'merged' must be a list, found {_short(merged)}")
    for each in merged:
        _check(each)


def _check_base(base: object) -> None:
    good = isinstance(base, Mapping) and isinstance(base.get("id"), str) and isinstance(base.get("weights"), Mapping)
    weights = base["weights"].values() if good and isinstance(base, Mapping) else ()
    if not good or not all(
        isinstance(numbers, list) and numbers and all(map(_is_number, numbers)) for numbers in weights
    ):
        raise ValueError(f"metadata 'base' must have an id and lists of weights by name, found {_short(base)}")


def check_depth(metadata: object) -> None:
    """Raise if a value of JSON types is nested too deep for recursive code.

    Raises:
        ValueError: it is nested deeper than ``_MAX_DEPTH``.
    """
    level: list[Any] = [metadata]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (Mapping, list, tuple))
            for inner in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return
    raise ValueError(f"metadata must be nested at most {_MAX_DEPTH} deep")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _adapter(model: nn.Module) -> str | None:
    """Return a digest of the model's PEFT configuration, without the entries that describe its origin."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    configs = next((configs for configs in found if isinstance(configs, Mapping)), None)
    if configs is None:
        return None
    options = {
        name: {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("base_model_name_or_path", "revision", "inference_mode")
        }
        for name, config in configs.items()
    }
    text = json.dumps(
        options,
        sort_keys=True,
        default=lambda value: sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value),
    )
    return hashlib.sha256(text.encode()).hexdigest()
