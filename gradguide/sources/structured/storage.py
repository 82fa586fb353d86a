"""Read and write files of structured sources: safetensors with JSON metadata.

Files of an older layout have the same ``format`` number. Their factors are matrices of single tokens, without the
leading dimension of the two pairs (tokens, sequences). They are recognised by that, and refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradguide.sources import files as file
from gradguide.sources.structured.factors import Factor, LayerFactors

__all__ = ["read", "write"]

KIND = "structured"


def write(path: str | os.PathLike[str], layers: Mapping[str, LayerFactors], metadata: Mapping[str, Any]) -> None:
    """Write the factors atomically."""
    tables: dict[str, dict[str, Tensor]] = {t: {} for t in ("s_basis", "s_rest", "g_basis", "g_rest")}
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, held in layers.items():
        tables["s_basis"][name], tables["s_rest"][name] = held.inputs.basis, held.inputs.rest
        tables["g_basis"][name], tables["g_rest"][name] = held.outputs.basis, held.outputs.rest
        if held.anchor is not None:
            left[name], right[name] = held.anchor
        if held.weight is not None:
            weights[name] = held.weight
    if left:
        tables |= {"anchor_left": left, "anchor_right": right}
    if weights:
        tables["weight"] = weights
    # A list, since JSON objects are written in sorted order.
    listed = [[name, held.scale] for name, held in layers.items()]
    header = {"kind": KIND, "layers": listed, **metadata}
    file.write(path, tables, header)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, LayerFactors], dict[str, Any]]:
    """Read factors by layer and metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, not a structured source, or of an older or newer layout. The message says what
            to do: capture it again, upgrade gradguide, or use SourceGradient.load.
    """
    tables, metadata = file.read(path)
    if metadata.pop("kind", None) != KIND:
        raise ValueError(f"{os.fspath(path)!r} holds no structured source; read it with SourceGradient.load")
    metadata.pop("format")
    listed = metadata.pop("layers", None)
    if any(table.dim() == 2 for table in tables.get("s_basis", {}).values()):
        raise ValueError(
            f"{os.fspath(path)!r} has an older layout (before gradguide 0.2.0), with factors of tokens alone: "
            "capture it again"
        )
    try:
        anchors = {n: (t, tables["anchor_right"][n]) for n, t in tables.get("anchor_left", {}).items()}
        layers = {
            name: LayerFactors(
                Factor(tables["s_basis"][name], tables["s_rest"][name]),
                Factor(tables["g_basis"][name], tables["g_rest"][name]),
                float(scale),
                anchors.get(name),
                tables.get("weight", {}).get(name),
            )
            for name, scale in listed
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged: {error!r}") from error
    return layers, metadata
