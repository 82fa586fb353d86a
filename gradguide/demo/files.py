"""A folder appears under its name only when it is complete; ``gradguide.utils.atomic`` does the same for files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradguide.utils.atomic import scratch_beside

__all__ = ["replacing_folder"]


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``path`` if the block ends without an error.

    ``path`` must not exist, or be an empty folder; its parents are made.
    """
    with scratch_beside(path) as scratch:
        partial = scratch.folder / path.name  # the scratch folder itself is private
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
