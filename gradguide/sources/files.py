"""Read and write source files: safetensors with JSON metadata, written atomically, read without unpickling."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradguide.sources.metadata import check_depth
from gradguide.utils.atomic import atomic_write

__all__ = ["FORMAT", "read", "read_metadata", "write"]

FORMAT = 1
_KEY = "gradguide"


def write(path: str | os.PathLike[str], tables: dict[str, dict[str, Tensor]], metadata: dict[str, Any]) -> None:
    """Write tables of tensors under keys ``table/name``, and the metadata as one JSON object.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    tensors = {
        f"{table}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for table, entries in tables.items()
        for name, tensor in entries.items()
    }
    header = {_KEY: json.dumps({"format": FORMAT, **metadata}, sort_keys=True)}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=header)
        except safetensors.SafetensorError as error:
            raise _as_os_error(error, path) from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tables of tensors and the metadata of a source file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, not safetensors, not a source file, damaged, or of a newer format.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    with _opened(path) as (file, metadata):
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            table, _, name = key.partition("/")
            tables.setdefault(table, {})[name] = file.get_tensor(key)
    return tables, metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a source file without its tensors.

    Raises:
        FileNotFoundError, ValueError: see :func:`read`.
    """
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the open safetensors file and its metadata."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no source file at {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            yield file, _metadata(path, file.metadata() or {})
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a readable safetensors file ({error}): it is truncated or of another kind; "
            "save it again with SourceGradient.save or StructuredSource.save"
        ) from error


def _as_os_error(error: safetensors.SafetensorError, path: str | os.PathLike[str]) -> OSError:
    """Return the operating system's error. The text of safetensors' error has its number."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"cannot write {os.fspath(path)!r}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path))


def _metadata(path: str | os.PathLike[str], header: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(header[_KEY])
        version = metadata["format"]
        if type(version) is not int or not 1 <= version < 2**31:
            raise ValueError(f"format {version!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds tensors but no source of gradguide (found metadata {sorted(header)}); source "
            "files are written by SourceGradient.save and StructuredSource.save"
        ) from error
    if version > FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} has format {version}, this version of gradguide reads up to {FORMAT}: "
            "upgrade gradguide"
        )
    try:
        check_depth(metadata)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged: {error}") from error
    return dict(metadata)
