"""A folder appears under its name only when it is complete; ``gradguide.atomic`` does the same for files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing_folder"]


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes ``path`` if the block ends without an error.

    ``path`` must not exist, or be an empty folder; its parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the goal, not in the system's temporary folder: a rename works only within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial = scratch / path.name  # in a folder of its own, because mkdtemp makes private ones
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
