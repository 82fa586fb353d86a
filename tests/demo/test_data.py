from __future__ import annotations

from pathlib import Path

import pytest

from gradguide.demo.data import BUILT_IN, read_file, read_transfer
from gradguide.demo.errors import DemoError
from tests.demo.conftest import rows_of, write_tsv


def test_default_split_is_last_domain_against_others(data: Path) -> None:
    transfer = read_transfer(data)
    assert transfer.target.name == "west"
    assert transfer.target.labels == ("gull", "wave")
    assert transfer.source.labels == ("palm", "sand", "snow", "wolf")
    assert (len(transfer.source.train), len(transfer.source.test)) == (24, 12)
    assert transfer.split == "by domain"


def test_chosen_domains(data: Path) -> None:
    transfer = read_transfer(data, target="north", sources=["west"])
    assert (transfer.target.name, transfer.source.name) == ("north", "west")


def test_default_sources_are_the_first_five(tmp_path: Path) -> None:
    rows = [(f"text {d}{label}", f"{d}{label}", d) for d in "abcdefgh" for label in "xy"]
    write_tsv(tmp_path / "train.tsv", rows)
    write_tsv(tmp_path / "test.tsv", rows)
    assert read_transfer(tmp_path).source.name == "a, b, c, d, e"
    assert read_transfer(tmp_path, target="b").source.name == "a, c, d, e, f"


def test_without_domains_labels_are_split_in_half(data: Path) -> None:
    for name in ("train.tsv", "test.tsv"):
        write_tsv(data / name, [row[:2] for row in rows_of(3)], header=("text", "label"))
    transfer = read_transfer(data)
    assert transfer.source.labels == ("gull", "palm", "sand")
    assert transfer.target.labels == ("snow", "wave", "wolf")
    assert "halves" in transfer.split
    with pytest.raises(DemoError, match="--target needs a column domain, which the data lack; found 'west'"):
        read_transfer(data, target="west")


def test_without_domains_four_labels_are_needed(data: Path) -> None:
    for name in ("train.tsv", "test.tsv"):
        write_tsv(data / name, [("x", "one"), ("y", "two")], header=("text", "label"))
    with pytest.raises(DemoError, match="needs at least 4, found one, two"):
        read_transfer(data)


def test_quotes_mean_nothing(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", [('"so she said', "a", "d")])
    assert read_file(tmp_path / "train.tsv")[0].text == '"so she said'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "found 0 lines"),
        ("text\tlabel\n", "found 1 lines"),
        ("text\tclass\nhi\tx\n", "no column 'label', found text, class"),
        ("text\tlabel\nhi\n", r"line 2: expected text, label, found \['hi'\]"),
        ("text\tlabel\tdomain\nhi\ta\td\nho\t\td\n", "line 3: expected text, label, domain"),
    ],
)
def test_bad_files(data: Path, content: str | None, message: str) -> None:
    path = data / "train.tsv"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(DemoError, match=message) as error:
        read_transfer(data)
    assert "train.tsv" in str(error.value)


def test_not_utf8(data: Path) -> None:
    (data / "test.tsv").write_bytes(b"text\tlabel\n\xff\xfe\tx\n")
    with pytest.raises(DemoError, match=r"test\.tsv: cannot be read"):
        read_transfer(data)


def test_unknown_domain_lists_those_there_are(data: Path) -> None:
    with pytest.raises(DemoError, match="--target must be one of north, south, west; found 'east'"):
        read_transfer(data, target="east")
    with pytest.raises(DemoError, match=r"--source must be one of .*; found 'east'"):
        read_transfer(data, sources=["north", "east"])
    with pytest.raises(DemoError, match="--source must not name the target domain, found 'west'"):
        read_transfer(data, sources=["west"])


def test_labels_that_training_lacks(data: Path) -> None:
    write_tsv(data / "test.tsv", [*rows_of(1), ("new", "orca", "west")])
    with pytest.raises(DemoError, match=r"west: test.tsv has labels that train.tsv lacks: orca"):
        read_transfer(data)


def test_task_without_test_rows(data: Path) -> None:
    write_tsv(data / "test.tsv", [row for row in rows_of(1) if row[2] != "west"])
    with pytest.raises(DemoError, match=r"west: test.tsv has no rows of it"):
        read_transfer(data)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="--data must be a folder"):
        read_transfer(tmp_path / "nothing")


def test_built_in_texts() -> None:
    transfer = read_transfer(BUILT_IN)
    assert (len(transfer.source.labels), len(transfer.target.labels)) == (20, 4)
    texts = [e.text for task in (transfer.source, transfer.target) for e in (*task.train, *task.test)]
    assert len(set(texts)) == len(texts) == 480
