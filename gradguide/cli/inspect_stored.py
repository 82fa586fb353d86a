"""Read the file of a stored source (``SourceGradient``) into JSON types, for ``gradguide inspect`` and for scripts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradguide.cli.read_adapter import read_tensors
from gradguide.sources import files as file
from gradguide.sources.stored import SourceGradient
from gradguide.utils.names import module_of, without_adapter

__all__ = ["compare", "describe", "modelled_drift"]

Tables = dict[str, dict[str, Tensor]]


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return metadata, sizes and norms of a source file.

    Returns:
        JSON types: ``path``, ``kind`` ("fixed", "moving" or "anchored"), ``metadata`` as captured, ``tensors``,
        ``numbers``, ``bytes``, ``gradient_norm`` and ``fisher_trace`` (None if the file has none), and ``layers``, a
        list of the same values by layer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a source file, is damaged, or has a newer format.
    """
    tables, metadata = _read(path)
    names = metadata["names"]
    return {
        "path": os.fspath(path),
        "kind": "fixed" if "fisher" not in tables else "moving" if "gradient" in tables else "anchored",
        "metadata": {key: value for key, value in metadata.items() if key != "names"},
        "tensors": len(names),
        "bytes": sum(t.numel() * t.element_size() for table in tables.values() for t in table.values()),
        **_in_total_and_by_layer(lambda members: _measures(tables, members), names),
    }


def compare(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Any]:
    """Return cosines between two source files over the parameters that both contain, in total and by layer.

    Returns:
        JSON types: ``path`` of the other file, ``shared`` (number of tensors), ``gradient_cosine``, ``fisher_cosine``
        (None if one file has no such table) and ``layers``.

    Raises:
        FileNotFoundError, ValueError: see ``describe``; or the files share no parameter of the same name and shape.
    """
    (ours, metadata), (theirs, _) = _read(path), _read(other)
    pairs = _pairs(next(iter(ours.values())), next(iter(theirs.values())))
    shared = [name for name in metadata["names"] if name in pairs]
    if not shared:
        raise ValueError(f"{os.fspath(path)!r} and {os.fspath(other)!r} share no parameter of one name and shape")
    renamed = {label: {name: table[key] for name, key in pairs.items()} for label, table in theirs.items()}

    def cosines(names: list[str]) -> dict[str, float | None]:
        return {
            f"{table}_cosine": _cosine(ours[table], renamed[table], names)
            if table in ours and table in renamed
            else None
            for table in ("gradient", "fisher")
        }

    return {"path": os.fspath(other), "shared": len(shared), **_in_total_and_by_layer(cosines, shared)}


def modelled_drift(path: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the distance of an adapter from the parameters at capture, and the rise of the source loss it implies.

    Args:
        path: a source file with curvature, which contains the parameters at capture.
        adapter: a safetensors file of parameters, as PEFT's ``save_pretrained`` writes it (or its folder).

    Returns:
        JSON types: ``path`` of the adapter, ``matched`` (number of tensors), ``distance``, ``relative`` to the length
        of the parameters at capture (None if they were zero), ``modelled_rise`` of the source's mean loss
        (``s0 d + F d^2 / 2``; None for a source of ``anchored()``, whose H has another unit), ``layers``.

    Raises:
        FileNotFoundError, ValueError: see ``describe``; the source has no curvature, or no adapter tensor matches.
    """
    tables, metadata = _read(path)
    if "anchor" not in tables:
        raise ValueError(
            f"{os.fspath(path)!r} has no curvature, and so not the parameters at capture: drift is unknown"
        )
    tensors = read_tensors(adapter)
    pairs = _pairs(tables["anchor"], tensors, outer=True)
    if not pairs:
        raise ValueError(f"no tensor of {os.fspath(adapter)!r} fits a parameter of {os.fspath(path)!r}")
    moves = {name: tensors[key].double() - tables["anchor"][name].double() for name, key in pairs.items()}

    normalized = any(each.get("anchored") for each in (metadata, *metadata.get("merged", ())))

    def measures(names: list[str]) -> dict[str, float | None]:
        start = _norm(tables["anchor"], names)
        rise = math.fsum(
            float((0.5 * tables["fisher"][n].double() * moves[n].square()).sum())
            + (float((tables["gradient"][n].double() * moves[n]).sum()) if "gradient" in tables else 0.0)
            for n in names
        )
        distance = _norm(moves, names)
        relative = distance / start if start > 0 else None
        return {"distance": distance, "relative": relative, "modelled_rise": None if normalized else rise}

    names = [name for name in metadata["names"] if name in moves]
    return {"path": os.fspath(adapter), "matched": len(names), **_in_total_and_by_layer(measures, names)}


def _read(path: str | os.PathLike[str]) -> tuple[Tables, dict[str, Any]]:
    """Return tables and metadata of a source file."""
    SourceGradient.load(path)  # validates the file
    return file.read(path)


def _pairs(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, outer: bool = False) -> dict[str, str]:
    """Return the name in ``theirs`` for each of our names that has one, for a tensor of the same shape.

    Equal names come first, then names that differ in the adapter. No name is used twice.

    Args:
        outer: whether their names may lack outer modules, such as a wrapper around a PEFT model.
    """
    keys = {_saved_name(key): key for key in theirs}
    found: list[tuple[int, int, str, str]] = []
    for place, (name, tensor) in enumerate(ours.items()):
        parts = _saved_name(name).split(".")
        tails = [".".join(parts[start:]) for start in range(len(parts) if outer else 1)]
        for removed, key in enumerate([name, *(keys.get(tail, "") for tail in tails)]):
            if key in theirs and theirs[key].shape == tensor.shape:
                found.append((removed, place, name, key))
                break
    owners: dict[str, str] = {}
    for _, _, name, key in sorted(found):
        owners.setdefault(key, name)
    return {name: key for key, name in owners.items()}


def _saved_name(name: str) -> str:
    """Return the name under which PEFT saves a parameter: without its adapter and the wrapper of whole copies."""
    return ".".join(part for part in without_adapter(name).split(".") if part != "modules_to_save")


def _in_total_and_by_layer(measure: Callable[[list[str]], Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return the values of ``measure`` over all names, and under ``layers`` those of each layer."""
    by_layer: dict[str, list[str]] = {}
    for name in names:
        by_layer.setdefault(module_of(name), []).append(name)
    layers = [{"layer": layer, **measure(members)} for layer, members in by_layer.items()]
    return {**measure(names), "layers": layers}


def _measures(tables: Tables, names: list[str]) -> dict[str, Any]:
    first = next(iter(tables.values()))
    return {
        "numbers": sum(first[name].numel() for name in names),
        "gradient_norm": _norm(tables["gradient"], names) if "gradient" in tables else None,
        "fisher_trace": math.fsum(float(tables["fisher"][n].double().sum()) for n in names)
        if "fisher" in tables
        else None,
    }


def _norm(table: Mapping[str, Tensor], names: list[str]) -> float:
    return math.sqrt(math.fsum(float(table[name].double().square().sum()) for name in names))


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> float:
    inner = math.fsum(float(torch.dot(a[n].double().reshape(-1), b[n].double().reshape(-1))) for n in names)
    lengths = _norm(a, names) * _norm(b, names)
    return inner / lengths if lengths > 0 else 0.0
