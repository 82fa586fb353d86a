"""What the README says is what the committed results and the library say."""

from __future__ import annotations

import re
from pathlib import Path

import gradguide
from benchmarks.readme import README, main

TEXT = README.read_text(encoding="utf-8")


def test_tables_are_made_from_the_committed_results() -> None:
    assert main(["--check"]) == 0


def test_every_public_name_is_there() -> None:
    for name in gradguide.__all__:
        assert f"{name}" in TEXT, name


def test_every_file_that_it_shows_exists() -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert shown
    for path in shown:
        assert (Path(README).parent / path).is_file(), path


def test_the_python_in_it_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_support_matrix_names_tests_that_exist() -> None:
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]*)\|$", TEXT.split("## What it works with")[1], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(named) > 20
    assert {name for name in named if not any(f"def {name}(" in text for text in texts)} == set()
