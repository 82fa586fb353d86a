"""Every row of the integration contract has a test that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

ROWS = range(1, 28)


def test_each_row_has_a_test() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"def (test(?:_i\d\d)+)_", text)]
    found = {int(row) for name in names for row in re.findall(r"_i(\d\d)", name)}
    assert set(ROWS) - found == set()
