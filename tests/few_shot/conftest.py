"""Small sets under the names of the real ones, and a tiny encoder that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.few_shot.digits import Digits
from tests.demo.conftest import WORDS, tiny_model, write_tsv
from tests.few_shot.known import results

__all__ = ["sets", "tiny_model"]

_WORDS = [word for labels in WORDS.values() for text in labels.values() for word in text.split()]


def _rows(domain: str, label: int, count: int, *, offset: int) -> list[tuple[str, str, str]]:
    """Rows that are all different, of words that differ between labels."""
    own = [_WORDS[(3 * label + i) % len(_WORDS)] for i in range(3)]
    return [
        (" ".join([*own, *["the"] * (number % 5), *["a"] * (number // 5 + offset)]), f"label_{label}", domain)
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clinc150 with seven domains of two labels, and hwu64, banking77, goemotions, mr without domains."""
    root = tmp_path_factory.mktemp("sets")
    for name, domains, labels in (
        ("clinc150", 7, 2), ("hwu64", 1, 4), ("banking77", 1, 17), ("goemotions", 1, 3), ("mr", 1, 2),
    ):  # fmt: skip
        folder = root / name
        folder.mkdir()
        numbered = [(f"domain{d}", d * labels + k) for d in range(domains) for k in range(labels)]
        for file, count, offset in (("train.tsv", 20, 0), ("test.tsv", 6, 10)):
            rows = [row for domain, label in numbered for row in _rows(domain, label, count, offset=offset)]
            if name == "clinc150":
                write_tsv(folder / file, rows)
            else:
                write_tsv(folder / file, [row[:2] for row in rows], header=("text", "label"))
    return root


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The digits network, trained on its source."""
    return Digits()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of results whose statistics are known."""
    path = tmp_path / "few_shot.csv"
    results().to_csv(path, index=False)
    return path
