"""The READMEs agree with the committed results, the files and the library."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import gradguide
from benchmarks.blocks import BLOCKS
from benchmarks.readme import FILES, blocks_in, fill, main

README = FILES[0]
TEXT = README.read_text(encoding="utf-8")
BLOCK = "before\n<!-- one: how -->\nold\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("path", FILES, ids=["main", "benchmarks"])
def test_tables_are_made_from_the_committed_results(path: Path) -> None:
    assert main(["--check"], [path]) == 0


def test_every_table_that_can_be_made_is_in_a_readme() -> None:
    assert set(BLOCKS) <= {name for path in FILES for name in blocks_in(path.read_text(encoding="utf-8"))}


def test_a_table_is_filled_and_the_text_around_it_stays() -> None:
    assert fill(BLOCK, {"one": lambda: "new\nrow", "unused": lambda: ""}) == BLOCK.replace("old", "new\nrow")


def test_tables_are_filled_and_checked_in_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "README.md", tmp_path / "other.md"
    for path in (first, second):
        path.write_text(BLOCK.replace("one", "peers"), encoding="utf-8")
    assert main(["--check"], [first, second]) == 1
    assert main([], [first, second]) == 0
    assert (
        first.read_text(encoding="utf-8") == f"before\n<!-- peers: how -->\n{BLOCKS['peers']()}\n<!-- end -->\nafter\n"
    )
    assert main(["--check"], [first, second]) == 0
    capsys.readouterr()
    second.write_text(second.read_text(encoding="utf-8").replace("1.00", "1.01", 1), encoding="utf-8")
    assert main(["--check"], [first, second]) == 1
    assert capsys.readouterr().err.startswith(f"{second}: a table differs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLOCK, "found one"),
        (BLOCK.replace("<!-- end -->\n", ""), "without the other"),
        (BLOCK + "<!-- end -->\n", "without the other"),
        (BLOCK.replace("old\n", "<!-- peers: how -->\n"), "without the other"),
    ],
    ids=["unknown", "not closed", "not opened", "nested"],
)
def test_a_block_that_cannot_be_made_fails_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    for arguments in (["--check"], []):
        assert main(arguments, [path]) == 1
        assert message in capsys.readouterr().err
        assert path.read_text(encoding="utf-8") == text


def _api() -> list[str]:
    """The code in the first column of the API table."""
    table = TEXT.split("## API")[1].split("\n\n")[1]
    return [code for cell in re.findall(r"^\|([^|]*)\|", table, flags=re.MULTILINE) for code in cell.split("`")[1::2]]


def test_every_public_name_is_in_the_api_table() -> None:
    assert set(gradguide.__all__) - {word for code in _api() for word in re.findall(r"\w+", code)} == set()


def test_every_keyword_of_the_api_table_is_an_argument() -> None:
    checked = set()
    for code in _api():
        name, keywords = code.partition("(")[0], set(re.findall(r"(\w+)=", code))
        if name in gradguide.__all__ and keywords:
            assert keywords - set(inspect.signature(getattr(gradguide, name)).parameters) == set(), name
            checked.add(name)
    assert checked >= {"GradGuide", "Direction", "Alignment", "Magnitude"}


@pytest.mark.parametrize("path", FILES, ids=["main", "benchmarks"])
def test_every_file_that_is_shown_or_linked_exists(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_every_benchmark_that_is_named_can_be_run() -> None:
    names = set(re.findall(r"python -m (benchmarks[\w.]*)", FILES[1].read_text(encoding="utf-8")))
    files = {name: README.parent / name.replace(".", "/") for name in names}
    assert len(names) > 8
    assert [n for n, f in files.items() if not (f.with_suffix(".py").is_file() or (f / "__main__.py").is_file())] == []


def test_the_python_in_it_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_support_matrix_names_tests_that_exist() -> None:
    contract = (Path(__file__).parent / "contract" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]*)\|$", contract.split("## What it works with")[1], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(named) > 20
    assert {name for name in named if not any(f"def {name}(" in text for text in texts)} == set()


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 250
