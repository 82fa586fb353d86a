"""Check, read and hash the tables of a stored source: gradient, Fisher information, anchor, each by parameter name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradguide.ops.allocate import allocate_contiguous
from gradguide.sources import files

__all__ = ["Tables", "checked_tables", "digest", "read_tables"]

Tables: TypeAlias = dict[str, dict[str, Tensor]]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KINDS = ({"gradient"}, {"gradient", "fisher", "anchor"}, {"fisher", "anchor"})


def checked_tables(given: Mapping[str, Mapping[str, Tensor] | None]) -> Tables:
    """Return copies of the tables that are not None, each allocated as one block per device and dtype.

    Raises:
        ValueError: there is no tensor, names or shapes differ between tables, or a number is not finite, or negative in
            ``fisher``.
        TypeError: a tensor has no floating dtype of 16, 32 or 64 bits.
    """
    tables: Tables = {label: dict(table) for label, table in given.items() if table is not None}
    if not any(tables.values()):
        raise ValueError("a source gradient needs at least one parameter, found none")
    shapes = {name: tensor.shape for name, tensor in next(iter(tables.values())).items()}
    for label, table in tables.items():
        if {name: tensor.shape for name, tensor in table.items()} != shapes:
            raise ValueError(f"{label} must have the names and shapes of the other tables")
        for name, tensor in table.items():
            if tensor.dtype not in _FLOATING:
                raise TypeError(f"{label} must hold floating numbers, found {tensor.dtype} for {name}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{label} must be finite, found NaN or Inf for {name}")
            if label == "fisher" and bool((tensor < 0).any()):
                raise ValueError(f"{label} must be at least 0, found {float(tensor.min())} for {name}")
    for table in tables.values():
        for (name, tensor), place in zip(list(table.items()), allocate_contiguous(list(table.values())), strict=True):
            table[name] = place.copy_(tensor.detach())
    return tables


def read_tables(path: str | os.PathLike[str]) -> tuple[Tables, dict[str, Any]]:
    """Read a file written by ``SourceGradient.save``: its tables, in the stored order of names, and its metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, not safetensors, not a source file, damaged, of a structured source, in 8
            bits, or of a newer format.
    """
    tables, metadata = files.read(path)
    if metadata.get("kind") == "structured":
        raise ValueError(f"{os.fspath(path)!r} holds a structured source; read it with StructuredSource.load")
    order = metadata.pop("names", None)
    metadata.pop("format")
    complete = isinstance(order, list) and all(isinstance(name, str) for name in order)
    if "steps" in tables:
        raise ValueError(
            f"{os.fspath(path)!r} holds a source in 8 bits, and 8-bit sources are no longer supported: capture it "
            "again, or load it with gradguide 0.1.0 and save it in float32 or bfloat16"
        )
    if not complete or set(tables) not in _KINDS:
        raise ValueError(f"{os.fspath(path)!r} is damaged: found tables {sorted(tables)} and names {order!r:.60}")
    for label, table in tables.items():
        if sorted(table) != sorted(order):
            raise ValueError(f"{os.fspath(path)!r} is damaged: {label} does not have the names that its metadata lists")
    return {label: {name: table[name] for name in order} for label, table in tables.items()}, metadata


def digest(tables: Tables) -> str:
    """Return a digest of names, shapes and values."""
    found = hashlib.sha256()
    for label, table in tables.items():
        for name, tensor in table.items():
            found.update(f"{label}/{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
