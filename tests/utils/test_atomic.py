"""Files are written completely or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gradguide import History, SourceGradient
from gradguide.utils import atomic
from gradguide.utils.atomic import atomic_write


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    os.umask(before)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_new_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_write(target) as temporary:
        assert temporary.name == target.name
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_folders_are_made_and_strings_taken(tmp_path: Path) -> None:
    with atomic_write(str(tmp_path / "deep" / "er" / "a")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "deep" / "er" / "a").read_text() == "new"


def test_old_content_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")
    with pytest.raises(error, match="stop"), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error("stop")
    assert names(tmp_path) == (["a.txt"] if existing else [])
    if existing:
        assert target.read_text() == "old"


@pytest.mark.parametrize("existing", [True, False])
def test_writer_that_removes_the_temporary_fails_and_keeps_the_old(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(target) as temporary:
        temporary.unlink()
    assert names(tmp_path) == (["a.txt"] if existing else [])


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_mode_follows_the_umask(tmp_path: Path, umask: None, mask: int) -> None:
    os.umask(mask)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    (tmp_path / "plain.txt").write_text("as open() makes it")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "plain.txt")]
    assert modes == [0o666 & ~mask] * 2
    assert os.umask(mask) == mask


def test_two_writers_at_once_do_not_share_a_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_write(target) as first, atomic_write(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


# Writers in separate processes. They load only this module, since importing the package takes seconds.
WRITER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
with atomic.atomic_write(sys.argv[2]) as temporary:
    temporary.write_text("half")
    (temporary.parent / "of the writer").write_text("safetensors and others write files of their own first")
    print("writing", flush=True)
    sys.stdin.readline()
    temporary.write_text("whole")
"""


@contextmanager
def writer(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that pauses while writing ``target``, and continues after a line of input."""
    command = [sys.executable, "-c", WRITER, str(atomic.__file__), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process
        process.communicate("go on\n", timeout=60)


def save(target: Path, text: str = "new") -> None:
    with atomic_write(target) as temporary:
        temporary.write_text(text)


posix = pytest.mark.skipif(os.name != "posix", reason="locks, signals and modes of POSIX")


@posix
def test_what_killed_writers_left_is_swept_at_the_next_save_of_the_same_file(tmp_path: Path) -> None:
    target, other = tmp_path / "a.txt", tmp_path / "b.txt"
    target.write_text("old")
    for path in (target, target, other):
        with writer(path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    assert target.read_text() == "old"
    assert [name[:3] for name in names(tmp_path)] == [".a.", ".b.", "a.t"], (
        "the second writer removed what the first left"
    )
    (tmp_path / ".a.notes").write_text("a file of the user")
    save(target)
    assert target.read_text() == "new"
    assert [name[:3] for name in names(tmp_path)] == [".a.", ".b.", "a.t"], "the other file's leftover stays"
    assert (tmp_path / ".a.notes").exists()
    save(other)
    assert names(tmp_path) == [".a.notes", "a.txt", "b.txt"]


@posix
def test_what_another_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with writer(target):
        save(target)
        assert target.read_text() == "new"
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["a.txt"]


@posix
def test_without_file_locks_only_old_leftovers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_lock", lambda file: None)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.txt") as temporary:
        left = [temporary.parent, temporary.parent.with_name(f"{temporary.parent.name}0")]
        raise RuntimeError
    for folder, age in zip(left, (60, 48 * 3600), strict=True):
        folder.mkdir()
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    save(tmp_path / "a.txt")
    assert names(tmp_path) == [left[0].name, "a.txt"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_mode_of_an_existing_file_is_kept(tmp_path: Path, umask: None, mode: int) -> None:
    os.umask(0o022)
    target = tmp_path / "a.safetensors"
    target.touch()
    target.chmod(mode)
    SourceGradient({"w": torch.ones(2)}).save(target)
    assert SourceGradient.load(target).names() == ["w"]
    assert stat.S_IMODE(target.stat().st_mode) == mode


@posix
def test_mode_of_a_new_source_file_follows_the_umask(tmp_path: Path, umask: None) -> None:
    os.umask(0o027)
    SourceGradient({"w": torch.ones(2)}).save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@posix
@pytest.mark.parametrize("existing", [True, False])
def test_symbolic_links_stay_and_the_file_behind_them_is_replaced(tmp_path: Path, existing: bool) -> None:
    real = tmp_path / "store" / "real.txt"
    links = tmp_path / "links"
    links.mkdir()
    if existing:
        real.parent.mkdir()
        real.write_text("old")
    (links / "second.txt").symlink_to("../store/real.txt")
    (links / "first.txt").symlink_to("second.txt")
    (tmp_path / "folder").symlink_to("links")
    save(tmp_path / "folder" / "first.txt")
    assert (links / "first.txt").is_symlink()
    assert (links / "second.txt").is_symlink()
    assert not real.is_symlink()
    assert real.read_text() == "new"
    assert names(links) == ["first.txt", "second.txt"]
    assert names(real.parent) == ["real.txt"]


@posix
def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="a") as caught:
        save(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert names(tmp_path) == ["a", "b"]


@posix
def test_what_is_no_regular_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name, error in (("folder", IsADirectoryError), ("pipe", OSError), ("file/below", NotADirectoryError)):
        with pytest.raises(error, match=name), atomic_write(tmp_path / name):
            pytest.fail("must not start to write")
    assert names(tmp_path) == ["file", "folder", "pipe"]


def test_long_names_are_written(tmp_path: Path) -> None:
    target = tmp_path / ("ö" * 120 + ".txt")
    save(target)
    assert names(tmp_path) == [target.name]


def as_history(path: Path) -> None:
    history = History()
    for step in range(1000):
        history.append({"grad_norm": float(step)})
    history.save(path)


def as_source(path: Path) -> None:
    SourceGradient({"w": torch.ones(4096)}).save(path)


@posix
@pytest.mark.parametrize(("write", "name"), [(as_history, "a.csv"), (as_history, "a.jsonl"), (as_source, "a")])
def test_a_full_disk_is_an_os_error_and_the_old_file_stays(tmp_path: Path, write: object, name: str) -> None:
    """The limit on file sizes simulates a full disk. Python ignores its signal."""
    import resource

    assert callable(write)
    target = tmp_path / name
    target.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OSError, match=r".") as caught:
            write(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert target.read_text() == "old"
    assert names(tmp_path) == [name]
