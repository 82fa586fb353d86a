"""Every row of the contract has a test named after it, and every such test has a row."""

from __future__ import annotations

import re
from pathlib import Path

CONTRACT = Path(__file__).parent / "README.md"


def test_rows_and_tests_agree() -> None:
    rows = set(re.findall(r"^\| i(\d\d) \|", CONTRACT.read_text(encoding="utf-8"), flags=re.MULTILINE))
    texts = [path.read_text(encoding="utf-8") for path in CONTRACT.parents[1].rglob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"def (test(?:_i\d\d)+)_", text)]
    tested = {row for name in names for row in re.findall(r"_i(\d\d)", name)}
    assert len(rows) == 36
    assert rows - tested == set()
    assert tested - rows == set()
