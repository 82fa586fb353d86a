"""Files and folders appear under their name only when they are complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "replacing_folder"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the suffix of ``path``, which becomes ``path`` if the block ends without an error.

    An older file of that name stays until then. The folder must exist.
    """
    with _scratch(path) as scratch:
        partial = scratch / path.name
        yield partial
        partial.replace(path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes ``path`` if the block ends without an error.

    ``path`` must not exist, or be an empty folder; its parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(path) as scratch:
        partial = scratch / path.name
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    # Beside the goal, not in the system's temporary folder: a rename works only within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
