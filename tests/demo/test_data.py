from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from gradguide.demo.config import BUILT_IN, DemoError, OptionError
from gradguide.demo.data import Example, batches, draw, few_shot, read_file, read_transfer
from tests.demo.conftest import rows_of, write_tsv


def test_default_split_is_last_domain_against_others(data: Path) -> None:
    transfer = read_transfer(data)
    assert transfer.target.name == "west"
    assert transfer.target.labels == ("gull", "wave")
    assert transfer.source.labels == ("palm", "sand", "snow", "wolf")
    assert (len(transfer.source.train), len(transfer.source.test)) == (24, 12)
    assert transfer.split == "by domain"
    for task in (transfer.source, transfer.target):
        assert {e.label for e in task.train} == {e.label for e in task.test} == set(task.labels)
    assert {e.domain for e in transfer.target.train} == {"west"}


def test_chosen_domains(data: Path) -> None:
    transfer = read_transfer(data, target="north", sources=["west"])
    assert (transfer.target.name, transfer.source.name) == ("north", "west")
    assert transfer.source.labels == ("gull", "wave")


def test_source_domains_are_sorted_and_counted_once(data: Path) -> None:
    assert read_transfer(data, sources=["south", "north", "south"]).source.name == "north, south"


def test_one_domain_is_not_enough(tmp_path: Path) -> None:
    for name in ("train.tsv", "test.tsv"):
        write_tsv(tmp_path / name, [("x", "a", "only"), ("y", "b", "only")])
    with pytest.raises(DemoError, match="at least two domains, for source and target, found only 'only'"):
        read_transfer(tmp_path)


def test_a_task_needs_two_labels(data: Path) -> None:
    write_tsv(data / "train.tsv", [row for row in rows_of(2) if row[1] != "gull"])
    with pytest.raises(DemoError, match="west: a task needs at least two labels, found wave"):
        read_transfer(data)


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
    assert (
        {e.label for e in transfer.source.train} == {e.label for e in transfer.source.test} == {"gull", "palm", "sand"}
    )
    with pytest.raises(DemoError, match="--target needs a domain column, which the data do not have; found 'west'"):
        read_transfer(data, target="west")


def test_without_domains_four_labels_are_needed(data: Path) -> None:
    for name in ("train.tsv", "test.tsv"):
        write_tsv(data / name, [("x", "one"), ("y", "two")], header=("text", "label"))
    with pytest.raises(DemoError, match="needs at least 4, found one, two"):
        read_transfer(data)


def test_quotes_are_plain_characters(tmp_path: Path) -> None:
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


def test_an_unknown_domain_is_refused_with_the_known_ones(data: Path) -> None:
    with pytest.raises(DemoError, match="--target must be one of north, south, west; found 'east'"):
        read_transfer(data, target="east")
    with pytest.raises(DemoError, match=r"--source must be one of .*; found 'east'"):
        read_transfer(data, sources=["north", "east"])
    with pytest.raises(DemoError, match="--source must not contain the target domain, found 'west'"):
        read_transfer(data, sources=["west"])


def test_test_labels_must_occur_in_training(data: Path) -> None:
    write_tsv(data / "test.tsv", [*rows_of(1), ("new", "orca", "west")])
    with pytest.raises(DemoError, match=r"west: test.tsv has labels that are not in train.tsv: orca"):
        read_transfer(data)


def test_task_without_test_rows(data: Path) -> None:
    write_tsv(data / "test.tsv", [row for row in rows_of(1) if row[2] != "west"])
    with pytest.raises(DemoError, match=r"west: test.tsv has no rows for this task"):
        read_transfer(data)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="--data must be a folder"):
        read_transfer(tmp_path / "nothing")


def test_built_in_texts() -> None:
    transfer = read_transfer(BUILT_IN)
    assert (len(transfer.source.labels), len(transfer.target.labels)) == (20, 4)
    texts = [e.text for task in (transfer.source, transfer.target) for e in (*task.train, *task.test)]
    assert len(set(texts)) == len(texts) == 480


def test_few_shot_takes_k_of_each_label_by_seed(data: Path) -> None:
    task = read_transfer(data).target
    sample = few_shot(task, 4, seed=1)
    assert Counter(example.label for example in sample) == {"gull": 4, "wave": 4}
    assert len(set(sample)) == 8
    assert sample == few_shot(task, 4, seed=1)
    assert sample != few_shot(task, 4, seed=2)


def test_few_shot_needs_k_rows(data: Path) -> None:
    with pytest.raises(OptionError, match="--shots must be at most 6, the number of rows of 'gull'; found 7"):
        few_shot(read_transfer(data).target, 7, seed=0)


def test_draw_of_a_label_does_not_depend_on_others() -> None:
    a, b = ([Example(f"{label}{i}", label, None) for i in range(20)] for label in "ab")
    assert draw(a, 5, 0) == draw([*b, *a], 5, 0)[:5]
    assert len(draw(a, 50, 0)) == 20


def test_batches_cover_every_row_in_each_pass() -> None:
    stream = [row for batch in islice(batches(6, 4, seed=0), 9) for row in batch]
    assert [sorted(stream[i : i + 6]) for i in range(0, 36, 6)] == [list(range(6))] * 6
    assert stream == [row for batch in islice(batches(6, 4, seed=0), 9) for row in batch]
    assert sorted(next(batches(3, 16, seed=0))) == [0, 1, 2]
