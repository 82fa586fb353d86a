"""Write files atomically: a file is complete or absent."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

if sys.platform != "win32":
    import fcntl

__all__ = ["Scratch", "atomic_write", "scratch_beside"]

_LOCK = ".gradguide-lock"
_DAY = 24 * 60 * 60


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path on the same file system; rename it to ``path`` on success, remove it on failure.

    An existing file keeps its mode. A symbolic link stays, and its target is replaced. Missing folders are created.
    Temporary files of killed processes for the same target are removed first.

    Raises:
        OSError: the folder is not writable, the disk is full, or ``path`` is not a regular file.
    """
    target = _resolve_links(Path(path))
    mode = _mode(target)
    with scratch_beside(target) as scratch:
        temporary = scratch.folder / target.name
        temporary.touch()
        yield temporary
        temporary.chmod(scratch.mode if mode is None else mode)
        with temporary.open("rb+") as file:  # a rename may reach the disk before the content does
            os.fsync(file.fileno())
        temporary.replace(target)


class Scratch(NamedTuple):
    """A temporary folder, and the mode of a file created by a plain ``open()``."""

    folder: Path
    mode: int


@contextmanager
def scratch_beside(target: Path) -> Iterator[Scratch]:
    """Yield a new private folder beside ``target``, and remove it afterwards.

    The folder contains a locked file. A killed process releases the lock. The next call for the same target therefore
    detects an abandoned folder and removes it.

    Raises:
        OSError: the parent folder cannot be created or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.stem[:40]}.gradguide-"  # file names have at most 255 bytes
    _sweep(target.parent, prefix)
    folder = target.parent / f"{prefix}{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    try:
        unlocked = folder / f"{_LOCK}-new"
        with unlocked.open("xb") as file:
            if _lock(file):  # locked before the rename, so that no sweep removes the folder in between
                unlocked.rename(folder / _LOCK)
            yield Scratch(folder, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of killed processes; on systems without locks, folders older than a day."""
    folders: list[Path] = []
    with suppress(OSError):  # a folder may be writable but not readable
        folders = [entry for entry in parent.iterdir() if entry.name.startswith(prefix)]
    for folder in folders:
        locked = None
        with suppress(OSError), (folder / _LOCK).open("rb+") as file:
            locked = _lock(file)
            if locked:
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            if locked is None and time.time() - folder.stat().st_mtime > _DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[bytes]) -> bool | None:
    """Return whether the file could be locked; None if the system does not support locks for it."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems do not support locks
        return None
    return True


def _resolve_links(path: Path) -> Path:
    """Return the path that ``open(path, "w")`` would write."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return target


def _mode(target: Path) -> int | None:
    """Return the permission bits of a file, None if it does not exist.

    Raises:
        OSError: it is a folder, a device or a pipe, which a rename would destroy or could not replace.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(target))
    return stat.S_IMODE(mode)
