"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradguide.atomic import replacing


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
    with replacing(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_folders_are_made_and_strings_taken(tmp_path: Path) -> None:
    with replacing(str(tmp_path / "deep" / "er" / "a")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "deep" / "er" / "a").read_text() == "new"


def test_old_content_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as temporary:
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
    with pytest.raises(error, match="stop"), replacing(target) as temporary:
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
    with pytest.raises(FileNotFoundError), replacing(target) as temporary:
        temporary.unlink()
    assert names(tmp_path) == (["a.txt"] if existing else [])


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_mode_follows_the_umask(tmp_path: Path, umask: None, mask: int) -> None:
    os.umask(mask)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    (tmp_path / "plain.txt").write_text("as open() makes it")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "plain.txt")]
    assert modes == [0o666 & ~mask] * 2
    assert os.umask(mask) == mask


def test_two_writers_at_once_do_not_share_a_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]
