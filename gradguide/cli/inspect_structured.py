"""Read the file of a structured source into JSON types, for ``gradguide inspect`` and for scripts."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from gradguide.cli.read_adapter import read_changes
from gradguide.sources import files
from gradguide.sources.structured.factors import Factor, LayerFactors, Product
from gradguide.sources.structured.layers import MOVING_STARTS
from gradguide.sources.structured.pull import adapter_pull
from gradguide.sources.structured.source import StructuredSource
from gradguide.sources.structured.storage import KIND

__all__ = ["compare", "describe", "is_structured", "modelled_drift"]

Layers = dict[str, LayerFactors]


def is_structured(path: str | os.PathLike[str]) -> bool:
    """Return whether a source file holds a structured source.

    Raises:
        FileNotFoundError, ValueError: see ``gradguide.sources.files.read_metadata``.
    """
    return files.read_metadata(path).get("kind") == KIND


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return metadata, sizes and spectra of a structured source.

    Returns:
        JSON types: ``path``, ``kind`` ("structured"), ``metadata`` as captured, ``numbers``, ``bytes``, ``input_kept``
        and ``output_kept``: the trace of the low-rank parts of S and G over the whole trace, in [0, 1]; and ``layers``,
        with those values, ``rank``, ``scale`` (mean square norm of the outputs) and ``anchored``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no structured source, is damaged, or has an older or newer layout.
    """
    layers, metadata = _read(path)
    rows = [
        {
            "layer": name,
            "rank": held.pairs * max(held.inputs.rank, held.outputs.rank),
            "input_kept": _kept([held.inputs]),
            "output_kept": _kept([held.outputs]),
            "scale": held.scale,
            "anchored": held.anchor is not None,
        }
        for name, held in layers.items()
    ]
    tensors = [part for held in layers.values() for part in _tensors(held)]
    return {
        "path": os.fspath(path),
        "kind": KIND,
        "metadata": metadata,
        "numbers": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "input_kept": _kept([held.inputs for held in layers.values()]),
        "output_kept": _kept([held.outputs for held in layers.values()]),
        "layers": rows,
    }


def compare(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Any]:
    """Return cosines of S and of G between two structured sources, over the layers that both have, and by layer.

    The cosine of two matrices is their Frobenius inner product over the product of their norms.

    Returns:
        JSON types: ``path`` of the other file, ``shared`` (number of layers), ``input_cosine``, ``output_cosine`` and
        ``layers``.

    Raises:
        FileNotFoundError, ValueError: see ``describe``; or the files share no layer of the same name and size.
    """
    (ours, _), (theirs, _) = _read(path), _read(other)
    shared = [
        name
        for name, held in ours.items()
        if name in theirs and (held.shape, held.pairs) == (theirs[name].shape, theirs[name].pairs)
    ]
    if not shared:
        raise ValueError(f"{os.fspath(path)!r} and {os.fspath(other)!r} share no layer of one name and size")

    def cosines(names: list[str]) -> dict[str, float]:
        return {
            "input_cosine": _cosine([(ours[name].inputs, theirs[name].inputs) for name in names]),
            "output_cosine": _cosine([(ours[name].outputs, theirs[name].outputs) for name in names]),
        }

    layers = [{"layer": name, **cosines([name])} for name in shared]
    return {"path": os.fspath(other), "shared": len(shared), **cosines(shared), "layers": layers}


def modelled_drift(path: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the modelled drift of a LoRA adapter from the captured model: ``1/2 sum tr(D^T G D S)``.

    Args:
        path: a structured source.
        adapter: a folder of PEFT's ``save_pretrained``, or the safetensors file in it.

    Returns:
        JSON types: ``path`` of the adapter, ``matched`` (number of layers), ``outside`` (names of adapted layers that
        the source does not have) and ``others`` (names of modules that the adapter changes otherwise, such as trained
        copies), which are not counted, ``modelled_kl`` in nats per token, and ``layers``.

    Raises:
        FileNotFoundError, ValueError: see ``describe`` and ``read_changes``; or the adapter has no layer of the source,
            or its start changed the weights.
    """
    layers, _ = _read(path)
    changes, others, start = read_changes(adapter)
    matched = [name for name in layers if name in changes]
    if not matched:
        raise ValueError(
            f"{os.fspath(adapter)!r} adapts none of the {len(layers)} layers of {os.fspath(path)!r}: it adapts "
            f"{next(iter(changes))}, the source has {next(iter(layers))}"
        )
    if start.startswith(MOVING_STARTS) and any(layers[name].anchor is None for name in matched):
        raise ValueError(
            f"{os.fspath(adapter)!r} has init_lora_weights={start!r}, which changed the base model's weights at the "
            "start: B A is not the change from the captured model. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, or inspect a source of the model with that adapter"
        )
    rows: list[dict[str, Any]] = []
    for name, held in layers.items():
        parts = [changes[name]] if name in changes else []
        for left, right in parts:
            if (left.shape[0], right.shape[1]) != held.shape:
                raise ValueError(
                    f"{os.fspath(adapter)!r} changes {name} by a matrix of {(left.shape[0], right.shape[1])}, the "
                    f"source has {held.shape}: it is of another base model"
                )
        parts += [(-held.anchor[0].float(), held.anchor[1].float())] if held.anchor is not None else []
        if parts:
            rows.append({"layer": name, "modelled_kl": _modelled_kl(held, parts)})
    return {
        "path": os.fspath(adapter),
        "matched": len(matched),
        "outside": [name for name in changes if name not in layers],
        "others": others,
        "modelled_kl": math.fsum(row["modelled_kl"] for row in rows),
        "layers": rows,
    }


def _read(path: str | os.PathLike[str]) -> tuple[Layers, dict[str, Any]]:
    """Return factors by layer and metadata, after validation."""
    source = StructuredSource.load(path)
    return dict(source._layers), source.metadata


def _tensors(held: LayerFactors) -> list[torch.Tensor]:
    extra = [part for part in (*(held.anchor or ()), held.weight) if part is not None]
    return [held.inputs.basis, held.inputs.rest, held.outputs.basis, held.outputs.rest, *extra]


def _kept(factors: list[Factor]) -> float:
    """Return the trace of the low-rank parts over the whole trace; 1 if the trace is zero."""
    low = math.fsum(float(factor.basis.double().square().sum()) for factor in factors)
    whole = low + math.fsum(float(factor.rest.double().sum()) for factor in factors)
    return low / whole if whole > 0 else 1.0


def _cosine(pairs: list[tuple[Factor, Factor]]) -> float:
    """Return the cosine of two block-diagonal matrices; 0 if one of them is zero."""
    inner = math.fsum(a.inner(b) for a, b in pairs)
    squares = math.fsum(a.inner(a) for a, _ in pairs) * math.fsum(b.inner(b) for _, b in pairs)
    return inner / math.sqrt(squares) if squares > 0 else 0.0


def _modelled_kl(held: LayerFactors, parts: list[Product]) -> float:
    left = torch.cat([part for part, _ in parts], 1)[None]
    right = torch.cat([part for _, part in parts])[None]
    inputs, outputs = held.inputs.to(dtype=torch.float32), held.outputs.to(dtype=torch.float32)
    return float(adapter_pull(inputs, outputs, torch.zeros(held.pairs, 1, 1), left, right, [])[1].sum())
